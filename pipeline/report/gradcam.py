"""Which images the report explains with heatmaps, and the share of heatmaps in the image border."""

import numpy as np
import pandas as pd
from scipy.stats import t

from pipeline.evaluation.intervals import QUANTILES, design_effect
from pipeline.evaluation.metrics import apply_threshold
from pipeline.evaluation.shortcuts import BORDER_WIDTH, THUMBNAIL_SIZE

MARGIN = (
    BORDER_WIDTH / THUMBNAIL_SIZE
)  # width of the border, as a share of the edge; as for the shortcut baseline `border`
UNIFORM_BORDER_SHARE = 1 - (1 - 2 * MARGIN) ** 2  # of a uniform map: the border's share of the area
SAMPLE_SIZE = 64  # images at most, drawn at random, for the mean share in the border
KINDS = ["most confident correct", "most confident wrong", "least confident"]  # of example images


def most_and_least_confident(
    labels: np.ndarray, probabilities: np.ndarray, threshold: float, count: int = 4
) -> pd.DataFrame:
    """Select the most confident correct (up to half per class), most confident wrong, and least confident images.

    Confidence is the distance of P(positive) from the threshold.

    Args:
        labels: (N,), 0 or 1.
        probabilities: (N,), P(positive).
        threshold: P(positive) from which an image is predicted positive.
        count: maximum number of images of each kind.

    Returns:
        `kind` and `row`, 0 to N − 1; each image at most once.
    """
    correct = apply_threshold(probabilities, threshold) == labels
    table = pd.DataFrame({"label": labels, "correct": correct, "confidence": np.abs(probabilities - threshold)})
    table = table.sort_values("confidence", ascending=False, kind="stable")
    correct_per_class = table[table["correct"]].groupby("label").head(count // 2)
    selected = [
        correct_per_class.sort_values("label", kind="stable"),
        table[~table["correct"]].head(count),
        table[::-1].head(count),
    ]
    rows = pd.concat(
        [pd.DataFrame({"kind": kind, "row": images.index}) for kind, images in zip(KINDS, selected, strict=True)]
    )
    return rows.drop_duplicates("row").reset_index(drop=True)


def border_share(maps: np.ndarray) -> np.ndarray:
    """Return the share (N,) of each heatmap (N, S, S), by its sum, that lies in the border; NaN for an empty map."""
    margin = round(maps.shape[-1] * MARGIN)
    total = maps.sum(axis=(1, 2))
    center = maps[:, margin:-margin, margin:-margin].sum(axis=(1, 2))
    share: np.ndarray = np.divide(total - center, total, out=np.full(len(maps), np.nan), where=total > 0)
    return share


def draw_sample(count: int) -> np.ndarray:
    """Return the rows of at most `SAMPLE_SIZE` of `count` images, drawn at random with a fixed seed, in order."""
    return np.sort(np.random.default_rng(0).permutation(count)[:SAMPLE_SIZE])


def mean_border_share(shares: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """Return the mean share of heatmaps in the border with the ends of its 95 % interval over patients.

    The interval is the mean ± t standard errors, which allow for the design effect of several images per patient.

    Args:
        shares: (N,), from `border_share`; NaN for an empty heatmap, which does not count.
        groups: (N,), the name of each image's group (patient).

    Returns:
        Mean, low and high; NaN without a heatmap, and ends of NaN for fewer than two groups.
    """
    defined = ~np.isnan(shares)
    shares, groups = shares[defined], groups[defined]
    group_count = len(np.unique(groups))
    if group_count < 2:
        return float(shares.mean()) if len(shares) else np.nan, np.nan, np.nan
    variance = shares.var(ddof=1) / len(shares) * design_effect(shares, groups)
    mean, half_width = float(shares.mean()), float(t.ppf(QUANTILES[1], group_count - 1) * np.sqrt(variance))
    return mean, max(mean - half_width, 0.0), min(mean + half_width, 1.0)
