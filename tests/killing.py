"""Trains seed 0 of the project in the working directory, again and again, in children that are killed on the way.

    python killing.py FAULTS

FAULTS is a JSON list of [where, count]: the child kills itself with SIGKILL as it comes to `where` for the count-th
time. `where` is a key of FAULTS below, or "seconds", and the child is killed after so many. A last child runs to the
end. Prints the exit status of each as a JSON list. The children are forked from one process that has imported
everything, which saves them the imports.
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


def half_of_a_checkpoint(real, state, out):
    real(state, out)
    out.flush()
    out.truncate(out.tell() // 2)
    die()


def half_of_the_weights(real, path, data):
    real(path, data[: len(data) // 2])
    die()


def after(real, *arguments, **options):
    real(*arguments, **options)
    die()


def before(real, *arguments, **options):
    die()


FAULTS = {
    "in the middle of an epoch": (AdamW, "step", after),
    "in the middle of a checkpoint": (torch, "save", half_of_a_checkpoint),
    "before a checkpoint has its name": (os, "fsync", before),
    "after a checkpoint": (Checkpoint, "save", after),
    "before an epoch is logged": (SeedRun, "log_epoch", before),
    "after an epoch is logged": (SeedRun, "log_epoch", after),
    "in the middle of an epoch's log": (mlflow.MlflowClient, "log_batch", after),
    "in the middle of the model": (Path, "write_bytes", half_of_the_weights),
    "between the model and its description": (classifier, "describe", before),
    "before the run is closed": (SeedRun, "finish", before),
    "after the run is closed": (SeedRun, "finish", after),
}


def install(where: str, count: int) -> None:
    owner, name, fault = FAULTS[where]
    real, left = getattr(owner, name), [count]

    def maybe(*arguments, **options):
        left[0] -= 1
        return real(*arguments, **options) if left[0] else fault(real, *arguments, **options)

    setattr(owner, name, maybe)


def child(where: str, count: float) -> int:
    """Train in a child and return how it ended: 0, or less the number of the signal that killed it."""
    process = os.fork()
    if not process:
        if where in FAULTS:
            install(where, int(count))
        train.main(["--seed", "0"])  # ends the process
    if where == "seconds":
        time.sleep(count)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    torch.set_deterministic_debug_mode("error")
    print(json.dumps([child(where, count) for where, count in [*json.loads(sys.argv[1]), ["", 0]]]))
