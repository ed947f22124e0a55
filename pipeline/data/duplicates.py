"""Detection of near-duplicates: a radiograph re-encoded, resized, brightened, or cropped by 1 % at each edge.

Different chests can have similar perceptual hashes, so the hash only selects candidate pairs, and a comparison of their
pixels decides. docs/data.md describes how the two limits were chosen.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pandas as pd
from PIL import Image
from scipy.cluster.hierarchy import DisjointSet
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter

MAX_HAMMING_DISTANCE = 40  # bits, of 256, between the hashes of a candidate pair
MIN_SIMILARITY = 0.96  # of two copies of one radiograph
THUMBNAIL_SIZE = 64  # edge of the compared thumbnails, pixels
# These three bound memory, also where all hashes are alike.
QUERIES = 64  # hashes compared with all others at once
CHUNK_SIZE = 1024  # candidates compared at once
CACHED_EDGE_IMAGES = 16384  # of 8 KB

COORDINATES = np.linspace(-1, 1, THUMBNAIL_SIZE, dtype=np.float32)
# The center has the largest weight: cropping displaces the edges most, and they contain markers and black borders.
WINDOW = np.outer(np.cos(COORDINATES * np.pi / 2), np.cos(COORDINATES * np.pi / 2))


def perceptual_hash(pixels: np.ndarray) -> str:
    """Compute the perceptual hash (pHash): the 16×16 lowest frequencies of the DCT of a 32×32 thumbnail.

    Args:
        pixels: uint8 (S, S).

    Returns:
        64 hexadecimal digits; each bit says whether a frequency is above the median.
    """
    frequencies = dctn(_thumbnail(pixels).astype(np.float32))[:16, :16]
    # np.median takes five times as long.
    median = np.partition(frequencies, (127, 128), axis=None)[127:129].mean()
    return np.packbits(frequencies > median).tobytes().hex()


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    block, rest = divmod(len(pixels), 32)
    if rest:
        # reducing_gap first averages whole blocks of pixels, which takes a quarter of the time.
        return np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=1.0))
    # NumPy averages whole blocks in half of Pillow's time, and rounds as Pillow does.
    sums = np.add.reduce(pixels.reshape(32, block, -1), axis=1, dtype=np.uint16)
    sums = np.add.reduceat(sums, np.arange(0, len(pixels), block), axis=1, dtype=np.uint32)
    return (sums + block**2 // 2) * (2**24 // block**2) >> 24


def find_duplicates(manifest: pd.DataFrame, images: np.ndarray) -> np.ndarray:
    """Find images that show the same radiograph.

    Args:
        manifest: N rows with the columns xxh128 and phash.
        images: the pack, uint8 (N, S, S); only candidates are read.

    Returns:
        int (N,): for each image, the first row of its group of duplicates; its own row if it has no duplicate.
    """
    unique_rows = np.flatnonzero(~manifest["xxh128"].duplicated())  # one image represents all with equal pixels
    hex_hashes = "".join(manifest["phash"].iloc[unique_rows])
    hashes = np.frombuffer(bytes.fromhex(hex_hashes), np.uint8).reshape(len(unique_rows), -1)
    edge_image = lru_cache(CACHED_EDGE_IMAGES)(lambda index: _edge_image(images[unique_rows[index]]))
    components: DisjointSet[int] = DisjointSet()
    for index, near in _near_hashes(hashes):
        for candidate in (index, *near):
            components.add(candidate)
        others = [candidate for candidate in near if not components.connected(index, candidate)]
        for start in range(0, len(others), CHUNK_SIZE):
            chunk = others[start : start + CHUNK_SIZE]
            similarities = similarity(edge_image(index), np.array([edge_image(other) for other in chunk]))
            for row in np.flatnonzero(similarities >= MIN_SIMILARITY):
                components.merge(index, chunk[row])
    groups = np.arange(len(unique_rows))
    for component in components.subsets():
        groups[list(component)] = min(component)
    return manifest["xxh128"].map(pd.Series(unique_rows[groups], manifest["xxh128"].iloc[unique_rows])).to_numpy()


def _near_hashes(hashes: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """Yield each row that has later rows within `MAX_HAMMING_DISTANCE`, and these.

    An exhaustive search: to be exact at this distance, multi-index hashing looks at so many buckets that it takes
    twenty times as long.

    Args:
        hashes: uint8 (N, 32).
    """
    import faiss

    for start in range(0, len(hashes), QUERIES):
        index = faiss.IndexBinaryFlat(8 * hashes.shape[1])
        index.add(hashes[start:])
        limits, _, near = index.range_search(hashes[start : start + QUERIES], MAX_HAMMING_DISTANCE + 1)
        for query in np.flatnonzero(np.diff(limits.astype(int)) > 1):  # each finds itself
            found = near[limits[query] : limits[query + 1]]
            later = found[found > query]
            if len(later):
                yield start + int(query), (start + later).tolist()


def similarity(image: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compute how well each other image is explained by this one, up to brightness, small shifts and scalings.

    The similarity is the multiple correlation of the other image with this one and with the first-order terms of its
    horizontal and vertical shift and scaling: its gradients, and its gradients times the coordinate (Lucas and Kanade
    1981).

    Args:
        image: (64, 64).
        others: (M, 64, 64).

    Returns:
        (M,): 0 (unrelated) to 1 (the same radiograph).
    """
    image = image.astype(np.float32)
    dy, dx = np.gradient(image)
    basis = (np.stack([image, dx, dx * COORDINATES, dy, dy * COORDINATES[:, None]]) * WINDOW).reshape(5, -1)
    targets = (others * WINDOW).reshape(len(others), THUMBNAIL_SIZE * THUMBNAIL_SIZE)
    products = basis @ targets.T
    explained = (products * (np.linalg.pinv(basis @ basis.T, hermitian=True) @ products)).sum(axis=0)
    return np.asarray(np.sqrt(explained.clip(0) / np.square(targets).sum(axis=1).clip(1e-9)))


def _edge_image(pixels: np.ndarray) -> np.ndarray:
    """Return edges and vessels, which distinguish chests, without the large-scale shading that all chests share."""
    small = Image.fromarray(pixels).resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BILINEAR)
    smooth = gaussian_filter(np.asarray(small, dtype=np.float32), 0.7)
    return (smooth - gaussian_filter(smooth, 1.5)).astype(np.float16)
