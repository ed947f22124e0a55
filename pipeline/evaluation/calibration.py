"""Whether probabilities mean what they say, and what makes them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from pipeline.evaluation.metrics import has_single_class

BIN_COUNT = 10  # of equal width, into which probabilities are sorted
PROBABILITY_EPS = 1e-7  # a float32 that says 1 is at least this far from it
MAX_LOG_TEMPERATURE = 4.0  # of the logarithm of a temperature; probabilities that are never wrong would ask for 0


def log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Return the log odds, finite also where a probability is rounded to 0 or 1."""
    return np.asarray(logit(np.clip(np.asarray(probabilities, dtype=float), PROBABILITY_EPS, 1 - PROBABILITY_EPS)))


def bin_indices(probabilities: np.ndarray) -> np.ndarray:
    """Return the bin, 0 to BINS − 1, of each probability."""
    index: np.ndarray = np.minimum((np.asarray(probabilities) * BIN_COUNT).astype(int), BIN_COUNT - 1)
    return index


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the expected calibration error (Naeini, Cooper and Hauskrecht 2015).

    Args:
        labels: (N,), 0 or 1.
        probabilities: (N,), P(positive).

    Returns:
        The mean distance, in [0, 1], between the probability of a bin and its share of positives, weighted by images.
    """
    gaps = np.bincount(bin_indices(probabilities), np.asarray(probabilities, dtype=float) - labels, BIN_COUNT)
    return float(np.abs(gaps).sum() / len(labels))


def reliability_curve(labels: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """Return a row per bin that has images: `bin`, `images`, mean `probability` and `positives`, their share."""
    table = pd.DataFrame(
        {"bin": bin_indices(probabilities), "probability": np.asarray(probabilities, float), "label": labels}
    )
    found = table.groupby("bin").agg(
        images=("label", "size"), probability=("probability", "mean"), positives=("label", "mean")
    )
    return found.reset_index()


@dataclass(frozen=True)
class Recalibrator:
    """Makes P(positive) of a logit divided by `temperature`, plus `bias`."""

    temperature: float
    bias: float = 0.0

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        return np.asarray(expit(log_odds(probabilities) / self.temperature + self.bias))


RecalibratorFit = Callable[[np.ndarray, np.ndarray], Recalibrator | None]


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> Recalibrator | None:
    """Fit a temperature (Guo, Pleiss, Sun and Weinberger 2017) by likelihood; None where there is one class only."""
    if has_single_class(labels):
        return None
    odds, signs = log_odds(probabilities), 2 * np.asarray(labels, dtype=float) - 1

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, -signs * odds / np.exp(log_temperature)).mean())

    found = minimize_scalar(loss, bounds=(-MAX_LOG_TEMPERATURE, MAX_LOG_TEMPERATURE), method="bounded")
    return Recalibrator(float(np.exp(found.x)))


def fit_platt(labels: np.ndarray, probabilities: np.ndarray) -> Recalibrator | None:
    """Fit temperature and bias (Platt 1999), without which no shift of prevalence is estimated well.

    Weighted sampling moves all logits by a constant, which a temperature alone cannot mend (Alexandari, Kundaje and
    Shrikumar 2020, arXiv:1901.06852).

    Returns:
        None where there is one class only, or where higher probabilities do not mean more positives.
    """
    from sklearn.linear_model import LogisticRegression

    if has_single_class(labels):
        return None
    # The weak penalty keeps it finite where the classes do not overlap.
    fitted = LogisticRegression(C=1e3).fit(log_odds(probabilities)[:, None], labels)
    slope, bias = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    return Recalibrator(1 / slope, bias) if slope > np.exp(-MAX_LOG_TEMPERATURE) else None
