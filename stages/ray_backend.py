"""Every seed as a Ray task that works in a clone of its own; code comes by git, data and models by DVC."""

import logging
import os
import re
import socket
import subprocess
import tempfile
from pathlib import Path

import click
import ray
from ray.exceptions import RayError

from pipeline.core.config import Config
from pipeline.core.errors import UserError, first_line, redact_credentials
from pipeline.tracking.runs import parent_run
from pipeline.tracking.store import connect
from stages.common import prepend_environment_path

RETRIES = 3  # of a seed whose worker or machine was lost


def train(address: str, config: Config) -> dict[int, str]:
    """Train all seeds on the cluster and push what they leave to the DVC remote.

    Args:
        address: of the cluster's head, as `ray start` prints it, or `auto`.
        config: whose seeds are trained.

    Returns:
        Why the seeds that failed did so.

    Raises:
        UserError: there is no such cluster, no DVC remote, or something that is not committed.
    """
    if not _said("dvc", "config", "core.remote"):
        raise UserError("there is no default DVC remote; run: dvc remote add -d NAME URL, and commit .dvc/config")
    _run(Path(), "dvc", "push", "--run-cache", "weights", "prepare", "split")
    changed = _said("git", "status", "--porcelain", "--untracked-files=no")
    if changed:
        raise UserError(f"{changed.split()[-1]} is not committed, so no other machine can see it; commit it")
    if _said("git", "remote") and not _said("git", "branch", "--remotes", "--contains", "HEAD"):
        raise UserError("the present commit is on no remote, so no other machine can see it; run: git push")
    try:
        if address != "auto":  # Ray itself would try for minutes
            host, _, port = address.rpartition("/")[2].rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, OverflowError, RuntimeError, RayError) as error:
        raise UserError(f"no Ray cluster answers at {address}: {first_line(error)}") from None
    cores = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    if cores < config.active.train.cpu_threads:
        raise UserError(
            f"no node at {address} has train.cpu_threads = {config.active.train.cpu_threads} cores, the largest has "
            f"{cores:g}; start nodes with more (ray start --num-cpus N)"
        )
    # Made once, here; tasks that look for it at once would each make one.
    parent_run(connect(config.model_name), config)
    gpus = int(ray.cluster_resources().get("GPU", 0) > 0)
    task = ray.remote(num_cpus=config.active.train.cpu_threads, num_gpus=gpus, max_retries=RETRIES)(_train)
    source = _said("git", "config", "remote.origin.url") or str(Path.cwd())
    tracking = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_TRACKING_")}
    given = source, _said("git", "rev-parse", "HEAD"), tracking
    seeds = {task.remote(seed, *given): seed for seed in config.seeds}
    waiting, failed = list(seeds), dict[int, str]()
    while waiting:
        (ended,), waiting = ray.wait(waiting)
        seed = seeds[ended]
        try:
            ray.get(ended)
            click.echo(f"seed {seed} is trained")
        except (RayError, UserError) as error:
            failed[seed] = str(getattr(error, "cause", error)).strip().splitlines()[-1]
            click.echo(f"seed {seed} failed")
    ray.shutdown()
    return failed


def _train(seed: int, source: str, commit: str, tracking: dict[str, str]) -> None:
    prepend_environment_path()
    os.environ |= tracking
    with tempfile.TemporaryDirectory(prefix=f"seed-{seed}-") as name:
        clone = Path(name)
        _run(clone, "git", "clone", "--quiet", source, ".")
        _run(clone, "git", "checkout", "--quiet", commit)
        _run(clone, "dvc", "pull", "weights", "prepare", "split")
        _run(clone, "dvc", "repro", "-s", f"train@{seed}")
        _run(clone, "dvc", "push", "--run-cache", f"train@{seed}")


def _run(folder: Path, *command: str) -> None:
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if ended.returncode:
        told = re.search(r".*(error|fatal): .*", ended.stdout + ended.stderr, re.IGNORECASE)
        raise UserError(redact_credentials(f"{' '.join(command)}: {told[0] if told else ended.stderr.strip()}"))


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
