"""Metrics of binary classifiers, on a data set or on many bootstrap resamples of it at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict, TypeVar, cast

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from pipeline.core.config import Keep

CONFIDENCE_LEVEL = 0.95  # of all intervals
METRIC_LABELS = {
    "accuracy": "accuracy", "f1": "F1", "recall": "sensitivity", "precision": "PPV", "specificity": "specificity",
    "npv": "NPV", "balanced_accuracy": "balanced accuracy", "mcc": "Matthews correlation",
    "positive_likelihood_ratio": "positive likelihood ratio", "negative_likelihood_ratio": "negative likelihood ratio",
    "loss": "log loss", "auroc": "AUROC",
    "average_precision": "average precision", "brier": "Brier score",
    "calibration_error": "expected calibration error", "calibration_intercept": "calibration intercept",
    "calibration_slope": "calibration slope",
}  # fmt: skip
LOWER_IS_BETTER = ["loss", "brier", "calibration_error", "negative_likelihood_ratio"]
THRESHOLD_METRICS = [
    "accuracy", "f1", "recall", "precision", "specificity", "balanced_accuracy", "npv", "mcc",
    "positive_likelihood_ratio", "negative_likelihood_ratio",
]  # fmt: skip
SCORE_METRICS = ["loss", "auroc", "average_precision", "brier", "calibration_error"]
RANK_METRICS = ["auroc", "average_precision"]  # they depend on the order of the images only
CALIBRATION_METRICS = ["calibration_intercept", "calibration_slope"]  # from `calibration_regression`
UNDEFINED_REASONS = {
    "f1": "no positive image",
    "recall": "no positive image",
    "specificity": "no negative image",
    "precision": "no image is predicted positive",
    "npv": "no image is predicted negative",
    "mcc": "images or predictions of one class only",
    "positive_likelihood_ratio": "images of one class only, or no false positive",
    "negative_likelihood_ratio": "images of one class only, or no true negative",
    "balanced_accuracy": "images of one class only",
    "auroc": "images of one class only",
    "average_precision": "images of one class only",
    "calibration_intercept": "images of one class only",
    "calibration_slope": "images of one class only, or the probabilities separate the classes",
}
DEFAULT_THRESHOLD = 0.5  # an image is predicted positive where P(positive) is at least the threshold
BIN_COUNT = 10  # bins of equal width for calibration
CHUNK_SIZE = 64  # resamples per chunk, so that a chunk fits into the processor's cache
EPS = np.finfo(float).eps  # probabilities are clipped by it in the log loss, as in scikit-learn

Probabilities = TypeVar("Probabilities", np.ndarray, pd.Series, pd.DataFrame)


class Scores(TypedDict):
    loss: float | None
    accuracy: float
    f1: float
    recall: float | None
    precision: float | None
    specificity: float | None
    balanced_accuracy: float | None
    auroc: float | None
    average_precision: float | None


def score_predictions(labels: np.ndarray, probabilities: np.ndarray, predicted: np.ndarray | None = None) -> Scores:
    """Score the predictions of one model; see `compute_metrics`.

    Args:
        labels: (N,), 0 or 1.
        probabilities: (N,), P(positive) in [0, 1].
        predicted: (N,), 0 or 1; by default, the probabilities at `DEFAULT_THRESHOLD`.

    Returns:
        The metrics; undefined ones are None, except that an undefined `f1` is 0.
    """
    probabilities = np.asarray(probabilities, dtype=float)
    if predicted is None:
        predicted = apply_threshold(probabilities)
    row = compute_metrics(labels, predicted, probabilities, np.ones((1, len(labels)))).iloc[0]
    scores = {metric: None if np.isnan(row[metric]) else float(row[metric]) for metric in Scores.__annotations__}
    return cast("Scores", scores | {"f1": scores["f1"] or 0.0})


def compute_metrics(
    labels: np.ndarray,
    predicted: np.ndarray,
    probabilities: np.ndarray | None,
    weights: np.ndarray,
    scores: np.ndarray | None = None,
) -> pd.DataFrame:
    """Score one model on every resample.

    Args:
        labels: (N,), 0 or 1.
        predicted: (N,), the predicted labels, 0 or 1.
        probabilities: (N,), P(positive) in [0, 1]; None where the model has none.
        weights: (R, N), how often each of R resamples contains each image, as from `intervals.bootstrap_weights`.
        scores: (N,), by which `RANK_METRICS` rank the images; by default, the probabilities.

    Returns:
        A row per resample with `THRESHOLD_METRICS` and, given probabilities, `SCORE_METRICS`. `recall` is the
        sensitivity, `precision` the PPV, `loss` the mean cross-entropy in nats, and `calibration_error` the expected
        calibration error over `BIN_COUNT` bins (Naeini, Cooper and Hauskrecht 2015). NaN where a metric is undefined
        (see `UNDEFINED_REASONS`).
    """
    chunks = [weights[start : start + CHUNK_SIZE].astype(float) for start in range(0, len(weights), CHUNK_SIZE)]
    labels, predicted = np.asarray(labels, dtype=float), np.asarray(predicted, dtype=float)
    values = np.concatenate([_threshold_metrics(labels, predicted, chunk) for chunk in chunks])
    table = pd.DataFrame(values, columns=THRESHOLD_METRICS)
    if probabilities is None:
        return table
    probabilities = np.asarray(probabilities, dtype=float)
    scores = probabilities if scores is None else np.asarray(scores, dtype=float)
    values = np.concatenate([_score_metrics(labels, probabilities, scores, chunk) for chunk in chunks])
    return pd.concat([table, pd.DataFrame(values, columns=SCORE_METRICS)], axis="columns")


def apply_threshold(probabilities: Probabilities, threshold: float = DEFAULT_THRESHOLD) -> Probabilities:
    """Return the labels, 0 or 1, predicted by P(positive) at an operating point."""
    return (probabilities >= threshold).astype(int)


def has_single_class(labels: ArrayLike) -> bool:
    """Return whether the labels lack one of the classes, so that metrics that need both are undefined."""
    return len(np.unique(labels)) < 2


def count_groups(labels: np.ndarray, groups: np.ndarray) -> tuple[int, int]:
    """Return the numbers of groups with a positive image and of groups with a negative one."""
    positive, negative = (len(np.unique(groups[labels == label])) for label in (1, 0))
    return positive, negative


def mean_group_size(groups: np.ndarray) -> float:
    """Return the number of images in the group of an image, on average over the images."""
    _, sizes = np.unique(groups, return_counts=True)
    return float((sizes**2).sum() / sizes.sum())


def bin_indices(probabilities: np.ndarray) -> np.ndarray:
    """Return the calibration bin, 0 to `BIN_COUNT` − 1, of each probability."""
    index: np.ndarray = np.minimum((np.asarray(probabilities) * BIN_COUNT).astype(int), BIN_COUNT - 1)
    return index


def best_model(models: Mapping[str, Scores]) -> str:
    """Return the name of the model with the highest F1; ties go to the lowest loss, then to the first."""
    return max(models, key=lambda name: (models[name]["f1"], -(models[name]["loss"] or 0)))


def kept_epoch(history: Sequence[Scores], keep: Keep) -> int:
    """Return the index of the epoch whose weights are kept; a later one wins a tie.

    Args:
        history: the validation scores after every epoch.
        keep: `best_f1`, `best_loss` or `last`.
    """
    score: Callable[[Scores], float] = {
        "best_f1": lambda scores: scores["f1"],
        "best_loss": lambda scores: -(scores["loss"] or 0),
        "last": lambda _: 0,
    }[keep]
    return max(range(len(history)), key=lambda index: (score(history[index]), index))


def metrics_of_counts(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray) -> np.ndarray:
    """Compute `THRESHOLD_METRICS` from confusion matrices.

    Args:
        tp: (R,), true positives; counts, or shares of any total.
        fp: (R,), false positives.
        fn: (R,), false negatives.
        tn: (R,), true negatives.

    Returns:
        (R, metrics); NaN where a metric is undefined.
    """
    positives, negatives, predicted_positives, predicted_negatives = tp + fn, fp + tn, tp + fp, fn + tn
    recall, specificity = _divide(tp, positives), _divide(tn, negatives)
    f1 = np.where(positives > 0, _divide(2 * tp, 2 * tp + fp + fn), np.nan)
    marginals = np.sqrt((positives * negatives) * (predicted_positives * predicted_negatives))
    return np.stack(
        [
            (tp + tn) / (positives + negatives),
            f1,
            recall,
            _divide(tp, predicted_positives),
            specificity,
            (recall + specificity) / 2,
            _divide(tn, predicted_negatives),
            _divide(tp * tn - fp * fn, marginals),
            _divide(recall, _divide(fp, negatives)),
            _divide(_divide(fn, positives), specificity),
        ],
        axis=1,
    )


def confusion_cells(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return whether every image is a true positive, false positive, false negative or true negative, (N, 4)."""
    labels, predicted = np.asarray(labels, dtype=float), np.asarray(predicted, dtype=float)
    return np.column_stack(
        [labels * predicted, (1 - labels) * predicted, labels * (1 - predicted), (1 - labels) * (1 - predicted)]
    )


def log_losses(is_positive: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the log loss of every image, from whether it is positive and P(positive)."""
    losses: np.ndarray = -np.log(np.clip(np.where(is_positive, probabilities, 1 - probabilities), EPS, 1))
    return losses


def _threshold_metrics(labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return metrics_of_counts(*(weights @ confusion_cells(labels, predicted)).T)


def _score_metrics(
    labels: np.ndarray, probabilities: np.ndarray, scores: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    image_losses = log_losses(labels == 1, probabilities), (probabilities - labels) ** 2
    gaps = np.eye(BIN_COUNT)[bin_indices(probabilities)] * (probabilities - labels)[:, None]
    total = weights.sum(axis=1)
    # Unlike a product of matrices, these sums do not depend on the number of threads in their last digits.
    loss, brier = ((weights * losses).sum(axis=1) / total for losses in image_losses)
    calibration_error = np.abs(weights @ gaps / total[:, None]).sum(axis=1)

    # True and false positives at each distinct score as the threshold, from the highest down.
    order = np.argsort(-scores, kind="stable")
    is_last_of_ties = np.append(np.diff(scores[order]) != 0, True)
    sorted_weights = weights[:, order]
    tp, predicted_positive = (
        np.cumsum(values, axis=1)[:, is_last_of_ties] for values in (sorted_weights * labels[order], sorted_weights)
    )
    fp = predicted_positive - tp
    new_tp, new_fp = (np.diff(values, axis=1, prepend=0) for values in (tp, fp))
    positives, negatives = tp[:, -1], fp[:, -1]
    auroc = _divide((new_fp * (tp - new_tp / 2)).sum(axis=1), positives * negatives)
    precision_sum = (new_tp * tp / np.maximum(predicted_positive, 1)).sum(axis=1)
    average_precision = np.where(negatives > 0, _divide(precision_sum, positives), np.nan)
    return np.stack([loss, auroc, average_precision, brier, calibration_error], axis=1)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide; NaN where the denominator is 0."""
    shares: np.ndarray = np.divide(numerator, denominator, out=np.full(len(denominator), np.nan), where=denominator > 0)
    return shares
