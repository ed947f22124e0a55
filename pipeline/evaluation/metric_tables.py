"""Tables of metrics on the validation set: intervals, differences, calibration, prevalence and subgroups."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation import calibration, prevalence
from pipeline.evaluation.cross_fitting import cross_fit, grouped_folds
from pipeline.evaluation.intervals import bootstrap_weights, compare_metrics, confidence_intervals, percentile_interval
from pipeline.evaluation.metrics import SCORE_METRICS, THRESHOLD_METRICS, apply_threshold, compute_metrics

MIN_PER_CLASS = 10  # a slice with fewer images of a class is marked as small
HELD_OUT_SOURCE = "held-out source"
SIZE_BINS = {"below 512": 0, "512 to 1023": 512, "1024 to 2047": 1024, "2048 and more": 2048}  # shorter edge, pixels
COLUMNS = ["model", "estimate_type", "metric", "value", "low", "high", "method", "reason"]


@dataclass(frozen=True)
class Predictions:
    """Predicted labels (N,), 0 or 1, of a model, and P(positive) (N,), if it has one.

    `estimate_type` is `fixed` if nothing was fitted on the validation images, `cross-fitted` if threshold and members
    were fitted on other folds than the image's own, or `apparent` if they were fitted on the same images, which is
    optimistically biased. A model that is unavailable only has a `reason`.
    """

    predicted: np.ndarray
    probabilities: np.ndarray | None
    estimate_type: str = "fixed"
    reason: str = ""

    def subset(self, rows: np.ndarray) -> "Predictions":
        probabilities = None if self.probabilities is None else self.probabilities[rows]
        return Predictions(self.predicted[rows], probabilities, self.estimate_type)


def unavailable_predictions(reason: str) -> Predictions:
    return Predictions(np.empty(0), None, "", reason)


class ValidationSet:
    """Labels and groups (N,) of the validation images, their folds and bootstrap weights."""

    def __init__(self, labels: np.ndarray, groups: np.ndarray, resamples: int) -> None:
        self.labels, self.groups = np.asarray(labels, dtype=int), np.asarray(groups)
        self.resamples = resamples
        self.weights = bootstrap_weights(self.groups, resamples)

    @cached_property
    def folds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return grouped_folds(self.labels, self.groups)

    def bootstrap_metrics(self, predictions: Predictions) -> pd.DataFrame:
        """Return the metrics on every resample, from `compute_metrics`; no rows if the model is unavailable."""
        if predictions.reason:
            return pd.DataFrame()
        return compute_metrics(self.labels, predictions.predicted, predictions.probabilities, self.weights)

    def subset(self, rows: np.ndarray) -> "ValidationSet":
        return ValidationSet(self.labels[rows], self.groups[rows], self.resamples)


def interval_table(
    validation: ValidationSet, predictions: Mapping[str, Predictions], samples: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """Return a row per model and metric: `model`, `estimate_type` and the columns of `confidence_intervals`.

    Args:
        validation: the set.
        predictions: by model.
        samples: by model, from `ValidationSet.bootstrap_metrics`.
    """
    tables, metrics = [], [*THRESHOLD_METRICS, *SCORE_METRICS]
    for name, model in predictions.items():
        table = pd.DataFrame(columns=["metric", "reason"])
        if not model.reason:
            table = confidence_intervals(validation.labels, model.predicted, validation.groups, samples[name])
        table = table.set_index("metric").reindex(metrics).rename_axis("metric").reset_index()
        table["reason"] = table["reason"].fillna(model.reason or "a vote has no probability")
        tables.append(table.assign(model=name, estimate_type=model.estimate_type).reindex(columns=COLUMNS))
    return pd.concat(tables)


def difference_table(samples: Mapping[str, pd.DataFrame], references: Iterable[str]) -> pd.DataFrame:
    """Compare every model with each reference: `model`, `against` and the columns of `compare_metrics`."""
    columns = ["model", "against", "metric", "difference", "low", "high", "probability"]
    tables = [
        compare_metrics(samples[name], samples[reference]).assign(model=name, against=reference)
        for reference in dict.fromkeys(references)
        for name in samples
        if name != reference and len(samples[name])
    ]
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
                row["reason"] = row["reason"] or "too few groups of a class to cross-fit"
            else:
                predicted = apply_threshold(calibrated)
                metrics = compute_metrics(labels, predicted, calibrated, validation.weights[:1]).iloc[0]
                row |= {metric: metrics[metric] for metric in ("loss", "brier", "calibration_error")}
                curves.append(calibration.reliability_curve(labels, calibrated).assign(model=name, calibration=kind))
            rows.append(row)
    columns = ["model", "calibration", "temperature", "bias", "loss", "brier", "calibration_error", "reason"]
    return pd.DataFrame(rows, columns=columns), pd.concat(curves)[
        ["model", "calibration", "bin", "images", "probability", "positives"]
    ]


def prevalence_table(
    validation: ValidationSet, samples: Mapping[str, pd.DataFrame], expected: float | None
) -> pd.DataFrame:
    """Compute metrics of every model at `PREVALENCES` and at the expected prevalence.

    Returns:
        A row per model and prevalence: `accuracy`, `ppv` and `npv`, each with the ends of its interval.
    """
    rows, is_positive = [], validation.labels == 1
    positive_groups, negative_groups = (
        len(np.unique(validation.groups[of_class])) for of_class in (is_positive, ~is_positive)
    )
    for name, sample in samples.items():
        if not len(sample):
            continue
        rng = np.random.default_rng(0)
        sensitivity = jeffreys_draws(sample["recall"].to_numpy(), positive_groups, rng)
        specificity = jeffreys_draws(sample["specificity"].to_numpy(), negative_groups, rng)
        for share in sorted({*prevalence.PREVALENCES, *([expected] if expected else [])}):
            row = {"model": name, "prevalence": share}
            for metric, values in prevalence.metrics_at_prevalence(sensitivity, specificity, share).items():
                low, high = percentile_interval(pd.Series(values))
                row |= {metric: values[0], f"{metric}_low": low, f"{metric}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def jeffreys_draws(proportions: np.ndarray, group_count: int, rng: np.random.Generator) -> np.ndarray:
    """Replace a bootstrap without variation by draws from Jeffreys' posterior (Brown, Cai and DasGupta 2001).

    A proportion without an observed error is the same in all resamples, but the true one can be lower.

    Args:
        proportions: (1 + resamples,), the value on the original set, then those on the resamples.
        group_count: the number of groups in the denominator.
        rng: makes the draws.
    """
    if np.isnan(proportions[0]) or np.nanmin(proportions) < np.nanmax(proportions):
        return proportions
    successes = proportions[0] * group_count
    draws = rng.beta(successes + 0.5, group_count - successes + 0.5, len(proportions))
    return np.append(proportions[:1], draws[1:])


def slice_table(
    validation: ValidationSet, table: pd.DataFrame, predictions: Mapping[str, Predictions], held_out: str | None
) -> pd.DataFrame:
    """Evaluate models on the images of each source, view and size.

    Args:
        validation: the set.
        table: a row per image, with `source`, `view`, `width` and `height`.
        predictions: by model.
        held_out: the source that was left out of training, if any.

    Returns:
        `by`, `slice`, `images`, `positives`, `small` (fewer than `MIN_PER_CLASS` images of a class) and the columns of
        `interval_table`. Sources that were trained on also have a row with the reason why metrics of the model without
        them are missing.
    """
    edges = np.searchsorted(list(SIZE_BINS.values()), table[["width", "height"]].min(axis="columns"), side="right") - 1
    columns = {
        "source": table["source"],
        "view": table["view"],
        "size": pd.Series(list(SIZE_BINS), dtype=str).iloc[edges],
    }
    tables = []
    for by, column in columns.items():
        values = column.to_numpy()
        known_values = [value for value in np.unique(values) if value]
        for value in known_values:
            kind = HELD_OUT_SOURCE if by == "source" and value == held_out else by
            metrics = _evaluate_slice(validation, predictions, np.flatnonzero(values == value))
            tables.append(metrics.assign(by=kind, slice=value))
        if not known_values:
            tables.append(pd.DataFrame({"by": [by], "slice": [""], "reason": [f"no {by} is known"]}))
        elif by == "source":
            trained_on = [value for value in known_values if value != held_out]
            reason = "needs a training without this source: split.held_out_source"
            tables.append(pd.DataFrame({"by": HELD_OUT_SOURCE, "slice": trained_on, "reason": reason}))
    return pd.concat(tables)[["by", "slice", "images", "positives", "small", *COLUMNS]]


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
        return fit(labels[rows], probabilities[rows]) or calibration.Recalibrator(1.0)

    calibrated = cross_fit(validation.folds, fit_rows, lambda recalibrate, rows: recalibrate(probabilities[rows]))
    return calibrated, fitted


def _evaluate_slice(
    validation: ValidationSet, predictions: Mapping[str, Predictions], rows: np.ndarray
) -> pd.DataFrame:
    subset = validation.subset(rows)
    models = {name: model.subset(rows) for name, model in predictions.items()}
    table = interval_table(subset, models, {name: subset.bootstrap_metrics(model) for name, model in models.items()})
    counts = np.bincount(subset.labels, minlength=2)
    return table.assign(images=len(rows), positives=counts[1], small=counts.min() < MIN_PER_CLASS)
