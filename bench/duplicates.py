"""Find what is there twice among N radiographs, and in each tenth of them a copy that was encoded again.

python bench/duplicates.py [N]    # the competition has 15264 + 400
"""

import json
import resource
import sys

import numpy as np
import pandas as pd
from common import DRAWN, radiographs, seconds
from PIL import Image

from pipeline.data import duplicates, images

SIZE = 128


def main(count: int) -> None:
    pack = chests(count)
    pack[::10] = pack[1::10][: len(pack[::10])]
    pack[::10, 0, 0] ^= 1  # not the same bytes
    table = pd.DataFrame({
        "xxh128": [str(row) for row in range(count)],
        "phash": [duplicates.perceptual_hash(pixels) for pixels in pack],
    })  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: list[np.ndarray] = []
    taken = seconds(lambda: found.append(duplicates.find_duplicates(table, pack)))
    joined = int((found[0] != np.arange(count)).sum())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(json.dumps({"images": count, "seconds": round(taken, 1), "found": joined, "more_megabytes": grown}))


def chests(count: int) -> np.ndarray:
    """Mix drawn radiographs in twos, with light and shade of their own: a little more alike than real ones are."""
    rng = np.random.default_rng(1)
    drawn = np.stack([images.decode_radiograph(data, SIZE, "stretch")[0] for data in radiographs()]).astype(np.float32)
    pack = np.empty((count, SIZE, SIZE), np.uint8)
    for row in range(count):
        first, second = drawn[rng.choice(DRAWN, 2, replace=False)]
        shade = Image.fromarray(rng.normal(0, 30, (24, 24)).astype(np.float32)).resize((SIZE, SIZE))
        pack[row] = (0.6 * first + 0.4 * second + np.asarray(shade)).clip(0, 255)
    return pack


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15664)
