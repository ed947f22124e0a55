"""Detect duplicates among N radiographs, of which every tenth is a slightly changed copy of another.

python bench/duplicates.py [N]    # the competition has 15264 + 400
"""

import json
import resource
import sys

import numpy as np
import pandas as pd
from common import UNIQUE_IMAGES, radiographs, seconds
from PIL import Image

from pipeline.data import duplicates, images

SIZE = 128


def main(count: int) -> None:
    pack = make_pack(count)
    pack[::10] = pack[1::10][: len(pack[::10])]
    pack[::10, 0, 0] ^= 1  # so that the bytes differ
    table = pd.DataFrame({
        "xxh128": [str(row) for row in range(count)],
        "phash": [duplicates.perceptual_hash(pixels) for pixels in pack],
    })  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results: list[np.ndarray] = []
    duration = seconds(lambda: results.append(duplicates.find_duplicates(table, pack)))
    found = int((results[0] != np.arange(count)).sum())
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(json.dumps({"images": count, "seconds": round(duration, 1), "duplicates": found, "added_mb": memory}))


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


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15664)
