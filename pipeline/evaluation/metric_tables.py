"""What models say of the validation set, and the tables of what that is worth."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation import calibration, prevalence
from pipeline.evaluation.cross_fitting import cross_fit, grouped_folds
from pipeline.evaluation.intervals import (
    SCORE_METRICS,
    THRESHOLD_METRICS,
    bootstrap_weights,
    compare_metrics,
    compute_metrics,
    confidence_intervals,
    percentile_interval,
)

MIN_PER_CLASS = 10  # images of a class, below which a slice says little
HELD_OUT_SOURCE = "source left out"
SIZE_BINS = {"below 512": 0, "512 to 1023": 512, "1024 to 2047": 1024, "2048 and more": 2048}  # shorter edge, pixels
COLUMNS = ["model", "estimate_type", "metric", "value", "low", "high", "method", "reason"]


@dataclass(frozen=True)
class Predictions:
    """Labels (N,), 0 or 1, that a model gives, and P(positive), if it has one.

    `measured` says whether the same images chose its operating point or its members: `fixed` where nothing was
    chosen, `cross-fitted` where each image was judged by what the others chose, else `apparent`, which flatters.
    A model that is not there has only a `reason`.
    """

    predicted: np.ndarray
    probabilities: np.ndarray | None
    estimate_type: str = "fixed"
    reason: str = ""


def unavailable(reason: str) -> Predictions:
    return Predictions(np.empty(0), None, "", reason)


class ValidationSet:
    """The validation set, and how often each resample draws its images."""

    def __init__(self, labels: np.ndarray, groups: np.ndarray, resamples: int) -> None:
        self.labels, self.groups = np.asarray(labels, dtype=int), np.asarray(groups)
        self.resamples = resamples
        self.weights = bootstrap_weights(self.groups, resamples)

    @cached_property
    def folds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return grouped_folds(self.labels, self.groups)

    def bootstrap_metrics(self, opinion: Predictions) -> pd.DataFrame:
        """Return the model's figures on every resample, as `intervals.figures` does; no rows where it is absent."""
        if opinion.reason:
            return pd.DataFrame()
        return compute_metrics(self.labels, opinion.predicted, opinion.probabilities, self.weights)

    def subset(self, rows: np.ndarray) -> "ValidationSet":
        return ValidationSet(self.labels[rows], self.groups[rows], self.resamples)


def interval_table(
    validation: ValidationSet, opinions: Mapping[str, Predictions], samples: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """Return a row per model and figure: `model`, `measured`, and what `intervals.intervals` gives."""
    parts, everything = [], [*THRESHOLD_METRICS, *SCORE_METRICS]
    for name, opinion in opinions.items():
        found = pd.DataFrame(columns=["metric", "reason"])
        if not opinion.reason:
            found = confidence_intervals(validation.labels, opinion.predicted, validation.groups, samples[name])
        found = found.set_index("metric").reindex(everything).rename_axis("metric").reset_index()
        found["reason"] = found["reason"].fillna(opinion.reason or "a vote has no probability")
        parts.append(found.assign(model=name, estimate_type=opinion.estimate_type).reindex(columns=COLUMNS))
    return pd.concat(parts)


def difference_table(samples: Mapping[str, pd.DataFrame], against: Iterable[str]) -> pd.DataFrame:
    """Compare every model with some: `model`, `against`, and what `intervals.differences` gives."""
    columns = ["model", "against", "metric", "difference", "low", "high", "probability"]
    parts = [
        compare_metrics(samples[name], samples[other]).assign(model=name, against=other)
        for other in dict.fromkeys(against)
        for name in samples
        if name != other and len(samples[name])
    ]
    return pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)


def seed_table(samples: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return how the figures spread over the seeds: `metric`, `mean`, `deviation`, `lowest`, `highest`, `reason`."""
    whole = pd.DataFrame({name: sample.iloc[0] for name, sample in samples.items()}).T
    found = pd.DataFrame(
        {"mean": whole.mean(), "deviation": whole.std(), "lowest": whole.min(), "highest": whole.max()}
    )
    reason = np.where(whole.isna().all(), "no seed has it", np.where(whole.count() < 2, "one seed only", ""))
    return found.assign(reason=reason).rename_axis("metric").reset_index()


def calibration_table(validation: ValidationSet, models: Mapping[str, np.ndarray]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure probabilities before and after calibration, which is cross-fitted.

    Args:
        validation: the set.
        models: P(positive) by name.

    Returns:
        A row per model and `calibration` (`none`, `temperature`, `temperature and bias`) with the `temperature` and
        `bias` that all images together choose, `loss`, `brier`, `calibration_error` and the `reason` where they are
        missing; and the bins of all these, as `calibration.reliability` gives them.
    """
    labels, rows, reliabilities = validation.labels, [], []
    for name, probabilities in models.items():
        for kind, fit in {
            "none": None, "temperature": calibration.fit_temperature, "temperature and bias": calibration.fit_platt,
        }.items():  # fmt: skip
            row: dict[str, Any] = {"model": name, "calibration": kind, "reason": ""}
            after, chosen = cross_fit_recalibration(validation, probabilities, fit) if fit else (probabilities, None)
            if fit and chosen:
                row |= {"temperature": chosen.temperature, "bias": chosen.bias}
            elif fit:
                row["reason"] = "images of one class only, or higher probabilities do not mean more positives"
            if after is None:
                row["reason"] = row["reason"] or "too few groups of a class to cross-fit"
            else:
                once = compute_metrics(labels, after >= 0.5, after, validation.weights[:1]).iloc[0]
                row |= {metric: once[metric] for metric in ("loss", "brier", "calibration_error")}
                reliabilities.append(calibration.reliability_curve(labels, after).assign(model=name, calibration=kind))
            rows.append(row)
    columns = ["model", "calibration", "temperature", "bias", "loss", "brier", "calibration_error", "reason"]
    return pd.DataFrame(rows, columns=columns), pd.concat(reliabilities)[
        ["model", "calibration", "bin", "images", "probability", "positives"]
    ]


def prevalence_table(
    validation: ValidationSet, samples: Mapping[str, pd.DataFrame], expected: float | None
) -> pd.DataFrame:
    """Carry every model to other prevalences, the expected one among them.

    Returns:
        A row per model and prevalence: `accuracy`, `ppv` and `npv`, each with the ends of its interval.
    """
    rows, positive = [], validation.labels == 1
    for name, sample in samples.items():
        if not len(sample):
            continue
        rng = np.random.default_rng(0)
        sensitivity = jeffreys_draws(sample["recall"].to_numpy(), len(np.unique(validation.groups[positive])), rng)
        specificity = jeffreys_draws(
            sample["specificity"].to_numpy(), len(np.unique(validation.groups[~positive])), rng
        )
        for share in sorted({*prevalence.PREVALENCES, *([expected] if expected else [])}):
            row = {"model": name, "prevalence": share}
            for figure, values in prevalence.metrics_at_prevalence(sensitivity, specificity, share).items():
                low, high = percentile_interval(pd.Series(values))
                row |= {figure: values[0], f"{figure}_low": low, f"{figure}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def jeffreys_draws(shares: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return a share of `count` groups on every resample; where none differs, draw what it may be.

    That no error was seen does not say that there is none: the draws are of Jeffreys' posterior (Brown, Cai and
    DasGupta 2001).
    """
    if np.isnan(shares[0]) or np.nanmin(shares) < np.nanmax(shares):
        return shares
    hits = shares[0] * count
    drawn = rng.beta(hits + 0.5, count - hits + 0.5, len(shares))
    return np.append(shares[:1], drawn[1:])


def slice_table(
    validation: ValidationSet, table: pd.DataFrame, opinions: Mapping[str, Predictions], held_out: str | None
) -> pd.DataFrame:
    """Score models on the images of one source, view or size.

    Args:
        validation: the set.
        table: a row per image, with `source`, `view`, `width` and `height`.
        opinions: of the models.
        held_out: the source that was not trained on, if there is one.

    Returns:
        `by`, `slice`, `images`, `positives`, `small` (too few of a class to say much), and the columns of
        `interval_table`. For a source that was trained on, a row says why its figures when left out are missing.
    """
    edges = np.searchsorted(list(SIZE_BINS.values()), table[["width", "height"]].min(axis="columns"), side="right") - 1
    kinds = {
        "source": table["source"],
        "view": table["view"],
        "size": pd.Series(list(SIZE_BINS), dtype=str).iloc[edges],
    }
    parts = []
    for by, column in kinds.items():
        values = column.to_numpy()
        known = [value for value in np.unique(values) if value]
        for value in known:
            rows = np.flatnonzero(values == value)
            inside = validation.subset(rows)
            own = {
                name: Predictions(
                    opinion.predicted[rows],
                    None if opinion.probabilities is None else opinion.probabilities[rows],
                    opinion.estimate_type,
                )
                for name, opinion in opinions.items()
            }
            found = interval_table(
                inside, own, {name: inside.bootstrap_metrics(opinion) for name, opinion in own.items()}
            )
            counts = np.bincount(inside.labels, minlength=2)
            kind = HELD_OUT_SOURCE if by == "source" and value == held_out else by
            parts.append(
                found.assign(
                    by=kind, slice=value, images=len(rows), positives=counts[1], small=counts.min() < MIN_PER_CLASS
                )
            )
        if not known:
            parts.append(pd.DataFrame({"by": [by], "slice": [""], "reason": [f"no {by} is known"]}))
        elif by == "source":
            seen = [value for value in known if value != held_out]
            reason = "needs a training without this source: split.held_out_source"
            parts.append(pd.DataFrame({"by": HELD_OUT_SOURCE, "slice": seen, "reason": reason}))
    return pd.concat(parts)[["by", "slice", "images", "positives", "small", *COLUMNS]]


def cross_fit_recalibration(
    validation: ValidationSet, probabilities: np.ndarray, fit: calibration.RecalibratorFit
) -> tuple[np.ndarray | None, calibration.Recalibrator | None]:
    """Calibrate P(positive) (N,) of the set, each fold by what the others fit, and return what all together fit.

    Either is None where it cannot be had: the first where a class has too few groups, both where there is no fit.
    """
    labels = validation.labels
    chosen = fit(labels, probabilities)
    if chosen is None:
        return None, None

    def of_others(rows: np.ndarray) -> calibration.Recalibrator:
        return fit(labels[rows], probabilities[rows]) or calibration.Recalibrator(1.0)

    return cross_fit(validation.folds, of_others, lambda found, rows: found(probabilities[rows])), chosen
