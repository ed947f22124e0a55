"""MLflow runs: one per seed under one parent run per set of seeds, looked up by fingerprint before they are created.

A run is completed from the outs of its training, so a resumed, repeated or restored training is the same run.
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
from pipeline.tracking.fingerprint import parent_run_name, seed_run_name
from pipeline.tracking.store import Store, software_version_tag
from pipeline.tracking.tracking_uri import workspace_root

FINGERPRINT = "fingerprint"
DVC_EXPERIMENT = "dvc.experiment"
WORKER = "worker"  # host and process that train
WORKSPACE = "workspace"  # host and folder of the DVC workspace
MANIFEST = Path("data/manifest.csv")
DATA_CARD = [Path("data/card.json"), Path("data/card.md")]
CHECKPOINT = "checkpoint"  # artifact folder of a run's model
SEED_FILES = ["model.safetensors", "model.json", "history.csv", "metrics.json", "validation.csv"]


def parent_run(store: Store, config: Config, fingerprint: str) -> Run:
    """Return the parent run of all seeds; it stays scheduled until `finish_parent` closes it."""
    _close_killed(store)
    run = _find_or_create(store, config, fingerprint, parent_run_name(config, fingerprint), {})
    if run.info.status == "RUNNING":  # MLflow's initial status; no process runs the parent itself
        store.client.update_run(run.info.run_id, status="SCHEDULED")
    return run


class SeedRun:
    """The MLflow run of one seed's training; nothing is logged twice."""

    def __init__(self, store: Store, config: Config, parent: Run, seed: int, fingerprint: str) -> None:
        worker = _worker(psutil.Process())
        tags = {MLFLOW_PARENT_RUN_ID: parent.info.run_id, WORKER: worker}
        run = _find_or_create(store, config, fingerprint, seed_run_name(config, seed, fingerprint), tags)
        self.run_id = run.info.run_id
        self.finished = run.info.status == "FINISHED"
        self._client = store.client
        self._monitor: SystemMetricsMonitor | None = None
        if self.finished:
            return
        split, self._prefixes, self._last_epochs = config.active.split, dict[int, str](), dict[int, int]()
        for fold in split.validation_folds:
            self._prefixes[fold] = prefix = f"fold-{fold}/" if split.cross_validate else ""
            logged = self._client.get_metric_history(self.run_id, f"{prefix}validation/f1")
            self._last_epochs[fold] = max((metric.step for metric in logged), default=0)
        scheme = split.model_dump(include={"cross_validate", "held_out_source"})
        params = {"seed": seed, **scheme, **config.active.train.model_dump()}
        self._client.log_batch(self.run_id, params=[Param(key, str(value)) for key, value in params.items()])
        with store.lock:  # MLflow fails when two runs log the same dataset at once
            self._log_dataset()
        self._client.set_tag(self.run_id, WORKER, worker)
        self._client.update_run(self.run_id, status="RUNNING")

    def monitor_system_metrics(self) -> Self:
        """Log CPU, memory and GPU use until the run is closed."""
        if not self.finished:
            # Training may take less than MLflow's default sampling interval of ten seconds.
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
        self, fold: int, row: Mapping[str, Any], ended_at: float | None = None, images_per_second: float | None = None
    ) -> None:
        """Log one row of `history.csv`, unless the epoch has been logged before.

        Args:
            fold: the fold that validates; in cross-validation, the names of the metrics begin with it.
            row: the epoch and its metrics.
            ended_at: end of the epoch in seconds since 1970; by default now.
            images_per_second: training throughput, which is not among the outs.
        """
        epoch = int(row["epoch"])
        if self.finished or epoch <= self._last_epochs[fold]:
            return
        metrics = {f"validation/{key}": row[key] for key in row if key not in ("epoch", "train_loss", "lr")} | {
            "train/loss": row["train_loss"],
            "train/lr": row["lr"],
            "train/images_per_second": images_per_second,
        }
        prefix = self._prefixes[fold]
        log_metrics(
            self._client, self.run_id, {f"{prefix}{key}": value for key, value in metrics.items()}, epoch, ended_at
        )
        self._last_epochs[fold] = epoch

    def upload_checkpoint(self, weights: Path) -> None:
        """Upload the weights kept so far, replacing earlier ones."""
        if not self.finished:
            self._client.log_artifact(self.run_id, str(weights), CHECKPOINT)

    def finish(self, folder: Path) -> None:
        """Complete the run from the outs of its training, and close it."""
        if self.finished:
            return
        for row in pd.read_csv(folder / "history.csv").to_dict("records"):
            self.log_epoch(int(row.pop("fold")), {str(key): value for key, value in row.items()})
        for name in SEED_FILES:
            self._client.log_artifact(self.run_id, str(folder / name), CHECKPOINT)
        best = read_json(folder / "metrics.json")
        del best["run"]
        log_metrics(self._client, self.run_id, {f"best/{key}": value for key, value in best.items()}, best["epoch"])
        rows = "".join(
            f"| {key.replace('_', ' ')} | {value:.4g} |\n" for key, value in best.items() if value is not None
        )
        tags = {MLFLOW_RUN_NOTE: f"| metric | kept epoch |\n| --- | ---: |\n{rows}"}
        for key, value in (tags | read_json(folder / "model.json")["environment"]).items():
            self._client.set_tag(self.run_id, key, value)
        self.close("FINISHED")

    def _log_dataset(self) -> None:
        with warnings.catch_warnings():
            # MLflow warns of ambiguous dataset sources, and that integer columns cannot hold missing values.
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
    client: mlflow.MlflowClient,
    run_id: str,
    metrics: Mapping[str, Any],
    step: int = 0,
    timestamp: float | None = None,
) -> None:
    """Log metrics as of now or of `timestamp` (seconds since 1970), except missing ones (MLflow stores NaN as 0)."""
    milliseconds = int((timestamp or time.time()) * 1000)
    batch = [Metric(key, float(value), milliseconds, step) for key, value in metrics.items() if not pd.isna(value)]
    client.log_batch(run_id, metrics=batch)


def finish_parent(store: Store, run: Run, report: Path, bag: Mapping[str, Any]) -> None:
    """Add the report, the data card, the bag's metrics and the table of all models to the parent run, and close it."""
    hashes = [sha256_of_file(report / name) for name in ("table.csv", "index.html")]
    digest = hashlib.sha256(json.dumps([*hashes, bag]).encode()).hexdigest()
    if run.data.tags.get("report_sha256") == digest:
        return
    for file in sorted(path for path in report.iterdir() if path.is_file()):
        store.client.log_artifact(run.info.run_id, str(file), "report")
    for file in DATA_CARD:
        store.client.log_artifact(run.info.run_id, str(file), "data")
    log_metrics(store.client, run.info.run_id, {f"bag/{key}": value for key, value in bag.items()})
    store.client.set_tag(run.info.run_id, MLFLOW_RUN_NOTE, (report / "table.md").read_text(encoding="utf-8"))
    store.client.set_terminated(run.info.run_id, "FINISHED")
    store.client.set_tag(run.info.run_id, "report_sha256", digest)  # last: marks the run as complete


def find_run(store: Store, fingerprint: str) -> Run | None:
    """Return the run with this fingerprint."""
    runs = store.client.search_runs([store.experiment_id], f"tags.{FINGERPRINT} = '{fingerprint}'", max_results=1)
    return runs[0] if runs else None


def _find_or_create(store: Store, config: Config, fingerprint: str, name: str, tags: Mapping[str, str]) -> Run:
    with store.lock:
        run = find_run(store, fingerprint)
        if run:
            return run
        common = {
            FINGERPRINT: fingerprint,
            "profile": config.profile,
            "data_md5": md5_of_file(MANIFEST),
            WORKSPACE: _workspace(),
        }
        all_tags = {**common, **tags, **software_version_tag(), **commit_and_experiment_tags()}
        return store.client.create_run(store.experiment_id, tags=all_tags, run_name=name)


def commit_and_experiment_tags() -> dict[str, str]:
    """Return tags with the current git commit and, under `dvc exp run`, the name of the experiment."""
    tags = {}
    with suppress(OSError, subprocess.CalledProcessError):  # git is missing, or this is no repository
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        tags[MLFLOW_GIT_COMMIT] = commit.stdout.strip()
    if "DVC_EXP_NAME" in os.environ:
        tags[DVC_EXPERIMENT] = os.environ["DVC_EXP_NAME"]
    return tags


def runs_of_removed_experiments(store: Store, experiments: Collection[str]) -> list[Run]:
    """Return this workspace's runs whose DVC experiment is neither in `experiments` nor training now."""
    runs = store.client.search_runs([store.experiment_id], f"tags.{WORKSPACE} = '{_workspace()}'", max_results=50_000)
    training = {run.data.tags.get(DVC_EXPERIMENT, "") for run in runs if run.info.status == "RUNNING"}
    kept = {"", *experiments, *training}
    return [run for run in runs if run.data.tags.get(DVC_EXPERIMENT, "") not in kept]


def _workspace() -> str:
    return f"{socket.gethostname()}:{workspace_root()}"


def _close_killed(store: Store) -> None:
    """Set runs to KILLED that are marked as running on this machine but whose process has ended."""
    for run in store.client.search_runs([store.experiment_id], "attributes.status = 'RUNNING'"):
        host, _, process = run.data.tags.get(WORKER, "").rpartition(" ")
        if host == socket.gethostname() and not _is_alive(process):
            current = store.client.get_run(run.info.run_id)  # it may have finished just before its process ended
            if current.info.status == "RUNNING":
                store.client.set_terminated(run.info.run_id, "KILLED")


def _worker(process: psutil.Process) -> str:
    # Process ids are reused; together with the start time they are unique. The time is relative to the boot of the
    # machine, since its clock may be corrected meanwhile.
    return f"{socket.gethostname()} {process.pid}@{process.create_time() - psutil.boot_time():.2f}"


def _is_alive(process: str) -> bool:
    with suppress(psutil.NoSuchProcess):
        return _worker(psutil.Process(int(process.partition("@")[0]))).endswith(f" {process}")
    return False
