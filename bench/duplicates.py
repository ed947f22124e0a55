"""Detect duplicates among N radiographs, of which every tenth is a slightly changed copy of another.

python bench/duplicates.py [N]            # the competition has 15264 + 400
python bench/duplicates.py 400000 random  # random hashes, but every hundredth has another within 20 bits; the baseline
                                          # compares all pairs by NumPy, extrapolated from 200 rows
"""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from common import UNIQUE_IMAGES, radiographs
from PIL import Image

from pipeline.data import duplicates, images

SIZE = 128
SMALL_SIZE = 32


def main(count: int, kind: str = "radiographs") -> None:
    with tempfile.TemporaryDirectory() as folder:
        if kind == "radiographs":
            pack = make_pack(count)
            pack[::10] = pack[1::10][: len(pack[::10])]
            pack[::10, 0, 0] ^= 1  # so that the bytes differ
            hashes = [duplicates.perceptual_hash(pixels) for pixels in pack]
        else:
            pack, hashes = make_random_pack(Path(folder, "images.npy"), count), make_random_hashes(count)
        table = pd.DataFrame({"xxh128": [str(row) for row in range(count)], "phash": hashes})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found: list[np.ndarray] = []
        duration, cpu_time = measure(lambda: found.append(duplicates.find_duplicates(table, pack)))
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    results = {"images": count, "seconds": round(duration, 1), "cpu_seconds": round(cpu_time, 1)}
    results |= {"duplicates": int((found[0] != np.arange(count)).sum()), "added_mb": memory}
    if kind == "random":
        plain = all_pairs_cpu_seconds(hashes)
        results |= {"plain_cpu_seconds": round(plain, 1), "ratio": round(plain / cpu_time, 2)}
    print(json.dumps(results))


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Return the elapsed time and the CPU time of all threads, in seconds."""
    start, cpu_start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu_start


def make_pack(count: int) -> np.ndarray:
    """Blend pairs of synthetic radiographs and add random shading; they are slightly more similar than real ones."""
    rng = np.random.default_rng(1)
    sources = np.stack([images.decode_radiograph(data, SIZE, "stretch")[0] for data in radiographs()]).astype(
        np.float32
    )
    pack = np.empty((count, SIZE, SIZE), np.uint8)
    for row in range(count):
        first, second = sources[rng.choice(UNIQUE_IMAGES, 2, replace=False)]
        shading = Image.fromarray(rng.normal(0, 30, (24, 24)).astype(np.float32)).resize((SIZE, SIZE))
        pack[row] = (0.6 * first + 0.4 * second + np.asarray(shading)).clip(0, 255)
    return pack


def make_random_pack(path: Path, count: int) -> np.ndarray:
    """Write images of noise, which are no duplicates, to a file, and map it."""
    pack = np.lib.format.open_memmap(path, "w+", np.uint8, (count, SMALL_SIZE, SMALL_SIZE))
    rng = np.random.default_rng(1)
    for chunk in np.array_split(pack, 100):
        chunk[:] = rng.integers(0, 256, chunk.shape, dtype=np.uint8)
    return np.load(path, mmap_mode="r")


def make_random_hashes(count: int) -> list[str]:
    """Draw hashes; every hundredth is the one before it with 20 bits changed, as of another image of a patient."""
    rng = np.random.default_rng(2)
    hashes = rng.integers(0, 256, (count, 32), dtype=np.uint8)
    near = hashes[100::100]
    near[:] = hashes[99:-1:100] ^ np.packbits(
        rng.permuted(np.tile(np.arange(256) < 20, (len(near), 1)), axis=1), axis=1
    )
    return [row.tobytes().hex() for row in hashes]


def all_pairs_cpu_seconds(hashes: list[str], sample: int = 200) -> float:
    """Return how long comparing all pairs of hashes with NumPy takes one core, without a comparison of pixels."""
    words = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint64).reshape(-1, 4).T.copy()
    rows = np.linspace(0, len(hashes) - 1, sample).astype(int)

    def compare() -> None:
        for row in rows:
            distances = np.bitwise_count(words[:, row + 1 :] ^ words[:, row, None]).sum(axis=0, dtype=np.uint16)
            np.flatnonzero(distances <= duplicates.MAX_HAMMING_DISTANCE)

    return measure(compare)[1] * len(hashes) / sample


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15664, *sys.argv[2:])
