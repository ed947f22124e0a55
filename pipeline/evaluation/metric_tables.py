"""Tables of metrics on the validation set: intervals, differences, calibration and prevalence."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation import calibration, prevalence, selection
from pipeline.evaluation.cross_fitting import cross_fit, grouped_folds
from pipeline.evaluation.intervals import (
    ONE_GROUP,
    bootstrap_weights,
    compare_predictions,
    confidence_intervals,
    percentile_interval,
)
from pipeline.evaluation.metrics import (
    CALIBRATION_METRICS,
    RANK_METRICS,
    SCORE_METRICS,
    THRESHOLD_METRICS,
    apply_threshold,
    compute_metrics,
)

COLUMNS = ["model", "estimate_type", "metric", "value", "low", "high", "method", "reason"]
RELIABILITY_COLUMNS = [
    "model", "calibration", "bin", "images", "groups", "positive_groups", "negative_groups", "positive_images",
    "probability", "positives", "low", "high",
]  # fmt: skip


@dataclass(frozen=True)
class Predictions:
    """Predicted labels (N,), 0 or 1, of a model, and P(positive) (N,), if it has one.

    `estimate_type` is `fixed` if nothing was fitted on the validation images, `cross-fitted` if threshold and members
    were fitted on other folds than the image's own, or `apparent` if they were fitted on the same images, which is
    optimistically biased. A model that is unavailable only has a `reason`.

    Recalibrated probabilities have another type than the labels and `scores` (N,), by which images are ranked, if their
    recalibration is all that was fitted: `probability_type` and `score_type` are given where they differ.
    """

    predicted: np.ndarray
    probabilities: np.ndarray | None
    estimate_type: str = "fixed"
    reason: str = ""
    scores: np.ndarray | None = None
    score_type: str = ""
    probability_type: str = ""

    def type_of(self, metric: str) -> str:
        """Return the estimate type of a metric."""
        if metric in RANK_METRICS:
            return self.score_type or self.estimate_type
        of_probabilities = metric in (*SCORE_METRICS, *CALIBRATION_METRICS)
        return (self.probability_type if of_probabilities else "") or self.estimate_type

    def as_apparent(self) -> "Predictions":
        """Return the same predictions as apparent ones."""
        return replace(self, estimate_type="apparent", score_type="apparent", probability_type="apparent")

    def subset(self, rows: np.ndarray) -> "Predictions":
        probabilities, scores = (
            None if values is None else values[rows] for values in (self.probabilities, self.scores)
        )
        return replace(self, predicted=self.predicted[rows], probabilities=probabilities, scores=scores)


def unavailable_predictions(reason: str) -> Predictions:
    return Predictions(np.empty(0), None, "", reason)


class ValidationSet:
    """Labels and groups (N,) of the validation images, their folds and bootstrap weights."""

    def __init__(self, labels: np.ndarray, groups: np.ndarray, resamples: int) -> None:
        self.labels, self.groups = np.asarray(labels, dtype=int), np.asarray(groups)
        self.resamples = resamples

    @cached_property
    def weights(self) -> np.ndarray:
        """From `bootstrap_weights`: (1 + resamples, N)."""
        return bootstrap_weights(self.groups, self.resamples)

    @cached_property
    def folds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return grouped_folds(self.labels, self.groups)

    def bootstrap_metrics(self, predictions: Predictions) -> pd.DataFrame:
        """Return the metrics on every resample, from `compute_metrics`; no rows if the model is unavailable."""
        if predictions.reason:
            return pd.DataFrame()
        return compute_metrics(
            self.labels, predictions.predicted, predictions.probabilities, self.weights, predictions.scores
        )

    def subset(self, rows: np.ndarray) -> "ValidationSet":
        return ValidationSet(self.labels[rows], self.groups[rows], self.resamples)


def interval_table(
    validation: ValidationSet, predictions: Mapping[str, Predictions], refitted: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """Return a row per model and metric: `model`, `estimate_type` and the columns of `confidence_intervals`.

    Args:
        validation: the set.
        predictions: by model.
        refitted: by model with a fitted threshold, from `CrossFittedPredictor.bootstrap_metrics`.
    """
    tables, metrics = [], [*THRESHOLD_METRICS, *SCORE_METRICS, *CALIBRATION_METRICS]
    for name, model in predictions.items():
        table = pd.DataFrame(columns=["metric", "reason"])
        if not model.reason:
            table = confidence_intervals(
                validation.labels, model.predicted, validation.groups, model.probabilities, model.scores
            )
            if name in refitted:
                table = include_threshold_variation(table, refitted[name])
        table = table.set_index("metric").reindex(metrics).rename_axis("metric").reset_index()
        table["reason"] = table["reason"].fillna(model.reason)
        types = [model.type_of(metric) for metric in metrics]
        tables.append(table.assign(model=name, estimate_type=types).reindex(columns=COLUMNS))
    return pd.concat(tables)


def include_threshold_variation(intervals: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """Extend the intervals of metrics at a fitted threshold to the percentiles over resamples that fit it again.

    Intervals for fixed predictions leave out that another sample would have given another threshold; percentiles are
    too narrow where hardly an image is on the wrong side of it. Their union covers (`bench/operating_point.py`).

    Args:
        intervals: from `confidence_intervals`.
        samples: metrics on every resample, from `CrossFittedPredictor.bootstrap_metrics`.
    """
    table = intervals.set_index("metric")
    for metric in table.index[table["low"].notna()].intersection(THRESHOLD_METRICS):
        low, high = percentile_interval(samples[metric])
        table.loc[metric, "low"] = np.fmin(table.loc[metric, "low"], low)
        table.loc[metric, "high"] = np.fmax(table.loc[metric, "high"], high)
        table.loc[metric, "method"] += ", threshold refitted"
    return table.reset_index()


def corrected_table(
    validation: ValidationSet,
    predictions: Mapping[str, Predictions],
    bias: pd.DataFrame,
    samples: Mapping[str, pd.DataFrame],
) -> pd.DataFrame:
    """Correct metrics for selection on the validation set.

    Sensitivity and specificity are corrected, and the other metrics of the confusion matrix follow from them, and so do
    their intervals. That of the AUROC is shifted.

    Args:
        validation: the set.
        predictions: the apparent ones, by model.
        bias: a row per model, from `selection.estimate_selection_bias`.
        samples: of the models whose threshold was fitted, from `CrossFittedPredictor.bootstrap_metrics`.

    Returns:
        The columns of `interval_table`; a row per model and metric, `THRESHOLD_METRICS` and `auroc`.
    """
    tables = [pd.DataFrame(columns=COLUMNS)]
    for name, model in predictions.items():
        rows = []
        apparent = interval_table(validation, {name: model}, {}).set_index("metric", drop=False)
        amount = pd.Series(bias.loc[name])
        rates = selection.correct_rates(validation.labels, model.predicted, validation.groups, amount)
        corrected = selection.corrected_metrics(validation.labels, *rates)
        for metric in [*THRESHOLD_METRICS, "auroc"]:
            row = apparent.loc[metric].to_dict() | {"estimate_type": "corrected"}
            if np.isnan(row["value"]):
                rows.append(row)
                continue
            if metric == "auroc":
                shifted = np.array([row[column] for column in ("value", "low", "high")]) - amount["auroc"]
                value, low, high = np.clip(shifted, 0, 1)
            else:
                value, low, high = corrected.loc[metric]
            row |= {"value": value, "low": low, "high": high}
            if np.isnan(low) and not row["reason"]:
                reason = ONE_GROUP if amount.isna().all() else "undefined in the resamples"
                row |= {"method": "", "reason": reason}
            rows.append(row)
        table = pd.DataFrame(rows, columns=COLUMNS)
        tables.append(include_threshold_variation(table, samples[name])[COLUMNS] if name in samples else table)
    return pd.concat(tables)


def rank_table(samples: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return `model` and the `probability` with which it has the highest F1 in a resample; ties are shared."""
    f1 = pd.DataFrame({name: sample["f1"] for name, sample in samples.items()})
    ranks = selection.rank_probabilities(f1.iloc[1:])
    return ranks.rename_axis("model").rename("probability").reset_index()


def difference_table(
    validation: ValidationSet,
    predictions: Mapping[str, Predictions],
    refitted: Mapping[str, pd.DataFrame],
    references: Iterable[str],
) -> pd.DataFrame:
    """Compare every model with each reference: `model`, `against` and the columns of `compare_predictions`.

    Args:
        validation: the set.
        predictions: by model.
        refitted: by model with a fitted threshold, from `CrossFittedPredictor.bootstrap_metrics`.
        references: names of models.
    """
    columns = ["model", "against", "metric", "difference", "low", "high", "probability", "reason"]
    tables = []
    for reference in dict.fromkeys(references):
        for name, model in predictions.items():
            if name == reference or model.reason:
                continue
            table = compare_predictions(validation.labels, validation.groups, model, predictions[reference])
            if name in refitted and reference in refitted:
                table = include_threshold_variation(table.assign(method=""), refitted[name] - refitted[reference])
            tables.append(table.assign(model=name, against=reference))
    return pd.concat(tables)[columns] if tables else pd.DataFrame(columns=columns)


def seed_table(samples: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Summarize each metric over the seeds: `metric`, `mean`, `deviation`, `lowest`, `highest`, `reason`."""
    values = pd.DataFrame({name: sample.iloc[0] for name, sample in samples.items()}).T
    table = pd.DataFrame(
        {"mean": values.mean(), "deviation": values.std(), "lowest": values.min(), "highest": values.max()}
    )
    reason = np.where(
        values.isna().all(), "undefined for every seed", np.where(values.count() < 2, "one seed only", "")
    )
    return table.assign(reason=reason).rename_axis("metric").reset_index()


def calibration_table(validation: ValidationSet, models: Mapping[str, np.ndarray]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Evaluate probabilities before and after recalibration, which is cross-fitted.

    Args:
        validation: the set.
        models: P(positive) (N,) by model.

    Returns:
        A row per model and `calibration` (`none`, `temperature`, `temperature and bias`) with the `temperature` and
        `bias` fitted on all images, `loss`, `brier`, `calibration_error`, and the `reason` where they are missing; and
        the reliability curves of all these, from `reliability_curve`.
    """
    fits: dict[str, calibration.RecalibratorFit | None] = {
        "none": None, "temperature": calibration.fit_temperature, "temperature and bias": calibration.fit_platt,
    }  # fmt: skip
    labels, rows, curves = validation.labels, [], []
    for name, probabilities in models.items():
        for kind, fit in fits.items():
            row: dict[str, Any] = {"model": name, "calibration": kind, "reason": ""}
            calibrated, fitted = (
                cross_fit_recalibration(validation, probabilities, fit) if fit else (probabilities, None)
            )
            if fit and fitted:
                row |= {"temperature": fitted.temperature, "bias": fitted.bias}
            elif fit:
                row["reason"] = "images of one class only, or higher probabilities do not mean more positives"
            if calibrated is None:
                row["reason"] = row["reason"] or "too few patients of a class to cross-fit"
            else:
                predicted = apply_threshold(calibrated)
                metrics = compute_metrics(labels, predicted, calibrated, validation.weights[:1]).iloc[0]
                row |= {metric: metrics[metric] for metric in ("loss", "brier", "calibration_error")}
                curve = calibration.reliability_curve(labels, calibrated, validation.groups)
                curves.append(curve.assign(model=name, calibration=kind))
            rows.append(row)
    columns = ["model", "calibration", "temperature", "bias", "loss", "brier", "calibration_error", "reason"]
    return pd.DataFrame(rows, columns=columns), pd.concat(curves)[RELIABILITY_COLUMNS]


def prevalence_table(
    validation: ValidationSet, predictions: Mapping[str, Predictions], bias: pd.DataFrame, expected: float | None
) -> pd.DataFrame:
    """Compute metrics of every model at `PREVALENCES` and at the expected prevalence.

    Args:
        validation: the set.
        predictions: by model; the apparent ones of a model that is corrected.
        bias: a row per model that is corrected for selection, from `selection.estimate_selection_bias`.
        expected: the prevalence, if known.

    Returns:
        A row per model and prevalence: `estimate_type`, and `accuracy`, `ppv` and `npv`, each with the ends of its
        interval.
    """
    rows = []
    for name, model in predictions.items():
        if model.reason:
            continue
        is_corrected = name in bias.index
        amount = pd.Series(bias.loc[name]) if is_corrected else pd.Series(0.0, selection.CORRECTED_RATES)
        rates = selection.correct_rates(validation.labels, model.predicted, validation.groups, amount)
        for share in sorted({*prevalence.PREVALENCES, *([expected] if expected else [])}):
            estimate_type = "corrected" if is_corrected else model.estimate_type
            row = {"model": name, "estimate_type": estimate_type, "prevalence": share}
            for metric, values in prevalence.metrics_at_prevalence(*rates, share).items():
                low, high = percentile_interval(pd.Series(values))
                row |= {metric: values[0], f"{metric}_low": low, f"{metric}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def cross_fit_recalibration(
    validation: ValidationSet, probabilities: np.ndarray, fit: calibration.RecalibratorFit
) -> tuple[np.ndarray | None, calibration.Recalibrator | None]:
    """Recalibrate P(positive) (N,) of the validation set.

    Returns:
        The cross-fitted probabilities (N,), None if a class has too few groups; and the recalibrator fitted on all
        images. Both are None if that fit is impossible.
    """
    labels = validation.labels
    fitted = fit(labels, probabilities)
    if fitted is None:
        return None, None

    def fit_rows(rows: np.ndarray) -> calibration.Recalibrator:
        return fit(labels[rows], probabilities[rows]) or calibration.Recalibrator()

    calibrated = cross_fit(validation.folds, fit_rows, lambda recalibrate, rows: recalibrate(probabilities[rows]))
    return calibrated, fitted
