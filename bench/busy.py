"""Images per second with two threads while 0, 1 and 2 other processes compute, by how long waiting threads spin.

python bench/busy.py [ROUNDS] [SECONDS] [NETWORK-TASKS] [SPIN_COUNTS]

Everything runs on the first two cores. The rates are keyed by libgomp's spin count: 0 sleeps at once, 300000 is
libgomp's default, and the commands set threads.SPIN_COUNT. All run in turn in every round, and the best round of each
counts, because other processes can only slow it down. `ratio` is that of threads.SPIN_COUNT to the best of all,
`median_ratio` the same of the medians. Commas separate the parts of a list:

python bench/busy.py 5 1 alexnet-train 0,500,5000,300000
"""

import json
import os
import subprocess
import sys
import time
from typing import Any

import pandas as pd
from common import ROOT

from pipeline.core import threads

TASKS = "efficientnet-train,alexnet-train"
SPIN_COUNTS = f"0,{threads.SPIN_COUNT},300000"
CORES, OTHERS = 2, [0, 1, 2]
# Ends with the benchmark, even if that is killed.
COMPUTE = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"


def main(rounds: str = "5", seconds: str = "1", tasks: str = TASKS, spin_counts: str = SPIN_COUNTS) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    for task in tasks.split(","):
        workers = {
            count: start_worker(task, count)
            for count in sorted({threads.SPIN_COUNT, *map(int, spin_counts.split(","))})
        }
        for worker in workers.values():
            measure(worker, 0)  # import torch, build the network, warm up
        for count in OTHERS:
            others = [subprocess.Popen([sys.executable, "-c", COMPUTE]) for _ in range(count)]
            rates = pd.DataFrame(
                [
                    {spin_count: measure(worker, float(seconds)) for spin_count, worker in workers.items()}
                    for _ in range(int(rounds))
                ]
            )
            for process in others:
                process.kill()
                process.wait()
            best, median = rates.max(), rates.median()
            ratios = {"ratio": best / best.max(), "median_ratio": median / median.max()}
            result = {
                "task": task,
                "other_processes": count,
                "images_per_second": best.round(1).to_dict(),
                **{name: round(ratio[threads.SPIN_COUNT], 2) for name, ratio in ratios.items()},
                "load_average": round(os.getloadavg()[0], 1),
            }
            print(json.dumps(result), flush=True)
        for worker in workers.values():
            worker.communicate()  # closes its input, which ends it


def start_worker(task: str, spin_count: int) -> "subprocess.Popen[str]":
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    environment = inherited | {"GOMP_SPINCOUNT": str(spin_count)}
    command = [sys.executable, __file__, "work", task]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True, bufsize=1)


def measure(worker: "subprocess.Popen[str]", seconds: float) -> float:
    assert worker.stdin
    assert worker.stdout
    worker.stdin.write(f"{seconds}\n")
    return float(worker.stdout.readline())


def work(name: str) -> None:
    """Run one task for as many seconds as each line of the input says, and print images per second."""
    import torch
    from torch.nn.functional import cross_entropy

    from pipeline.core import memory
    from pipeline.models.classifier import Architecture, Classifier
    from pipeline.training import determinism

    determinism.make_deterministic(CORES)
    memory.retain_freed_memory()
    network_name, task = name.split("-")
    settings: dict[str, tuple[Any, ...]] = {
        "efficientnet": ("timm/tf_efficientnet_lite0", [], 160, "imagenet", 32, torch.channels_last),
        "alexnet": ("alexnet", [256, 128], 224, "none", 8, torch.contiguous_format),
    }
    backbone, hidden, size, normalization, batch, memory_format = settings[network_name]
    architecture = Architecture(backbone, hidden, 0, size, normalization, size, "stretch")
    network = Classifier(architecture).train(task == "train").to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-5)
    images = torch.rand(batch, 3, size, size).contiguous(memory_format=memory_format)
    labels = torch.arange(batch) % 2

    def train() -> None:
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()

    @torch.inference_mode()
    def predict() -> None:
        network(images)

    step = {"train": train, "predict": predict}[task]
    for line in sys.stdin:
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < float(line):
            step()
            count += batch
        print(count / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(sys.argv[2])
    else:
        main(*sys.argv[1:])
