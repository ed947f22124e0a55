"""Calibration of predicted probabilities: error, reliability curve, temperature and Platt scaling."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from pipeline.evaluation.metrics import bin_indices, compute_metrics, has_single_class

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


def reliability_curve(labels: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """Return a row per non-empty bin: `bin`, `images`, mean `probability` and `positives`, the share of positives."""
    table = pd.DataFrame(
        {"bin": bin_indices(probabilities), "probability": np.asarray(probabilities, float), "label": labels}
    )
    bins = table.groupby("bin").agg(
        images=("label", "size"), probability=("probability", "mean"), positives=("label", "mean")
    )
    return bins.reset_index()


@dataclass(frozen=True)
class Recalibrator:
    """Recalibrates P(positive): its logit is divided by `temperature`, then `bias` is added."""

    temperature: float
    bias: float = 0.0

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
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
    """Fit temperature and bias (Platt 1999).

    Weighted sampling shifts all logits by a constant, which a temperature alone cannot correct, and estimates of label
    shift need calibrated probabilities (Alexandari, Kundaje and Shrikumar 2020, arXiv:1901.06852).

    Returns:
        None for a single class, or if the share of positives does not increase with the probability.
    """
    from sklearn.linear_model import LogisticRegression

    if has_single_class(labels):
        return None
    # The weak penalty keeps the coefficients finite if the classes are separable.
    model = LogisticRegression(C=1e3).fit(log_odds(probabilities)[:, None], labels)
    slope, bias = float(model.coef_[0, 0]), float(model.intercept_[0])
    return Recalibrator(1 / slope, bias) if slope > np.exp(-MAX_LOG_TEMPERATURE) else None
