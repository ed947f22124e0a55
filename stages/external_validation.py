"""External validation for every source that allows it."""

import configparser
import hashlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.common import check_git, prepare_training, print_table, run_git, stage

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.core.config import Config

COPIES = Path(".dvc/tmp/external-validation")  # a copy of the workspace per source; neither Git nor DVC looks into it
TABLE = Path("scores/external_validation.csv")


@stage
@click.option("--jobs", metavar="N", type=click.IntRange(1), default=1, help="Train N seeds at once.")
def external_validation(jobs: int) -> None:
    """Run the pipeline once per source with that source held out, and write scores/external_validation.csv.

    Each run has a copy of the workspace in .dvc/tmp, with the same cache, and logs to the same MLflow. After an
    interruption, the same command resumes; sources that are up to date are not trained again. The summary over the
    sources is by a random-effects meta-analysis.
    """
    import pandas as pd

    from pipeline.core.config import load_config
    from pipeline.core.errors import UserError
    from pipeline.core.files import read_csv, write_csv
    from pipeline.data.manifest import read_split
    from pipeline.evaluation import external_validation as evaluation
    from pipeline.training.signals import SignalHandler

    config = load_config()
    check_git()
    prepare_training()
    sources = evaluation.list_sources(read_split(Path("data")))
    possible = sources[sources["reason"] == ""]["source"].tolist()
    tables, failures = [], []
    with SignalHandler() as stop:
        for row in sources.to_dict("records"):
            source, reason = row["source"], row["reason"]
            counts = (
                f"{row['images']} images of {row['patients']} patients, {row['positive_patients']} of them positive"
            )
            if not reason:
                click.echo(f"{source} ({possible.index(source) + 1} of {len(possible)}): {counts}; training without it")
                folder = _copy_workspace(config.profile, source)
                reason = _run_pipeline(folder, jobs, stop)
                failures += [source] if reason else []
            if stop():
                click.echo("interrupted; the same command resumes from there", err=True)
                sys.exit(128 + stop())
            if reason:
                click.echo(f"{source}: no external validation: {reason}")
                tables.append(pd.DataFrame([{**row, "reason": reason}]))
            else:
                tables.append(read_csv(folder / "metrics/external.csv"))
                _finish_parent_run(config, source, folder)
    metrics = pd.concat(tables).reindex(columns=evaluation.COLUMNS)
    table = pd.concat([metrics, evaluation.summarize_sources(metrics)]).assign(recipe=evaluation.recipe_hash(config))
    write_csv(TABLE, table)
    _print(table)
    if failures:
        raise UserError(
            f"{len(failures)} of {len(possible)} sources failed: {', '.join(failures)}; see the output above"
        )
    click.echo(f"{TABLE}: {len(possible)} of {len(sources)} sources; next: dvc repro")


def _copy_workspace(profile: str, source: str) -> Path:
    """Bring a copy of the workspace up to date, in which the source is held out, and return its folder.

    Files come from Git's index or are not ignored by it; outs come from DVC's cache, which the copies share.
    """
    import yaml

    name = re.sub(r"\W+", "-", f"{profile}-{source}").strip("-")
    folder = COPIES / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:6]}"
    listed = run_git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for file in map(Path, filter(None, listed.split("\0"))):
        if file.is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, folder / file)
    params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    params[profile]["split"]["held_out_source"] = source
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False, allow_unicode=True), encoding="utf-8")

    settings = configparser.ConfigParser(interpolation=None)
    settings.read(".dvc/config.local", encoding="utf-8")
    cache = subprocess.run(["dvc", "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
    # Links to the cache instead of copies: a data set may be large. No stage changes its inputs.
    settings.read_dict({"cache": {"dir": cache, "type": "reflink,hardlink,symlink,copy"}, "core": {"no_scm": "true"}})
    with (folder / ".dvc/config.local").open("w", encoding="utf-8") as stream:
        settings.write(stream)
    return folder


def _run_pipeline(folder: Path, jobs: int, stop: Callable[[], int]) -> str:
    """Run the pipeline in a copy of the workspace up to the metrics; return why it failed, or an empty text."""
    from pipeline.tracking.tracking_uri import workspace_root

    environment = os.environ | {"DVC_ROOT": str(workspace_root())}  # of MLflow's store and of the checkpoints
    commands = [["dvc", "--wait-for-lock", "repro", "bag"]]
    if jobs > 1:
        commands.insert(0, [sys.executable, "-m", "stages.train_all", "--jobs", str(jobs)])
    for command in commands:
        process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
        while process.poll() is None:
            if stop():
                os.killpg(process.pid, signal.SIGINT)  # DVC itself ignores it while a stage runs
                process.wait()
            time.sleep(0.1)
        if process.returncode:
            return "its run failed"
    return ""


def _finish_parent_run(config: "Config", source: str, folder: Path) -> None:
    """Close the parent run of the seeds of a copy in MLflow, since no stage `promote` runs there."""
    from mlflow.exceptions import MlflowException

    from pipeline.core.errors import UserError, first_line
    from pipeline.tracking.runs import finish_parent_of_copy
    from pipeline.tracking.store import connect

    try:
        store, seed, method = connect(config.model_name), config.model_names[0], config.active.bag.method
        finish_parent_of_copy(store, seed, method, lambda path: (folder / path).read_text(encoding="utf-8"), {})
    except (UserError, MlflowException) as error:
        click.echo(f"{source}: its run is not complete in MLflow: {first_line(error)}")


def _print(table: "pd.DataFrame") -> None:
    from rich.table import Column, Table

    from pipeline.evaluation.metrics import METRIC_LABELS

    metrics = ["auroc", "recall", "specificity"]
    counts = ["images", "positives", "patients", "positive_patients"]
    header = [
        "source",
        *(name.replace("_", " ") for name in counts),
        "model",
        *map(METRIC_LABELS.get, metrics),
        "reason",
    ]
    printed = Table(*(Column(str(name), overflow="fold") for name in header))
    texts = table.fillna({"role": "", "model": "", "reason": ""})
    for _, rows in texts.groupby(["source", "role"], sort=False):
        by_metric = {str(row["metric"]): row for row in rows.to_dict("records")}
        row = by_metric.get("auroc") or rows.to_dict("records")[0]
        cells = [_format(by_metric[metric]) if metric in by_metric else "–" for metric in metrics]
        numbers = [f"{row[name]:.0f}" for name in counts]
        printed.add_row(str(row["source"]), *numbers, str(row["model"] or "–"), *cells, str(row["reason"]))
    print_table(printed)


def _format(row: dict[Any, Any]) -> str:
    value = "" if math.isnan(row["value"]) else f"{row['value']:.3f} "
    interval = "" if math.isnan(row["low"]) else f"({row['low']:.3f} to {row['high']:.3f})"
    return (value + interval).strip() or "–"


if __name__ == "__main__":
    external_validation()
