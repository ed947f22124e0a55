"""Selection of the operating point, the threshold on P(positive), on the validation set."""

import numpy as np
import pandas as pd

from pipeline.core.config import EvaluateParams
from pipeline.evaluation.metrics import DEFAULT_THRESHOLD, has_single_class


def choose_threshold(labels: np.ndarray, probabilities: np.ndarray, params: EvaluateParams) -> float:
    """Choose a threshold by the rule `operating_point`.

    `half` is always 0.5. `best_f1` maximizes F1, `youden` the sum of sensitivity and specificity (Youden 1950), and
    `sensitivity` the specificity subject to a sensitivity of at least `min_sensitivity`.

    Args:
        labels: (N,), 0 or 1.
        probabilities: (N,), P(positive).
        params: contains the rule.

    Returns:
        A threshold midway between two neighboring probabilities, so that rounding cannot change a prediction; among
        equally good ones the nearest to 0.5. It is 0.5 for a single class.
    """
    labels, probabilities = np.asarray(labels, dtype=int), np.asarray(probabilities, dtype=float)
    if params.operating_point == "half" or has_single_class(labels):
        return DEFAULT_THRESHOLD
    values = np.unique(probabilities)
    thresholds = np.append(values[0] / 2, (values[1:] + values[:-1]) / 2)
    # In each sorted class, the images from the threshold on are predicted positive.
    positives, negatives = (np.sort(probabilities[labels == label]) for label in (1, 0))
    tp = len(positives) - np.searchsorted(positives, thresholds)
    fp = len(negatives) - np.searchsorted(negatives, thresholds)
    sensitivity, specificity = tp / len(positives), 1 - fp / len(negatives)
    objective = {
        "best_f1": 2 * tp / (tp + fp + len(positives)),
        "youden": sensitivity + specificity,
        "sensitivity": np.where(sensitivity >= params.min_sensitivity, specificity, -1),
    }[params.operating_point]
    best = thresholds[objective >= objective.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - DEFAULT_THRESHOLD))])


def choose_thresholds(labels: np.ndarray, models: pd.DataFrame, params: EvaluateParams) -> pd.Series:
    """Choose the threshold of every model; `models` has a column of P(positive) per model."""
    return models.apply(lambda column: choose_threshold(labels, column.to_numpy(), params))
