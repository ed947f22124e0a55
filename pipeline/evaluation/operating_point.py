"""The operating point: the threshold from which P(positive) is called positive, chosen on the validation set."""

import numpy as np
import pandas as pd

from pipeline.core.config import EvaluateParams
from pipeline.evaluation.metrics import DEFAULT_THRESHOLD, has_single_class


def choose_threshold(labels: np.ndarray, probabilities: np.ndarray, params: EvaluateParams) -> float:
    """Choose a threshold by the rule `operating_point`.

    `half` is 0.5 whatever the images say. `best_f1` has the highest F1, `youden` the highest sum of sensitivity and
    specificity (Youden 1950), and `sensitivity` the highest specificity where the sensitivity is at least
    `min_sensitivity`.

    Args:
        labels: (N,), 0 or 1.
        probabilities: (N,), P(positive).
        params: with the rule.

    Returns:
        A threshold between two probabilities of the images, so that no rounding moves an image across it; of equally
        good ones the nearest to 0.5. It is 0.5 where there is one class only.
    """
    labels, probabilities = np.asarray(labels, dtype=int), np.asarray(probabilities, dtype=float)
    if params.operating_point == "half" or has_single_class(labels):
        return DEFAULT_THRESHOLD
    values = np.unique(probabilities)
    thresholds = np.append(values[0] / 2, (values[1:] + values[:-1]) / 2)
    # Of each class, sorted, those from the threshold on are called positive.
    positives, negatives = (np.sort(probabilities[labels == label]) for label in (1, 0))
    tp = len(positives) - np.searchsorted(positives, thresholds)
    fp = len(negatives) - np.searchsorted(negatives, thresholds)
    sensitivity, specificity = tp / len(positives), 1 - fp / len(negatives)
    worth = {
        "best_f1": 2 * tp / (tp + fp + len(positives)),
        "youden": sensitivity + specificity,
        "sensitivity": np.where(sensitivity >= params.min_sensitivity, specificity, -1),
    }[params.operating_point]
    best = thresholds[worth >= worth.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - DEFAULT_THRESHOLD))])


def choose_thresholds(labels: np.ndarray, models: pd.DataFrame, params: EvaluateParams) -> pd.Series:
    """Choose the threshold of every model, one column of P(positive) each."""
    return models.apply(lambda column: choose_threshold(labels, column.to_numpy(), params))
