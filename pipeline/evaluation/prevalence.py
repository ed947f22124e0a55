"""What a model is worth where the disease is more or less common than on the validation set."""

from typing import TypedDict

import numpy as np

PREVALENCES = [0.01, 0.02, 0.05, *(tenth / 10 for tenth in range(1, 10))]
MAX_ITERATIONS, TOLERANCE = 1000, 1e-9


def metrics_at_prevalence(
    sensitivity: float | np.ndarray, specificity: float | np.ndarray, prevalence: float | np.ndarray
) -> dict[str, np.ndarray]:
    """Carry sensitivity and specificity, which are of the classes, to another prevalence (Bayes' rule).

    Args:
        sensitivity: in [0, 1].
        specificity: in [0, 1].
        prevalence: in (0, 1); the three are numbers or arrays that fit one another.

    Returns:
        `accuracy`, `ppv` and `npv`; NaN where nothing is called so.
    """
    hit, missed = np.multiply(prevalence, sensitivity), np.multiply(prevalence, np.subtract(1, sensitivity))
    alarm = np.multiply(np.subtract(1, prevalence), np.subtract(1, specificity))
    passed = np.multiply(np.subtract(1, prevalence), specificity)
    with np.errstate(invalid="ignore"):
        return {"accuracy": hit + passed, "ppv": hit / (hit + alarm), "npv": passed / (passed + missed)}


class LabelShift(TypedDict):
    prevalence: float
    probabilities: np.ndarray


def adapt_label_shift(probabilities: np.ndarray, prior: float) -> LabelShift:
    """Adapt predictions to the prevalence of unlabeled images (Saerens, Latinne and Decaestecker 2002).

    Its assumption is label shift: each class looks as it did, only their shares have changed. EM on the images then
    gives the most likely prevalence.

    Args:
        probabilities: (N,), calibrated P(positive) of the new images.
        prior: the prevalence for which they are calibrated, in (0, 1).

    Returns:
        The estimated `prevalence`, in [0, 1], and the `probabilities` at it.
    """
    given = np.asarray(probabilities, dtype=float)
    prevalence = prior
    posterior = given
    for _ in range(MAX_ITERATIONS):
        positive, negative = given * prevalence / prior, (1 - given) * (1 - prevalence) / (1 - prior)
        posterior = positive / (positive + negative)
        moved = float(posterior.mean()) - prevalence
        prevalence += moved
        if abs(moved) < TOLERANCE:
            break
    return {"prevalence": prevalence, "probabilities": posterior}
