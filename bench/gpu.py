"""Everything that wants a GPU: equal bytes, agreement with the CPU, host waits, rates, ten seeds at once.

python bench/gpu.py [SECTION …] [--out FILE] [--device cpu] [--quick]

Prints one JSON object with an entry per section, and the same to FILE after every case. A case that fails is an
`error` with the end of its traceback, and the next one runs. Rates are images per second. It imports neither MLflow nor
DVC. `--quick` takes tiny networks and images, to try the script on a CPU.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from networks import build_classifier
from nvjpeg import measure_nvjpeg
from safetensors.torch import save
from torch import Tensor, distributed, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from pipeline.core import config
from pipeline.core.config import FindingParams, TrainParams
from pipeline.core.errors import Interrupted
from pipeline.data.dataset import PackedImages
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference.candidate import Candidate
from pipeline.inference.dataset import probability_table
from pipeline.models.classifier import Classifier
from pipeline.training import determinism, loop, mps
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.distributed import ProcessGroup, init_distributed
from pipeline.training.schedule import build_optimizer

ROOT = Path(__file__).parents[1]
SEEDS = 10  # trained at once
TIME_LIMIT = 430  # seconds, after which no case is begun; the longest takes 40
WARMUP_STEPS = 12  # after which kernels are loaded and the step is captured
VALIDATION_IMAGES = 8
ALEXNET: dict[str, Any] = {"frozen_epochs": 0, "loader_threads": 2}  # the competition's recipe: 512 px, batches of 8
LITE0: dict[str, Any] = ALEXNET | {
    "backbone": "timm/tf_efficientnet_lite0", "head_hidden": [], "image_size": 224, "normalization": "imagenet",
    "batch_size": 32, "mixup_alpha": 0, "optimizer": "adamw", "channels_last": True,
}  # fmt: skip
CONVNEXT = LITE0 | {"backbone": "convnext_tiny", "batch_size": 64}  # with stochastic depth
VIT = LITE0 | {"backbone": "timm/vit_small_patch16_224", "batch_size": 64, "channels_last": False}
NETWORKS = {"alexnet": ALEXNET, "efficientnet-lite0": LITE0, "convnext-tiny": CONVNEXT, "vit-small": VIT}
RANDOM_WEIGHTS = '{"source": "none"}'  # origin.json, beside the pretrained weights that there are not
QUICK = {"backbone": "squeezenet1_1", "image_size": 32, "batch_size": 4}


@dataclass
class Bench:
    """The device, the images and the results so far."""

    device: torch.device
    quick: bool
    folder: Path  # for packs and checkpoints; with origin.json
    out: Path | None = None
    start: float = field(default_factory=time.perf_counter)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    packs: dict[tuple[int, int], PackedImages] = field(default_factory=dict)

    def run(self, section: str, name: str, measure: Callable[[], Any]) -> None:
        """Record what a case returns, or how it failed; a case for which no time is left is not run."""
        if time.perf_counter() - self.start > TIME_LIMIT:
            self.results.setdefault(section, {})[name] = {"error": "no time left; name the section to run it alone"}
            return
        try:
            value = measure()
        except Exception as error:  # noqa: BLE001  # the other cases shall run
            value = {"error": f"{type(error).__name__}: {error}"[:300], "traceback": traceback.format_exc()[-1500:]}
        self.results.setdefault(section, {})[name] = value
        print(f"{section}, {name}: {json.dumps(value)}", file=sys.stderr, flush=True)
        if self.out:
            self.out.write_text(json.dumps(self.results, indent=1))

    def few(self, cases: dict[str, Any]) -> dict[str, Any]:
        """Return the cases, or only the first in a quick run."""
        return dict(list(cases.items())[:1]) if self.quick else cases

    def recipe(self, **changes: object) -> TrainParams:
        """Return the training parameters of the competition profile, with changes."""
        defaults = config.load_config(ROOT / "params.yaml").profiles["competition"].train.model_dump()
        return TrainParams.model_validate({**defaults, **changes, **(QUICK if self.quick else {})})

    def pack(self, size: int, count: int) -> PackedImages:
        """Return `count` random images, of which every second one, a positive, is brighter in the middle."""
        size, count = (32, min(count, 28)) if self.quick else (size, count)
        if (size, count) not in self.packs:
            unique = np.random.default_rng(0).integers(0, 200, (min(count, 256), size, size), np.uint8)
            unique[1::2, size // 4 : -size // 4, size // 4 : -size // 4] += 50
            folder = self.folder / f"{size}-{count}"
            folder.mkdir()
            np.save(folder / "images.npy", np.resize(unique, (count, size, size)))
            (folder / "images.json").write_text('{"resize": "stretch"}')
            self.packs[size, count] = PackedImages(folder / "images.npy", self.device)
        return self.packs[size, count]

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class NoCheckpoint(Checkpoint):
    """Saves and loads nothing; `feature_views` writes its features to the folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "")

    def save(self, state: dict[str, Any]) -> None:
        pass

    def load(self) -> None:
        return None


@dataclass
class Steps:
    """The `stop` of a training: calls `actions` after the steps with these numbers and stops it after the last."""

    last: float = float("inf")
    actions: Mapping[int, Callable[[], object]] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)  # of the end of every step so far, on a clock of all processes

    def __call__(self) -> int:
        if action := self.actions.get(len(self.times) + 1):
            action()
        self.times.append(time.monotonic())
        return signal.SIGINT if len(self.times) >= self.last else 0


def train(
    bench: Bench,
    params: TrainParams,
    pack: PackedImages,
    *,
    seed: int = 0,
    stop: Callable[[], int] = lambda: 0,
    checkpoint: Checkpoint | None = None,
    on_epoch: Callable[..., None] = lambda *_: None,
    graph: bool = True,
    group: ProcessGroup | None = None,
    count: int | None = None,
) -> loop.Trainer:
    """Train on the first `count` images until the end, or until `stop` says so.

    Without `graph`, the host launches every kernel of every step.
    """
    count = min(count or len(pack.images), len(pack.images))
    subset = ["validation"] * VALIDATION_IMAGES + ["train"] * (count - VALIDATION_IMAGES)
    images = np.arange(count)  # two sources, each with both labels
    table = pd.DataFrame({"label": images % 2, "subset": subset, "source": images // 2 % 2})
    trainer = loop.Trainer(params, seed, table, pack, bench.folder, group or ProcessGroup())
    trainer.use_cuda_graph = trainer.use_cuda_graph and graph
    with contextlib.suppress(Interrupted):
        trainer.run(checkpoint or NoCheckpoint(Path(tempfile.mkdtemp(dir=bench.folder))), on_epoch, stop)
    bench.synchronize()
    return trainer


def digest(trainer: loop.Trainer) -> str:
    """Hash the weights, the losses and the predictions of a training."""
    tensors = {name: value.cpu().contiguous() for name, value in trainer.network.state_dict().items()}
    results = [entry.train_loss for entry in trainer.history], [p.tolist() for p in trainer.predictions]
    return hashlib.sha256(save(tensors) + repr(results).encode()).hexdigest()[:16]


def place_classifier(bench: Bench, params: TrainParams, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    network = build_classifier(params)
    return network.to(bench.device, memory_format=memory_format(params)).eval()  # type: ignore[no-any-return, call-overload]


def memory_format(params: TrainParams) -> torch.memory_format:
    return torch.channels_last if params.channels_last else torch.contiguous_format


# Sections


def describe_environment(bench: Bench) -> None:
    def versions() -> dict[str, Any]:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
        return {
            "gpus": subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
            if bench.device.type == "cuda"
            else [],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "python": platform.python_version(),
            "cores": len(os.sched_getaffinity(0)),
        }

    size = 256 if bench.quick else 8192

    def matmul(dtype: torch.dtype, tf32: bool) -> float:
        with math_mode(tf32):
            left, right = torch.randn(2, size, size, device=bench.device, dtype=dtype)
            return round(2 * size**3 * repeat_rate(bench, lambda: left @ right, 0.5) / 1e12, 3)

    def copy_rate() -> float:
        source = torch.ones(size * size * 8, device=bench.device)
        target = torch.empty_like(source)
        return round(2 * source.nbytes * repeat_rate(bench, lambda: target.copy_(source), 0.5) / 1e9, 1)

    def upload_rate() -> float:
        source = torch.ones(size * size, pin_memory=bench.device.type == "cuda")
        target = torch.empty_like(source, device=bench.device)
        upload = partial(target.copy_, source, non_blocking=True)
        return round(source.nbytes * repeat_rate(bench, upload, 0.5) / 1e9, 1)

    bench.run("environment", "versions", versions)
    bench.run("environment", "float32 TFLOP/s", lambda: matmul(torch.float32, tf32=False))
    bench.run("environment", "tf32 TFLOP/s", lambda: matmul(torch.float32, tf32=True))
    bench.run("environment", "bfloat16 TFLOP/s", lambda: matmul(torch.bfloat16, tf32=False))
    bench.run("environment", "copy on the device GB/s", copy_rate)
    bench.run("environment", "copy to the device GB/s", upload_rate)


def measure_rates(bench: Bench) -> None:
    """Measure images per second over whole epochs, beside forward, backward and optimizer alone."""
    large = LITE0 | {"batch_size": 256}
    cases = {
        "alexnet 512 px batch 8 tf32": (ALEXNET | {"precision": "tf32"}, 4096, True),
        "alexnet 512 px batch 8 bfloat16": (ALEXNET | {"precision": "bfloat16"}, 4096, True),
        "efficientnet-lite0 224 px batch 256 bfloat16": (large | {"precision": "bfloat16"}, 8192, False),
        "efficientnet-lite0 224 px batch 32 bfloat16": (LITE0 | {"precision": "bfloat16"}, 8192, True),
        "alexnet 512 px batch 8 float32": (ALEXNET | {"precision": "float32"}, 4096, False),
        "efficientnet-lite0 224 px batch 256 float16": (large | {"precision": "float16"}, 8192, False),
        "convnext-tiny 224 px batch 64 bfloat16": (CONVNEXT | {"precision": "bfloat16"}, 4096, False),
        "vit-small 224 px batch 64 bfloat16": (VIT | {"precision": "bfloat16"}, 4096, False),
        "alexnet 512 px batch 8 tf32 contiguous": (
            ALEXNET | {"precision": "tf32", "channels_last": False},
            4096,
            False,
        ),
    }

    def measure(changes: dict[str, Any], count: int, also_eager: bool) -> dict[str, Any]:
        params = bench.recipe(**changes)
        pack = bench.pack(params.image_size, count)
        result = {"graph": epoch_rate(bench, params, pack)}
        if also_eager:  # on fewer images, because it is slower
            result["eager"] = epoch_rate(bench, params, pack, graph=False, count=len(pack.images) // 2)
        alone = step_rate(bench, params)
        return result | {"alone": round(alone, 1), "overhead": round(1 - result["graph"]["rate"] / alone, 3)}

    for name, case in bench.few(cases).items():
        bench.run("rates", name, partial(measure, *case))


def check_determinism(bench: Bench) -> None:
    """Compare the bytes of a training with those of one that is repeated, resumed, or run without the graph."""
    sizes = {"alexnet": 128, "efficientnet-lite0": 128, "convnext-tiny": 64, "vit-small": 224}
    cases = {
        f"{name} {precision}": NETWORKS[name]
        | {"image_size": sizes[name], "precision": precision, "batch_size": 8, "epochs": 2, "mixup_alpha": 0.5}
        for name in NETWORKS
        for precision in ("float32", "bfloat16", "tf32", "float16")
        if name == "alexnet" or precision in ("float32", "bfloat16")
    }
    resized = cases["efficientnet-lite0 bfloat16"] | {"image_size": 96}
    cases |= {
        "efficientnet-lite0 with augmentation and ema": resized | {
            "rotation": 5, "zoom": 0.2, "shift": 0.05, "gamma_jitter": 0.5, "ema_decay": 0.9,
            "gradient_accumulation_steps": 2, "frozen_epochs": 1, "sampling": "weighted", "schedule": "cosine",
        },
        "efficientnet-lite0 with style, groups and swa": resized | {
            "histogram_exchange": 0.5, "fourier_exchange": 0.5, "contrast_jitter": 0.5, "min_resolution": 0.5,
            "noise": 10, "min_jpeg_quality": 50, "cutmix_alpha": 1, "mixup_pairing": "same_label",
            "label_smoothing": 0.1, "sampling": "group_balanced", "group_dro": 0.5, "domain_adversarial": 0.5,
            "keep": "last", "swa_epochs": 1,
        },
        "efficientnet-lite0 with preprocessing": resized | {
            "lung_crop": True, "marker_mask": True, "border_mask": 0.1, "intensity_normalization": "equalize",
            "test_time_augmentation": "crops",
        },
        "efficientnet-lite0 with features of a frozen backbone": resized | {
            "feature_views": 3, "feature_maps": 3, "frozen_epochs": 2, "rotation": 5,
        },
    }  # fmt: skip

    def compare(changes: dict[str, Any]) -> dict[str, Any]:
        params = bench.recipe(**changes)
        size = 128 if params.image_size == 96 else params.image_size  # 96: resized
        pack = bench.pack(size, VALIDATION_IMAGES + (72 if bench.device.type == "cuda" else 24))
        whole = train(bench, params, pack)
        checkpoint = Checkpoint(bench.folder, uuid.uuid4().hex)
        train(bench, params, pack, stop=Steps(last=4), checkpoint=checkpoint)
        assert checkpoint.path.exists()
        trainings = {
            "repeated": train(bench, params, pack),
            "resumed": train(bench, params, pack, checkpoint=checkpoint),
            "without graph": train(bench, params, pack, graph=False),
        }
        equal = {name: digest(training) == digest(whole) for name, training in trainings.items()}
        finite = bool(np.isfinite([entry.train_loss for entry in whole.history]).all())
        return equal | {"finite": finite, "captured": whole.is_captured}

    for name, case in bench.few(cases).items():
        bench.run("determinism", name, partial(compare, case))


def check_agreement(bench: Bench) -> None:
    """Compare probabilities of the GPU with those of the CPU, float32: the largest difference, for trained networks."""
    cpu, layouts = torch.device("cpu"), {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

    def train_briefly(params: TrainParams, seed: int) -> Classifier:
        trainer = train(bench, params, bench.pack(params.image_size, 4096), seed=seed, count=VALIDATION_IMAGES + 256)
        return copy.deepcopy(trainer.eval_model).to(cpu, memory_format=torch.contiguous_format).eval()  # type: ignore[no-any-return, call-overload]

    def draw(size: int) -> Tensor:
        """Draw images between the two classes, so that not all probabilities are about 0 or 1."""
        pixels = np.random.default_rng(1).integers(0, 200, (32, size, size), np.uint8)
        pixels[:, size // 4 : -size // 4, size // 4 : -size // 4] += np.linspace(0, 50, 32).astype(np.uint8)[
            :, None, None
        ]
        return torch.from_numpy(pixels)

    def compare(changes: dict[str, Any]) -> dict[str, float]:
        params = bench.recipe(**changes, epochs=3)
        network, pixels = train_briefly(params, 0), draw(params.image_size)
        expected = network.predict_proba(pixels)
        result = {"standard deviation": expected.std().item()}
        for name, layout in layouts.items():
            moved = network.to(bench.device, memory_format=layout)  # type: ignore[call-overload]
            result[name] = (moved.predict_proba(pixels.to(bench.device)).cpu() - expected).abs().max().item()
        return result

    def compare_candidates() -> float:
        params, seeds = bench.recipe(**ALEXNET, epochs=2), range(3)
        members, pixels = {f"seed-{seed}": [train_briefly(params, seed)] for seed in seeds}, draw(params.image_size)
        ensemble = EnsembleConfig(list(members), "mean", "mean", [1.0] * len(seeds), 0.5)
        expected = Candidate(members, ensemble, FindingParams()).predict(pixels)
        moved = {name: [network.to(bench.device)] for name, (network,) in members.items()}
        actual = Candidate(moved, ensemble, FindingParams()).predict(pixels)
        return float((actual["probability"] - expected["probability"]).abs().max())

    for name, case in bench.few(NETWORKS).items():
        bench.run("agreement", name, partial(compare, case))
    bench.run("agreement", "candidate of three alexnets", compare_candidates)


def count_waits(bench: Bench) -> None:
    """Count the waits of the host for the device per step, by source line, and what the profiler sees."""
    steps = 4 if bench.quick else 20
    cases = {
        "alexnet 512 px tf32": ALEXNET | {"precision": "tf32"},
        "efficientnet-lite0 224 px bfloat16": LITE0 | {"precision": "bfloat16"},
    }

    def count(changes: dict[str, Any], graph: bool) -> dict[str, Any]:
        params = bench.recipe(**changes)
        pack = bench.pack(params.image_size, 4096)
        warmup = 3 if bench.quick else WARMUP_STEPS
        last = warmup + steps
        set_mode = torch.cuda.set_sync_debug_mode if bench.device.type == "cuda" else lambda _: None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actions = {warmup: lambda: set_mode("warn"), last: lambda: set_mode("default")}
            train(bench, params, pack, stop=Steps(last, actions), graph=graph)
        waits = Counter(
            f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)
        )
        on_cuda = [ProfilerActivity.CUDA] if bench.device.type == "cuda" else []
        profiler = profile(activities=[ProfilerActivity.CPU, *on_cuda], acc_events=True)
        begin = end = 0.0

        def start() -> None:
            nonlocal begin
            bench.synchronize()
            profiler.start()
            begin = time.perf_counter()

        def finish() -> None:
            nonlocal end
            bench.synchronize()
            end = time.perf_counter()
            profiler.stop()

        train(bench, params, pack, stop=Steps(last, {warmup: start, last: finish}), graph=graph)
        events = profiler.events() or []
        on_device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        calls = Counter(e.name for e in events if e.device_type == DeviceType.CPU and e.name.startswith("cu"))
        copies = Counter(e.name for e in on_device if e.name.startswith(("Memcpy", "Memset")))
        busy, until = 0.0, 0.0
        for event in sorted(on_device, key=lambda e: e.time_range.start):
            busy += max(0.0, event.time_range.end - max(until, event.time_range.start))
            until = max(until, event.time_range.end)
        kernels = Counter[str]()
        for event in on_device:
            kernels[event.name[:80]] += event.time_range.elapsed_us() / steps
        return {
            "waits per step": {line: count / steps for line, count in waits.items()},
            "calls per step": {name: number / steps for name, number in calls.items() if number >= steps / 4},
            "copies per step": {name: number / steps for name, number in copies.items()},
            "kernels per step": (len(on_device) - copies.total()) / steps,
            "busy share": round(busy / 1e6 / (end - begin), 3),
            "milliseconds per step": round(1000 * (end - begin) / steps, 3),
            "microseconds per step of the longest kernels": {k: round(v, 1) for k, v in kernels.most_common(12)},
        }

    for name, changes in bench.few(cases).items():
        bench.run("waits", name, partial(count, changes, graph=True))
    bench.run("waits", "alexnet 512 px tf32 without graph", partial(count, ALEXNET | {"precision": "tf32"}, False))


def train_seeds_at_once(bench: Bench) -> None:
    """Train ten seeds on one GPU: in processes, in processes under MPS, and in threads of one process."""
    seeds = 2 if bench.quick else SEEDS
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "one seed": lambda: in_processes(bench, 1),
        "processes": lambda: in_processes(bench, 1 if bench.quick else seeds),
        "processes under MPS": lambda: in_processes_under_mps(bench, seeds),
        "threads": lambda: in_threads(bench, seeds),
    }
    if bench.device.type == "cpu":
        del ways["processes under MPS"], ways["one seed"]
    for name, way in ways.items():
        bench.run("seeds", name, way)

    def compare() -> dict[str, bool]:
        hashes: dict[str, set[str]] = {}
        for result in bench.results["seeds"].values():
            for precision, one in result.items():
                if isinstance(one, dict):
                    hashes.setdefault(precision, set()).add(one["digest of seed 0"])
        return {precision: len(values) == 1 for precision, values in hashes.items()}

    bench.run("seeds", "equal bytes of seed 0", compare)


def measure_inference(bench: Bench) -> None:
    """Measure images per second of `probability_table`, which reads the pack and predicts."""
    cases = {"alexnet 512 px": (ALEXNET, 1), "ten alexnets 512 px": (ALEXNET, 10), "efficientnet-lite0": (LITE0, 1)}

    def measure(changes: dict[str, Any], members: int) -> float:
        params = bench.recipe(**changes)
        pack = bench.pack(params.image_size, 4096)
        models = {f"seed-{seed}": [place_classifier(bench, params, seed)] for seed in range(members)}
        rows = list(range(len(pack.images) // (2 if members > 1 else 1)))
        predict = partial(probability_table, models, pack, rows)
        return round(len(rows) * repeat_rate(bench, predict, 1.0, warmup=1, least=2), 1)

    for name, case in bench.few(cases).items():
        bench.run("inference", name, partial(measure, *case))


def compare_precisions(bench: Bench) -> None:
    """Record training losses by epoch, in every precision."""
    for name in bench.few({"alexnet": 0, "efficientnet-lite0": 0}):
        for precision in bench.few(dict.fromkeys(["float32", "bfloat16", "float16", "tf32"])):
            changes = NETWORKS[name] | {
                "precision": precision,
                "image_size": 128,
                "batch_size": 16,
                "epochs": 2 if bench.quick else 5,
            }

            def losses(changes: dict[str, Any] = changes) -> list[float]:
                params = bench.recipe(**changes, lr=3e-4)
                trainer = train(bench, params, bench.pack(params.image_size, VALIDATION_IMAGES + 256))
                return [round(entry.train_loss, 5) for entry in trainer.history]

            bench.run("precisions", f"{name} {precision}", losses)


def check_process_group(bench: Bench) -> None:
    """Train one seed by torchrun on all GPUs, if there are several; record what one process too many says."""
    count = torch.cuda.device_count()

    def compare() -> dict[str, Any]:
        runs = [run_workers(bench, 1, processes=count, precisions=["float32"]) for _ in range(2)]
        alone = run_workers(bench, 1, precisions=["float32"])
        hashes = [results["float32"][0]["digest"] for results in (*runs, alone)]
        return {
            "processes": count,
            "equal bytes of two runs": hashes[0] == hashes[1],
            "equal bytes of one process": hashes[0] == hashes[2],
        }

    def start_too_many() -> str:
        try:
            run_workers(bench, 1, processes=count + 1, precisions=["float32"])
        except RuntimeError as error:
            return next((line for line in str(error).splitlines() if "Error: " in line), str(error)[-300:])
        return "it trained"

    def reduce_alone() -> dict[str, Any]:
        """Sum gradients with NCCL in a group of one process."""
        where = f"file://{bench.folder}/nccl"
        distributed.init_process_group("nccl", init_method=where, rank=0, world_size=1)
        network, images = nn.Conv2d(3, 8, 3, device=bench.device), torch.rand(2, 3, 32, 32, device=bench.device)
        network(images).square().sum().backward()
        expected = network.weight.grad
        network.zero_grad(set_to_none=True)
        nn.parallel.DistributedDataParallel(network)(images).square().sum().backward()
        distributed.destroy_process_group()
        equal = expected is not None and torch.equal(network.weight.grad, expected)  # type: ignore[arg-type]
        return {"nccl": torch.cuda.nccl.version(), "equal": equal}

    if bench.device.type == "cuda":
        bench.run("nccl", "gradients in a group of one", reduce_alone)
        if count > 1:  # one process needs no process group
            bench.run("nccl", "torchrun", compare)
        bench.run("nccl", "more processes than GPUs", start_too_many)


def measure_baselines(bench: Bench) -> None:
    """Measure images per second of plain training loops on one batch, as users of timm and torchvision have them."""
    import timm
    from torchvision import models

    def measure(
        build: Callable[[], nn.Module], size: int, batch: int, dtype: torch.dtype, layout: torch.memory_format
    ) -> float:
        size, batch = (32, 4) if bench.quick else (size, batch)
        network = build().to(bench.device, memory_format=layout).train()  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
        scaler = torch.amp.GradScaler(bench.device.type, enabled=dtype == torch.float16)
        images = torch.randn(batch, 3, size, size, device=bench.device).contiguous(memory_format=layout)
        labels = torch.arange(batch, device=bench.device) % 2

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(bench.device.type, dtype, enabled=dtype != torch.float32):
                loss = cross_entropy(network(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        return round(batch * repeat_rate(bench, step, 3.0), 1)

    lite0 = partial(timm.create_model, "tf_efficientnet_lite0")
    alexnet = partial(models.alexnet, num_classes=2)
    cases = {
        "timm efficientnet-lite0 224 px batch 256 float16": (lite0, 224, 256, torch.float16, torch.channels_last),
        "alexnet 512 px batch 8 tf32": (alexnet, 512, 8, torch.float32, torch.contiguous_format),
    }
    if bench.quick:
        cases = {name: (lite0, *case[1:]) for name, case in cases.items()}
    for name, case in bench.few(cases).items():
        with math_mode("tf32" in name, deterministic=False):
            bench.run("baseline", name, partial(measure, *case))


def measure_jpeg(bench: Bench) -> None:
    if bench.device.type == "cuda":
        bench.run("jpeg", "nvjpeg", measure_nvjpeg)


SECTIONS = {
    "environment": describe_environment,
    "rates": measure_rates,
    "determinism": check_determinism,
    "agreement": check_agreement,
    "waits": count_waits,
    "seeds": train_seeds_at_once,
    "baseline": measure_baselines,
    "inference": measure_inference,
    "precisions": compare_precisions,
    "jpeg": measure_jpeg,
    "nccl": check_process_group,  # last: a collective that hangs would end all
}


# Rates


def repeat_rate(bench: Bench, work: Callable[[], object], seconds: float, *, warmup: int = 3, least: int = 3) -> float:
    """Return how often the work is done per second."""
    for _ in range(1 if bench.quick else warmup):
        work()
    bench.synchronize()
    start, count = time.perf_counter(), 0
    while count < least or time.perf_counter() - start < (0 if bench.quick else seconds):
        for _ in range(least):
            work()
        count += least
        bench.synchronize()
    return count / (time.perf_counter() - start)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return round(time.perf_counter() - start, 1)


def epoch_rate(
    bench: Bench, params: TrainParams, pack: PackedImages, *, graph: bool = True, count: int | None = None
) -> dict[str, Any]:
    """Return the median rate of the epochs after the first one, which go on for 2.5 seconds or more."""
    rates: list[float] = []
    begin = float("inf")

    def on_epoch(entry: loop.EpochMetrics, _: Classifier | None) -> None:
        nonlocal begin
        rates.append(entry.images_per_second)
        begin = min(begin, time.perf_counter())

    def stop() -> int:
        long_enough = len(rates) > 1 and (bench.quick or time.perf_counter() - begin > 2.5)
        return signal.SIGINT if long_enough else 0

    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = train(bench, params, pack, on_epoch=on_epoch, stop=stop, graph=graph, count=count)
    result = {"rate": round(statistics.median(rates[1:]), 1), "first epoch": round(rates[0], 1), "epochs": len(rates)}
    if bench.device.type == "cuda":
        result |= {"captured": trainer.is_captured, "peak MB": torch.cuda.max_memory_allocated() // 2**20}
        del trainer
        torch.cuda.empty_cache()
    return result


def step_rate(bench: Bench, params: TrainParams) -> float:
    """Return the rate of forward, backward and optimizer alone, on one batch, captured as a graph on CUDA."""
    network = place_classifier(bench, params).train()
    on_cuda = bench.device.type == "cuda"
    optimizer = build_optimizer(list(network.parameters()), params)
    size = params.image_size
    images = torch.rand(params.batch_size, 3, size, size, device=bench.device)
    images = images.contiguous(memory_format=memory_format(params))
    targets = torch.full((params.batch_size, 2), 0.5, device=bench.device)
    dtype = loop.AUTOCAST_DTYPES.get(params.precision)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(bench.device.type, dtype, enabled=dtype is not None, cache_enabled=False):
            logits = network(images)
        cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    with math_mode(params.precision == "tf32"):
        if not on_cuda:
            return params.batch_size * repeat_rate(bench, step, 1)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        return params.batch_size * repeat_rate(bench, graph.replay, 1, least=20)


@contextmanager
def math_mode(tf32: bool, *, deterministic: bool = True) -> Iterator[None]:
    """Use TF32 or IEEE float32, and deterministic kernels or the fastest, during the block."""
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    try:
        with determinism.use_tensor_float32(enabled=tf32):
            yield
    finally:
        torch.backends.cudnn.benchmark = False
        torch.set_deterministic_debug_mode("error")


# Several seeds at once


def in_processes(bench: Bench, seeds: int, variables: dict[str, str] | None = None) -> dict[str, Any]:
    precisions = ["float32"] if bench.quick else ["tf32", *["bfloat16"] * bool(variables)]
    results = run_workers(bench, seeds, precisions=precisions, variables=variables)
    return {precision: combine(results[precision], bench.recipe(**ALEXNET).batch_size) for precision in precisions}


def in_processes_under_mps(bench: Bench, seeds: int) -> dict[str, Any]:
    """Start MPS for these processes only, and stop it after them."""
    with mps.start_mps(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]) as variables:
        return in_processes(bench, seeds, variables)


def in_threads(bench: Bench, seeds: int) -> dict[str, Any]:
    """Train every seed in a thread; they warm up, and are captured, one after another."""

    def train_all(precision: str) -> dict[str, Any]:
        warming, barrier = threading.Lock(), threading.Barrier(seeds, timeout=60)

        def train_one(seed: int) -> dict[str, Any]:
            def wait() -> None:
                warming.release()
                barrier.wait()

            warming.acquire()
            try:
                return train_counted(bench, precision, seed, wait)
            except BaseException:
                barrier.abort()
                if warming.locked():
                    warming.release()
                raise

        with ThreadPoolExecutor(seeds) as pool:
            results = list(pool.map(train_one, range(seeds)))
        return combine(results, bench.recipe(**ALEXNET).batch_size)

    precision = "float32" if bench.quick else "tf32"
    return {precision: train_all(precision)}


def train_counted(
    bench: Bench, precision: str, seed: int, wait: Callable[[], object], group: ProcessGroup | None = None
) -> dict[str, Any]:
    """Train AlexNet for a fixed number of steps; call `wait` when it has warmed up."""
    params = bench.recipe(**ALEXNET, precision=precision)
    warmup, last = (2, 5) if bench.quick else (WARMUP_STEPS, WARMUP_STEPS + 460)  # within the first epoch

    def begin() -> None:
        bench.synchronize()
        wait()

    steps = Steps(last, {warmup: begin, last: bench.synchronize})
    trainer = train(bench, params, bench.pack(params.image_size, 4096), seed=seed, stop=steps, group=group)
    return {"times": steps.times[warmup - 1 :], "digest": digest(trainer), "seed": seed}


def combine(results: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    """Sum the images that all trainings do while all of them run."""
    begin, end = max(one["times"][0] for one in results), min(one["times"][-1] for one in results)
    steps = sum(bisect_left(one["times"], end) - bisect_left(one["times"], begin) for one in results)
    whole = sum(len(one["times"]) - 1 for one in results)
    duration = max(one["times"][-1] for one in results) - min(one["times"][0] for one in results)
    return {
        "rate": round(batch_size * steps / (end - begin), 1) if end > begin else None,
        "rate from the first start to the last end": round(batch_size * whole / duration, 1),
        "digest of seed 0": results[0]["digest"],
        "different digests": len({one["digest"] for one in results}),
    }


def run_workers(
    bench: Bench,
    seeds: int,
    *,
    precisions: list[str],
    processes: int = 0,
    variables: dict[str, str] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Run a process per seed, or one seed in so many processes of torchrun; return the results by precision."""
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    pack = bench.pack(bench.recipe(**ALEXNET).image_size, 4096)
    job = {
        "device": bench.device.type, "quick": bench.quick, "seeds": seeds, "precisions": precisions,
        "pack": str(pack._path),  # noqa: SLF001
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "origin.json").write_text(RANDOM_WEIGHTS)
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launch, __file__, "--worker", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (variables or {})
    workers = []
    for seed in range(seeds):
        with (folder / f"{seed}.log").open("w") as log:
            workers.append(
                subprocess.Popen([*command, str(seed)], env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        for seed, worker in enumerate(workers):
            if worker.wait(90):
                raise RuntimeError((folder / f"{seed}.log").read_text()[-3000:])
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    results = [json.loads((folder / f"{seed}.json").read_text()) for seed in range(seeds)]
    return {precision: [one[precision] for one in results] for precision in precisions}


def work(folder: Path, seed: int) -> None:
    """Train one seed in each precision, together with the other processes."""
    job = json.loads((folder / "job.json").read_text())
    with init_distributed() as group:
        device = determinism.select_device() if job["device"] == "cuda" else torch.device("cpu")
        bench = Bench(device, job["quick"], folder)
        pack = PackedImages(Path(job["pack"]), device)
        bench.packs[pack.size, len(pack.images)] = pack

        def wait(precision: str) -> None:
            (folder / f"{precision}-{seed}.ready").touch()
            deadline = time.monotonic() + 60
            while len(list(folder.glob(f"{precision}-*.ready"))) < job["seeds"]:
                if time.monotonic() > deadline:
                    raise TimeoutError("the other processes are not ready")
                time.sleep(0.001)

        results = {
            precision: train_counted(bench, precision, seed, partial(wait, precision), group)
            for precision in job["precisions"]
        }
        if group.is_main_process:
            (folder / f"{seed}.json").write_text(json.dumps(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--out", type=Path, help="file for the results so far")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks and images")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    determinism.make_deterministic(1)
    if arguments.worker:
        work(Path(arguments.worker[0]), int(arguments.worker[1]))
        return
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"unknown section {min(unknown)}; there are {', '.join(SECTIONS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; to try the script: --device cpu --quick")
    # Trainings print their epochs on stdout, which is for the results.
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(os.devnull).open("w") as devnull,
        contextlib.redirect_stdout(devnull),
    ):
        (Path(folder) / "origin.json").write_text(RANDOM_WEIGHTS)
        bench = Bench(torch.device(arguments.device), arguments.quick, Path(folder), arguments.out)
        for name in arguments.sections or SECTIONS:
            bench.run("seconds", name, partial(seconds, partial(SECTIONS[name], bench)))
    print(json.dumps(bench.results))


if __name__ == "__main__":
    main()
