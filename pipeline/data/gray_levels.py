"""Scaling of images of more than 8 bits to 8 bits."""

import numpy as np

from pipeline.data.image_checks import UnusableError, check_contrast

OUTLIERS = 0.03  # share of the pixels at either end that cannot set the range, such as hot pixels and markers
GAP = 0.1  # of the range between these percentiles, between the picture and its outliers
MAX_GAP_SHARE = 1e-4  # of the pixels may lie in the gap, such as the smooth edges of a marker
MIN_INNER = 0.05  # share of the pixels that must lie between the lowest and the highest level for these to be left out
MIN_INNER_LEVELS = 20  # and number of levels; pictures of fewer are drawings
TABLE_SIZE = 1 << 16  # levels; images of up to 16 bits are scaled with a table of their levels
MAX_SAMPLE = 1_000_000  # pixels, evenly spaced among the sorted ones of an image of floats


def find_range(levels: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Find the lowest and the highest gray level that belong to the picture: what becomes black and white.

    These are the ends of all levels that occur, unless there are outliers: levels below the 3rd or above the 97th
    percentile that are farther away than these percentiles are from each other, or beyond a gap, which is a tenth of
    that distance with at most one in 10,000 pixels. The percentiles are those of the pixels between the lowest and the
    highest level, because a border, a saturated background or a burned-in marker is all of one such level, however many
    pixels it has. Outliers are left out and the rule is applied again, until none is left. So a hot pixel, a marker of
    up to 3 % of the pixels and a constant border set no range, while 873 of 953 public radiographs keep the range of
    their levels, and all but 3 of them more than 99 % of their pixels inside of it. Smooth edges of a marker, which
    leave no gap, can widen the range by as much as the percentiles are apart, and no more.

    Args:
        levels: (N,), distinct and ascending.
        counts: (N,), of the pixels of each level, all above 0.
    """
    while True:
        inner = slice(None)
        if len(levels) > MIN_INNER_LEVELS and counts[1:-1].sum() >= MIN_INNER * counts.sum():
            inner = slice(1, -1)
        low, high = find_percentiles(levels[inner], counts[inner], OUTLIERS)
        first = np.searchsorted(levels, low - (high - low))
        last = np.searchsorted(levels, high + (high - low), "right")
        below = np.concatenate([[0], np.cumsum(counts)])  # pixels of lower levels
        start = np.searchsorted(levels, levels - GAP * (high - low))  # of the levels near to each, and their end
        stop = np.searchsorted(levels, levels + GAP * (high - low), "right")
        most, rows = MAX_GAP_SHARE * below[-1], np.arange(len(levels))
        first = max([first, *rows[(levels <= low) & (start > 0) & (below[:-1] - below[start] <= most)]])
        last = min([last, *rows[(levels >= high) & (stop < len(levels)) & (below[stop] - below[1:] <= most)] + 1])
        if last - first == len(levels):
            return float(levels[0]), float(levels[-1])
        levels, counts = levels[first:last], counts[first:last]


def find_percentiles(levels: np.ndarray, counts: np.ndarray, share: float) -> tuple[float, float]:
    """Return the levels below and above which there is this share of the pixels.

    Args:
        levels: (N,), ascending.
        counts: (N,), of the pixels of each level.
        share: 0 to 0.5.
    """
    below = np.cumsum(counts)
    low, high = np.searchsorted(below, (share * below[-1], (1 - share) * below[-1]))
    return float(levels[low]), float(levels[high])


def scale_to_uint8(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale from low to high to 0 to 255 and clip; a value that is not a number becomes 0."""
    scaled = np.clip(values, low, high, dtype=np.float64)
    scaled -= low
    scaled *= 255 / (high - low or 1)
    gray: np.ndarray = np.rint(np.nan_to_num(scaled, copy=False), out=scaled).astype(np.uint8)
    return gray


def rescale_to_uint8(values: np.ndarray) -> np.ndarray:
    """Scale an image from its own range of gray levels, see `find_range`; uint8 is returned unchanged.

    Args:
        values: integers or floats, of any shape. What is not finite is background, which becomes black.

    Raises:
        UnusableError: no value is finite, or integers are blank or nearly blank.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind in "iu" and values.min() >= 0 and values.max() < TABLE_SIZE:
        counts = np.bincount(values.ravel())
        levels = np.flatnonzero(counts)
        low, high = find_range(levels, counts[levels])
        check_contrast(high - low)
        gray: np.ndarray = scale_to_uint8(np.arange(len(counts)), low, high)[values]
        return gray
    sample = np.sort(values[np.isfinite(values)])
    if not len(sample):
        raise UnusableError("pixel values that are not finite")
    sample = np.append(sample[:: len(sample) // MAX_SAMPLE + 1], sample[-1])
    low, high = find_range(*np.unique(sample.astype(np.float64), return_counts=True))
    if values.dtype.kind in "iu":
        check_contrast(high - low)
    return scale_to_uint8(np.where(np.isfinite(values), values, low), low, high)
