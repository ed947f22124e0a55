"""Images per second over an epoch of training, compared with a plain PyTorch loop with ImageFolder and DataLoader.

python bench/training.py [IMAGES] [ROUNDS] [SIZE]

Both train the same network on the same radiographs with the same number of threads. `overhead` is the share of this
project's epoch outside forward, backward and optimizer, measured by the same steps on one batch in memory.
SIZE takes the place of the edges of the images in the list of cases.
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
from networks import build_classifier
from torch.nn.functional import cross_entropy

from pipeline.core.config import TrainParams
from pipeline.data.dataset import PackedImages
from pipeline.models.classifier import Classifier
from pipeline.training import determinism, loop
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.distributed import ProcessGroup
from pipeline.training.schedule import build_optimizer

CASES = {
    "alexnet": {"backbone": "alexnet", "image_size": 224, "batch_size": 8},
    "efficientnet-lite0": {
        "backbone": "timm/tf_efficientnet_lite0", "image_size": 160, "batch_size": 32, "head_hidden": [],
        "channels_last": True,
    },
}  # fmt: skip
WORKERS = [0, 2]  # of the baseline loader; the better result counts


def main(count: int = 192, rounds: int = 5, size: int | None = None) -> None:
    threads = len(os.sched_getaffinity(0))
    determinism.make_deterministic(threads)
    for name, case in CASES.items():
        changes = case | ({"image_size": size} if size else {})
        params = recipe(**changes, epochs=1, frozen_epochs=0, mixup_alpha=0, cpu_threads=threads)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"backbone": name, "threads": threads} | compare(params, Path(folder), count, rounds)))


def compare(params: TrainParams, folder: Path, count: int, rounds: int) -> dict[str, float]:
    table = write_folder_and_pack(folder, count + 8, params.image_size)
    pack = PackedImages(folder / "images.npy", torch.device("cpu"))

    def ours() -> float:
        checkpoint = Checkpoint(folder, uuid.uuid4().hex)
        trainer = loop.Trainer(params, 0, table, pack, folder, ProcessGroup())
        result = trainer.run(checkpoint, lambda *_: None, lambda: 0)
        return result.history[0].images_per_second

    def plain(workers: int) -> float:
        network = build_classifier(params).train()
        optimizer = build_optimizer(list(network.parameters()), params)
        start, image_count = time.perf_counter(), 0
        for images, labels in loader(folder, params.image_size, params.batch_size, workers):
            step(network, optimizer, images, labels)
            image_count += len(images)
        return image_count / (time.perf_counter() - start)

    def steps_only() -> float:
        """Run forward, backward and optimizer repeatedly on one batch."""
        memory_format = torch.channels_last if params.channels_last else torch.contiguous_format
        network = build_classifier(params).train().to(memory_format=memory_format)
        optimizer = build_optimizer(list(network.parameters()), params)
        images = torch.rand(params.batch_size, 3, params.image_size, params.image_size).contiguous(
            memory_format=memory_format
        )
        labels = torch.arange(params.batch_size) % 2
        start = time.perf_counter()
        for _ in range(count // params.batch_size):
            step(network, optimizer, images, labels)
        return count / (time.perf_counter() - start)

    baselines = [partial(plain, workers) for workers in WORKERS]
    our_rate, *plain_rates, step_rate = alternate(ours, *baselines, steps_only, rounds=rounds)
    return {
        "images_per_second": round(our_rate, 1),
        "plain": round(max(plain_rates), 1),
        "ratio": round(our_rate / max(plain_rates), 2),
        "overhead": round(1 - our_rate / step_rate, 3),
    }


def step(network: Classifier, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer.zero_grad()
    cross_entropy(network(images), labels).backward()
    optimizer.step()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
