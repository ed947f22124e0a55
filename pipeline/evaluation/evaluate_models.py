"""Evaluation of the seeds, the bag and the shortcut baselines on the validation set."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.core.config import BAG, Config, Method
from pipeline.core.files import read_csv, read_json, write_csv, write_json
from pipeline.evaluation import curves, ensemble, metric_tables, prevalence
from pipeline.evaluation.calibration import fit_platt
from pipeline.evaluation.cross_fitting import cross_fit
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.evaluation.metric_tables import Predictions, ValidationSet
from pipeline.evaluation.metrics import Scores, best_model, compute_metrics, score_predictions
from pipeline.evaluation.prevalence import LabelShift

HEADLINE_METRICS = ["f1", "recall", "specificity", "auroc", "calibration_error"]  # in the summary


@dataclass(frozen=True)
class Evaluation:
    """Tables by the path of their file, and scalar metrics of the best seed and the bag."""

    tables: dict[str, pd.DataFrame]
    summary: dict[str, Any]


class CrossFittedPredictor:
    """A model or ensemble with thresholds and weights fitted on the validation set, and its predictions for that set.

    Attributes:
        ensemble_config: fitted on all validation images.
        predictions: cross-fitted if anything was fitted and the folds allow it; see `Predictions.estimate_type`.
        apparent_predictions: of `ensemble_config`, on the images that it was fitted on.
        probabilities: (N,), P(positive) of `predictions`; for a vote, the mean of the members.
    """

    def __init__(
        self, config: Config, validation: ValidationSet, members: pd.DataFrame, method: Method = "mean"
    ) -> None:
        params, tie = config.active.evaluate, config.active.bag.tie

        def fit(rows: np.ndarray) -> EnsembleConfig:
            return ensemble.fit_ensemble(validation.labels[rows], members.iloc[rows], method, tie, params)

        def predict(fitted: EnsembleConfig, rows: np.ndarray) -> np.ndarray:
            return ensemble.predict(members.iloc[rows], fitted).to_numpy(float)

        all_rows = np.arange(len(members))
        self.ensemble_config = fit(all_rows)
        apparent = predict(self.ensemble_config, all_rows)
        values, estimate_type = apparent, "fixed"
        if params.operating_point != "half" or (method == "greedy" and members.shape[1] > 1):
            cross_fitted = cross_fit(validation.folds, fit, predict)
            values, estimate_type = (apparent, "apparent") if cross_fitted is None else (cross_fitted, "cross-fitted")
        self.probabilities = values[:, 0]
        self.predictions = self._make_predictions(values, estimate_type)
        self.apparent_predictions = self._make_predictions(apparent, "apparent")

    def _make_predictions(self, values: np.ndarray, estimate_type: str) -> Predictions:
        probabilities, predicted = values.T
        return Predictions(predicted, None if self.ensemble_config.method == "vote" else probabilities, estimate_type)


def write_ensembles(config: Config) -> dict[str, Scores]:
    """Fit the ensembles by every method, and write their predictions, scores and curves.

    The files are `metrics/candidates.json`, `metrics/bag.json`, `predictions/bag.csv`, and `plots/bag_roc.csv`,
    `bag_precision_recall.csv` and `bag_confusion.csv`.

    Returns:
        The apparent scores of every seed, then those of the ensembles by vote, mean and `bag.method`, by name.
    """
    params = config.active.bag
    predictions = _read_predictions()
    validation = predictions["validation"]
    labels = validation["label"].to_numpy()

    def fit(members: list[str], method: Method) -> EnsembleConfig:
        return ensemble.fit_ensemble(labels, validation[members], method, params.tie, config.active.evaluate)

    ensembles = {method: fit(config.bag_members, method) for method in ensemble.METHODS}
    bag = ensembles[params.method]
    candidates = {**{seed: fit([seed], "mean") for seed in config.model_names}, BAG: bag}
    write_json(ensemble.CANDIDATES, {name: asdict(candidate) for name, candidate in candidates.items()})

    combined = {}
    for subset, table in predictions.items():
        columns = ensemble.combine(table, bag)
        columns["greedy"] = ensemble.combine(table, ensembles["greedy"])["greedy"]
        combined[subset] = pd.concat([table.filter(["file", "label"]), columns], axis="columns")
    write_csv(Path("predictions/bag.csv"), pd.concat(combined, names=["subset"]).reset_index("subset"))

    predicted = {method: ensemble.predict(validation, fitted) for method, fitted in ensembles.items()}
    scores = {
        method: score_predictions(labels, table["probability"].to_numpy(), table["label"].to_numpy())
        for method, table in predicted.items()
    }
    scores["vote"] |= {"loss": None, "auroc": None, "average_precision": None}
    write_json(Path("metrics/bag.json"), scores)
    _write_bag_curves(labels, predicted[params.method])
    methods = dict.fromkeys(["vote", "mean", params.method])
    return {**read_json(Path("metrics/evaluate.json")), **{f"bag ({method})": scores[method] for method in methods}}


def write_evaluation(config: Config, metadata: pd.DataFrame) -> None:
    """Write the tables of `evaluate_models` and `metrics/summary.json`."""
    evaluation = evaluate_models(config, _read_predictions(), metadata, Path("predictions"), Path("metrics"))
    for path, table in evaluation.tables.items():
        write_csv(Path(path), table)
    write_json(Path("metrics/summary.json"), evaluation.summary)


def evaluate_models(
    config: Config,
    predictions: Mapping[str, pd.DataFrame],
    metadata: pd.DataFrame,
    predictions_folder: Path,
    metrics_folder: Path,
) -> Evaluation:
    """Evaluate all models on the validation set, and estimate the prevalence of the test set.

    Args:
        config: contains the rules that choose thresholds and combine models.
        predictions: `validation` and `test`, with a column of P(positive) per seed, from the evaluate stage.
        metadata: a row per image, indexed by file, with `group`, `source`, `view`, `width` and `height`.
        predictions_folder: with `soup.csv` and `shortcuts.csv`.
        metrics_folder: with `evaluate.json` and `shortcuts.json`.
    """
    table, test = predictions["validation"], predictions["test"]
    metadata, labels = metadata.loc[table["file"]], table["label"].to_numpy()
    validation = ValidationSet(labels, metadata["group"].to_numpy(), config.active.evaluate.resamples)
    best, bag = best_model(read_json(metrics_folder / "evaluate.json")), f"bag ({config.active.bag.method})"
    roles = {"best": best, "bag": bag}
    predictors = fit_predictors(config, validation, table, predictions_folder / "soup.csv")
    models = {name: predictor.predictions for name, predictor in predictors.items()}
    if reason := _soup_unavailable_reason(config):
        models["bag (soup)"] = metric_tables.unavailable_predictions(reason)
    models |= load_baselines(predictions_folder / "shortcuts.csv", metrics_folder / "shortcuts.json")

    tables = build_tables(config, validation, metadata, predictors, models, roles)
    tables |= build_bag_tables(config, predictions, predictors[bag].ensemble_config)
    shifts = {
        role: estimate_label_shift(labels, table, test, predictors[name].ensemble_config)
        for role, name in roles.items()
    }
    tables["predictions/adapted.csv"] = pd.DataFrame(
        {"file": test["file"]} | {role: shift["probabilities"] for role, shift in shifts.items()}
    )
    summary = {
        role: summarize(name, predictors[name].ensemble_config, tables, config.active.evaluate.expected_prevalence)
        | {"estimated_test_prevalence": _optional_float(shifts[role]["prevalence"])}
        for role, name in roles.items()
    }
    return Evaluation(tables, summary)


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


def load_baselines(probabilities_file: Path, info_file: Path) -> dict[str, Predictions]:
    """Return the predictions of the shortcut baselines by name."""
    table, baselines = pd.read_csv(probabilities_file), {}
    for name, info in read_json(info_file).items():
        probabilities = table[name].to_numpy()
        baselines[f"shortcut ({name})"] = (
            metric_tables.unavailable_predictions(info["reason"])
            if info["reason"]
            else Predictions(probabilities >= info["threshold"], probabilities)
        )
    return baselines


def build_tables(
    config: Config,
    validation: ValidationSet,
    metadata: pd.DataFrame,
    predictors: Mapping[str, CrossFittedPredictor],
    models: Mapping[str, Predictions],
    roles: Mapping[str, str],
) -> dict[str, pd.DataFrame]:
    """Build the tables of metrics on the validation set.

    Args:
        config: names the seeds.
        validation: the set.
        metadata: a row per validation image.
        predictors: by name.
        models: the predictions of these and of the shortcut baselines, by name.
        roles: names of the `best` seed and the `bag`.
    """
    params, (best, bag) = config.active.evaluate, (roles["best"], roles["bag"])
    samples = {name: validation.bootstrap_metrics(model) for name, model in models.items()}
    candidates = [*config.model_names, bag]
    calibrations, reliability = metric_tables.calibration_table(
        validation, {name: predictors[name].probabilities for name in candidates}
    )
    by_prevalence = metric_tables.prevalence_table(
        validation, {name: samples[name] for name in candidates}, params.expected_prevalence
    )
    return {
        "metrics/intervals.csv": metric_tables.interval_table(validation, models, samples),
        "metrics/differences.csv": metric_tables.difference_table(samples, [bag, best]),
        "metrics/seeds.csv": metric_tables.seed_table({seed: samples[seed] for seed in config.model_names}),
        "metrics/operating_points.csv": _operating_point_table(validation.labels, predictors, params.operating_point),
        "metrics/calibration.csv": calibrations,
        "metrics/prevalence.csv": by_prevalence,
        "metrics/reliability.csv": reliability,
        "metrics/slices.csv": metric_tables.slice_table(
            validation, metadata, {name: models[name] for name in (best, bag)}, config.active.split.held_out_source
        ),
        "plots/bag_prevalence.csv": by_prevalence.query("model == @bag"),
        "plots/bag_reliability.csv": reliability.query("model == @bag and calibration == 'none'"),
    }


def build_bag_tables(
    config: Config, predictions: Mapping[str, pd.DataFrame], bag: EnsembleConfig
) -> dict[str, pd.DataFrame]:
    """Build the tables of how the members differ, and of F1 by the number of members."""
    members, validation = config.bag_members, predictions["validation"]
    disputed = {
        subset: ensemble.images_with_disagreement(table, ensemble.combine(table, bag), len(members))
        for subset, table in predictions.items()
    }
    return {
        "metrics/disagreement.csv": ensemble.pairwise_disagreement(validation[members], bag.thresholds),
        "plots/bag_growth.csv": ensemble.metric_by_ensemble_size(validation["label"].to_numpy(), validation, bag),
        "predictions/disputed.csv": pd.concat(disputed, names=["subset"]).reset_index("subset"),
    }


def estimate_label_shift(
    labels: np.ndarray, validation: pd.DataFrame, test: pd.DataFrame, ensemble_config: EnsembleConfig
) -> LabelShift:
    """Estimate the prevalence of the test set and adapt its predictions; NaN where they cannot be calibrated.

    Args:
        labels: (N,), of the validation images, 0 or 1.
        validation: a row per validation image, with a column of P(positive) per member.
        test: the same for the test images.
        ensemble_config: combines the members.
    """
    uncalibrated, on_test = (ensemble.predict(table, ensemble_config)["probability"] for table in (validation, test))
    recalibrate = fit_platt(labels, uncalibrated.to_numpy())
    if recalibrate is None or not len(test):
        return {"prevalence": np.nan, "probabilities": np.full(len(test), np.nan)}
    return prevalence.adapt_label_shift(recalibrate(on_test.to_numpy()), float(labels.mean()))


def summarize(
    name: str, ensemble_config: EnsembleConfig, tables: Mapping[str, pd.DataFrame], expected_prevalence: float | None
) -> dict[str, Any]:
    """Return the scalar metrics of one model, from the tables of `build_tables`."""
    intervals = tables["metrics/intervals.csv"].query("model == @name").set_index("metric")
    calibrations = tables["metrics/calibration.csv"].query("model == @name").set_index("calibration")
    by_prevalence = tables["metrics/prevalence.csv"].query("model == @name")
    expected = by_prevalence[by_prevalence["prevalence"] == expected_prevalence]
    summary: dict[str, Any] = {"model": name, "threshold": ensemble_config.threshold}
    for metric in HEADLINE_METRICS:
        value, low, high = (_optional_float(intervals.loc[metric, column]) for column in ("value", "low", "high"))
        summary |= {metric: value, f"{metric}_low": low, f"{metric}_high": high}
    summary["temperature"] = _optional_float(calibrations.loc["temperature", "temperature"])
    for column in ("accuracy", "accuracy_low", "accuracy_high", "ppv", "npv"):
        summary[f"expected_{column}"] = _optional_float(expected[column].iloc[0]) if len(expected) else None
    return summary


def _read_predictions() -> dict[str, pd.DataFrame]:
    return {subset: read_csv(Path(f"predictions/{subset}.csv")) for subset in ("validation", "test")}


def _write_bag_curves(labels: np.ndarray, bag: pd.DataFrame) -> None:
    probabilities = bag["probability"].to_numpy()
    write_csv(Path("plots/bag_roc.csv"), curves.roc_points(labels, probabilities))
    write_csv(Path("plots/bag_precision_recall.csv"), curves.precision_recall_points(labels, probabilities))
    confusion = pd.DataFrame({"actual": labels, "predicted": bag["label"]}).replace({0: "negative", 1: "positive"})
    write_csv(Path("plots/bag_confusion.csv"), confusion)


def _soup_unavailable_reason(config: Config) -> str:
    return ensemble.soup_unavailable_reason(
        config.active.weights.source, config.active.train.head_hidden, len(config.bag_members)
    )


def _operating_point_table(
    labels: np.ndarray, predictors: Mapping[str, CrossFittedPredictor], chosen_by: str
) -> pd.DataFrame:
    """Return the threshold of every predictor with its metrics, both cross-fitted and apparent where they differ."""
    rows = []
    for name, predictor in predictors.items():
        estimates = [predictor.predictions]
        if predictor.predictions.estimate_type == "cross-fitted":
            estimates.append(predictor.apparent_predictions)
        for estimate in estimates:
            row = {
                "model": name,
                "chosen_by": chosen_by,
                "threshold": predictor.ensemble_config.threshold,
                "estimate_type": estimate.estimate_type,
            }
            metrics = compute_metrics(labels, estimate.predicted, None, np.ones((1, len(labels)))).iloc[0]
            rows.append(row | metrics.to_dict())
    return pd.DataFrame(rows)


def _optional_float(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)
