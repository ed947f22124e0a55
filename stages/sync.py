"""Bring MLflow up to date with DVC's files."""

from itertools import chain
from pathlib import Path

import click

from stages.common import check_git, list_experiments, stage


@stage
@click.option("--prune", is_flag=True, help="Also delete the runs of DVC experiments that were removed.")
@click.option("--yes", is_flag=True, help="Do not ask before deleting.")
def sync(prune: bool, yes: bool) -> None:
    """From DVC's files, create the runs, versions and aliases that MLflow lacks, then apply the promotion gate.

    The gate is that of `cxr promote`. A repeated call changes nothing.
    """
    from pipeline.core.config import load_config
    from pipeline.tracking import backfill, promotion, saved_view
    from pipeline.tracking import prune as pruning
    from pipeline.tracking.runs import DVC_EXPERIMENT
    from pipeline.tracking.store import connect

    config = load_config()
    if prune:
        check_git()
    store = connect(config.model_name)
    versions = backfill.backfill(store, config)
    decision = promotion.promote_best(store, config, versions)
    click.echo(promotion.format_decision(config.model_name, decision))
    click.echo(saved_view.format_links(store))
    if not prune:
        return
    # In this order, since one may end meanwhile.
    experiments = [*_running_experiments(), *list_experiments()]
    runs = pruning.removable_runs(store, config.model_name, versions.values(), experiments)
    for run in runs:
        click.echo(f"{run.info.run_name} (experiment {run.data.tags[DVC_EXPERIMENT]})")
    if not runs:
        click.echo("no runs of removed experiments")
    elif yes or click.confirm(f"Delete these {len(runs)} runs and their registered versions?"):
        pruning.remove_runs(store, config.model_name, runs)
        click.echo(f"{len(runs)} runs deleted")
        click.echo(f"to free the space of these and of all else that is deleted, run: {pruning.gc_command()}")


def _running_experiments() -> list[str]:
    """Return the names of the DVC experiments that run, and of those that were killed, which DVC takes for running."""
    from dvc.repo.experiments.executor.base import ExecutorInfo, TaskStatus

    folder = Path(".dvc/tmp/exps")
    files = chain(folder.glob("run/*/*.run"), folder.glob("standalone/run/*/*.run"))
    infos = [ExecutorInfo.load_json(str(file)) for file in files]
    return [info.name for info in infos if info.name and info.status in (TaskStatus.RUNNING, TaskStatus.SUCCESS)]


if __name__ == "__main__":
    sync()
