"""Images per second and core: batches from the pack, compared with ImageFolder and DataLoader.

python bench/input.py [SIZE] [IMAGES]

`float` is a batch ready for the network, (B, 3, SIZE, SIZE), flipped and normalized; `uint8` is a batch of bytes that
the device converts.
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
from pipeline.training.augment import augment, draw_augmentation
from pipeline.training.determinism import make_generator

BATCH = 8


def main(size: int = 512, count: int = 512) -> None:
    torch.set_num_threads(1)
    params = recipe(image_size=size)  # without mixup, which both would do in the same way
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder_and_pack(folder, count, size)
        pack = PackedImages(folder / "images.npy", torch.device("cpu"))
        network = Classifier(Architecture("squeezenet1_1", [], 0, size, "none", size, "stretch"))
        batches = torch.randperm(count, generator=make_generator(0, "order")).split(BATCH)

        def read_uint8() -> None:
            for _ in pack.batches(batches):
                pass

        def read_float() -> None:
            for step, pixels in enumerate(pack.batches(batches)):
                drawn = draw_augmentation(len(pixels), params, make_generator(0, step, "augment"))
                network.normalize(augment(network.resize(pixels), drawn))

        def read_plain() -> None:
            for _ in loader(folder, size, BATCH, 0):
                pass

        measurements = [partial(seconds, read) for read in (read_uint8, read_float, read_plain)]
        uint8, floats, plain = (count / duration for duration in alternate(*measurements))
    rates = {"uint8": round(uint8), "float": round(floats), "plain": round(plain)}
    ratios = {"ratio_uint8": round(uint8 / plain, 1), "ratio_float": round(floats / plain, 1)}
    print(json.dumps({"size": size} | rates | ratios))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
