"""Calibration of predicted probabilities: error, reliability curve, temperature and Platt scaling."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from pipeline.core.config import Recalibration
from pipeline.evaluation.metrics import CONFIDENCE_LEVEL, bin_indices, compute_metrics, has_single_class

PROBABILITY_EPS = 1e-7  # distance from 0 and 1 to which probabilities are clipped; about the precision of float32
MAX_LOG_TEMPERATURE = 4.0  # bound on |log temperature|; without it, the optimum for perfect predictions would be 0


def log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Return the log odds; clipping keeps those of 0 and 1 finite."""
    return np.asarray(logit(np.clip(np.asarray(probabilities, dtype=float), PROBABILITY_EPS, 1 - PROBABILITY_EPS)))


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the expected calibration error, in [0, 1]; see `compute_metrics`.

    Args:
        labels: (N,), 0 or 1.
        probabilities: (N,), P(positive).
    """
    metrics = compute_metrics(labels, np.zeros(len(labels)), probabilities, np.ones((1, len(labels))))
    return float(metrics["calibration_error"][0])


def reliability_curve(labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray | None = None) -> pd.DataFrame:
    """Compare predicted probabilities with the observed share of positives, bin by bin.

    Args:
        labels: (N,), 0 or 1.
        probabilities: (N,), P(positive).
        groups: (N,), the name of each image's group; by default, every image is its own.

    Returns:
        A row per non-empty bin: `bin`, the numbers of `images`, `positive_images`, `groups`, `positive_groups` (with a
        positive image) and `negative_groups`, the mean `probability`, the share of `positives`, and `low` and `high`,
        Jeffreys' 95 % interval (Brown, Cai and DasGupta 2001) of that share, for which a group counts as one
        observation.
    """
    table = pd.DataFrame(
        {
            "bin": bin_indices(probabilities),
            "probability": np.asarray(probabilities, float),
            "label": labels,
            "group": np.arange(len(labels)) if groups is None else groups,
        }
    )
    group = table["group"]
    table = table.assign(positive=group.where(table["label"] == 1), negative=group.where(table["label"] == 0))
    bins = table.groupby("bin").agg(
        images=("label", "size"),
        groups=("group", "nunique"),
        positive_groups=("positive", "nunique"),
        negative_groups=("negative", "nunique"),
        positive_images=("label", "sum"),
        probability=("probability", "mean"),
        positives=("label", "mean"),
    )
    successes = bins["positives"] * bins["groups"]
    failures = bins["groups"] - successes
    from scipy.stats import beta

    # By convention, the interval of no (or only) positives reaches to 0 (or 1).
    low, high = beta.interval(CONFIDENCE_LEVEL, successes + 0.5, failures + 0.5)
    bins = bins.assign(low=np.where(successes == 0, 0, low), high=np.where(failures == 0, 1, high))
    return bins.reset_index()


@dataclass(frozen=True)
class Recalibrator:
    """Recalibrates P(positive): its logit is divided by `temperature`, then `bias` is added.

    `reason` says why it is the identity, if nothing was fitted. The identity returns probabilities unchanged.
    """

    temperature: float = 1.0
    bias: float = 0.0
    reason: str = ""

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        if (self.temperature, self.bias) == (1, 0):
            return np.asarray(probabilities, dtype=float)
        return np.asarray(expit(log_odds(probabilities) / self.temperature + self.bias))


RecalibratorFit = Callable[[np.ndarray, np.ndarray], Recalibrator | None]


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> Recalibrator | None:
    """Fit a temperature by maximum likelihood (Guo, Pleiss, Sun and Weinberger 2017); None for a single class."""
    if has_single_class(labels):
        return None
    logits, signs = log_odds(probabilities), 2 * np.asarray(labels, dtype=float) - 1

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, -signs * logits / np.exp(log_temperature)).mean())

    result = minimize_scalar(loss, bounds=(-MAX_LOG_TEMPERATURE, MAX_LOG_TEMPERATURE), method="bounded")
    return Recalibrator(float(np.exp(result.x)))


def fit_platt(labels: np.ndarray, probabilities: np.ndarray) -> Recalibrator | None:
    """Fit temperature and bias to smoothed labels (Platt 1999).

    Weighted sampling shifts all logits by a constant, which a temperature alone cannot correct, and estimates of label
    shift need calibrated probabilities (Alexandari, Kundaje and Shrikumar 2020, arXiv:1901.06852). Platt's targets,
    (positives + 1) / (positives + 2) and 1 / (negatives + 2), keep few or separable images from giving probabilities
    near 0 and 1.

    Returns:
        None for a single class, or if the share of positives does not increase with the probability.
    """
    from sklearn.linear_model import LogisticRegression

    if has_single_class(labels):
        return None
    labels = np.asarray(labels, dtype=int)
    negatives, positives = np.bincount(labels)
    targets = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    # An image with target t is one positive with weight t and one negative with weight 1 - t.
    logits, ones = np.tile(log_odds(probabilities), 2)[:, None], np.ones(len(labels), int)
    weights = np.concatenate([targets, 1 - targets])
    model = LogisticRegression(C=1e3, solver="newton-cholesky").fit(logits, np.concatenate([ones, 0 * ones]), weights)
    slope, bias = float(model.coef_[0, 0]), float(model.intercept_[0])
    return Recalibrator(1 / slope, bias) if slope > np.exp(-MAX_LOG_TEMPERATURE) else None


def fit_recalibrator(labels: np.ndarray, scores: np.ndarray, method: Recalibration) -> Recalibrator:
    """Fit the recalibration `method`; where that is impossible, return the identity with the reason.

    Args:
        labels: (N,), 0 or 1.
        scores: (N,), in [0, 1].
        method: none, temperature or platt.
    """
    if method == "none":
        return Recalibrator(reason="recalibration: none")
    if has_single_class(labels):
        return Recalibrator(reason="images of one class only")
    fitted = fit_temperature(labels, scores) if method == "temperature" else fit_platt(labels, scores)
    return fitted or Recalibrator(reason="higher scores do not mean more positives")
