"""Images per second of EfficientNet-Lite0 on the CPU, with freed memory retained or with default settings.

python bench/allocator.py [BATCHES] [ROUNDS] [SIZE]

Each measurement runs in its own process, because the settings of the C library cannot be undone.
"""

import json
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import timm  # noqa: F401  # once, instead of in every forked process
import torch
from torch.nn.functional import cross_entropy

from pipeline.core import memory
from pipeline.models.classifier import Architecture, Classifier
from pipeline.training import determinism

BATCH = 32


def main(batches: int = 10, rounds: int = 5, size: int = 160) -> None:
    retained, plain = zip(
        *([measure(batches, size, retain) for retain in (True, False)] for _ in range(rounds)), strict=True
    )
    for task in TASKS:
        our_rate, plain_rate = (
            statistics.median(rates[task.__name__] for rates in results) for results in (retained, plain)
        )
        rates = {"images_per_second": round(our_rate, 1), "plain": round(plain_rate, 1)}
        print(json.dumps({"task": task.__name__, **rates, "ratio": round(our_rate / plain_rate, 2)}))


def measure(batches: int, size: int, retain: bool) -> dict[str, float]:
    """Return images per second of each task, measured in a new process."""
    with ProcessPoolExecutor(1, get_context("fork")) as process:
        return process.submit(measure_here, batches, size, retain).result()


def measure_here(batches: int, size: int, retain: bool) -> dict[str, float]:
    determinism.make_deterministic(len(os.sched_getaffinity(0)))
    if retain:
        memory.retain_freed_memory()
    architecture = Architecture("timm/tf_efficientnet_lite0", [], 0, size, "imagenet", size, "stretch")
    network = Classifier(architecture).to(memory_format=torch.channels_last)
    images = torch.rand(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
    rates = {}
    for task in TASKS:
        task(network, images)  # warm up: select kernels, allocate memory
        start = time.perf_counter()
        for _ in range(batches):
            task(network, images)
        rates[task.__name__] = batches * BATCH / (time.perf_counter() - start)
    return rates


def train(network: Classifier, images: torch.Tensor) -> None:
    cross_entropy(network.train()(images), torch.arange(len(images)) % 2).backward()


@torch.inference_mode()
def predict(network: Classifier, images: torch.Tensor) -> None:
    network.eval()(images)


TASKS = [train, predict]

if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
