"""Tune hyperparameters."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.core.errors import UserError, first_line, rename_in_errors
from stages.common import check_git, prepare_training, require_ray, stage

if TYPE_CHECKING:
    from pipeline.core.config import Config

PARAMS = Path("params.yaml")
METRICS = ["auroc", "average_precision", "balanced_accuracy", "f1"]  # higher is better


@stage
@click.argument("space", metavar="KEY=VALUES...", nargs=-1, required=True)
@click.option("--trials", metavar="N", type=click.IntRange(1), default=20, help="Trials in all.")
@click.option("--seeds", metavar="LIST", help="Seeds of each trial.", show_default="the first three of params.yaml")
@click.option("--metric", type=click.Choice(METRICS), default="auroc", help="Metric to maximize, on average.")
@click.option("--study", "name", metavar="NAME", default="tune", help="Name of the study.")
@click.option("--jobs", metavar="N", type=click.IntRange(1), default=1, help="Trials at once.")
@click.option("--ray", metavar="ADDRESS", help="Train on this Ray cluster.")
def tune(
    space: tuple[str, ...], trials: int, seeds: str | None, metric: str, name: str, jobs: int, ray: str | None
) -> None:
    """Search for better values of keys of params.yaml with Optuna, and show the trials.

    KEY=VALUES is KEY=A,B or KEY=interval(LOW,HIGH), KEY=log(LOW,HIGH) (uniform in the logarithm), or
    KEY=range(START,STOP,STEP) (without STOP). Each trial is a DVC experiment, NAME-0, NAME-1, …, the first one with
    the present values. A trial stops after a seed if it is worse than the best one by a paired comparison. The study is
    kept in optuna.db: the same command resumes it, also after a kill, and a larger N extends it.
    """
    from pipeline.core.config import load_config
    from pipeline.training.search_space import parse_search_space

    if not re.fullmatch(r"[\w-]+", name):
        raise click.UsageError(f"--study {name}: write letters, digits, _ and -")
    config = load_config()
    distributions, present = parse_search_space(space, config, _apply)
    prepared = [key for key in distributions if key.startswith(f"{config.profile}.prepare.")]
    if ray and prepared:
        raise UserError(f"{prepared[0]}: a Ray cluster gets prepared images; leave it out, or run without --ray")
    trial_seeds = _apply("seeds", f"[{seeds}]").seeds if seeds else config.seeds[:3]
    _apply("seeds", f"[{trial_seeds[0]}]")  # as bag.members must allow
    check_git()

    if ray:
        with require_ray():
            from stages.ray_backend import open_cluster
    from stages.tuner import STORAGE, Tuner

    with _lock(f"{STORAGE}.lock") as lock:
        prepare_training()
        tuner = Tuner(config, distributions, present, trial_seeds, metric, name, lock)
        if ray:
            tuner.start_seed = open_cluster(ray, config)
        tuner.run(trials, jobs)
        tuner.print_results()


def _apply(key: str, value: str) -> "Config":
    """Return the configuration in which a key has another value, as `dvc exp run -S` sets it."""
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from ruamel.yaml.error import YAMLError

    from pipeline.core.config import load_config

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, PARAMS.name)
        path.write_bytes(PARAMS.read_bytes())
        try:
            apply_overrides(path, [f"++{key}={value}"])
        except (DvcException, HydraException, OmegaConfBaseException, YAMLError) as error:
            raise UserError(f"{key}={value}: {first_line(error)}") from None
        with rename_in_errors({str(path): str(PARAMS)}):
            return load_config(path)


@contextmanager
def _lock(path: str) -> Iterator[int]:
    """Lock a file until the block and the trials that it started, which inherit the descriptor, have ended."""
    import fcntl

    lock = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            click.echo("waiting for another cxr tune in this workspace, or for a trial that it left running")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


if __name__ == "__main__":
    tune()
