"""Decision curve analysis: the net benefit of acting on predictions (Vickers and Elkin 2006)."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy.special import expit, logit

from pipeline.evaluation.calibration import log_odds
from pipeline.evaluation.metrics import has_single_class

THRESHOLDS = np.arange(1, 100) / 100  # probabilities from which on images are treated
COLUMNS = ["prevalence", "threshold", "net_benefit", "treat_all", "treat_none"]


def net_benefit(
    sensitivity: np.ndarray, specificity: np.ndarray, prevalence: float, thresholds: np.ndarray
) -> np.ndarray:
    """Return true positives minus weighted false positives, per image (Vickers and Elkin 2006).

    Who acts from a probability t on considers a false positive t / (1 − t) times as bad as a missed positive. At the
    prevalence of the images, it is TP / N − FP / N · t / (1 − t).

    Args:
        sensitivity: of acting from each threshold on, in [0, 1].
        specificity: the same.
        prevalence: in [0, 1].
        thresholds: probabilities, in [0, 1); the three arrays have one shape.
    """
    weights = thresholds / (1 - thresholds)
    return np.asarray(sensitivity * prevalence - (1 - specificity) * (1 - prevalence) * weights)


def decision_curve(labels: np.ndarray, probabilities: np.ndarray, prevalences: Iterable[float] = ()) -> pd.DataFrame:
    """Compute the net benefit of a model and of treating all or none, at `THRESHOLDS`.

    At another prevalence than that of the images, sensitivity and specificity are assumed not to depend on it, and the
    probabilities are shifted to it by Bayes' rule.

    Args:
        labels: (N,), 0 or 1.
        probabilities: (N,), calibrated P(positive) at the prevalence of these images, predicted by a model that was not
            fitted on them.
        prevalences: where to compute the curve besides, in (0, 1).

    Returns:
        `COLUMNS`, a row per threshold for the prevalence of the images, then for each of `prevalences`. Without both
        classes, or with a missing probability, there are no rows.
    """
    labels, probabilities = np.asarray(labels, dtype=int), np.asarray(probabilities, dtype=float)
    if has_single_class(labels) or np.isnan(probabilities).any():
        return pd.DataFrame(columns=COLUMNS)
    observed, tables = float(labels.mean()), []
    for prevalence in dict.fromkeys([observed, *prevalences]):
        shift = logit(prevalence) - logit(observed)
        shifted = expit(log_odds(probabilities) + shift) if shift else probabilities
        # In each sorted class, the images from the threshold on are treated.
        sensitivity, false_positive_rate = (
            1 - np.searchsorted(np.sort(shifted[labels == label]), THRESHOLDS) / (labels == label).sum()
            for label in (1, 0)
        )
        columns = {
            "prevalence": prevalence,
            "threshold": THRESHOLDS,
            "net_benefit": net_benefit(sensitivity, 1 - false_positive_rate, prevalence, THRESHOLDS),
            "treat_all": net_benefit(np.ones(len(THRESHOLDS)), np.zeros(len(THRESHOLDS)), prevalence, THRESHOLDS),
            "treat_none": 0.0,
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)
