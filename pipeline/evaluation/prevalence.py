"""Metrics at other prevalences than that of the validation set, and adaptation of predictions to label shift."""

from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
from scipy.special import expit, logit

from pipeline.evaluation.calibration import log_odds
from pipeline.evaluation.intervals import bootstrap_weights, percentile_ends, smaller_group_count
from pipeline.evaluation.metrics import CONFIDENCE_LEVEL, has_single_class, mean_group_size

PREVALENCES = [0.01, 0.02, 0.05, *(tenth / 10 for tenth in range(1, 10))]
MAX_ITERATIONS, TOLERANCE = 1000, 1e-9
NEWTON_STEPS, BISECTIONS = 25, 30
SLOPE_PENALTY = 1e-3  # as in `calibration.fit_platt`: keeps the slope finite if the classes are separable
MAX_LOG_RATIO = 30.0  # bound on the log likelihood ratio of the classes
MIN_PATIENTS = 5  # labeled, of each class; with fewer, the interval of a difference excludes 0 too often
AT_BORDER = 5e-4  # of 0 or 1: a prevalence that is shown as 0.0 % or 100.0 %
RESAMPLES = 500  # of the interval of the prevalence; its ends then vary by about a tenth of its width


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


def change_prevalence(probabilities: np.ndarray, prior: float, prevalence: float) -> np.ndarray:
    """Convert probabilities that are calibrated for one prevalence to another by Bayes' rule, under label shift.

    Args:
        probabilities: (N,), P(positive).
        prior: the prevalence for which they are calibrated, in (0, 1).
        prevalence: the new one, in [0, 1].

    Returns:
        (N,), P(positive).
    """
    positive, negative = probabilities * prevalence / prior, (1 - probabilities) * (1 - prevalence) / (1 - prior)
    return np.asarray(positive / (positive + negative))


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
        posterior = change_prevalence(calibrated, prior, prevalence)
        change = float(posterior.mean()) - prevalence
        prevalence += change
        if abs(change) < TOLERANCE:
            break
    return {"prevalence": prevalence, "probabilities": posterior}


@dataclass(frozen=True)
class PrevalenceEstimate:
    """The prevalence of unlabeled images, and its difference from that of the labeled ones, with 95 % intervals.

    Attributes:
        probabilities: of the unlabeled images, calibrated for their estimated prevalence.
        reason: why there is no estimate or no interval, else empty.
    """

    probabilities: np.ndarray
    prevalence: float = np.nan
    low: float = np.nan
    high: float = np.nan
    difference: float = np.nan
    difference_low: float = np.nan
    difference_high: float = np.nan
    reason: str = ""

    @property
    def differs(self) -> bool:
        """Whether the interval of the difference excludes 0; False without an interval."""
        return self.difference_low > 0 or self.difference_high < 0


def estimate_prevalence(
    labels: np.ndarray,
    scores: np.ndarray,
    groups: np.ndarray,
    new_scores: np.ndarray,
    new_groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
) -> PrevalenceEstimate:
    """Estimate the prevalence of unlabeled images under label shift, with a 95 % confidence interval.

    The estimate is that of `adapt_label_shift` on scores calibrated with `calibration.fit_platt`'s model. The interval
    is a percentile bootstrap that resamples the groups of both sets and refits the calibration on every resample,
    because with few positive images the calibration is the less certain part. Within `AT_BORDER` of 0 or 1 resamples do
    not vary; there the interval reaches to the exact end (Clopper and Pearson 1934) of as many groups, and that of the
    difference to this end less the opposite end of the interval of the labeled images' prevalence.

    Args:
        labels: (N,), of the labeled images, 0 or 1.
        scores: (N,), P(positive), not necessarily calibrated.
        groups: (N,), the name of each image's group.
        new_scores: (M,), of the unlabeled images.
        new_groups: (M,); None if unknown: then the new images are assumed to be grouped like the labeled ones, images
            of like scores together.
        resamples: number of bootstrap resamples.

    Returns:
        NaN and the `reason` without images to estimate from, for a single class, or if the share of positives does not
        increase with the score. No interval for one patient, or fewer than `MIN_PATIENTS` of a class.
    """
    labels, scores, new_scores = (np.asarray(values, dtype=float) for values in (labels, scores, new_scores))
    unavailable = PrevalenceEstimate(np.full(len(new_scores), np.nan))
    if not len(new_scores):
        return replace(unavailable, reason="no test images")
    if has_single_class(labels):
        return replace(unavailable, reason="labeled images of one class only")
    if new_groups is None:
        new_groups = np.argsort(np.argsort(new_scores)) // mean_group_size(groups)
    logits, new_logits = log_odds(scores), log_odds(new_scores)
    weights, new_weights = bootstrap_weights(groups, resamples), bootstrap_weights(new_groups, resamples)
    # In reverse order, so that the resamples of the two sets do not come from the same random numbers.
    new_weights[1:] = new_weights[:0:-1].copy()
    reason = "one patient only" if min(len(weights), len(new_weights)) == 1 else ""
    if not reason and smaller_group_count(labels, groups) < MIN_PATIENTS:
        reason = f"fewer than {MIN_PATIENTS} patients of a class"
    if reason:
        weights, new_weights = weights[:1], new_weights[:1]
    priors = weights @ labels / weights.sum(axis=1)
    usable = (priors > 0) & (priors < 1)
    weights, new_weights, priors = weights[usable], new_weights[usable], priors[usable]
    slopes, biases = _fit_logistic(logits, labels, weights)
    if slopes[0] <= 0:
        return replace(unavailable, reason="the share of positives does not increase with the probability")
    shift = adapt_label_shift(expit(slopes[0] * new_logits + biases[0]), float(priors[0]))
    prevalence, difference = shift["prevalence"], shift["prevalence"] - float(priors[0])
    estimate = PrevalenceEstimate(shift["probabilities"], prevalence, difference=difference, reason=reason)
    if len(priors) == 1:
        return estimate
    log_ratios = slopes[:, None] * new_logits + (biases - logit(priors))[:, None]
    sample = _maximize_likelihood(np.exp(np.clip(log_ratios, -MAX_LOG_RATIO, MAX_LOG_RATIO)), new_weights)[1:]
    low, high = percentile_ends(sample)
    difference_low, difference_high = percentile_ends(sample - priors[1:])
    prior_low, prior_high = percentile_ends(priors[1:])
    exact = 1 - ((1 - CONFIDENCE_LEVEL) / 2) ** (1 / len(np.unique(new_groups)))
    if prevalence < AT_BORDER:
        high, difference_high = max(high, exact), max(difference_high, exact - prior_low)
    elif prevalence > 1 - AT_BORDER:
        low, difference_low = min(low, 1 - exact), min(difference_low, 1 - exact - prior_high)
    return replace(estimate, low=low, high=high, difference_low=difference_low, difference_high=difference_high)


def _fit_logistic(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit a logistic regression of labels on one feature to every resample, by Newton's method.

    Args:
        logits: (N,).
        labels: (N,), 0 or 1.
        weights: (R, N), how often each resample contains each image; both classes have weight in each.

    Returns:
        Slopes and biases, (R,).
    """
    center, scale = logits.mean(), logits.std() or 1.0
    feature = (logits - center) / scale
    slopes, biases = np.ones(len(weights)), logit(weights @ labels / weights.sum(axis=1))
    for _ in range(NEWTON_STEPS):
        fitted = expit(slopes[:, None] * feature + biases[:, None])
        residuals, variances = weights * (labels - fitted), weights * fitted * (1 - fitted)
        gradient = np.stack([residuals.sum(axis=1), residuals @ feature - SLOPE_PENALTY * slopes])
        h00, h01, h11 = variances.sum(axis=1) + TOLERANCE, variances @ feature, variances @ feature**2 + SLOPE_PENALTY
        step = np.stack([h11 * gradient[0] - h01 * gradient[1], h00 * gradient[1] - h01 * gradient[0]])
        step /= h00 * h11 - h01**2
        step /= np.maximum(1, np.abs(step).max(axis=0) / 2)  # Newton's method can overshoot on nearly separable images
        biases, slopes = biases + step[0], slopes + step[1]
    return slopes / scale, biases - slopes * center / scale


def _maximize_likelihood(ratios: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Maximize the likelihood of a mixture of two classes in the share of positives, by bisection of its derivative.

    Args:
        ratios: (R, M), likelihood of each image as a positive over that as a negative.
        weights: (R, M), how often each resample contains each image.

    Returns:
        (R,), in [0, 1].
    """
    excess, low, high = ratios - 1, np.zeros(len(ratios)), np.ones(len(ratios))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        is_rising = (weights * excess / (1 + middle[:, None] * excess)).sum(axis=1) > 0
        low, high = np.where(is_rising, middle, low), np.where(is_rising, high, middle)
    return np.asarray((low + high) / 2)
