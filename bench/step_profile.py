"""Where the time of a training step on the CPU goes, by group of operators, beside the machine's limits.

python bench/step_profile.py [STEPS] [PRECISION]

Prints a JSON line per backbone and group: the share of the time; `gflops`, the arithmetic of convolutions per second;
and `gbytes`, per second, counting every tensor that an operator reads or writes once. Before them come the limits:
oneDNN's 3x3 convolution of 256 channels, torch's matrix product, and adding to an array larger than the cache. At a
load of more than the cores in use, the profiler's times include waiting.
"""

import json
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from common import recipe, write_folder_and_pack
from torch.profiler import ProfilerActivity, profile
from training import CASES

from pipeline.core import memory
from pipeline.core.config import TrainParams
from pipeline.data.dataset import PackedImages
from pipeline.training import determinism, loop
from pipeline.training.distributed import ProcessGroup

GROUPS = {"batch norm": ("batch_norm",), "activation": ("hardtanh", "relu", "threshold", "clamp"),
          "max pooling": ("max_pool",), "matrix product": ("mm",), "padding, copies": ("copy_", "fill_"),
          "optimizer": ("sqrt", "addcdiv", "addcmul", "lerp", "_adam")}  # fmt: skip
PASSES = {"native_batch_norm": 4, "native_batch_norm_backward": 5, "hardtanh_backward": 3, "clamp_": 2, "copy_": 2}


def main(steps: int = 5, precision: str = "float32") -> None:
    threads = len(os.sched_getaffinity(0))
    determinism.make_deterministic(threads)
    memory.retain_freed_memory()
    print(json.dumps({"threads": threads, "load": os.getloadavg()[0]} | measure_limits(getattr(torch, precision))))
    for backbone, changes in CASES.items():
        params = recipe(**changes, epochs=1, frozen_epochs=0, mixup_alpha=0, cpu_threads=threads, precision=precision)
        for row in profile_steps(params, steps):
            print(json.dumps({"backbone": backbone} | row))


def measure_limits(dtype: torch.dtype) -> dict[str, float]:
    matrix, array = torch.rand(1024, 1024, dtype=dtype), torch.zeros(2**25)
    images, weight = (  # for a smaller batch, torch may choose another library
        torch.rand(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for shape in ((8, 256, 13, 13), (256, 256, 3, 3))
    )
    flops = 2 * 8 * 13**2 * weight.numel()
    return {
        "convolution_gflops": round(flops / best_time(lambda: torch.conv2d(images, weight, padding=1), 50) / 1e9),
        "matrix_product_gflops": round(2 * 1024**3 / best_time(lambda: matrix @ matrix, 50) / 1e9),
        "gbytes": round(2 * array.nbytes / best_time(lambda: array.add_(1), 20) / 1e9, 1),
    }


def best_time(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def profile_steps(params: TrainParams, steps: int) -> list[dict[str, str | float]]:
    with tempfile.TemporaryDirectory() as folder:
        table = write_folder_and_pack(Path(folder), params.batch_size + 8, params.image_size)
        pack = PackedImages(Path(folder, "images.npy"), torch.device("cpu"))
        trainer = loop.Trainer(params, 0, table, pack, Path(folder), ProcessGroup())
        trainer.network.train()
        trainer._start_phase()  # noqa: SLF001

        def step() -> None:
            trainer._train_step(*trainer._load_batch(0, trainer.train_rows))  # noqa: SLF001

        best = best_time(step, steps + 1)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            for _ in range(steps):
                step()
    events = profiler.key_averages(group_by_input_shape=True)
    # Only the gradient of a convolution records the shape of its output, here also that of the forward operator.
    outputs = {
        str(event.input_shapes[1:3]): event.input_shapes[0]
        for event in events
        if event.key == "aten::convolution_backward"
    }
    item_size = 2 if params.precision == "bfloat16" else 4
    seconds: dict[str, float] = defaultdict(float)
    flops, moved = seconds.copy(), seconds.copy()
    for event in events:
        name, work, size = event.key.removeprefix("aten::"), 0.0, 0.0
        group = next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "other")
        if name in ("convolution_backward", "mkldnn_convolution"):
            backward = name == "convolution_backward"
            shapes = event.input_shapes[1:3] if backward else event.input_shapes[:2]
            images, weight = shapes
            output, times = outputs.get(str(shapes), []), 1
            if backward and images[1] > 3:
                times = 1 if weight[1] == 1 else 2  # a depthwise convolution's two gradients are two calls
            kind = "pointwise" if weight[2:] == [1, 1] else "depthwise" if weight[1] == 1 else "other convolution"
            group = f"{kind} {'backward' if backward else 'forward'}"
            work = 2 * times * math.prod(output) * math.prod(weight[1:])
            size = times * (math.prod(images) + math.prod(output))
        elif event.input_shapes and name in PASSES:
            size = PASSES[name] * math.prod(event.input_shapes[0])
        seconds[group] += event.self_cpu_time_total / 1e6
        flops[group] += work * event.count
        moved[group] += size * event.count * item_size
    total = sum(seconds.values())
    rows: list[dict[str, str | float]] = [
        {"group": group, "share": round(spent / total, 3), "gflops": round(flops[group] / spent / 1e9, 1),
         "gbytes": round(moved[group] / spent / 1e9, 1)}
        for group, spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]  # fmt: skip
    return [*rows, {"group": "all", "share": 1, "gflops": round(sum(flops.values()) / steps / best / 1e9, 1),
                    "images_per_second": round(params.batch_size / best, 1)}]  # fmt: skip


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((int, str), sys.argv[1:], strict=False)))
