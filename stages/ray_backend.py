"""Training on a Ray cluster: one task per seed, in its own clone; git transports code, DVC data and models."""

import logging
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import ray
from ray.exceptions import RayError

from pipeline.core.config import Config
from pipeline.core.errors import UserError, first_line, redact_credentials
from stages.common import prepend_environment_path

MAX_RETRIES = 3  # of a seed whose worker or machine was lost


def train(address: str, config: Config, gpus_per_seed: float | None = None) -> dict[int, str]:
    """Train all seeds on the cluster, see `open_cluster`; return the reason of failure for each seed that failed."""
    start = open_cluster(address, config, gpus_per_seed)
    seeds = {start(seed): seed for seed in config.seeds}
    unfinished, failures = list(seeds), dict[int, str]()
    while unfinished:
        (finished,), unfinished = ray.wait(unfinished)
        seed = seeds[finished]
        try:
            ray.get(finished)
            click.echo(f"seed {seed} is trained")
        except (RayError, UserError) as error:
            failures[seed] = _reason(error)
            click.echo(f"seed {seed} failed")
    ray.shutdown()
    return failures


def wait_for_seeds(tasks: Sequence[ray.ObjectRef[None]], stop: Callable[[], int]) -> None:
    """Wait until all these seeds are trained; if `stop` returns a signal, cancel those that are not.

    Raises:
        UserError: one failed, or was cancelled.
    """
    unfinished = list(tasks)
    while unfinished and not stop():
        _, unfinished = ray.wait(unfinished, num_returns=len(unfinished), timeout=1)
    for task in unfinished:
        ray.cancel(task)
    try:
        ray.get(list(tasks))
    except (RayError, UserError) as error:
        raise UserError(_reason(error)) from None


def open_cluster(
    address: str, config: Config, gpus_per_seed: float | None = None
) -> Callable[..., ray.ObjectRef[None]]:
    """Connect to the cluster and push to the DVC remote what trainings need.

    Args:
        address: of the cluster's head node, as `ray start` prints it, or `auto`.
        config: the configuration with the seeds.
        gpus_per_seed: Ray's `num_gpus` of each seed, above 0, at most 1; by default 1, or 0 if the cluster has no GPU.

    Returns:
        A function that starts the training of a seed and pushes its outs to the DVC remote. With options of `dvc exp
        run` as its second argument, it trains in a DVC experiment.

    Raises:
        UserError: the cluster cannot be reached or is too small, there is no DVC remote, or a change is not committed
            or not pushed.
    """
    if address == "local":
        raise UserError("--ray local: only cxr predict takes it; leave --ray out to train on this machine")
    if not _output("dvc", "config", "core.remote"):
        raise UserError("no default DVC remote; run: dvc remote add -d NAME URL, and commit .dvc/config")
    _run(Path(), "dvc", "push", "--run-cache", "weights", "prepare", "split")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    if changes:
        raise UserError(f"{changes.split()[-1]} is not committed, so other machines cannot get it; commit it")
    if _output("git", "remote") and not _output("git", "branch", "--remotes", "--contains", "HEAD"):
        raise UserError("the current commit is on no git remote, so other machines cannot get it; run: git push")
    connect(address)
    cores = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    if cores < config.active.train.cpu_threads:
        raise UserError(
            f"no node of {address} has train.cpu_threads = {config.active.train.cpu_threads} cores, the largest has "
            f"{cores:g}; start a larger node (ray start --num-cpus N)"
        )
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    if gpus_per_seed and not has_gpus:
        raise UserError(f"no node of {address} has a GPU; start one with a GPU, or leave out --gpus-per-seed")
    gpus = gpus_per_seed or int(has_gpus)
    task = ray.remote(num_cpus=config.active.train.cpu_threads, num_gpus=gpus, max_retries=MAX_RETRIES)(_train)
    source = _output("git", "config", "remote.origin.url") or str(Path.cwd())
    tracking = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_TRACKING_")}
    commit = _output("git", "rev-parse", "HEAD")
    return lambda seed, options=(): task.remote(seed, source, commit, tracking, options)


def connect(address: str) -> None:
    """Connect to a Ray cluster.

    Args:
        address: of the cluster's head node, as `ray start` prints it, or `auto`; or `local` for a new cluster on this
            machine, which ends with this process.

    Raises:
        UserError: the cluster cannot be reached.
    """
    try:
        if address not in ("auto", "local"):  # fail at once; Ray would retry for minutes
            host, _, port = address.rpartition("/")[2].rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (OSError, ValueError, OverflowError, RuntimeError, RayError) as error:
        raise UserError(f"no Ray cluster at {address}: {first_line(error)}; start it, or correct the address") from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "cause", error)).strip().splitlines()[-1]


def _train(seed: int, source: str, commit: str, tracking: dict[str, str], options: Sequence[str]) -> None:
    prepend_environment_path()
    os.environ |= tracking
    with tempfile.TemporaryDirectory(prefix=f"seed-{seed}-") as name:
        clone = Path(name)
        _run(clone, "git", "clone", "--quiet", source, ".")
        _run(clone, "git", "checkout", "--quiet", commit)
        _run(clone, "dvc", "pull", "weights", "prepare", "split")
        if options:
            # Finds seeds that were pushed before, and does without data of stages that have not changed.
            _run(clone, "dvc", "exp", "run", "--pull", "--allow-missing", *options, f"train@{seed}")
        else:
            _run(clone, "dvc", "repro", "-s", f"train@{seed}")
        _run(clone, "dvc", "push", "--run-cache", f"train@{seed}")


def _run(folder: Path, *command: str) -> None:
    """Run a command; its error line becomes a `UserError`."""
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        line = re.search(r".*(error|fatal): .*", result.stdout + result.stderr, re.IGNORECASE)
        raise UserError(redact_credentials(f"{' '.join(command)}: {line[0] if line else result.stderr.strip()}"))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
