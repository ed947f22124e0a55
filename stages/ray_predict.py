"""Prediction on a Ray cluster: Ray Data over partitions of the input, each of which becomes one Parquet file."""

import hashlib
import logging
import os
import re
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import pandas as pd
import ray
import ray.data
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning

from pipeline.core.errors import UserError, first_line
from pipeline.core.progress import track_progress
from pipeline.core.threads import limit_spinning
from pipeline.data.remote import is_url
from stages.predict import check_usable, prepare_device
from stages.ray_backend import connect

if TYPE_CHECKING:
    from pipeline.inference.apply_networks import Precision
    from pipeline.inference.candidate import Candidate
    from pipeline.inference.partitions import Partition, PartitionFolder

MAX_RETRIES = 2  # of a partition whose worker was lost
MAX_ROUNDS = 3  # over the partitions that are still missing, such as those of workers whose machine was lost
MAX_CORES = 4  # of a worker, which holds a copy of the model
MAX_TASKS = 10_000  # of Ray Data; each has one or more partitions

ModelFiles = dict[str, np.ndarray]  # content of each file by its path in the candidate's folder, (bytes,) uint8


def predict(address: str, names: Sequence[str], output: str, model: str, precision: "Precision") -> None:
    """Classify radiographs on a cluster; a run that was stopped goes on with the partitions that are missing.

    Args:
        address: of the cluster's head node, as `ray start` prints it, or `auto`; or `local` for a new cluster on this
            machine, which ends with this process.
        names: files, folders, patterns, archives and URLs, which every machine can read.
        output: folder or fsspec URL for the predictions, to which every machine can write.
        model: a registered version or a candidate, see `open_model_folder`.
        precision: float32 or bfloat16.

    Raises:
        UserError: nothing was found, the cluster or the output cannot be used, images are not usable, or partitions
            are missing at the end.
    """
    import torch

    from pipeline.core.config import load_config
    from pipeline.evaluation import ensemble
    from pipeline.inference import candidate
    from pipeline.inference.image_files import ImageFiles
    from pipeline.inference.partitions import PartitionFolder, check_names
    from pipeline.tracking.model_folder import open_model_folder

    names = [_make_absolute(name) for name in names]  # the workers run elsewhere
    check_names(names, _make_absolute(output))
    folder, files = PartitionFolder(_make_absolute(output)), ImageFiles(names)
    with open_model_folder(load_config(), model) as found:
        loaded = candidate.load_candidate(found.folder, torch.device("cpu"))
        paths = [path for path in found.folder.rglob("*") if path.is_file()]
        model_files = {str(path.relative_to(found.folder)): np.fromfile(path, np.uint8) for path in paths}
    click.echo(f"{found.title}: {ensemble.describe_output(loaded.config, loaded.finding)}", err=True)
    model_settings = {"model": found.model, "version": found.version, "content hash": found.content_hash}
    settings = model_settings | {"precision": precision, "input": names}
    listed, before, failures, rate = folder.check(settings), folder.count(), list[str](), "nothing is missing"
    if listed:
        click.echo(f"{output}: the images as listed on {listed}; later ones are not included", err=True)
    if not listed or any(folder.missing()):
        try:
            with _silence_ray():
                connect(address)
            folder.start(settings, files)
            start, stored = time.perf_counter(), ray.put(model_files)
            failures = _predict_missing(folder, stored, found.model, found.version, precision)
            rate = f"{(folder.count()['files'] - before['files']) / (time.perf_counter() - start):.1f} images/s"
        except RayError as error:
            reason = first_line(getattr(error, "cause", None) or error)
            raise UserError(f"Ray failed: {reason}; the same command again predicts what is missing") from None
        finally:
            ray.shutdown()
    counts, missing = folder.count(), sum(1 for _ in folder.missing())
    skipped = f", {counts['skipped']} skipped that are no images" if counts["skipped"] else ""
    predicted = f"{counts['files']} files, {counts['positive']} positive, {counts['unusable']} unusable"
    click.echo(f"{output}: {predicted}{skipped}; {rate}")
    if missing:
        reason = failures[0] if failures else "their workers were lost"
        are = "partition is" if missing == 1 else "partitions are"
        raise UserError(f"{missing} {are} missing: {reason}; the same command again predicts only what is missing")
    check_usable(counts["unusable"], counts["files"])


def _make_absolute(name: str) -> str:
    name = re.sub(r"^(file|local)://", "", name)
    return name if is_url(name) else os.path.abspath(name)  # noqa: PTH100  # Path.absolute keeps `..`


@contextmanager
def _silence_ray() -> Iterator[None]:
    """Let Ray's C++ code connect, and be silent: it warns of its own actors, and says that the level is set."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    stderr = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _predict_missing(folder: "PartitionFolder", *model: Any) -> list[str]:
    """Predict the missing partitions, and again those whose workers were lost; return why some are still missing."""
    failures, missing = list[str](), list(folder.missing())
    for _ in range(MAX_ROUNDS):
        if missing:
            failures = _predict_partitions(folder, missing, *model)
            before, missing = missing, list(folder.missing())
            if missing == before:
                break
    return failures


def _predict_partitions(folder: "PartitionFolder", missing: "list[Partition]", *model: Any) -> list[str]:
    """Predict partitions; return why some could not be, except those whose workers were lost.

    `model` is what `PartitionPredictor` takes of it: files, name, version and precision.
    """
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1  # the others go on
    workers, cores, gpus = _plan_workers()
    partitions = ray.data.from_items([asdict(one) for one in missing], override_num_blocks=min(len(missing), MAX_TASKS))
    with warnings.catch_warnings(category=RayDeprecationWarning, action="ignore"):  # max_task_retries has no successor
        results = partitions.map_batches(
            PartitionPredictor,
            fn_constructor_args=(folder.name, *model, cores, _hash_code()),
            batch_size=1,
            concurrency=min(workers, len(missing)),
            num_cpus=cores,
            num_gpus=gpus,
            max_task_retries=MAX_RETRIES,  # without end otherwise, also if a file kills each worker that reads it
        )
        rows = track_progress(results.iter_rows(), "predicting", len(missing))
        return [row["failure"] for row in rows if row["failure"]]


def _plan_workers() -> tuple[int, int, int]:
    """Return the number of workers that use the cluster's GPUs, or else its cores; and the cores and GPUs of each.

    Raises:
        UserError: the cluster has no cores.
    """
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in resources]
    with_gpu = [(cores, gpus) for cores, gpus in nodes if cores >= gpus > 0]
    if with_gpu:
        return sum(gpus for _, gpus in with_gpu), min(cores // gpus for cores, gpus in with_gpu), 1
    workers = {size: sum(cores // size for cores, _ in nodes) for size in range(1, MAX_CORES + 1)}
    size = max(workers, key=lambda size: (workers[size] * size, size))
    if not workers[size]:
        raise UserError("the Ray cluster has no cores; add a machine with: ray start --address ADDRESS")
    return workers[size], size, 0


@cache
def _hash_code() -> str:
    """Return a hash of the code, which must be the same on all machines."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.glob("pipeline/**/*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class PartitionPredictor:
    """Predicts partitions with a model that it loads once."""

    def __init__(
        self,
        folder: str,
        model_files: "ray.ObjectRef[ModelFiles]",
        model: str,
        version: str,
        precision: "Precision",
        cores: int,
        code_hash: str,
    ) -> None:
        limit_spinning()
        os.environ["LOKY_MAX_CPU_COUNT"] = str(cores)  # which joblib.cpu_count returns
        self.folder, self.model_files, self.precision = folder, model_files, precision
        self.model, self.version, self.code_hash = model, version, code_hash

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Predict one partition; return the reason if it cannot be."""
        from pipeline.inference.partitions import Partition, PartitionFolder

        partition = Partition(*(int(batch[name][0]) for name in ("index", "offset", "length")))
        try:
            self._predict(PartitionFolder(self.folder), partition)
        except Exception as error:  # noqa: BLE001  # the other partitions go on, and the driver reports it
            return {"failure": [str(error) if isinstance(error, UserError | OSError) else repr(error)]}
        return {"failure": [""]}

    def _predict(self, folder: "PartitionFolder", partition: "Partition") -> None:
        from pipeline.inference.files import predict_files

        if _hash_code() != self.code_hash:
            raise UserError(f"{socket.gethostname()} has another version of this project; install the same everywhere")
        if folder.has_predictions(partition):  # a worker was lost after it had written them
            return
        skipped = list[object]()
        files = folder.read_partition(partition)
        tables = predict_files(self._candidate, files, model=self.model, version=self.version, skip=skipped.append)
        folder.write_predictions(partition, pd.concat(tables), len(skipped))

    @cached_property
    def _candidate(self) -> "Candidate":
        from pipeline.inference import candidate

        device = prepare_device(self.precision)
        with tempfile.TemporaryDirectory() as name:
            for path, content in ray.get(self.model_files).items():
                Path(name, path).parent.mkdir(parents=True, exist_ok=True)
                content.tofile(Path(name, path))
            return candidate.load_candidate(Path(name), device, self.precision)
