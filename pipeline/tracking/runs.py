"""One MLflow run per seed under one parent per experiment, found by fingerprint before anything is made.

A run is completed from what DVC holds, so a resumed, a repeated and a restored training are one run.
"""

import hashlib
import json
import os
import socket
import subprocess
import time
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import mlflow
import pandas as pd
import psutil
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_GIT_COMMIT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NOTE,
)

from pipeline.core.config import Config
from pipeline.core.files import md5_of_file, read_json, sha256_of_file
from pipeline.data import manifest
from pipeline.tracking import fingerprint
from pipeline.tracking.store import Store
from pipeline.tracking.tracking_uri import workspace_root

FINGERPRINT = "fingerprint"
DVC_EXPERIMENT = "dvc.experiment"
WORKER = "worker"  # the machine and the process that trains
WORKSPACE = "workspace"  # the machine and the folder whose DVC experiments a run may be of
MANIFEST = Path("data/manifest.csv")
DATA_CARD = [Path("data/card.json"), Path("data/card.md")]
CHECKPOINT = "checkpoint"  # where a run keeps its model's files
SEED_FILES = ["model.safetensors", "model.json", "history.csv", "metrics.json"]


def parent_run(store: Store, config: Config) -> Run:
    """Return the run that gathers all seeds; it waits for them until `finish_parent` closes it."""
    _close_killed(store)
    mark = fingerprint.training_fingerprint(config)
    run = _find_or_make(store, config, mark, fingerprint.parent_run_name(config, mark), {})
    if run.info.status == "RUNNING":  # as which MLflow makes every run, but no process stands for this one
        store.client.update_run(run.info.run_id, status="SCHEDULED")
    return run


class SeedRun:
    """The MLflow run of one seed's training; what is already in it is not logged again."""

    def __init__(self, store: Store, config: Config, parent: Run, seed: int, mark: str) -> None:
        worker = {WORKER: _worker(psutil.Process())}
        of = {MLFLOW_PARENT_RUN_ID: parent.info.run_id}
        run = _find_or_make(store, config, mark, fingerprint.seed_run_name(config, seed, mark), of | worker)
        self.run_id = run.info.run_id
        self.finished = run.info.status == "FINISHED"
        self._client = store.client
        self._monitor: SystemMetricsMonitor | None = None
        if self.finished:
            return
        history = self._client.get_metric_history(self.run_id, "validation/f1")
        self._last_epoch = max((metric.step for metric in history), default=0)
        params = {"seed": seed, "fold": config.active.split.validation_fold(seed), **config.active.train.model_dump()}
        self._client.log_batch(self.run_id, params=[Param(key, str(value)) for key, value in params.items()])
        with store.lock:  # MLflow fails where two runs bring the same dataset at once
            self._log_dataset()
        self._client.set_tag(self.run_id, WORKER, worker[WORKER])
        self._client.update_run(self.run_id, status="RUNNING")

    def monitor_system_metrics(self) -> Self:
        """Log how busy the machine is, until the run is closed."""
        if not self.finished:
            # Training may last less than MLflow's ten seconds between two looks.
            self._monitor = SystemMetricsMonitor(self.run_id, sampling_interval=2, resume_logging=True)
            self._monitor.start()
        return self

    def close(self, status: str) -> None:
        if self.finished:
            return
        if self._monitor:
            self._monitor.finish()
        self._client.set_terminated(self.run_id, status)
        self.finished = status == "FINISHED"

    def log_epoch(
        self, row: Mapping[str, Any], ended: float | None = None, images_per_second: float | None = None
    ) -> None:
        """Log one row of `history.csv`; an epoch that is there already is left alone.

        Args:
            row: the epoch and its figures.
            ended: when, in seconds since 1970; by default now.
            images_per_second: which no out of a training holds.
        """
        epoch = int(row["epoch"])
        if self.finished or epoch <= self._last_epoch:
            return
        named = {f"validation/{key}": row[key] for key in row if key not in ("epoch", "train_loss", "lr")} | {
            "train/loss": row["train_loss"],
            "train/lr": row["lr"],
            "train/images_per_second": images_per_second,
        }
        log_metrics(self._client, self.run_id, named, epoch, ended)
        self._last_epoch = epoch

    def upload_checkpoint(self, weights: Path) -> None:
        """Store the best weights so far in place of the last ones."""
        if not self.finished:
            self._client.log_artifact(self.run_id, str(weights), CHECKPOINT)

    def finish(self, folder: Path) -> None:
        """Complete the run from the outs of its training, and close it."""
        if self.finished:
            return
        for row in pd.read_csv(folder / "history.csv").to_dict("records"):
            self.log_epoch({str(key): value for key, value in row.items()})
        for name in SEED_FILES:
            self._client.log_artifact(self.run_id, str(folder / name), CHECKPOINT)
        best = read_json(folder / "metrics.json")
        del best["run"]
        log_metrics(self._client, self.run_id, {f"best/{key}": value for key, value in best.items()}, best["epoch"])
        figures = "".join(
            f"| {key.replace('_', ' ')} | {value:.4g} |\n" for key, value in best.items() if value is not None
        )
        tags = {MLFLOW_RUN_NOTE: f"| best epoch | |\n| --- | ---: |\n{figures}"}
        for key, value in (tags | read_json(folder / "model.json")["environment"]).items():
            self._client.set_tag(self.run_id, key, value)
        self.close("FINISHED")

    def _log_dataset(self) -> None:
        with warnings.catch_warnings():
            # MLflow warns of two equal kinds of source, and that integer columns cannot miss values.
            warnings.simplefilter("ignore", UserWarning)
            dataset = from_pandas(
                manifest.read_manifest(MANIFEST.parent),
                source=str(MANIFEST),
                name="radiographs",
                digest=md5_of_file(MANIFEST),
            )
            entity = dataset._to_mlflow_entity()  # noqa: SLF001
        tags = [InputTag(MLFLOW_DATASET_CONTEXT, "training")]
        self._client.log_inputs(self.run_id, [DatasetInput(entity, tags)])


def log_metrics(
    client: mlflow.MlflowClient, run_id: str, values: Mapping[str, Any], step: int = 0, when: float | None = None
) -> None:
    """Log what is a number, as of now or of `when` (seconds since 1970); MLflow would store a missing figure as 0."""
    milliseconds = int((when or time.time()) * 1000)
    metrics = [Metric(key, float(value), milliseconds, step) for key, value in values.items() if not pd.isna(value)]
    client.log_batch(run_id, metrics=metrics)


def finish_parent(store: Store, run: Run, report: Path, bag: Mapping[str, Any]) -> None:
    """Give the parent run the table of all models as its description, the bag's figures, report and data card."""
    marks = [sha256_of_file(report / name) for name in ("table.csv", "index.html")]
    digest = hashlib.sha256(json.dumps([*marks, bag]).encode()).hexdigest()
    if run.data.tags.get("report") == digest:
        return
    for file in sorted(path for path in report.iterdir() if path.is_file()):
        store.client.log_artifact(run.info.run_id, str(file), "report")
    for file in DATA_CARD:
        store.client.log_artifact(run.info.run_id, str(file), "data")
    log_metrics(store.client, run.info.run_id, {f"bag/{key}": value for key, value in bag.items()})
    store.client.set_tag(run.info.run_id, MLFLOW_RUN_NOTE, (report / "table.md").read_text(encoding="utf-8"))
    store.client.set_terminated(run.info.run_id, "FINISHED")
    store.client.set_tag(run.info.run_id, "report", digest)  # last: from here on the run is complete


def find_run(store: Store, mark: str) -> Run | None:
    """Return the run with this fingerprint."""
    found = store.client.search_runs([store.experiment_id], f"tags.{FINGERPRINT} = '{mark}'", max_results=1)
    return found[0] if found else None


def _find_or_make(store: Store, config: Config, mark: str, name: str, tags: dict[str, str]) -> Run:
    with store.lock:
        found = find_run(store, mark)
        if found:
            return found
        facts = {FINGERPRINT: mark, "profile": config.profile, "data": md5_of_file(MANIFEST), WORKSPACE: _workspace()}
        tags = {**facts, **tags, **commit_and_experiment_tags()}
        return store.client.create_run(store.experiment_id, tags=tags, run_name=name)


def commit_and_experiment_tags() -> dict[str, str]:
    """Return as tags the commit that is checked out and, in `dvc exp run`, the experiment."""
    tags = {}
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        tags[MLFLOW_GIT_COMMIT] = commit.stdout.strip()
    if "DVC_EXP_NAME" in os.environ:
        tags[DVC_EXPERIMENT] = os.environ["DVC_EXP_NAME"]
    return tags


def orphaned_runs(store: Store, experiments: Collection[str]) -> list[Run]:
    """Return this workspace's runs of DVC experiments but `experiments` and those of which a run trains now."""
    found = store.client.search_runs([store.experiment_id], f"tags.{WORKSPACE} = '{_workspace()}'", max_results=50_000)
    kept = {"", *experiments, *(run.data.tags.get(DVC_EXPERIMENT, "") for run in found if run.info.status == "RUNNING")}
    return [run for run in found if run.data.tags.get(DVC_EXPERIMENT, "") not in kept]


def _workspace() -> str:
    return f"{socket.gethostname()}:{workspace_root()}"


def _close_killed(store: Store) -> None:
    """Mark as KILLED what says that it runs on this machine, but whose process is gone."""
    for run in store.client.search_runs([store.experiment_id], "attributes.status = 'RUNNING'"):
        host, _, process = run.data.tags.get(WORKER, "").rpartition(" ")
        if host == socket.gethostname() and not _lives(process):
            now = store.client.get_run(run.info.run_id)  # it may have ended well just before its process did
            if now.info.status == "RUNNING":
                store.client.set_terminated(run.info.run_id, "KILLED")


def _worker(process: psutil.Process) -> str:
    # A process id is given again; together with the time of its birth it is not. Since the start of the machine, for
    # the time of day may be put right meanwhile.
    return f"{socket.gethostname()} {process.pid}@{process.create_time() - psutil.boot_time():.2f}"


def _lives(process: str) -> bool:
    with suppress(psutil.NoSuchProcess):
        return _worker(psutil.Process(int(process.partition("@")[0]))).endswith(f" {process}")
    return False
