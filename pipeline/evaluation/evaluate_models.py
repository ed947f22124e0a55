"""All that the validation set says of the models, the bag and what needs no radiology, as tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.core.config import Config, Method
from pipeline.core.files import read_json
from pipeline.evaluation import ensemble, metric_tables, prevalence
from pipeline.evaluation.calibration import fit_platt
from pipeline.evaluation.cross_fitting import cross_fit
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.evaluation.intervals import compute_metrics
from pipeline.evaluation.metric_tables import Predictions, ValidationSet
from pipeline.evaluation.metrics import best_model

HEADLINE_METRICS = ["f1", "recall", "specificity", "auroc", "calibration_error"]  # in the summary


@dataclass(frozen=True)
class Evaluation:
    """Tables by the path of their file, and the single numbers of the best model and the bag."""

    tables: dict[str, pd.DataFrame]
    summary: dict[str, Any]


def evaluate_models(
    config: Config, subsets: Mapping[str, pd.DataFrame], facts: pd.DataFrame, predictions: Path, metrics: Path
) -> Evaluation:
    """Measure everything on the validation set, and estimate the prevalence of the test set.

    Args:
        config: with the rules by which thresholds are chosen and models are combined.
        subsets: `validation` and `test` with P(positive) of every seed, as the evaluate stage leaves them.
        facts: a row per image, by its file, with `group`, `source`, `view`, `width` and `height`.
        predictions: the folder with `soup.csv` and `shortcuts.csv`.
        metrics: the folder with `evaluate.json` and `shortcuts.json`.
    """
    params, bag = config.active.evaluate, config.active.bag
    seeds, members = config.model_names, config.bag_members
    given, test = subsets["validation"], subsets["test"]
    facts, labels = facts.loc[given["file"]], given["label"].to_numpy()
    validation = ValidationSet(labels, facts["group"].to_numpy(), params.resamples)
    chosen, best = f"bag ({bag.method})", best_model(read_json(metrics / "evaluate.json"))

    judges: dict[str, CrossFittedPredictor] = {
        seed: CrossFittedPredictor(config, validation, given[[seed]]) for seed in seeds
    }
    judges |= {
        f"bag ({way})": CrossFittedPredictor(config, validation, given[members], way) for way in ensemble.METHODS
    }
    no_soup = ensemble.soup_unavailable_reason(
        config.active.weights.source, config.active.train.head_hidden, len(members)
    )
    if not no_soup:
        soup = pd.read_csv(predictions / "soup.csv").query("subset == 'validation'").reset_index()
        judges["bag (soup)"] = CrossFittedPredictor(config, validation, soup[["soup"]])
    voices = {name: judge.predictions for name, judge in judges.items()}
    if no_soup:
        voices["bag (soup)"] = metric_tables.unavailable(no_soup)
    shortcuts = pd.read_csv(predictions / "shortcuts.csv")
    for name, fact in read_json(metrics / "shortcuts.json").items():
        values = shortcuts[name].to_numpy()
        voices[f"shortcut ({name})"] = (
            metric_tables.unavailable(fact["reason"])
            if fact["reason"]
            else Predictions(values >= fact["threshold"], values)
        )
    samples = {name: validation.bootstrap_metrics(voice) for name, voice in voices.items()}
    models = {name: judges[name].probabilities for name in [*seeds, chosen]}
    rule = judges[chosen].rule
    combined = {subset: ensemble.combine(table, rule) for subset, table in subsets.items()}
    disputed = {name: ensemble.disagreements(table, combined[name], len(members)) for name, table in subsets.items()}
    calibrations, reliability = metric_tables.calibration_table(validation, models)
    shown = {name: samples[name] for name in [*seeds, chosen]}
    ahead = metric_tables.prevalence_table(validation, shown, params.expected_prevalence)
    roles, shifts = {"best": best, "bag": chosen}, {}
    for role, name in roles.items():
        old, new = (ensemble.predict(table, judges[name].rule)["probability"] for table in (given, test))
        shifts[role] = _shift(labels, old, new)
    intervals = metric_tables.interval_table(validation, voices, samples)
    tables = {
        "metrics/intervals.csv": intervals,
        "metrics/differences.csv": metric_tables.difference_table(samples, [chosen, best]),
        "metrics/seeds.csv": metric_tables.seed_table({seed: samples[seed] for seed in seeds}),
        "metrics/operating_points.csv": _operating_points(judges, labels, params.operating_point),
        "metrics/calibration.csv": calibrations,
        "metrics/prevalence.csv": ahead,
        "metrics/reliability.csv": reliability,
        "metrics/slices.csv": metric_tables.slice_table(
            validation, facts, {name: voices[name] for name in (best, chosen)}, config.active.split.held_out_source
        ),
        "metrics/disagreement.csv": ensemble.pairwise_disagreement(given[members], rule.thresholds),
        "plots/bag_growth.csv": ensemble.metric_by_ensemble_size(labels, given, rule),
        "plots/bag_prevalence.csv": ahead.query("model == @chosen"),
        "plots/bag_reliability.csv": reliability.query("model == @chosen and calibration == 'none'"),
        "predictions/disputed.csv": pd.concat(disputed, names=["subset"]).reset_index("subset"),
        "predictions/adapted.csv": pd.DataFrame(
            {"file": test["file"]} | {name: shift["probabilities"] for name, shift in shifts.items()}
        ),
    }
    summary = {
        role: _summary(name, judges[name].rule, intervals, calibrations, ahead, params.expected_prevalence)
        | {"estimated_test_prevalence": _number(shifts[role]["prevalence"])}
        for role, name in roles.items()
    }
    return Evaluation(tables, summary)


class CrossFittedPredictor:
    """One model or several with a rule, and what they say of the validation set where nothing flatters them."""

    def __init__(self, config: Config, validation: ValidationSet, given: pd.DataFrame, way: Method = "mean") -> None:
        params, tie = config.active.evaluate, config.active.bag.tie

        def fit(rows: np.ndarray) -> EnsembleConfig:
            return ensemble.fit_ensemble(validation.labels[rows], given.iloc[rows], way, tie, params)

        def answer(rule: EnsembleConfig, rows: np.ndarray) -> np.ndarray:
            return ensemble.predict(given.iloc[rows], rule).to_numpy(float)

        everything = np.arange(len(given))
        self.rule = fit(everything)
        self.apparent, estimate_type = answer(self.rule, everything), "fixed"
        honest = self.apparent
        if params.operating_point != "half" or (way == "greedy" and given.shape[1] > 1):
            fitted = cross_fit(validation.folds, fit, answer)
            honest, estimate_type = (honest, "apparent") if fitted is None else (fitted, "cross-fitted")
        self.probabilities = honest[:, 0]
        self.predictions = Predictions(
            honest[:, 1], None if self.rule.method == "vote" else self.probabilities, estimate_type
        )


def _operating_points(judges: Mapping[str, CrossFittedPredictor], labels: np.ndarray, chosen_by: str) -> pd.DataFrame:
    """Return the threshold of every judge, and its scores there on the images that chose it and cross-fitted."""
    rows = []
    for name, judge in judges.items():
        labeled = {judge.predictions.estimate_type: judge.predictions.predicted}
        if judge.predictions.estimate_type == "cross-fitted":
            labeled["apparent"] = judge.apparent[:, 1]
        for estimate_type, predicted in labeled.items():
            row = {
                "model": name,
                "chosen_by": chosen_by,
                "threshold": judge.rule.threshold,
                "estimate_type": estimate_type,
            }
            once = compute_metrics(labels, predicted, None, np.ones((1, len(labels)))).iloc[0]
            rows.append(row | once.to_dict())
    return pd.DataFrame(rows)


def _shift(labels: np.ndarray, validation: pd.Series, test: pd.Series) -> prevalence.LabelShift:
    """Adapt predictions of the test set; NaN where they cannot be calibrated."""
    calibrated = fit_platt(labels, validation.to_numpy())
    if calibrated is None or not len(test):
        return {"prevalence": np.nan, "probabilities": np.full(len(test), np.nan)}
    return prevalence.adapt_label_shift(calibrated(test.to_numpy()), float(labels.mean()))


def _summary(
    name: str, rule: EnsembleConfig, intervals: pd.DataFrame, calibrations: pd.DataFrame, ahead: pd.DataFrame,
    expected: float | None,
) -> dict[str, Any]:  # fmt: skip
    own = intervals[intervals["model"] == name].set_index("metric").reindex(HEADLINE_METRICS)
    found: dict[str, Any] = {"model": name, "threshold": rule.threshold}
    for metric in HEADLINE_METRICS:
        value, low, high = (_number(own.loc[metric, column]) for column in ("value", "low", "high"))
        found |= {metric: value, f"{metric}_low": low, f"{metric}_high": high}
    of_model = calibrations[calibrations["model"] == name].set_index("calibration")
    found["temperature"] = _number(of_model.loc["temperature", "temperature"])
    there = ahead[(ahead["model"] == name) & (ahead["prevalence"] == expected)]
    for column in ("accuracy", "accuracy_low", "accuracy_high", "ppv", "npv"):
        found[f"expected_{column}"] = _number(there[column].iloc[0]) if len(there) else None
    return found


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)
