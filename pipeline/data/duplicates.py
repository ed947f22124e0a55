"""The same radiograph twice: encoded again, resized, brightened, or trimmed by a percent at each edge.

Chests resemble each other, so a perceptual hash only names candidates, and their pixels decide. How the two limits
were found is in docs/data.md.
"""

import numpy as np
import pandas as pd
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter

MAX_HAMMING_DISTANCE = 40  # of 256 in which the hashes of candidates may differ
MIN_SIMILARITY = 0.96  # of two images that are one
THUMBNAIL_SIZE = 64  # edge of the thumbnails that are compared, pixels
CHUNK_SIZE = 1024  # candidates that are compared in one go

COORDINATES = np.linspace(-1, 1, THUMBNAIL_SIZE, dtype=np.float32)
# The middle counts most: toward the edges a trimmed image is moved furthest, and all have markers and black borders.
WINDOW = np.outer(np.cos(COORDINATES * np.pi / 2), np.cos(COORDINATES * np.pi / 2))


def perceptual_hash(pixels: np.ndarray) -> str:
    """Hash what an image looks like: pHash, with 16×16 frequencies of the cosine transform of a 32×32 thumbnail.

    Args:
        pixels: uint8 (S, S).

    Returns:
        64 hexadecimal digits, a bit per frequency: whether it is above the median of all.
    """
    # Whole pixels are averaged first, as far as that goes, for a quarter of the time.
    small = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=1.0)
    frequencies = dctn(np.asarray(small, dtype=np.float32))[:16, :16]
    return np.packbits(frequencies > np.median(frequencies)).tobytes().hex()


def find_duplicates(manifest: pd.DataFrame, images: np.ndarray) -> np.ndarray:
    """Find images that show the same radiograph.

    Args:
        manifest: its columns xxh128 and phash, N rows.
        images: the pack, uint8 (N, S, S); only candidates are read.

    Returns:
        int (N,): per image the row of the first that shows the same, its own if there is none before it.
    """
    first = np.flatnonzero(~manifest["xxh128"].duplicated())  # of equal pixels one is enough
    hashes = np.frombuffer(bytes.fromhex("".join(manifest["phash"].iloc[first])), np.uint64).reshape(-1, 4).T.copy()
    patterns: dict[int, np.ndarray] = {}
    same = np.arange(len(first))
    # Row by row, so that no table of all pairs is ever in memory.
    for place in range(len(first)):
        bits = np.bitwise_count(hashes[:, place + 1 :] ^ hashes[:, place, None]).sum(axis=0, dtype=np.uint16)
        near = np.flatnonzero(bits <= MAX_HAMMING_DISTANCE) + place + 1
        near = near[same[near] != same[place]]
        for start in range(0, len(near), CHUNK_SIZE):
            some = near[start : start + CHUNK_SIZE]
            for one in {place, *some.tolist()} - patterns.keys():
                patterns[one] = _pattern(images[first[one]])
            likely = some[similarity(patterns[place], np.array([patterns[one] for one in some])) >= MIN_SIMILARITY]
            joined = np.isin(same, same[[place, *likely]])
            same[joined] = same[joined].min()
    return manifest["xxh128"].map(pd.Series(first[same], manifest["xxh128"].iloc[first])).to_numpy()


def similarity(pattern: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Say how much of each other pattern is this one, brightened, moved and stretched a little: 0 nothing, 1 all.

    It is the multiple correlation of the other with this one and, to first order, with the four ways to move and
    stretch it: its slopes, and its slopes times the place (Lucas and Kanade 1981).

    Args:
        pattern: (64, 64).
        others: (M, 64, 64).

    Returns:
        (M,).
    """
    one = pattern.astype(np.float32)
    down, across = np.gradient(one)
    ways = (np.stack([one, across, across * COORDINATES, down, down * COORDINATES[:, None]]) * WINDOW).reshape(5, -1)
    targets = (others * WINDOW).reshape(len(others), THUMBNAIL_SIZE * THUMBNAIL_SIZE)
    shared = ways @ targets.T
    explained = (shared * (np.linalg.pinv(ways @ ways.T, hermitian=True) @ shared)).sum(axis=0)
    return np.asarray(np.sqrt(explained.clip(0) / np.square(targets).sum(axis=1).clip(1e-9)))


def _pattern(pixels: np.ndarray) -> np.ndarray:
    """Return what tells chests apart, edges and vessels, without the light and shade that they share."""
    small = Image.fromarray(pixels).resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BILINEAR)
    smooth = gaussian_filter(np.asarray(small, dtype=np.float32), 0.7)
    return (smooth - gaussian_filter(smooth, 1.5)).astype(np.float16)
