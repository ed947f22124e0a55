"""Confidence intervals: a bootstrap over groups, and Wilson's interval for simple proportions."""

from collections.abc import Iterable
from typing import TypedDict

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from pipeline.evaluation.metrics import UNDEFINED_REASONS, compute_metrics

CONFIDENCE_LEVEL = 0.95


def bootstrap_weights(groups: np.ndarray, count: int) -> np.ndarray:
    """Draw whole groups with replacement (Efron and Tibshirani 1993): images of one patient are not independent.

    Args:
        groups: (N,), the name of each image's group.
        count: number of resamples.

    Returns:
        (1 + count, N), how often each resample contains each image. The first row is the original set, all ones. It is
        the only row if there is only one group, because resampling one group has no variation.
    """
    _, index = np.unique(groups, return_inverse=True)
    size = index.max() + 1
    drawn = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=count if size > 1 else 0)
    return np.concatenate([np.ones((1, len(index)), np.int32), drawn.astype(np.int32)[:, index]])


def confidence_intervals(
    labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray, samples: pd.DataFrame
) -> pd.DataFrame:
    """Compute the 95 % confidence interval of every metric of one model.

    A proportion gets Wilson's interval (1927) where every image is its own group, and, counting groups, where the
    proportion is 0 or 1, because resampling cannot change it. All other intervals are percentiles of the bootstrap,
    over the resamples in which the metric is defined.

    Args:
        labels: (N,), 0 or 1.
        predicted: (N,), the predicted labels, 0 or 1.
        groups: (N,), the name of each image's group.
        samples: metrics on every resample, from `compute_metrics`.

    Returns:
        A row per metric: `metric`, `value`, `low`, `high`, `method` and, where the value or its interval is missing,
        the `reason`.
    """
    rows, group_count = [], len(np.unique(groups))
    labels, predicted, groups = np.asarray(labels, dtype=bool), np.asarray(predicted, dtype=bool), np.asarray(groups)
    denominators = {"accuracy": labels | ~labels, "recall": labels, "specificity": ~labels, "precision": predicted}
    for metric, sample in samples.items():
        row = {"metric": metric, "value": sample[0], "low": np.nan, "high": np.nan, "method": "", "reason": ""}
        if np.isnan(sample[0]):
            row["reason"] = UNDEFINED_REASONS[str(metric)]
        elif metric in denominators and (group_count == len(groups) or sample[0] in (0, 1)):
            size = len(np.unique(groups[denominators[str(metric)]]))
            interval = binomtest(round(sample[0] * size), size).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
            row |= {"low": interval.low, "high": interval.high, "method": "wilson"}
        elif group_count < 2:
            row["reason"] = "one group only"
        else:
            low, high = percentile_interval(sample)
            if low < high:
                row |= {"low": low, "high": high, "method": "bootstrap"}
            else:
                row["reason"] = "all resamples have the same value: too few images or errors for an interval"
        rows.append(row)
    return pd.DataFrame(rows)


def compare_metrics(
    ours: pd.DataFrame, theirs: pd.DataFrame, metrics: Iterable[str] | None = None, margin: float = 0
) -> pd.DataFrame:
    """Compare two models by a paired bootstrap.

    Args:
        ours: metrics of one model on every resample, from `compute_metrics`.
        theirs: metrics of the other model, with the same weights.
        metrics: names of the metrics to compare; by default, all that both tables have.
        margin: difference above which ours counts as greater.

    Returns:
        A row per metric: `metric`, `difference` (ours minus theirs), `low` and `high` of its 95 % confidence interval,
        and `probability`, the share of resamples with a difference above the margin. NaN where no resample defines the
        metric.
    """
    rows = []
    for metric in metrics or ours.columns.intersection(theirs.columns, sort=False):
        sample = ours[metric] - theirs[metric]
        low, high = percentile_interval(sample)
        resampled = sample[1:].dropna()
        probability = float((resampled > margin).mean()) if len(resampled) else np.nan
        rows.append({"metric": metric, "difference": sample[0], "low": low, "high": high, "probability": probability})
    return pd.DataFrame(rows)


class MetricDifference(TypedDict):
    difference: float
    low: float | None
    high: float | None
    probability: float | None


def compare_f1(
    labels: np.ndarray, groups: np.ndarray, ours: np.ndarray, theirs: np.ndarray, resamples: int, margin: float = 0
) -> MetricDifference:
    """Compare the F1 of two models from their predicted labels, 0 or 1; see `compare_metrics`, whose NaN become None.

    Without a positive image both F1 are 0, as in `score_predictions`, and only the difference, 0, is returned.
    """
    weights = bootstrap_weights(groups, resamples)
    our_metrics, their_metrics = (compute_metrics(labels, predicted, None, weights) for predicted in (ours, theirs))
    row = compare_metrics(our_metrics, their_metrics, ["f1"], margin).drop(columns="metric").iloc[0]
    low, high, probability = (None if np.isnan(row[key]) else float(row[key]) for key in ("low", "high", "probability"))
    difference = float(np.nan_to_num(row["difference"]))
    return {"difference": difference, "low": low, "high": high, "probability": probability}


def percentile_interval(sample: pd.Series) -> tuple[float, float]:
    """Return the ends of the 95 % percentile interval of a metric.

    Args:
        sample: (1 + resamples,), the value on the original set, then those on the resamples.

    Returns:
        NaN where the original value or every resampled value is missing.
    """
    resampled = sample.to_numpy()[1:]
    resampled = resampled[~np.isnan(resampled)]
    if not len(resampled) or np.isnan(sample[0]):
        return np.nan, np.nan
    low, high = np.quantile(resampled, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return float(low), float(high)
