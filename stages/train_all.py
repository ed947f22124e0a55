"""Train all seeds, several at once."""

import os
import re
import signal
import subprocess
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.common import stage

if TYPE_CHECKING:
    from rich.table import Table

# As the training loop prints them, and as DVC says that it has nothing to do.
EPOCH = re.compile(r"epoch (\d+/\d+) .* F1 ([\d.]+) +(\d+) images/s")
UP_TO_DATE = re.compile(r"didn't change, skipping|is cached - skipping")


@dataclass
class Seed:
    """One seed's `dvc repro` and its log."""

    number: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self, device: str) -> None:
        """Run in a session of its own, so that Ctrl-C reaches it through `stop` alone."""
        # Idle threads give their core away, which changes no result but the pace where seeds share cores.
        own = {"OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": device}
        command = ["dvc", "--wait-for-lock", "repro", "-s", f"train@{self.number}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def stop(self) -> None:
        """Ask the training, not DVC, to stop: DVC does not heed this signal while a stage runs."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def failed(self) -> bool:
        return self.process is not None and self.process.poll() not in (None, 0)

    @property
    def state(self) -> str:
        if self.process is None:
            return "waits"
        if self.runs:
            return "trains"
        if self.failed:
            return "failed"
        return "up to date" if UP_TO_DATE.search(self._text()) else "done"

    def last_epoch(self) -> tuple[str, ...]:
        """Return epoch, F1 and images per second as they were printed last."""
        found = EPOCH.findall(self._text())
        return tuple(found[-1]) if found else ("–", "–", "–")

    def reason(self) -> str:
        """Return the one line with which the stage failed, or DVC's."""
        lines = [line for line in self._text().splitlines() if line.lower().startswith("error: ")]
        return lines[0][len("error: ") :] if lines else "it ended without a word"

    def _text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.process else ""


@stage
@click.option("--jobs", type=click.IntRange(1), help="How many seeds train at once on this machine.")
@click.option("--ray", metavar="ADDRESS", help="Train on this Ray cluster instead.")
def train_all(jobs: int | None, ray: str | None) -> None:
    """Train every seed of params.yaml that is due, by a `dvc repro` each; afterwards `dvc repro` trains none.

    On this machine the seeds get its GPUs in turn. On a Ray cluster each works in a clone of its own, and the results
    come back with `dvc repro --pull`.
    """
    from pipeline.core.config import load_config
    from pipeline.core.errors import UserError

    if (jobs is None) == (ray is None):
        raise click.UsageError("give either --jobs N or --ray ADDRESS")
    config = load_config()
    ended = subprocess.run(["dvc", "--wait-for-lock", "repro", "weights", "split"], check=False)
    if ended.returncode:
        raise UserError("what comes before training failed, as dvc repro says above")
    if ray:
        try:
            from stages import ray_backend
        except ModuleNotFoundError:
            raise UserError("Ray is not installed; run: pip install -c constraints.txt -e '.[ray]'") from None
        failed = ray_backend.train(ray, config)
    else:
        failed = _train_here(config.seeds, jobs or 1)
    if failed:
        reasons = "; ".join(f"seed {seed}: {reason}" for seed, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(config.seeds)} seeds failed: {reasons}")
    click.echo(f"{len(config.seeds)} seeds are trained; next: dvc repro{' --pull' if ray else ''}")


def _train_here(numbers: list[int], jobs: int) -> dict[int, str]:
    """Train on this machine, and return why the seeds that failed did so."""
    from rich.live import Live

    from pipeline.core.errors import Interrupted
    from pipeline.training.signals import SignalHandler

    logs = Path("logs")
    logs.mkdir(exist_ok=True)
    seeds = [Seed(number, logs / f"seed-{number}.log") for number in numbers]
    waiting, devices = deque(seeds), _devices()
    places: list[Seed | None] = [None] * jobs
    with SignalHandler() as stop, Live(_table(seeds)) as live:
        try:
            while not stop() and (waiting or any(seed.runs for seed in seeds)):
                for place, there in enumerate(places):
                    if waiting and not (there and there.runs):
                        places[place] = seed = waiting.popleft()
                        seed.start(devices[place % len(devices)])
                live.update(_table(seeds))
                time.sleep(0.2)
        finally:
            for seed in seeds:
                seed.stop()
            for seed in seeds:
                if seed.process:
                    seed.process.wait()
        live.update(_table(seeds))
    if stop():
        raise Interrupted(stop(), "the seeds that were training are stopped")
    return {seed.number: f"{seed.reason()} (see {seed.log})" for seed in seeds if seed.failed}


def _devices() -> list[str]:
    """Return the GPUs by what CUDA_VISIBLE_DEVICES calls them; one empty name where there is none."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())] or [""]


def _table(seeds: list[Seed]) -> "Table":
    from rich.table import Table

    table = Table("seed", "state", "epoch", "validation F1", "images/s")
    for seed in seeds:
        table.add_row(str(seed.number), seed.state, *seed.last_epoch())
    return table


if __name__ == "__main__":
    train_all()
