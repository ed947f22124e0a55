"""Train seed 0 of the project in the working directory in child processes that are killed, until one finishes.

    python -m tests.forked tests/killing.py FAULTS

FAULTS is a JSON list of [point, count]: the child kills itself with SIGKILL when it reaches `point` for the count-th
time. `point` is a key of FAULTS below, or "seconds": then the child is killed after `count` seconds. A last child runs
to the end. Prints the exit status of each child as a JSON list. The children are forked from one process that has
imported everything already.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import mlflow
import mlflow.store.tracking.sqlalchemy_store
import sklearn.metrics  # noqa: F401
import timm  # noqa: F401
import torch
from torch.optim import AdamW

from pipeline.models import classifier
from pipeline.tracking.runs import SeedRun
from pipeline.training.checkpoint import Checkpoint
from stages.train import train


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def truncate_checkpoint(original, state, out):
    original(state, out)
    out.flush()
    out.truncate(out.tell() // 2)
    die()


def write_half_of_the_weights(original, path, data):
    original(path, data[: len(data) // 2])
    die()


def die_after(original, *arguments, **options):
    original(*arguments, **options)
    die()


def die_before(original, *arguments, **options):
    die()


FAULTS = {
    "in the middle of an epoch": (AdamW, "step", die_after),
    "while a checkpoint is written": (torch, "save", truncate_checkpoint),
    "before a checkpoint is renamed": (os, "fsync", die_before),
    "after a checkpoint": (Checkpoint, "save", die_after),
    "before an epoch is logged": (SeedRun, "log_epoch", die_before),
    "after an epoch is logged": (SeedRun, "log_epoch", die_after),
    "while an epoch is logged": (mlflow.MlflowClient, "log_batch", die_after),
    "while the weights are written": (Path, "write_bytes", write_half_of_the_weights),
    "between the weights and the description": (classifier, "save_description", die_before),
    "before the run is finished": (SeedRun, "finish", die_before),
    "after the run is finished": (SeedRun, "finish", die_after),
}


def install_fault(point: str, count: int) -> None:
    owner, name, fault = FAULTS[point]
    original, remaining = getattr(owner, name), [count]

    def call(*arguments, **options):
        remaining[0] -= 1
        return original(*arguments, **options) if remaining[0] else fault(original, *arguments, **options)

    setattr(owner, name, call)


def train_in_child(point: str, count: float) -> int:
    """Train in a child process and return its exit code: 0, or minus the number of the signal that killed it."""
    process = os.fork()
    if not process:
        if point in FAULTS:
            install_fault(point, int(count))
        train.main(["--seed", "0"])  # ends the process
    if point == "seconds":
        time.sleep(count)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    torch.set_deterministic_debug_mode("error")
    print(json.dumps([train_in_child(point, count) for point, count in [*json.loads(sys.argv[1]), ["", 0]]]))
