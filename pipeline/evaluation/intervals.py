"""Figures with their uncertainty: a bootstrap over groups, and Wilson's interval for plain proportions."""

from collections.abc import Iterable
from typing import TypedDict

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from pipeline.evaluation.calibration import BIN_COUNT, bin_indices

CONFIDENCE_LEVEL = 0.95
CHUNK_SIZE = 64  # resamples that are worked on at once, so that they stay in the processor's cache
EPS = np.finfo(float).eps
THRESHOLD_METRICS = ["accuracy", "f1", "recall", "precision", "specificity", "balanced_accuracy"]
SCORE_METRICS = ["loss", "auroc", "average_precision", "brier", "calibration_error"]
UNDEFINED_REASONS = {
    "f1": "no positive image",
    "recall": "no positive image",
    "specificity": "no negative image",
    "precision": "no image is predicted positive",
    "balanced_accuracy": "images of one class only",
    "auroc": "images of one class only",
    "average_precision": "images of one class only",
}


def bootstrap_weights(groups: np.ndarray, count: int) -> np.ndarray:
    """Draw whole groups with replacement (Efron and Tibshirani 1993): images of one patient are not independent.

    Args:
        groups: (N,), the name of each image's group.
        count: how many times.

    Returns:
        (1 + count, N), how often each image is drawn; in the first row, which is the set itself, once. One group alone
        has only that row: to draw it again says nothing of chance.
    """
    _, index = np.unique(groups, return_inverse=True)
    size = index.max() + 1
    drawn = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=count if size > 1 else 0)
    return np.concatenate([np.ones((1, len(index)), np.int32), drawn.astype(np.int32)[:, index]])


def compute_metrics(
    labels: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray | None, weights: np.ndarray
) -> pd.DataFrame:
    """Score one model on every resample.

    Args:
        labels: (N,), 0 or 1.
        predicted: (N,), the labels that the model gives, 0 or 1.
        probabilities: (N,), P(positive) in [0, 1]; None where the model has none.
        weights: (R, N), as `resample` gives them.

    Returns:
        A row per resample and a column per figure, named as in `metrics.Scores`, with `brier` and
        `calibration_error` (see `calibration.error`); NaN where a resample lacks what the figure divides by.
    """
    parts = [weights[start : start + CHUNK_SIZE].astype(float) for start in range(0, len(weights), CHUNK_SIZE)]
    labels, predicted = np.asarray(labels, dtype=float), np.asarray(predicted, dtype=float)
    table = pd.DataFrame(
        np.concatenate([_threshold_metrics(labels, predicted, part) for part in parts]), columns=THRESHOLD_METRICS
    )
    if probabilities is None:
        return table
    probabilities = np.asarray(probabilities, dtype=float)
    found = np.concatenate([_score_metrics(labels, probabilities, part) for part in parts])
    return pd.concat([table, pd.DataFrame(found, columns=SCORE_METRICS)], axis="columns")


def confidence_intervals(
    labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray, samples: pd.DataFrame
) -> pd.DataFrame:
    """Give every figure of one model its 95 % interval.

    The interval is Wilson's (1927) for a proportion of images that each are their own group, and, over the groups, for
    one that is 0 or 1, which no resample can change. Else it lies between the percentiles of the bootstrap, over those
    resamples in which the figure can be had.

    Args:
        labels: (N,), 0 or 1.
        predicted: (N,), the labels that the model gives, 0 or 1.
        groups: (N,), the name of each image's group.
        samples: as `figures` gives them.

    Returns:
        A row per figure: `metric`, `value`, `low`, `high`, `method` and, where a figure or its interval is missing,
        the `reason`.
    """
    rows, count = [], len(np.unique(groups))
    labels, predicted, groups = np.asarray(labels, dtype=bool), np.asarray(predicted, dtype=bool), np.asarray(groups)
    among = {"accuracy": labels | ~labels, "recall": labels, "specificity": ~labels, "precision": predicted}
    for metric, sample in samples.items():
        row = {"metric": metric, "value": sample[0], "low": np.nan, "high": np.nan, "method": "", "reason": ""}
        if np.isnan(sample[0]):
            row["reason"] = UNDEFINED_REASONS[str(metric)]
        elif metric in among and (count == len(groups) or sample[0] in (0, 1)):
            inside = among[str(metric)]
            size = len(np.unique(groups[inside]))
            found = binomtest(round(sample[0] * size), size).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
            row |= {"low": found.low, "high": found.high, "method": "wilson"}
        elif count < 2:
            row["reason"] = "one group only"
        else:
            low, high = percentile_interval(sample)
            if low < high:
                row |= {"low": low, "high": high, "method": "bootstrap"}
            else:
                row["reason"] = "no resample differs: too few errors for an interval"
        rows.append(row)
    return pd.DataFrame(rows)


def compare_metrics(
    ours: pd.DataFrame, theirs: pd.DataFrame, metrics: Iterable[str] | None = None, margin: float = 0
) -> pd.DataFrame:
    """Compare two models on the same resamples.

    Args:
        ours: figures of one, as `figures` gives them.
        theirs: of the other, from the same weights.
        metrics: which figures; by default all that both have.
        margin: by which ours must be greater.

    Returns:
        A row per figure: `metric`, `difference` (ours less theirs), the `low` and `high` end of its 95 % interval,
        and the `probability`, the share of resamples in which it is above the margin; these are NaN where no resample
        has the figure.
    """
    rows = []
    for metric in metrics or ours.columns.intersection(theirs.columns, sort=False):
        sample = ours[metric] - theirs[metric]
        low, high = percentile_interval(sample)
        had = sample[1:].dropna()
        probability = float((had > margin).mean()) if len(had) else np.nan
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
    """Compare the F1 of two models by the labels, 0 or 1, that they give; see `differences`, whose NaN are None.

    Without a positive image both have F1 0, as in `metrics.score`, and no resample tells them apart.
    """
    weights = bootstrap_weights(groups, resamples)
    mine, other = (compute_metrics(labels, predicted, None, weights) for predicted in (ours, theirs))
    found = compare_metrics(mine, other, ["f1"], margin).drop(columns="metric").iloc[0]
    low, high, probability = (
        None if np.isnan(found[key]) else float(found[key]) for key in ("low", "high", "probability")
    )
    return {
        "difference": float(np.nan_to_num(found["difference"])),
        "low": low,
        "high": high,
        "probability": probability,
    }


def percentile_interval(sample: pd.Series) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a figure, whose first value is the set's own; NaN where it has none."""
    had = sample.to_numpy()[1:]
    had = had[~np.isnan(had)]
    if not len(had) or np.isnan(sample[0]):
        return np.nan, np.nan
    low, high = np.quantile(had, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return float(low), float(high)


def _threshold_metrics(labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    cells = np.stack(
        [labels * predicted, (1 - labels) * predicted, labels * (1 - predicted), (1 - labels) * (1 - predicted)], 1
    )
    tp, fp, fn, tn = (weights @ cells).T
    recall, specificity = _divide(tp, tp + fn), _divide(tn, tn + fp)
    f1 = np.where(tp + fn > 0, _divide(2 * tp, 2 * tp + fp + fn), np.nan)
    accuracy = (tp + tn) / (tp + fp + fn + tn)
    return np.stack([accuracy, f1, recall, _divide(tp, tp + fp), specificity, (recall + specificity) / 2], axis=1)


def _score_metrics(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    surprise = -np.log(np.clip(np.where(labels == 1, probabilities, 1 - probabilities), EPS, 1))
    gaps = np.eye(BIN_COUNT)[bin_indices(probabilities)] * (probabilities - labels)[:, None]
    columns = np.column_stack([surprise, (probabilities - labels) ** 2, gaps])
    means = weights @ columns / weights.sum(axis=1, keepdims=True)
    loss, brier, error = means[:, 0], means[:, 1], np.abs(means[:, 2:]).sum(axis=1)

    # True and false positives where the threshold passes each distinct probability, from the highest down.
    order = np.argsort(-probabilities, kind="stable")
    last = np.append(np.diff(probabilities[order]) != 0, True)
    drawn = weights[:, order]
    tp, calls = (np.cumsum(part, axis=1)[:, last] for part in (drawn * labels[order], drawn))
    fp = calls - tp
    new_tp, new_fp = (np.diff(part, axis=1, prepend=0) for part in (tp, fp))
    positives, negatives = tp[:, -1], fp[:, -1]
    auroc = _divide((new_fp * (tp - new_tp / 2)).sum(axis=1), positives * negatives)
    precision = (new_tp * tp / np.maximum(calls, 1)).sum(axis=1)
    average_precision = np.where(negatives > 0, _divide(precision, positives), np.nan)
    return np.stack([loss, auroc, average_precision, brier, error], axis=1)


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide; NaN where there is nothing to divide by."""
    shares: np.ndarray = np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    return shares
