"""Make MLflow show what DVC holds."""

import subprocess

import click

from stages.common import stage


@stage
@click.option("--prune", is_flag=True, help="Then delete the runs of DVC experiments that were removed.")
@click.option("--yes", is_flag=True, help="Do not ask before deleting.")
def sync(prune: bool, yes: bool) -> None:
    """Complete runs, registered models and aliases in MLflow from DVC's files; done twice, it changes nothing more."""
    from pipeline.core.config import load_config
    from pipeline.core.errors import UserError
    from pipeline.tracking import sync as tracking
    from pipeline.tracking.runs import DVC_EXPERIMENT

    config = load_config()
    click.echo(tracking.format_decision(config.model_name, tracking.promote_best(config)))
    if not prune:
        return
    listed = subprocess.run(
        ["dvc", "exp", "list", "--all-commits", "--name-only"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise UserError(f"dvc exp list failed: {listed.stderr.strip()}")
    removed = tracking.removable_runs(config, listed.stdout.split())
    for run in removed:
        click.echo(f"{run.info.run_name}, of experiment {run.data.tags[DVC_EXPERIMENT]}")
    if not removed:
        click.echo("no run belongs to a removed experiment")
    elif yes or click.confirm(f"Delete these {len(removed)} runs and what is registered of them?"):
        tracking.remove_runs(config, removed)
        click.echo(f"{len(removed)} runs are deleted; mlflow gc frees their files")


if __name__ == "__main__":
    sync()
