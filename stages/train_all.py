"""Train all seeds, several at once."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.common import NumberRange, check_git, prepare_training, require_ray, stage

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.training.progress import TrainingProgress


def start_logged(
    command: Sequence[str], log: Path, variables: Mapping[str, str], pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a command with its output in a log, in a session of its own, which Ctrl-C does not reach."""
    log.parent.mkdir(exist_ok=True)
    # Idle threads yield their core to other seeds; the results do not change.
    environment = os.environ | {"GOMP_SPINCOUNT": "0", **variables}
    with log.open("wb") as out:
        return subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=pass_fds
        )


def first_error(log: Path) -> str:
    """Return the first error line of a log, which is the stage's or DVC's."""
    prefix, lines = "error: ", log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line[len(prefix) :] for line in lines if line.lower().startswith(prefix)]
    return errors[0] if errors else "no error message"


@dataclass
class SeedProcess:
    """The `dvc repro` of one seed, with its log and the progress file that the training writes."""

    seed: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self, variables: dict[str, str]) -> None:
        """Start with these variables; Ctrl-C reaches it only through `stop`."""
        from pipeline.training.progress import progress_path

        progress_path(self.seed).unlink(missing_ok=True)  # of an earlier training
        command = ["dvc", "--wait-for-lock", "repro", "-s", f"train@{self.seed}"]
        self.process = start_logged(command, self.log, variables)

    def stop(self) -> None:
        """Interrupt the training; DVC itself ignores the signal while a stage runs."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def has_failed(self) -> bool:
        return self.process is not None and self.process.poll() not in (None, 0)

    def failure_reason(self, jobs: int = 1) -> str:
        """Return the first error of the log of one of `jobs` trainings at once."""
        reason = first_error(self.log)
        # The training does not know of the others.
        return f"{reason}, or lower --jobs" if jobs > 1 and "out of memory" in reason else reason

    def progress(self) -> "TrainingProgress | None":
        """Return the progress of the training, or None if no training has begun since the start."""
        from pipeline.training.progress import read_progress

        return read_progress(self.seed) if self.process else None

    def status(self) -> str:
        if self.process is None:
            return "waiting"
        if self.is_running:
            return "training"
        progress = self.progress()
        if self.has_failed:
            return "interrupted" if progress and progress.state == "interrupted" else "failed"
        return "done" if progress else "up to date"  # DVC skipped the training or restored its results


@stage
@click.option(
    "--jobs",
    metavar="N",
    type=click.IntRange(1),
    help="Seeds to train at once on this machine.",
    show_default="one per GPU; without a GPU, cores / train.cpu_threads",
)
@click.option("--ray", metavar="ADDRESS", help="Train on this Ray cluster instead.")
@click.option(
    "--gpus-per-seed",
    metavar="SHARE",
    type=NumberRange(0, 1, min_open=True),
    help="Share of a GPU that each seed gets on the Ray cluster.",
    show_default="1, or 0 if it has no GPU",
)
def train_all(jobs: int | None, ray: str | None, gpus_per_seed: float | None) -> None:
    """Train every seed of params.yaml that has changed, with one `dvc repro` each.

    `dvc repro` then runs only the later stages. On this machine, the GPUs are assigned to the seeds in turn, and those
    on one GPU compute at the same time with NVIDIA MPS, if it is installed. On a Ray cluster, each seed trains in its
    own clone, and `dvc repro --pull` fetches the results.
    """
    from pipeline.core.config import load_config
    from pipeline.core.errors import UserError

    if ray and jobs:
        raise click.UsageError("give --jobs N or --ray ADDRESS, not both")
    if gpus_per_seed and not ray:
        raise click.UsageError("--gpus-per-seed needs --ray ADDRESS; on this machine, --jobs N lets seeds share a GPU")
    config = load_config()
    check_git()
    prepare_training()
    if ray:
        with require_ray():
            from stages import ray_backend
        failures = ray_backend.train(ray, config, gpus_per_seed)
    else:
        failures = _train_locally(config.seeds, jobs or _default_jobs(config.active.train.cpu_threads))
    if failures:
        reasons = "; ".join(f"seed {seed}: {reason}" for seed, reason in failures.items())
        raise UserError(f"{len(failures)} of {len(config.seeds)} seeds failed: {reasons}")
    click.echo(f"{len(config.seeds)} seeds are trained; next: dvc repro{' --pull' if ray else ''}")


def _train_locally(seeds: list[int], jobs: int) -> dict[int, str]:
    """Train on this machine, and return the reason of failure for each seed that failed."""
    from rich.live import Live

    from pipeline.core.errors import Interrupted
    from pipeline.training.signals import SignalHandler

    jobs = min(jobs, len(seeds))
    processes = [SeedProcess(seed, Path("logs", f"seed-{seed}.log")) for seed in seeds]
    waiting = deque(processes)
    slots: list[SeedProcess | None] = [None] * jobs
    with SignalHandler() as stop, gpu_environments(jobs) as gpus, Live(_progress_table(processes)) as live:
        try:
            while not stop() and (waiting or any(process.is_running for process in processes)):
                for slot, current in enumerate(slots):
                    if waiting and not (current and current.is_running):
                        slots[slot] = process = waiting.popleft()
                        process.start(gpus[slot % len(gpus)])
                live.update(_progress_table(processes))
                time.sleep(0.2)
        finally:
            for process in processes:
                process.stop()
            for process in processes:
                if process.process:
                    process.process.wait()
        live.update(_progress_table(processes))
    if stop():
        raise Interrupted(stop(), "all running trainings are stopped; dvc repro resumes from there")
    failures = [process for process in processes if process.has_failed]
    return {process.seed: f"{process.failure_reason(jobs)} (see {process.log})" for process in failures}


def _default_jobs(cpu_threads: int) -> int:
    from joblib import cpu_count

    devices = _devices()
    return max(1, cpu_count() // cpu_threads) if devices == [""] else len(devices)


@contextmanager
def gpu_environments(jobs: int) -> Iterator[list[dict[str, str]]]:
    """Yield the environment variables that select each GPU; during the block, MPS runs if jobs share a GPU."""
    from pipeline.core.errors import UserError
    from pipeline.training import mps

    devices = _devices()
    environments = [{"CUDA_VISIBLE_DEVICES": device} for device in devices]
    with ExitStack() as stack:
        if devices != [""] and jobs > len(devices):
            try:
                if not mps.is_running():
                    environments = [stack.enter_context(mps.start_mps(device)) for device in devices]
            except UserError as error:
                click.echo(f"{error}; trainings on the same GPU take turns")
        yield environments


def _devices() -> list[str]:
    """Return the GPUs as CUDA_VISIBLE_DEVICES names them; without a GPU, one empty name."""
    import torch

    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    # Of MIG devices, CUDA counts only the first, and a process can use only one.
    return (visible.split(",") if visible else [str(index) for index in range(count)]) if count else [""]


def _progress_table(processes: list[SeedProcess]) -> "Table":
    from rich.table import Table

    table = Table("seed", "status", "epoch", "validation F1", "images/s")
    for process in processes:
        progress, cells = process.progress(), ["–"] * 3
        if progress:
            fold = "" if progress.fold is None else f"fold {progress.fold}: "
            cells[0] = f"{fold}{progress.epoch}/{progress.epochs}"
            if progress.f1 is not None:
                cells[1] = f"{progress.f1:.3f}"
            if progress.images_per_second is not None:
                cells[2] = f"{progress.images_per_second:.0f}"
        table.add_row(str(process.seed), process.status(), *cells)
    return table


if __name__ == "__main__":
    train_all()
