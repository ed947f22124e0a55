"""Images per second of EfficientNet-Lite0 at 160 px on the CPU, with freed memory kept, against the C library as it is.

python bench/allocator.py [IMAGES] [ROUNDS]

Each figure is of a process of its own, for what the C library was told once it goes on doing.
"""

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from common import alternate, seconds
from torch.nn.functional import cross_entropy

from pipeline import memory
from pipeline.models.classifier import Architecture, Classifier
from pipeline.training import determinism

SIZE, BATCH = 160, 32


def main(count: int = 320, rounds: int = 5) -> None:
    for work in (train, judge):
        kept, plain = alternate(*(partial(alone, work, count, keep) for keep in (True, False)), rounds=rounds)
        figures = {"images_per_second": round(kept, 1), "plain": round(plain, 1), "ratio": round(kept / plain, 2)}
        print(json.dumps({"work": work.__name__} | figures))


def alone(work, count: int, keep: bool) -> float:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(rate, work, count, keep).result()


def rate(work, count: int, keep: bool) -> float:
    determinism.make_deterministic(len(os.sched_getaffinity(0)))
    if keep:
        memory.keep_freed()
    architecture = Architecture("timm/tf_efficientnet_lite0", [], 0, SIZE, "imagenet", SIZE, "stretch")
    network = Classifier(architecture).to(memory_format=torch.channels_last)
    images = torch.rand(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    work(network, images)  # the first time, kernels are chosen and memory is fetched
    return count / seconds(lambda: [work(network, images) for _ in range(0, count, BATCH)])


def train(network: Classifier, images: torch.Tensor) -> None:
    cross_entropy(network.train()(images), torch.arange(len(images)) % 2).backward()


@torch.inference_mode()
def judge(network: Classifier, images: torch.Tensor) -> None:
    network.eval()(images)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
