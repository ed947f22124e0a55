"""The steps from the zip to the split with N images of 65,000 patients: seconds, and MB of the process after each step.

python bench/scale.py [N]    # MIMIC-CXR has 377110; the images are 32×32 pixels of noise, to measure all but decoding
"""

import io
import json
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import psutil
from PIL import Image

from pipeline.core.config import PrepareParams, SplitParams
from pipeline.core.files import write_csv
from pipeline.data import duplicates, layout, manifest, packing, splitting
from pipeline.evaluation import acquisition
from pipeline.report import data_card

Result = TypeVar("Result")
PATIENTS = 65_000
SIZE = 32


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = folder / "raw.zip"
        write_archive(raw, count)
        measure("read_layout", lambda: layout.read_layout(raw))
        params = PrepareParams(image_size=SIZE, resize="stretch", max_quarantined=0)
        measure("prepare", lambda: packing.pack_images(raw, params, folder))
        images = measure("read_manifest", lambda: manifest.read_manifest(folder))
        pack = np.load(folder / "images.npy", mmap_mode="r")
        groups = measure("find_duplicates", lambda: duplicates.find_duplicates(images, pack))
        split = measure("split_dataset", lambda: splitting.split_dataset(images, groups, SplitParams(folds=5, seed=1)))
        measure("check_split", lambda: splitting.check_split(images, groups, split))
        quarantine = pd.read_csv(folder / "quarantine.csv")
        measure("describe_data", lambda: data_card.describe_data(images, quarantine, split, groups))
        write_csv(folder / "split.csv", split)
        table = measure("read_split", lambda: manifest.read_split(folder))
        measure("compute_features", lambda: acquisition.compute_features(pack, table))


def write_archive(path: Path, count: int) -> None:
    """Write labeled images, one in a hundred of them positive, a test image, and the table of patients."""
    rng = np.random.default_rng(0)
    files = [f"{number:06}.jpg" for number in range(count)]
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.writestr(f"train/{file}", encode(rng))
        archive.writestr("test/t.jpg", encode(rng))
        labels = pd.DataFrame({"File": files, "Label": (np.arange(count) % 100 == 0).astype(int)})
        archive.writestr("train_labels.csv", labels.to_csv(index=False))
        archive.writestr("sample_submission.csv", "File,Label\nt.jpg,0\n")
        patients = rng.integers(0, PATIENTS, count)
        metadata = labels[["File"]].assign(
            patient=patients, source=patients % 5, view="PA", sex="F", age=patients % 90, license="none"
        )
        archive.writestr("metadata.csv", metadata.to_csv(index=False))


def encode(rng: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)).save(stream, "JPEG", quality=50)
    return stream.getvalue()


def measure(step: str, work: Callable[[], Result]) -> Result:
    start, cpu_start = time.perf_counter(), cpu_seconds()
    result = work()
    memory = psutil.Process().memory_full_info().uss // 2**20
    times = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(cpu_seconds() - cpu_start, 1)}
    print(json.dumps({"step": step, **times, "mb": memory}), flush=True)
    return result


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its workers that have ended."""
    return sum(psutil.Process().cpu_times()[:4])


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400_000)
