"""Images per second on one core: batches from the pack, against ImageFolder and DataLoader on the same radiographs.

python bench/input.py [SIZE] [IMAGES]

`float` is a batch ready for the network, (B, 3, SIZE, SIZE) and flipped; `uint8` is what the host does when the
device takes bytes and does the rest.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from common import alternate, loader, recipe, seconds, write_folder_and_pack

from pipeline.data.dataset import PackedImages
from pipeline.models.classifier import Architecture, Classifier
from pipeline.training.augment import augment
from pipeline.training.determinism import make_generator

BATCH = 8


def main(size: int = 512, count: int = 512) -> None:
    torch.set_num_threads(1)
    params = recipe(size=size)  # mixup comes after, on both sides
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder_and_pack(folder, count, size)
        pack = PackedImages(folder / "images.npy", torch.device("cpu"))
        network = Classifier(Architecture("squeezenet1_1", [], 0, size, "none", size, "stretch"))
        batches = torch.randperm(count, generator=make_generator(0, "order")).split(BATCH)

        def packed() -> None:
            for _ in pack.batches(batches):
                pass

        def ready() -> None:
            for step, (_, pixels) in enumerate(pack.batches(batches)):
                network.normalize(augment(network.resize(pixels), params, make_generator(0, step, "augment")))

        def plain() -> None:
            for _ in loader(folder, size, BATCH, 0):
                pass

        sides = [partial(seconds, side) for side in (packed, ready, plain)]
        uint8, floats, theirs = (count / taken for taken in alternate(*sides))
    figures = {"uint8": uint8, "float": floats, "plain": theirs}
    ratios = {"ratio_uint8": round(uint8 / theirs, 1), "ratio_float": round(floats / theirs, 1)}
    print(json.dumps({"size": size} | {key: round(value) for key, value in figures.items()} | ratios))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
