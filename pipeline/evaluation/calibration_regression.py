"""Calibration intercept and slope (Cox 1958; Van Calster et al. 2019, doi:10.1186/s12916-019-1466-7)."""

import numpy as np
from scipy.special import expit

from pipeline.evaluation.calibration import log_odds
from pipeline.evaluation.metrics import has_single_class

MAX_ITERATIONS, TOLERANCE = 100, 1e-9
MAX_STEP = 2.0  # of one iteration; nearly separable classes make Newton's method overshoot


def fit_calibration(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit logistic regressions of the label on the logit of P(positive).

    The intercept is fitted with slope 1: 0 means that probabilities are right on average, a negative one that they are
    too high. The slope is fitted with its own intercept: 1 is ideal, a smaller one means too extreme probabilities.

    Args:
        labels: (N,), 0 or 1.
        probabilities: (N,), P(positive).

    Returns:
        Intercept and slope (2,), and the influence of every image on them (N, 2). NaN for a single class and, for the
        slope, if the probabilities separate the classes or are all equal.
    """
    labels = np.asarray(labels, dtype=float)
    estimates, influences = np.full(2, np.nan), np.full((len(labels), 2), np.nan)
    if has_single_class(labels):
        return estimates, influences
    logits = log_odds(probabilities)
    ones = np.ones((len(labels), 1))
    fits = [(ones, logits)]
    negatives, positives = logits[labels == 0], logits[labels == 1]
    if negatives.max() > positives.min() and positives.max() > negatives.min():  # otherwise, no slope is steep enough
        fits.append((np.column_stack([logits - logits.mean(), ones]), np.zeros(len(labels))))
    for column, (features, offset) in enumerate(fits):
        fitted = _fit_logistic(labels, features, offset)
        if fitted is not None:
            estimates[column], influences[:, column] = fitted
    return estimates, influences


def _fit_logistic(labels: np.ndarray, features: np.ndarray, offset: np.ndarray) -> tuple[float, np.ndarray] | None:
    """Return the first coefficient and the influence of every image on it (N,); None if there is no finite optimum."""
    coefficients = np.zeros(features.shape[1])
    for _ in range(MAX_ITERATIONS):
        fitted = expit(features @ coefficients + offset)
        information = features.T @ (features * (fitted * (1 - fitted))[:, None])
        scores = features * (labels - fitted)[:, None]
        try:
            influence = np.linalg.solve(information, scores.T)
        except np.linalg.LinAlgError:
            return None
        step = influence.sum(axis=1)
        if np.abs(step).max() < TOLERANCE:
            return float(coefficients[0]), influence[0]
        coefficients += step / max(1, np.abs(step).max() / MAX_STEP)
    return None
