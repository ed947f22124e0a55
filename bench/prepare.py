"""Decode N radiographs of 512×512 into the pack, against Pillow in a plain loop over the same zip.

python bench/prepare.py [N]    # the competition has 15264 + 400; TMPDIR=/dev/shm leaves the disk out of it
"""

import json
import os
import resource
import sys
import tempfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from common import DRAWN, radiographs
from joblib import cpu_count
from PIL import Image

from pipeline.core.config import PrepareParams
from pipeline.data import packing


def ours(raw: Path) -> None:
    params = PrepareParams(size=512, resize="stretch", max_quarantined=0)
    with tempfile.TemporaryDirectory() as target:
        packing.pack_images(raw, params, Path(target))


def plain(raw: Path) -> None:
    with zipfile.ZipFile(raw) as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        stack = np.empty((len(names), 512, 512), np.uint8)
        for row, name in enumerate(names):
            stack[row] = np.asarray(Image.open(BytesIO(archive.read(name))).convert("L"))


def costs(work: Callable[[Path], None], raw: Path) -> tuple[float, float]:
    """Return how long the work takes, and how long its processes compute, in seconds."""
    before = os.times()
    work(raw)
    after = os.times()
    return after.elapsed - before.elapsed, sum(after[:4]) - sum(before[:4])


def main(count: int, rounds: int = 3) -> None:
    images = radiographs()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw.zip")
        with zipfile.ZipFile(raw, "w") as archive:
            for index in range(count):
                archive.writestr(f"train/train/{index}.jpg", images[index % DRAWN])
            archive.writestr("test/test/t.jpg", images[-1])
            archive.writestr("train_labels.csv", "File,Label\n" + "".join(f"{i}.jpg,{i % 2}\n" for i in range(count)))
            archive.writestr("sample_submission.csv", "File,Label\nt.jpg,0\n")
        turns = [(costs(ours, raw), costs(plain, raw)) for _ in range(rounds)]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    (mine, mine_cpu), (theirs, theirs_cpu) = np.median(turns, axis=0)
    figures = {
        "images": count,
        "seconds": round(mine, 1),
        "plain_seconds": round(theirs, 1),
        "ratio": round(theirs / mine, 2),
        "cpu_seconds": round(mine_cpu, 1),
        "plain_cpu_seconds": round(theirs_cpu, 1),
        "ratio_on_free_cores": round(cpu_count() * theirs_cpu / mine_cpu, 2),
        "peak_mb_of_a_worker": round(peak),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15264)
