"""Decode N radiographs of 512×512 pixels into the pack; the baseline decodes the same zip with Pillow in a loop.

python bench/prepare.py [N]    # the competition has 15264 + 400; TMPDIR=/dev/shm excludes the disk
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
from common import UNIQUE_IMAGES, radiographs
from joblib import cpu_count
from PIL import Image

from pipeline.core.config import PrepareParams
from pipeline.data import packing


def ours(raw: Path) -> None:
    params = PrepareParams(image_size=512, resize="stretch", max_quarantined=0)
    with tempfile.TemporaryDirectory() as target:
        packing.pack_images(raw, params, Path(target))


def plain(raw: Path) -> None:
    with zipfile.ZipFile(raw) as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        stack = np.empty((len(names), 512, 512), np.uint8)
        for row, name in enumerate(names):
            stack[row] = np.asarray(Image.open(BytesIO(archive.read(name))).convert("L"))


def measure(decode: Callable[[Path], None], raw: Path) -> tuple[float, float]:
    """Return the elapsed time and the CPU time of all processes, in seconds."""
    before = os.times()
    decode(raw)
    after = os.times()
    return after.elapsed - before.elapsed, sum(after[:4]) - sum(before[:4])


def main(count: int, rounds: int = 3) -> None:
    images = radiographs()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw.zip")
        with zipfile.ZipFile(raw, "w") as archive:
            for index in range(count):
                archive.writestr(f"train/train/{index}.jpg", images[index % UNIQUE_IMAGES])
            archive.writestr("test/test/t.jpg", images[-1])
            archive.writestr("train_labels.csv", "File,Label\n" + "".join(f"{i}.jpg,{i % 2}\n" for i in range(count)))
            archive.writestr("sample_submission.csv", "File,Label\nt.jpg,0\n")
        times = [(measure(ours, raw), measure(plain, raw)) for _ in range(rounds)]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    (our_time, our_cpu_time), (plain_time, plain_cpu_time) = np.median(times, axis=0)
    results = {
        "images": count,
        "seconds": round(our_time, 1),
        "plain_seconds": round(plain_time, 1),
        "ratio": round(plain_time / our_time, 2),
        "cpu_seconds": round(our_cpu_time, 1),
        "plain_cpu_seconds": round(plain_cpu_time, 1),
        "ratio_on_idle_cores": round(cpu_count() * plain_cpu_time / our_cpu_time, 2),
        "peak_mb_of_a_worker": round(peak),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15264)
