"""Decode N radiographs of 512×512 into the pack, against Pillow in a plain loop over the same zip.

python bench/prepare.py [N]    # the competition has 15264 + 400
"""

import json
import sys
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
from common import DRAWN, radiographs, seconds
from PIL import Image

from pipeline import packing
from pipeline.config import PrepareParams


def plain(raw: Path) -> None:
    with zipfile.ZipFile(raw) as archive:
        for name in archive.namelist():
            if name.endswith(".jpg"):
                np.asarray(Image.open(BytesIO(archive.read(name))).convert("L").resize((512, 512)))


def main(count: int) -> None:
    images = radiographs()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw.zip")
        with zipfile.ZipFile(raw, "w") as archive:
            for index in range(count):
                archive.writestr(f"train/train/{index}.jpg", images[index % DRAWN])
            archive.writestr("test/test/t.jpg", images[-1])
            archive.writestr("train_labels.csv", "File,Label\n" + "".join(f"{i}.jpg,{i % 2}\n" for i in range(count)))
            archive.writestr("sample_submission.csv", "File,Label\nt.jpg,0\n")
        ours = seconds(lambda: packing.pack(raw, PrepareParams(size=512, max_quarantined=0), Path(folder)))
        theirs = seconds(lambda: plain(raw))
    figures = {
        "images": count,
        "seconds": round(ours, 1),
        "plain_seconds": round(theirs, 1),
        "ratio": round(theirs / ours, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15264)
