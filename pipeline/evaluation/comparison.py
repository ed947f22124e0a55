"""Whether a model is better than another on the same images, and whether its probabilities mean what they say."""

from typing import TypedDict

import numpy as np


class Difference(TypedDict):
    difference: float
    low: float
    high: float
    probability: float


def f1_difference(
    labels: np.ndarray, groups: np.ndarray, ours: np.ndarray, theirs: np.ndarray, resamples: int, margin: float = 0
) -> Difference:
    """Compare the F1 of two models by a paired bootstrap (Efron and Tibshirani 1993) over groups.

    Images of one patient are not independent, so whole groups are drawn, with replacement, the same for both models.

    Args:
        labels: (N,), 0 or 1.
        groups: (N,), the name of each image's group.
        ours: (N,), the labels that one model gives, 0 or 1.
        theirs: (N,), those of the other.
        resamples: how many times the groups are drawn.
        margin: by which ours must be better.

    Returns:
        The `difference` of F1 (ours less theirs), the `low` and `high` end of its 95 % interval, and the
        `probability`, the share of resamples in which it is above the margin.
    """
    _, index = np.unique(groups, return_inverse=True)
    count = index.max() + 1
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=resamples)

    def f1(called: np.ndarray) -> tuple[float, np.ndarray]:
        # Of each group: true positives twice, and images positive by label or by call, each time.
        hits = np.bincount(index, 2 * labels * called, count)
        positives = np.bincount(index, labels + called, count)
        whole = np.array([hits.sum(), positives.sum()])
        resampled = drawn @ np.stack([hits, positives], axis=1)
        return _share(whole[:1], whole[1:])[0], _share(resampled[:, 0], resampled[:, 1])

    (mine, my_resamples), (other, other_resamples) = f1(ours), f1(theirs)
    differences = my_resamples - other_resamples
    low, high = np.quantile(differences, [0.025, 0.975])
    return {
        "difference": float(mine - other),
        "low": float(low),
        "high": float(high),
        "probability": float((differences > margin).mean()),
    }


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> float:
    """Return the expected calibration error (Naeini, Cooper and Hauskrecht 2015).

    Args:
        labels: (N,), 0 or 1.
        probabilities: (N,), P(positive).
        bins: of equal width, into which the probabilities are sorted.

    Returns:
        The mean distance, in [0, 1], between the probability of a bin and its share of positives, weighted by images.
    """
    index = np.minimum((np.asarray(probabilities) * bins).astype(int), bins - 1)
    gaps = np.bincount(index, np.asarray(probabilities, dtype=float) - labels, bins)
    return float(np.abs(gaps).sum() / len(labels))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide; F1 is 0 where there is neither a positive nor a call."""
    shares: np.ndarray = part / np.maximum(whole, 1)
    return shares
