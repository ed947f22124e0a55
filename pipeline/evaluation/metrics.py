"""What a table of predictions is worth. Figures that cannot be had are None."""

from collections.abc import Mapping
from typing import TypedDict, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

METRIC_LABELS = {
    "accuracy": "accuracy", "f1": "F1", "recall": "sensitivity", "precision": "PPV", "specificity": "specificity",
    "balanced_accuracy": "balanced accuracy", "loss": "loss", "auroc": "AUROC",
    "average_precision": "average precision", "brier": "Brier score", "calibration_error": "calibration error",
}  # fmt: skip
LOWER_IS_BETTER = ["loss", "brier", "calibration_error"]
DEFAULT_THRESHOLD = 0.5  # the operating point: P(positive) from which an image is called positive


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
    """Score predictions of one model.

    Args:
        labels: (N,), 0 or 1.
        probabilities: (N,), P(positive) in [0, 1].
        predicted: (N,), 0 or 1; by default what `THRESHOLD` makes of the probabilities.

    Returns:
        `recall` is the sensitivity, `precision` the PPV, `loss` the mean cross-entropy in nats. What divides by
        an empty class is None; `f1` is 0 without a true positive.
    """
    # A training begins a second sooner when it imports this at its first validation.
    from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, log_loss, roc_auc_score

    labels = np.asarray(labels, dtype=int)
    probabilities = np.asarray(probabilities, dtype=float)
    if predicted is None:
        predicted = apply_threshold(probabilities)
    (tn, fp), (fn, tp) = confusion_matrix(labels, predicted, labels=[0, 1]).tolist()
    recall, specificity = _share(tp, tp + fn), _share(tn, tn + fp)
    both = not has_single_class(labels)
    return {
        "loss": float(log_loss(labels, probabilities, labels=[0, 1])),
        "accuracy": (tp + tn) / len(labels),
        "f1": float(f1_score(labels, predicted, zero_division=0)),
        "recall": recall,
        "precision": _share(tp, tp + fp),
        "specificity": specificity,
        "balanced_accuracy": (recall + specificity) / 2 if recall is not None and specificity is not None else None,
        "auroc": float(roc_auc_score(labels, probabilities)) if both else None,
        "average_precision": float(average_precision_score(labels, probabilities)) if both else None,
    }


def apply_threshold(probabilities: Probabilities, threshold: float = DEFAULT_THRESHOLD) -> Probabilities:
    """Return the labels, 0 or 1, that the operating point makes of P(positive)."""
    return (probabilities >= threshold).astype(int)


def has_single_class(labels: ArrayLike) -> bool:
    """Tell whether there are no labels of two kinds, so that what needs both cannot be had."""
    return len(np.unique(labels)) < 2


def best_model(models: Mapping[str, Scores]) -> str:
    """Return the name of the model with the highest F1, the lowest loss among equals, the first among those."""
    return max(models, key=lambda name: (models[name]["f1"], -(models[name]["loss"] or 0)))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
