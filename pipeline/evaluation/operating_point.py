"""Selection of the operating point, the threshold on a score, on the validation set."""

from math import ceil, log

import numpy as np
from scipy.special import betainc, expit

from pipeline.core.config import EvaluateParams
from pipeline.evaluation.calibration import log_odds
from pipeline.evaluation.metrics import CHUNK_SIZE, CONFIDENCE_LEVEL, DEFAULT_THRESHOLD, has_single_class


def choose_threshold(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, params: EvaluateParams) -> float:
    """Choose a threshold by the rule `operating_point`.

    `half` is always 0.5. `best_f1` maximizes F1, `youden` the sum of sensitivity and specificity (Youden 1950), and
    `sensitivity` the specificity among the thresholds up to `sensitivity_limits`.

    Args:
        labels: (N,), 0 or 1.
        scores: (N,), in [0, 1].
        groups: (N,), the name of each image's group.
        params: contains the rule.

    Returns:
        A threshold midway between two neighboring scores, so that rounding cannot change a prediction; among equally
        good ones the nearest to 0.5. It is 0.5 for a single class.
    """
    return float(choose_thresholds(labels, scores, groups, np.ones((1, len(labels))), params)[0])


def choose_thresholds(
    labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, weights: np.ndarray, params: EvaluateParams
) -> np.ndarray:
    """Choose a threshold on every resample, (R,); see `choose_threshold`.

    Args:
        labels: (N,), 0 or 1.
        scores: (N,), in [0, 1].
        groups: (N,), the name of each image's group.
        weights: (R, N), how often each of R resamples contains each image, as from `intervals.bootstrap_weights`.
        params: contains the rule.
    """
    labels, scores = np.asarray(labels, dtype=int), np.asarray(scores, dtype=float)
    if params.operating_point == "half" or has_single_class(labels):
        return np.full(len(weights), DEFAULT_THRESHOLD)
    chunks = [weights[start : start + CHUNK_SIZE].astype(float) for start in range(0, len(weights), CHUNK_SIZE)]
    return np.concatenate([_choose(labels, scores, np.asarray(groups), chunk, params) for chunk in chunks])


def sensitivity_limits(
    scores: np.ndarray, groups: np.ndarray, weights: np.ndarray, min_sensitivity: float
) -> np.ndarray:
    """Return the highest threshold on every resample that keeps `min_sensitivity` with 95 % confidence.

    It is a tolerance limit, not an estimate: as many positive images may lie below the threshold as leave the upper
    confidence limit of the share of missed ones at 1 - `min_sensitivity` (Clopper and Pearson 1934; Wilks 1941). Images
    of one patient count as one observation, in the effective number of patients (Kish 1965; Korn and Graubard 1998).

    With too few patients, no such threshold exists whatever the distribution of the scores (`sensitivity_caveat`). It
    is then the lowest positive score, or a tolerance limit for normally distributed log odds (by the noncentral t
    distribution; Krishnamoorthy and Mathew 2009, chapter 2) if that is lower.

    Args:
        scores: (P,), of the positive images, in [0, 1].
        groups: (P,), the name of each image's group.
        weights: (R, P), how often each resample contains each image; each contains at least one.
        min_sensitivity: in [0, 1].

    Returns:
        (R,), each the score of a positive image, or lower.
    """
    order = np.argsort(scores)
    scores, weights = np.asarray(scores, dtype=float)[order], weights[:, order].astype(float)
    counts, total = _effective_counts(np.asarray(groups)[order], weights), weights.sum(axis=1)
    missed = (np.cumsum(weights, axis=1) - weights) * (counts / total)[:, None]  # if the threshold is this score
    missed = np.minimum(missed, counts[:, None] * (1 - 1e-9))  # the last image of a resample may have a weight of 0
    # The upper limit of the missed share is the quantile of this beta distribution.
    confidence = betainc(missed + 1, counts[:, None] - missed, 1 - min_sensitivity)
    is_allowed = (confidence >= CONFIDENCE_LEVEL) & (weights > 0)
    last_allowed = is_allowed.shape[1] - 1 - np.argmax(is_allowed[:, ::-1], axis=1)
    limits = np.where(is_allowed.any(axis=1), scores[last_allowed], scores[np.argmax(weights > 0, axis=1)])

    needs_normal = ~is_allowed.any(axis=1) & (counts >= 2) & (min_sensitivity < 1)
    if needs_normal.any():
        from scipy.stats import nct, norm

        logits, counts, total = log_odds(scores), counts[needs_normal], total[needs_normal]
        share = weights[needs_normal] / total[:, None]
        mean = share @ logits
        deviation = np.sqrt(np.maximum(share @ logits**2 - mean**2, 0) * counts / (counts - 1))
        factor = nct.ppf(CONFIDENCE_LEVEL, counts - 1, norm.ppf(min_sensitivity) * np.sqrt(counts)) / np.sqrt(counts)
        limits[needs_normal] = np.minimum(limits[needs_normal], expit(mean - factor * deviation))
    return np.asarray(limits)


def sensitivity_caveat(labels: np.ndarray, groups: np.ndarray, params: EvaluateParams) -> str:
    """Return why the rule `sensitivity` cannot guarantee `min_sensitivity` on these images, or an empty string.

    Args:
        labels: (N,), 0 or 1.
        groups: (N,), the name of each image's group.
        params: contains the rule.
    """
    least, is_positive = params.min_sensitivity, np.asarray(labels) == 1
    if params.operating_point != "sensitivity" or least == 0:
        return ""
    promise = f"a sensitivity of {least:g} cannot be guaranteed with 95 % confidence"
    if has_single_class(labels):
        return f"{promise}: images of one class only, so the threshold is {DEFAULT_THRESHOLD}"
    if least == 1:
        return f"{promise}: no number of patients is enough; choose a lower min_sensitivity"
    positive_groups = np.asarray(groups)[is_positive]
    count = float(_effective_counts(positive_groups, np.ones((1, len(positive_groups))))[0])
    patients, needed = len(np.unique(positive_groups)), ceil(log(1 - CONFIDENCE_LEVEL) / log(least))
    if least**count <= 1 - CONFIDENCE_LEVEL:
        return ""
    effective = "" if count > patients - 0.5 else f", by their numbers of images as good as {count:.0f}"
    return (
        f"{promise}: it needs at least {needed} positive patients, there are {patients}{effective}; the threshold "
        f"assumes normally distributed log odds, and without that assumption the confidence is "
        f"{100 * (1 - least**count):.0f} %"
    )


def _choose(
    labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, weights: np.ndarray, params: EvaluateParams
) -> np.ndarray:
    """Choose a threshold on every resample, (R,); both classes occur in the images."""
    order = np.argsort(scores)
    values, first = np.unique(scores[order], return_index=True)
    thresholds = np.append(values[0] / 2, (values[1:] + values[:-1]) / 2)
    # Of the sorted images, those from the threshold on are predicted positive.
    tp, fp = (np.cumsum((weights * (labels == label))[:, order[::-1]], axis=1)[:, ::-1][:, first] for label in (1, 0))
    positives, negatives = tp[:, :1], fp[:, :1]
    defined = (positives * negatives > 0)[:, 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity, specificity = tp / positives, 1 - fp / negatives
        if params.operating_point == "best_f1":
            objective = 2 * tp / (tp + fp + positives)
        elif params.operating_point == "youden":
            objective = sensitivity + specificity
        else:
            is_positive, limits = labels == 1, np.full(len(weights), DEFAULT_THRESHOLD)
            limits[defined] = sensitivity_limits(
                scores[is_positive], groups[is_positive], weights[defined][:, is_positive], params.min_sensitivity
            )
            objective = np.where(thresholds <= limits[:, None], specificity, -1)
    is_best = objective >= objective.max(axis=1, keepdims=True) - 1e-12
    chosen = thresholds[np.argmin(np.where(is_best, np.abs(thresholds - DEFAULT_THRESHOLD), np.inf), axis=1)]
    if params.operating_point == "sensitivity":
        chosen = np.minimum(chosen, limits)  # the limit can be lower than all of them
    return np.where(defined, chosen, DEFAULT_THRESHOLD)


def _effective_counts(groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return Kish's effective number of groups in every resample, (R,); a group drawn twice counts as two.

    It is the number of groups of equal size that would be worth as much, if the images of a group are all alike.
    """
    _, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    total = weights.sum(axis=1)
    # The sum over drawn groups of the size squared is that over drawn images of the size of their group.
    counts = total**2 / (weights @ sizes[index].astype(float))
    return np.asarray(counts)
