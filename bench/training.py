"""Images per second of an epoch of training: this project, against a plain torch loop on ImageFolder and DataLoader.

python bench/training.py [IMAGES] [ROUNDS]

Both sides train the same network on the same radiographs with the same number of threads. `overhead` is the share of
our epoch that is not forward, backward and optimizer: the epoch against the same steps on a batch that is ready.
"""

import json
import os
import sys
import tempfile
import time
import uuid
from functools import partial
from pathlib import Path

import torch
from common import alternate, loader, recipe, write_folder_and_pack
from torch.nn.functional import cross_entropy

from pipeline.core.config import TrainParams
from pipeline.data.dataset import PackedImages
from pipeline.models.classifier import Architecture, Classifier
from pipeline.training import determinism, loop
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.distributed import ProcessGroup
from pipeline.training.schedule import build_optimizer

CASES = {
    "alexnet": {"backbone": "alexnet", "size": 224, "batch_size": 8},
    "efficientnet-lite0": {
        "backbone": "timm/tf_efficientnet_lite0", "size": 160, "batch_size": 32, "head_hidden": [], "channels_last": True,
    },
}  # fmt: skip
WORKERS = [0, 2]  # of the plain loader; the better of the two counts


def main(count: int = 192, rounds: int = 5) -> None:
    threads = len(os.sched_getaffinity(0))
    determinism.make_deterministic(threads)
    for name, changes in CASES.items():
        params = recipe(**changes, epochs=1, frozen_epochs=0, mixup_alpha=0, cpu_threads=threads)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"backbone": name, "threads": threads} | compare(params, Path(folder), count, rounds)))


def compare(params: TrainParams, folder: Path, count: int, rounds: int) -> dict[str, float]:
    table = write_folder_and_pack(folder, count + 8, params.size)
    pack = PackedImages(folder / "images.npy", torch.device("cpu"))

    def ours() -> float:
        checkpoint = Checkpoint(folder, uuid.uuid4().hex)
        training = loop.Trainer(params, 0, table, pack, folder, ProcessGroup())
        trained = training.run(checkpoint, lambda *_: None, lambda: 0)
        return trained.history[0].images_per_second

    def plain(workers: int) -> float:
        network = new(params).train()
        steps = build_optimizer(network.parameters(), params)
        start, seen = time.perf_counter(), 0
        for images, labels in loader(folder, params.size, params.batch_size, workers):
            step(network, steps, images, labels)
            seen += len(images)
        return seen / (time.perf_counter() - start)

    def ready() -> float:
        """Only forward, backward and optimizer, on one batch again and again."""
        memory_format = torch.channels_last if params.channels_last else torch.contiguous_format
        network = new(params).train().to(memory_format=memory_format)
        steps = build_optimizer(network.parameters(), params)
        images = torch.rand(params.batch_size, 3, params.size, params.size).contiguous(memory_format=memory_format)
        labels = torch.arange(params.batch_size) % 2
        start = time.perf_counter()
        for _ in range(count // params.batch_size):
            step(network, steps, images, labels)
        return count / (time.perf_counter() - start)

    plainly = [partial(plain, workers) for workers in WORKERS]
    mine, *theirs, bare = alternate(ours, *plainly, ready, rounds=rounds)
    return {
        "images_per_second": round(mine, 1),
        "plain": round(max(theirs), 1),
        "ratio": round(mine / max(theirs), 2),
        "overhead": round(1 - mine / bare, 3),
    }


def new(params: TrainParams) -> Classifier:
    return Classifier(
        Architecture(params.backbone, params.head_hidden, 0, params.size, params.normalization, params.size, "stretch")
    )


def step(network: Classifier, optimizer_: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer_.zero_grad()
    cross_entropy(network(images), labels).backward()
    optimizer_.step()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
