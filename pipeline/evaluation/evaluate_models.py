"""Evaluation of the seeds, the bag and the shortcut baselines on the validation set."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.core.config import BAG, Config, Method
from pipeline.core.errors import UserError
from pipeline.core.files import read_csv, read_json, write_csv, write_json
from pipeline.evaluation import (
    acquisition,
    curves,
    decision_curve,
    ensemble,
    forecast,
    metric_tables,
    operating_point,
    referral,
    selection,
    slices,
    source_probe,
)
from pipeline.evaluation.cross_fitted_predictor import (
    CrossFittedPredictor,
    fair_threshold_comparison,
    operating_point_table,
    with_fitted_threshold,
)
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.evaluation.expected_accuracy import ExpectedAccuracy
from pipeline.evaluation.metric_tables import Predictions, ValidationSet
from pipeline.evaluation.metrics import DEFAULT_THRESHOLD, Scores, best_model, score_predictions
from pipeline.evaluation.prevalence import PrevalenceEstimate, estimate_prevalence

HEADLINE_METRICS = ["f1", "recall", "specificity", "auroc", "calibration_error"]  # in the summary
SELECTION_RESAMPLES = 1000  # at most, for the bias of selection; more take longer and change its third decimal


@dataclass(frozen=True)
class Evaluation:
    """Tables by the path of their file, and scalar metrics of the best seed and the bag."""

    tables: dict[str, pd.DataFrame]
    summary: dict[str, Any]


@dataclass(frozen=True)
class EpochPredictions:
    """P(positive) of the validation images, (S, E, N), and the fold that validates each of them, (N,).

    Seeds are in the order of `Config.model_names`. NaN after the last epoch of a seed in a fold.
    """

    probabilities: np.ndarray
    folds: np.ndarray


def write_ensembles(config: Config, groups: pd.Series) -> dict[str, Scores]:
    """Fit the ensembles by every method, and write their predictions, scores and curves.

    The files are `metrics/candidates.json`, `metrics/bag.json`, `predictions/bag.csv`, and `plots/roc.csv` and
    `precision_recall.csv`.

    Args:
        config: contains the rules that choose thresholds and combine models.
        groups: the name of each image's group, indexed by file.

    Returns:
        The apparent scores of every seed, then those of the ensembles by vote, mean and `bag.method`, by name.
    """
    params = config.active.bag
    predictions = _read_predictions()
    validation = predictions["validation"]
    labels, group_names = validation["label"].to_numpy(), groups.loc[validation["file"]].to_numpy()

    def fit(members: list[str], method: Method) -> EnsembleConfig:
        return ensemble.fit_ensemble(
            labels, validation[members], group_names, method, params.tie, config.active.evaluate
        )

    ensembles = {method: fit(config.bag_members, method) for method in ensemble.METHODS}
    bag = ensembles[params.method]
    candidates = {**{seed: fit([seed], "mean") for seed in config.model_names}, BAG: bag}
    configs = {name: asdict(candidate) for name, candidate in candidates.items()}
    write_json(ensemble.CANDIDATES, {**configs, ensemble.WEIGHTS: ensemble.read_weights_hashes(config.model_names)})

    combined = {}
    for subset, table in predictions.items():
        columns = ensemble.combine(table, bag)
        columns["greedy"] = ensemble.combine(table, ensembles["greedy"])["greedy"]
        predicted = ensemble.predict(table, bag).rename(columns={"label": "predicted"})
        combined[subset] = pd.concat([table.filter(["file", "label"]), columns, predicted], axis="columns")
    write_csv(Path("predictions/bag.csv"), pd.concat(combined, names=["subset"]).reset_index("subset"))

    predictions_by_method = {method: ensemble.predict(validation, fitted) for method, fitted in ensembles.items()}
    scores = {
        method: score_predictions(labels, table["score"].to_numpy(), table["label"].to_numpy())
        for method, table in predictions_by_method.items()
    }
    write_json(Path("metrics/bag.json"), scores)
    _write_curves(labels, validation[config.model_names], predictions_by_method[params.method])
    methods = dict.fromkeys(["vote", "mean", params.method])
    return {**read_json(Path("metrics/evaluate.json")), **{f"bag ({method})": scores[method] for method in methods}}


def write_evaluation(config: Config, metadata: pd.DataFrame) -> Evaluation:
    """Write the tables of `evaluate_models`, `metrics/summary.json` and `metrics/headline.json`, and return them."""
    predictions = _read_predictions()
    epochs = load_epoch_predictions(config.model_names, predictions["validation"]["file"], Path("models"))
    evaluation = evaluate_models(config, predictions, epochs, metadata, Path("predictions"), Path("metrics"))
    for path, table in evaluation.tables.items():
        write_csv(Path(path), table)
    write_json(Path("metrics/summary.json"), evaluation.summary)
    write_json(Path("metrics/headline.json"), headline_metrics(evaluation))
    return evaluation


def load_epoch_predictions(names: Sequence[str], files: pd.Series, models_folder: Path) -> EpochPredictions:
    """Read the predictions after every epoch, as the train stage wrote them, in the order of `files`.

    Args:
        names: of the models.
        files: (N,), the validation images.
        models_folder: with a folder per model.

    Raises:
        UserError: a model was validated on other images than `files`, or in other folds than the first model.
    """
    tables = []
    for name in names:
        path = models_folder / name / "validation.csv"
        table = read_csv(path).set_index("file")
        if len(table) != len(files) or set(table.index) != set(files):
            raise UserError(f"{path}: other images than in predictions/validation.csv; run: dvc repro")
        tables.append(table.loc[files])
        if not tables[0]["fold"].equals(tables[-1]["fold"]):
            raise UserError(f"{path}: other folds than in models/{names[0]}/validation.csv; run: dvc repro")
    epochs = [table.drop(columns="fold").to_numpy(float).T for table in tables]
    probabilities = np.full((len(names), max(map(len, epochs)), len(files)), np.nan)
    for seed, values in enumerate(epochs):
        probabilities[seed, : len(values)] = values
    return EpochPredictions(probabilities, tables[0]["fold"].to_numpy())


def evaluate_models(
    config: Config,
    predictions: Mapping[str, pd.DataFrame],
    epochs: EpochPredictions,
    metadata: pd.DataFrame,
    predictions_folder: Path,
    metrics_folder: Path,
) -> Evaluation:
    """Evaluate all models on the validation set, and estimate what they do on the test set, without its labels.

    Args:
        config: contains the rules that choose thresholds and combine models.
        predictions: `validation` and `test`, with a column of P(positive) per seed, from the evaluate stage.
        epochs: of the same validation images.
        metadata: a row per image of the pack, from `manifest.read_split`, indexed by file.
        predictions_folder: with `soup.csv`, `shortcuts.csv`, and the features of the images.
        metrics_folder: with `evaluate.json` and `shortcuts.json`.
    """
    table, test = predictions["validation"], predictions["test"]
    metadata = metadata.assign(acquisition=acquisition.load_clusters(predictions_folder))
    on_validation, labels = metadata.loc[table["file"]], table["label"].to_numpy()
    validation = ValidationSet(labels, on_validation["group"].to_numpy(), config.active.evaluate.resamples)
    best, bag = best_model(read_json(metrics_folder / "evaluate.json")), f"bag ({config.active.bag.method})"
    roles = {"bag": bag, "best": best}
    predictors = fit_predictors(config, validation, table, predictions_folder / "soup.csv")
    bias = estimate_bias(config, validation, epochs, best, bag)
    # Where an epoch was chosen on these images, all predictions for them are apparent, else those of the best seed.
    is_selected = predictors if _selects_epochs(config, epochs) else bias.index
    models = {
        name: predictor.predictions.as_apparent() if name in is_selected else predictor.predictions
        for name, predictor in predictors.items()
    }
    if reason := _soup_unavailable_reason(config):
        models["bag (soup)"] = metric_tables.unavailable_predictions(reason)
    baselines, baseline_samples = load_baselines(
        config, validation, predictions_folder / "shortcuts.csv", metrics_folder / "shortcuts.json"
    )
    models |= baselines

    tables = build_tables(config, validation, on_validation, predictors, models, roles, bias, baseline_samples)
    tables |= build_bag_tables(config, predictions, predictors[bag].ensemble_config)
    on_test, summary = metadata.loc[test["file"]], dict[str, Any]()
    test_groups = on_test["group"].to_numpy() if slices.all_patients_known(on_test) else None
    adapted = pd.DataFrame({"file": test["file"]})
    combined = {
        name: {
            subset: ensemble.predict(members, predictors[name].ensemble_config)
            for subset, members in predictions.items()
        }
        for name in roles.values()
    }
    for role, name in roles.items():
        scores, new_scores = (combined[name][subset]["score"].to_numpy() for subset in ("validation", "test"))
        prevalence = estimate_prevalence(labels, scores, validation.groups, new_scores, test_groups)
        adapted[role] = prevalence.probabilities
        summary[role] = summarize(name, predictors[name].ensemble_config, tables) | _summarize_prevalence(prevalence)
    tables["predictions/adapted.csv"] = adapted
    shift, accuracy = forecast.forecast_test_set(
        config, predictions, combined[bag], models[bag].predicted, metadata, test_groups, predictions_folder
    )
    tables |= {"metrics/shift.csv": shift, "metrics/strata.csv": accuracy.strata}
    summary["bag"] |= _summarize_accuracy(accuracy)
    probe = source_probe.probe_dataset(metadata, config.active.split.validation_folds[0], predictions_folder)
    tables["metrics/source_probe.csv"] = probe
    summary["bag"] |= _summarize_probe(probe)
    summary["best"] |= _summarize_accuracy(
        ExpectedAccuracy(reason="estimated for the bag only: the best seed was selected on the validation images")
    )
    summary["validation"] = slices.count_patients(validation)
    return Evaluation(tables, summary)


def estimate_bias(
    config: Config, validation: ValidationSet, epochs: EpochPredictions, best: str, bag: str
) -> pd.DataFrame:
    """Estimate what selection on the validation set adds to the metrics of the models that it affects.

    Args:
        config: contains the rules that choose epochs and thresholds and combine models.
        validation: the set, N images.
        epochs: predictions for these images after every epoch.
        best: the name of the best seed.
        bag: the name of the bag.

    Returns:
        The columns of `selection.estimate_selection_bias`, and a row for each model that is affected: the bag and all
        seeds if epochs were chosen; the best seed, of which the choice among the seeds is a part, if there are several.
    """
    seeds, params, members = config.model_names, config.active.evaluate, config.bag_members
    selects_epochs = _selects_epochs(config, epochs)
    if not selects_epochs and len(seeds) == 1:
        return pd.DataFrame(columns=selection.CORRECTED_RATES, dtype=float)
    labels, weights = validation.labels, [1 / len(members)] * len(members)
    method = config.active.bag.method if len(members) > 1 else "mean"
    bag_config = EnsembleConfig(members, method, config.active.bag.tie, weights, DEFAULT_THRESHOLD)

    def score_bag(of_members: np.ndarray, resamples: np.ndarray) -> np.ndarray:
        if method == "greedy":
            rows = [np.repeat(np.arange(len(labels)), counts) for counts in resamples.astype(int)]
            fitted = [
                ensemble.select_greedily(labels[row], values[row]) for row, values in zip(rows, of_members, strict=True)
            ]
            return np.asarray(np.einsum("rnm,rm->rn", of_members, np.array(fitted)))
        stacked = pd.DataFrame(of_members.reshape(-1, len(members)), columns=members)
        return ensemble.combine(stacked, bag_config)[method].to_numpy().reshape(resamples.shape)

    def choose_thresholds(scores: np.ndarray, resamples: np.ndarray) -> np.ndarray:
        if params.operating_point == "half":
            return np.full(len(scores), DEFAULT_THRESHOLD)
        chosen = [
            operating_point.choose_thresholds(labels, score, validation.groups, counts[None], params)
            for score, counts in zip(scores, resamples, strict=True)
        ]
        return np.concatenate(chosen)

    bias = selection.estimate_selection_bias(
        labels,
        epochs.folds,
        epochs.probabilities,
        config.active.train.keep,
        validation.weights[1 : 1 + SELECTION_RESAMPLES],
        [seeds.index(member) for member in members],
        score_bag,
        choose_thresholds,
    )
    bias = bias.rename(index=dict(enumerate(seeds)) | {BAG: bag})
    if len(seeds) > 1:
        bias.loc[best] = bias.loc[selection.BEST]
    return bias.loc[[bag, *seeds] if selects_epochs else [best]]


def fit_predictors(
    config: Config, validation: ValidationSet, table: pd.DataFrame, soup_file: Path
) -> dict[str, CrossFittedPredictor]:
    """Fit every seed, the bag by every method and, if available, the averaged weights; return them by name."""
    predictors = {seed: CrossFittedPredictor(config, validation, table[[seed]]) for seed in config.model_names}
    for method in ensemble.METHODS:
        predictors[f"bag ({method})"] = CrossFittedPredictor(config, validation, table[config.bag_members], method)
    if not _soup_unavailable_reason(config):
        soup = pd.read_csv(soup_file).query("subset == 'validation'").reset_index()
        predictors["bag (soup)"] = CrossFittedPredictor(config, validation, soup[["soup"]])
    return predictors


def load_baselines(
    config: Config, validation: ValidationSet, probabilities_file: Path, info_file: Path
) -> tuple[dict[str, Predictions], dict[str, pd.DataFrame]]:
    """Return the predictions of the shortcut baselines by name, at a threshold that is fitted as for models.

    The second dictionary has the metrics of those that are available, on every resample, at thresholds fitted again.
    """
    table, config = pd.read_csv(probabilities_file), with_fitted_threshold(config)
    predictions, samples = {}, {}
    for feature, info in read_json(info_file).items():
        name = f"shortcut ({feature})"
        if info["reason"]:
            predictions[name] = metric_tables.unavailable_predictions(info["reason"])
        else:
            predictor = CrossFittedPredictor(config, validation, table[[feature]])
            predictions[name], samples[name] = predictor.predictions, predictor.bootstrap_metrics(validation)
    return predictions, samples


def build_tables(
    config: Config,
    validation: ValidationSet,
    metadata: pd.DataFrame,
    predictors: Mapping[str, CrossFittedPredictor],
    models: Mapping[str, Predictions],
    roles: Mapping[str, str],
    bias: pd.DataFrame,
    baseline_samples: Mapping[str, pd.DataFrame],
) -> dict[str, pd.DataFrame]:
    """Build the tables of metrics on the validation set.

    Args:
        config: names the seeds.
        validation: the set.
        metadata: a row per validation image.
        predictors: by name.
        models: the predictions of these and of the shortcut baselines, by name.
        roles: names of the `bag` and the `best` seed.
        bias: from `estimate_bias`.
        baseline_samples: from `load_baselines`.
    """
    params, (best, bag) = config.active.evaluate, (roles["best"], roles["bag"])
    samples = {name: predictor.bootstrap_metrics(validation) for name, predictor in predictors.items()}
    refitted = samples if params.operating_point != "half" else {}
    baselines = {name: models[name] for name in baseline_samples}
    differences = [
        metric_tables.difference_table(
            validation, {name: models[name] for name in predictors}, refitted, [bag, best]
        ).assign(rule=params.operating_point),
        *(
            fair_threshold_comparison(config, validation, name, predictors[name].scores, baselines, baseline_samples)
            for name in dict.fromkeys([bag, best])
        ),
    ]
    candidates = [*config.model_names, bag]
    apparent = {name: predictors[name].apparent_predictions for name in bias.index}
    corrected = metric_tables.corrected_table(validation, apparent, bias, refitted)
    calibrations, reliability = metric_tables.calibration_table(
        validation, {name: predictors[name].scores for name in candidates}
    )
    by_prevalence = metric_tables.prevalence_table(
        validation,
        {name: predictors[name].apparent_predictions if name in bias.index else models[name] for name in candidates},
        bias,
        params.expected_prevalence,
    )
    confusion = pd.DataFrame({"actual": validation.labels, "predicted": models[bag].predicted.astype(int)})
    return {
        "metrics/intervals.csv": pd.concat(
            [metric_tables.interval_table(validation, models, {**refitted, **baseline_samples}), corrected]
        ),
        "metrics/differences.csv": pd.concat(differences),
        "metrics/ranks.csv": metric_tables.rank_table({name: samples[name] for name in candidates}),
        "metrics/seeds.csv": metric_tables.seed_table({seed: samples[seed] for seed in config.model_names}),
        "metrics/operating_points.csv": operating_point_table(validation, predictors, params),
        "metrics/calibration.csv": calibrations,
        "metrics/prevalence.csv": by_prevalence,
        "metrics/reliability.csv": reliability,
        "metrics/slices.csv": slices.slice_table(validation, metadata, {name: models[name] for name in (best, bag)}),
        "plots/bag_confusion.csv": confusion.replace({0: "negative", 1: "positive"}),
        "plots/bag_decision_curve.csv": decision_curve.decision_curve(
            validation.labels,
            predictors[bag].probabilities,
            [params.expected_prevalence] if params.expected_prevalence else [],
        ),
        "plots/bag_referral.csv": referral.referral_table(
            validation,
            models[bag],
            referral.threshold_uncertainty(predictors[bag].scores, predictors[bag].thresholds),
        ),
        "plots/bag_reliability.csv": reliability.query("model == @bag and calibration == 'none'"),
    }


def build_bag_tables(
    config: Config, predictions: Mapping[str, pd.DataFrame], bag: EnsembleConfig
) -> dict[str, pd.DataFrame]:
    """Build the tables of how the members differ, and of F1 by the number of members."""
    members, validation = config.bag_members, predictions["validation"]
    disagreements = pd.concat(
        {
            subset: ensemble.images_with_disagreement(table, ensemble.combine(table, bag), len(members))
            for subset, table in predictions.items()
        },
        names=["subset"],
    )
    return {
        "metrics/disagreement.csv": ensemble.pairwise_disagreement(validation[members], bag.threshold),
        "plots/bag_ensemble_size.csv": ensemble.metric_by_ensemble_size(
            validation["label"].to_numpy(), validation, bag
        ),
        "predictions/disagreements.csv": disagreements.reset_index("subset"),
    }


def summarize(name: str, ensemble_config: EnsembleConfig, tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Return the scalar metrics of one model, from the tables of `evaluate_models`.

    Metrics are the corrected ones, with the apparent ones beside them, where there are any; `estimate_type` is that of
    F1.
    """
    intervals = tables["metrics/intervals.csv"].query("model == @name")
    apparent, intervals = (
        intervals.drop_duplicates("metric", keep=keep).set_index("metric") for keep in ("first", "last")
    )
    calibrations = tables["metrics/calibration.csv"].query("model == @name").set_index("calibration")
    summary: dict[str, Any] = {
        "model": name,
        "estimate_type": intervals.loc["f1", "estimate_type"],
        "threshold": ensemble_config.threshold,
    }
    for metric in HEADLINE_METRICS:
        value, low, high = (_optional_float(intervals.loc[metric, column]) for column in ("value", "low", "high"))
        summary |= {metric: value, f"{metric}_low": low, f"{metric}_high": high}
        if intervals.loc[metric, "estimate_type"] == "corrected":
            summary[f"apparent_{metric}"] = _optional_float(apparent.loc[metric, "value"])
    summary["temperature"] = _optional_float(calibrations.loc["temperature", "temperature"])
    return summary


def headline_metrics(evaluation: Evaluation) -> dict[str, float | None]:
    """Return the metrics to compare experiments by: few, with short names, so that they fit a row of `dvc exp show`.

    `f1_mean` and `f1_sd` are over the seeds, `f1_best` is of the best seed, corrected for its selection, and the others
    are of the bag.
    """
    bag, best = evaluation.summary["bag"], evaluation.summary["best"]
    seeds = evaluation.tables["metrics/seeds.csv"].set_index("metric").loc["f1"]
    return {
        "f1": bag["f1"],
        "f1_mean": _optional_float(seeds["mean"]),
        "f1_sd": _optional_float(seeds["deviation"]),
        "f1_best": best["f1"],
        **{metric: bag[metric] for metric in ("recall", "specificity", "auroc")},
    }


def _summarize_prevalence(estimate: PrevalenceEstimate) -> dict[str, Any]:
    values = {"": estimate.prevalence, "_low": estimate.low, "_high": estimate.high}
    return {f"estimated_test_prevalence{end}": _optional_float(value) for end, value in values.items()} | {
        "test_prevalence_differs": estimate.differs
    }


def _summarize_accuracy(accuracy: ExpectedAccuracy) -> dict[str, Any]:
    values = {"": accuracy.value, "_low": accuracy.low, "_high": accuracy.high}
    return {f"expected_accuracy{end}": _optional_float(value) for end, value in values.items()} | {
        "expected_accuracy_method": accuracy.method,
        "expected_accuracy_reason": accuracy.reason,
    }


def _summarize_probe(probe: pd.DataFrame) -> dict[str, Any]:
    network, thumbnail = (probe.set_index("features").loc[name] for name in ("network", "thumbnail"))
    return {
        "first_member_source_probe_auroc": _optional_float(network["value"]),
        "first_member_source_probe_auroc_low": _optional_float(network["low"]),
        "first_member_source_probe_auroc_high": _optional_float(network["high"]),
        "thumbnail_source_probe_auroc": _optional_float(thumbnail["value"]),
    }


def _selects_epochs(config: Config, epochs: EpochPredictions) -> bool:
    return config.active.train.keep != "last" and epochs.probabilities.shape[1] > 1


def _read_predictions() -> dict[str, pd.DataFrame]:
    return {subset: read_csv(Path(f"predictions/{subset}.csv")) for subset in ("validation", "test")}


def _write_curves(labels: np.ndarray, seeds: pd.DataFrame, bag: pd.DataFrame) -> None:
    scores = seeds.assign(**{BAG: bag["score"]})
    for name, points in (("roc", curves.roc_points), ("precision_recall", curves.precision_recall_points)):
        tables = {model: points(labels, scores[model].to_numpy()) for model in scores}
        write_csv(Path(f"plots/{name}.csv"), pd.concat(tables, names=["model"]).reset_index("model"))


def _soup_unavailable_reason(config: Config) -> str:
    return ensemble.soup_unavailable_reason(
        config.active.weights.source, config.active.train.head_hidden, len(config.bag_members)
    )


def _optional_float(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)
