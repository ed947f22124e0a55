"""Metrics at other prevalences than that of the validation set, and adaptation of predictions to label shift."""

from typing import TypedDict

import numpy as np

PREVALENCES = [0.01, 0.02, 0.05, *(tenth / 10 for tenth in range(1, 10))]
MAX_ITERATIONS, TOLERANCE = 1000, 1e-9


def metrics_at_prevalence(
    sensitivity: float | np.ndarray, specificity: float | np.ndarray, prevalence: float | np.ndarray
) -> dict[str, np.ndarray]:
    """Compute metrics at a prevalence by Bayes' rule; sensitivity and specificity are assumed not to depend on it.

    Args:
        sensitivity: in [0, 1].
        specificity: in [0, 1].
        prevalence: in (0, 1); the three are scalars or arrays that broadcast.

    Returns:
        `accuracy`, `ppv` and `npv`; a predictive value is NaN where no image gets that prediction.
    """
    tp, fn = np.multiply(prevalence, sensitivity), np.multiply(prevalence, np.subtract(1, sensitivity))
    fp = np.multiply(np.subtract(1, prevalence), np.subtract(1, specificity))
    tn = np.multiply(np.subtract(1, prevalence), specificity)
    with np.errstate(invalid="ignore"):
        return {"accuracy": tp + tn, "ppv": tp / (tp + fp), "npv": tn / (tn + fn)}


class LabelShift(TypedDict):
    prevalence: float
    probabilities: np.ndarray


def adapt_label_shift(probabilities: np.ndarray, prior: float) -> LabelShift:
    """Adapt predictions to the prevalence of unlabeled images (Saerens, Latinne and Decaestecker 2002).

    It assumes label shift: images of each class are distributed as before, and only the class proportions differ. An
    EM algorithm on the images estimates the prevalence by maximum likelihood.

    Args:
        probabilities: (N,), calibrated P(positive) of the new images.
        prior: the prevalence for which they are calibrated, in (0, 1).

    Returns:
        The estimated `prevalence`, in [0, 1], and the `probabilities` at it.
    """
    calibrated = np.asarray(probabilities, dtype=float)
    prevalence = prior
    posterior = calibrated
    for _ in range(MAX_ITERATIONS):
        positive, negative = calibrated * prevalence / prior, (1 - calibrated) * (1 - prevalence) / (1 - prior)
        posterior = positive / (positive + negative)
        change = float(posterior.mean()) - prevalence
        prevalence += change
        if abs(change) < TOLERANCE:
            break
    return {"prevalence": prevalence, "probabilities": posterior}
