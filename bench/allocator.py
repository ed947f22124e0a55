"""Images per second of EfficientNet-Lite0 at 160 px on the CPU, with freed memory kept, against the C library as it is.

python bench/allocator.py [BATCHES] [ROUNDS]

Each figure is of a process of its own, for what the C library was told once it goes on doing.
"""

import json
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import timm  # noqa: F401  # here, and not in each process that is forked
import torch
from torch.nn.functional import cross_entropy

from pipeline.core import memory
from pipeline.models.classifier import Architecture, Classifier
from pipeline.training import determinism

SIZE, BATCH = 160, 32


def main(batches: int = 10, rounds: int = 5) -> None:
    kept, plain = zip(*([rates(batches, keep) for keep in (True, False)] for _ in range(rounds)), strict=True)
    for work in WORK:
        ours, theirs = (statistics.median(one[work.__name__] for one in side) for side in (kept, plain))
        figures = {"images_per_second": round(ours, 1), "plain": round(theirs, 1), "ratio": round(ours / theirs, 2)}
        print(json.dumps({"work": work.__name__} | figures))


def rates(batches: int, keep: bool) -> dict[str, float]:
    with ProcessPoolExecutor(1, get_context("fork")) as process:
        return process.submit(measure, batches, keep).result()


def measure(batches: int, keep: bool) -> dict[str, float]:
    determinism.make_deterministic(len(os.sched_getaffinity(0)))
    if keep:
        memory.retain_freed_memory()
    architecture = Architecture("timm/tf_efficientnet_lite0", [], 0, SIZE, "imagenet", SIZE, "stretch")
    network = Classifier(architecture).to(memory_format=torch.channels_last)
    images = torch.rand(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    found = {}
    for work in WORK:
        work(network, images)  # the first time, kernels are chosen and memory is fetched
        start = time.perf_counter()
        for _ in range(batches):
            work(network, images)
        found[work.__name__] = batches * BATCH / (time.perf_counter() - start)
    return found


def train(network: Classifier, images: torch.Tensor) -> None:
    cross_entropy(network.train()(images), torch.arange(len(images)) % 2).backward()


@torch.inference_mode()
def judge(network: Classifier, images: torch.Tensor) -> None:
    network.eval()(images)


WORK = [train, judge]

if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
