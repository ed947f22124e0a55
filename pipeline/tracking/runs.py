"""MLflow runs: one per seed under one parent run per set of seeds, looked up by fingerprint before they are created.

A run is completed from the outs of its training, so a resumed, repeated or restored training is the same run. Seeds and
bag, whose run is the parent, have the same metrics at step 0, where MLflow draws bars, and `f1` is the first one logged
of each run: MLflow compares runs by the metric that it got first.
"""

import hashlib
import json
import os
import socket
import subprocess
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any, Self

import mlflow
import pandas as pd
import psutil
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_GIT_COMMIT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NOTE,
)

from pipeline.core.config import Config, SplitParams
from pipeline.core.files import md5_of_file, read_json, sha256_of_file
from pipeline.data import manifest
from pipeline.evaluation.metrics import Scores
from pipeline.tracking.fingerprint import parent_run_name, seed_run_name
from pipeline.tracking.store import Store, retry_conflicts, software_version_tag
from pipeline.tracking.tracking_uri import SQLITE, tracking_uri, workspace_root

FINGERPRINT = "fingerprint"
DVC_EXPERIMENT = "dvc.experiment"
WORKER = "worker"  # host and process that train
WORKSPACE = "workspace"  # host and folder of the DVC workspace
MANIFEST = Path("data/manifest.csv")
DATA_CARD = [Path("data/card.json"), Path("data/card.md")]
REPORT_HASH = "report_sha256"  # of the report in a complete parent run, and of its metrics
CHECKPOINT = "checkpoint"  # artifact folder of a run's model
SEED_STATISTICS = {"mean": "mean", "deviation": "sd", "lowest": "min", "highest": "max"}  # column -> part of a metric
RACE_SECONDS = 1  # within which machines see a run that one of them creates
SEED_FILES = ["model.safetensors", "model.json", "history.csv", "metrics.json", "validation.csv"]


def parent_run(store: Store, config: Config, fingerprint: str) -> Run:
    """Return the parent run of all seeds; it stays scheduled until `finish_parent` closes it."""
    _close_killed(store)
    run = _find_or_create(store, config, fingerprint, parent_run_name(config, fingerprint), {})
    _log_params(store, config, run)
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
        _correct_parent(store, run, parent)
        self.finished = run.info.status == "FINISHED"
        self._client = store.client
        self._monitored = False
        self._monitor: SystemMetricsMonitor | None = None
        if self.finished:
            return
        self._prefixes, self._last_epochs = epoch_prefixes(config.active.split), dict[int, int]()
        for fold, prefix in self._prefixes.items():
            logged = self._client.get_metric_history(self.run_id, f"{prefix}validation/f1")
            self._last_epochs[fold] = max((metric.step for metric in logged), default=0)
        _log_params(store, config, run, seed=seed)
        with store.lock:  # MLflow fails when two runs log the same dataset at once
            self._log_dataset()
        self._client.set_tag(self.run_id, WORKER, worker)
        self._client.update_run(self.run_id, status="RUNNING")

    def monitor_system_metrics(self) -> Self:
        """Log CPU, memory and GPU use from the end of the first epoch until the run is closed."""
        self._monitored = not self.finished
        if self._monitored and any(self._last_epochs.values()):
            self._start_monitor()
        return self

    def _start_monitor(self) -> None:
        # Training may take less than MLflow's default sampling interval of ten seconds.
        self._monitor = SystemMetricsMonitor(self.run_id, sampling_interval=2, resume_logging=True)
        self._monitor.start()

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

        Until the run is complete, its metrics at step 0 are those of the last epoch.

        Args:
            fold: the fold that validates; in cross-validation, the names of the metrics by epoch begin with it.
            row: the epoch and its metrics.
            ended_at: end of the epoch in seconds since 1970; by default now.
            images_per_second: training throughput, which is not among the outs.
        """
        epoch = int(row["epoch"])
        if self.finished or epoch <= self._last_epochs[fold]:
            return
        scores = {key: row[key] for key in row if key not in ("epoch", "train_loss", "lr")}
        metrics = {f"validation/{key}": value for key, value in scores.items()} | {
            "train/loss": row["train_loss"],
            "train/lr": row["lr"],
            "train/images_per_second": images_per_second,
        }
        prefix, ended_at = self._prefixes[fold], ended_at or time.time()
        log_summary(self._client, self.run_id, scores, ended_at)
        log_metrics(
            self._client, self.run_id, {f"{prefix}{key}": value for key, value in metrics.items()}, epoch, ended_at
        )
        self._last_epochs[fold] = epoch
        if self._monitored and not self._monitor:
            self._start_monitor()

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
        log_summary(self._client, self.run_id, best)
        rows = "".join(
            f"| {key.replace('_', ' ')} | {value:.4g} |\n" for key, value in best.items() if value is not None
        )
        tags = {MLFLOW_RUN_NOTE: f"| metric | kept epoch |\n| --- | ---: |\n{rows}"}
        for key, value in (tags | read_json(folder / "model.json")["environment"]).items():
            self._client.set_tag(self.run_id, key, value)
        self.close("FINISHED")

    @retry_conflicts
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


def epoch_prefixes(split: SplitParams) -> dict[int, str]:
    """Return what the names of the metrics by epoch begin with, by validation fold."""
    return {fold: f"fold-{fold}/" if split.cross_validate else "" for fold in split.validation_folds}


def log_metrics(
    client: mlflow.MlflowClient,
    run_id: str,
    metrics: Mapping[str, Any],
    step: int = 0,
    timestamp: float | None = None,
) -> None:
    """Log metrics as of now or of `timestamp` (seconds since 1970), except missing ones (MLflow stores NaN as 0)."""
    milliseconds = round((timestamp or time.time()) * 1000)
    batch = [Metric(key, float(value), milliseconds, step) for key, value in metrics.items() if not pd.isna(value)]
    client.log_batch(run_id, metrics=batch)


def log_summary(
    client: mlflow.MlflowClient, run_id: str, metrics: Mapping[str, Any], timestamp: float | None = None
) -> None:
    """Log the metrics of a model at step 0, F1 first, in place of earlier ones; see `log_metrics`."""
    timestamp = timestamp or next_timestamp(client, run_id)
    log_metrics(client, run_id, {"f1": metrics["f1"], **metrics}, timestamp=timestamp)


def next_timestamp(client: mlflow.MlflowClient, run_id: str) -> float:
    """Return a time for metrics at step 0, in seconds since 1970: MLflow shows the latest, and clocks differ."""
    logged = client.get_metric_history(run_id, "f1")
    return max([time.time(), *((metric.timestamp + 1) / 1000 for metric in logged)])


def finish_parent(store: Store, run: Run, report: Path, bag: Mapping[str, Any], seeds: pd.DataFrame) -> None:
    """Complete the parent run and close it.

    Args:
        store: the store of the run.
        run: the parent run.
        report: the folder of the report, which is uploaded with the data card; its table of all models is shown.
        bag: the metrics of the bag.
        seeds: their mean, deviation, lowest and highest value over the seeds by metric, as in metrics/seeds.csv.
    """
    statistics = seed_statistics(seeds)
    hashes = [sha256_of_file(report / name) for name in ("table.csv", "index.html")]
    digest = hashlib.sha256(json.dumps([*hashes, bag, statistics]).encode()).hexdigest()
    if run.data.tags.get(REPORT_HASH) == digest:
        return
    for file in sorted(path for path in report.iterdir() if path.is_file()):
        store.client.log_artifact(run.info.run_id, str(file), "report")
    for file in DATA_CARD:
        store.client.log_artifact(run.info.run_id, str(file), "data")
    log_summary(store.client, run.info.run_id, {**bag, **statistics})
    store.client.set_tag(run.info.run_id, MLFLOW_RUN_NOTE, (report / "table.md").read_text(encoding="utf-8"))
    store.client.set_terminated(run.info.run_id, "FINISHED")
    store.client.set_tag(run.info.run_id, REPORT_HASH, digest)  # last: marks the run as complete


def finish_parent_of_copy(
    store: Store, seed: str, method: str, read_out: Callable[[str], str], tags: Mapping[str, str]
) -> None:
    """Tag the parent run of a training in a copy of the workspace; log its metrics and close it, unless it is complete.

    No report is written there. Without a run, all seeds came from DVC's cache. A complete one may have more seeds.

    Args:
        store: the store of the run.
        seed: the name of one of its seeds.
        method: of its bag.
        read_out: returns the text of an out of the copy by its path.
        tags: of the run.
    """
    model = json.loads(read_out(f"models/{seed}/model.json"))
    run = find_run(store, model["parent_fingerprint"])
    if run is None:
        return
    for key, value in tags.items():
        store.client.set_tag(run.info.run_id, key, value)
    if REPORT_HASH not in run.data.tags:
        bag = json.loads(read_out("metrics/bag.json"))[method]
        seeds = pd.read_csv(StringIO(read_out("metrics/seeds.csv"))).set_index("metric")
        log_summary(store.client, run.info.run_id, {**bag, **seed_statistics(seeds)})
        store.client.set_terminated(run.info.run_id, "FINISHED")


def seed_statistics(seeds: pd.DataFrame) -> dict[str, float]:
    """Return the metrics of a parent run over its seeds, `seeds/f1_mean` and others, from metrics/seeds.csv."""
    return {
        f"seeds/{metric}_{part}": float(seeds.loc[metric, column])  # type: ignore[arg-type]
        for metric in Scores.__annotations__
        for column, part in SEED_STATISTICS.items()
    }


def find_run(store: Store, fingerprint: str) -> Run | None:
    """Return the run with this fingerprint."""
    return next(iter(_find_runs(store, fingerprint)), None)


def _find_runs(store: Store, fingerprint: str) -> list[Run]:
    """Return the runs with this fingerprint, oldest first; several only if machines created them at the same time."""
    oldest_first = ["attributes.start_time", "attributes.run_id"]
    return store.client.search_runs(
        [store.experiment_id], f"tags.{FINGERPRINT} = '{fingerprint}'", order_by=oldest_first
    )


def _find_or_create(store: Store, config: Config, fingerprint: str, name: str, tags: Mapping[str, str]) -> Run:
    with store.lock:
        found, created = _find_runs(store, fingerprint), None
        if not found:
            common = {
                FINGERPRINT: fingerprint,
                "profile": config.profile,
                "data_md5": md5_of_file(MANIFEST),
                WORKSPACE: _workspace(),
            }
            all_tags = {**common, **tags, **software_version_tag(), **commit_and_experiment_tags()}
            created = store.client.create_run(store.experiment_id, tags=all_tags, run_name=name).info.run_id
            if not tracking_uri().startswith(SQLITE):  # whose lock holds on other machines too
                time.sleep(RACE_SECONDS)
            found = _find_runs(store, fingerprint)
        if created not in (None, found[0].info.run_id):
            with suppress(MlflowException):  # not every user of a server may delete
                store.client.delete_run(created)
        return found[0]


def _log_params(store: Store, config: Config, run: Run, **params: Any) -> None:
    """Log the parameters of the training, except those that the run has: MLflow lets no parameter change."""
    scheme = config.active.split.model_dump(include={"cross_validate", "held_out_source"})
    params |= {**scheme, **config.active.train.model_dump()}
    for section in ("weights", "prepare", "split"):
        params |= {f"{section}.{key}": value for key, value in getattr(config.active, section).model_dump().items()}
    missing = [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]
    if missing:
        store.client.log_batch(run.info.run_id, params=missing)


def _correct_parent(store: Store, run: Run, parent: Run) -> None:
    """Move a run to its parent, if it belongs to another parent that a machine created at the same time."""
    other = run.data.tags.get(MLFLOW_PARENT_RUN_ID)
    if other != parent.info.run_id:
        filters = f"attributes.run_id = '{other}' AND tags.{FINGERPRINT} = '{parent.data.tags[FINGERPRINT]}'"
        if store.client.search_runs([store.experiment_id], filters, ViewType.ALL):
            store.client.set_tag(run.info.run_id, MLFLOW_PARENT_RUN_ID, parent.info.run_id)


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
    """Return this workspace's runs whose DVC experiment is neither in `experiments` nor training a seed now."""
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
