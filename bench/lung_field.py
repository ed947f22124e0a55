"""How well the box of `lung_crop` fits the lungs of radiographs that have masks of them.

IMAGES and MASKS are folders; a mask has the name of its image but for the ending, and lungs brighter than 127. The line
tells the median, the 5th percentile and the minimum of the share of the lungs in the box, and of the overlap of the box
with the smallest one around the lungs (intersection over union); the median share of the image in the box; and in how
many images no lungs were found, so that the box is the whole image. Masks of many images of covid-chestxray-dataset
(github.com/ieee8023/covid-chestxray-dataset) are in the wheel of torchxrayvision
(`pip download --no-deps torchxrayvision`), in torchxrayvision/data/semantic_masks_v7labs_lungs.zip.

python bench/lung_field.py IMAGES MASKS
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.data.images import decode_radiograph
from pipeline.models.preprocessing import LungField

SIZE = 256  # edge of images and masks, pixels


def overlap(box: np.ndarray, lungs: np.ndarray) -> tuple[float, float]:
    """Return the share of the lungs, bool (SIZE, SIZE), in the box, and the overlap of the box with theirs."""
    rows, columns = (np.flatnonzero(lungs.any(axis=axis)) for axis in (1, 0))
    truth = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / SIZE
    center = (np.arange(SIZE) + 0.5) / SIZE
    across, down = ((center > box[axis]) & (center < box[axis + 2]) for axis in (0, 1))
    shared = np.prod(np.maximum(np.minimum(box[2:], truth[2:]) - np.maximum(box[:2], truth[:2]), 0))
    union = np.prod(box[2:] - box[:2]) + np.prod(truth[2:] - truth[:2]) - shared
    return lungs[np.ix_(down, across)].sum() / lungs.sum(), shared / union


def summarize(values: np.ndarray) -> dict[str, float]:
    quantiles = {"median": 0.5, "5 %": 0.05, "minimum": 0.0}
    return {name: round(float(np.quantile(values, quantile)), 3) for name, quantile in quantiles.items()}


def main(images: Path, masks: Path) -> None:
    of_stems = {path.stem.lower(): path for path in masks.iterdir()}
    pairs = [(path, of_stems[path.stem.lower()]) for path in images.iterdir() if path.stem.lower() in of_stems]
    radiographs = np.stack([decode_radiograph(path.read_bytes(), SIZE, "stretch")[0] for path, _ in pairs])
    lungs = [np.asarray(Image.open(path).convert("L").resize((SIZE, SIZE))) > 127 for _, path in pairs]
    boxes = LungField()(torch.from_numpy(radiographs)[:, None]).numpy()
    shares, overlaps = np.array([overlap(box, mask) for box, mask in zip(boxes, lungs, strict=True)]).T
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    line = {
        "images": len(pairs), "lungs in the box": summarize(shares), "overlap": summarize(overlaps),
        "area": round(float(np.median(areas)), 3), "not found": int((areas == 1).sum()),
    }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
