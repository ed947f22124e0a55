"""Score the candidates on the test set, where somebody has its labels."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.common import print_table, stage

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.core.config import Config


@stage
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
def score(file: Path | None) -> None:
    """Score every candidate on the test images, beside the accuracy that was expected, and log it to MLflow.

    The labels are the columns File and Label of FILE, by default of test_labels.csv in data/raw.zip. Only this command
    reads them. It writes scores/test.csv, which the report shows from then on.
    """
    import pandas as pd

    from pipeline.core.config import load_config
    from pipeline.core.files import read_csv, read_json, write_csv
    from pipeline.data.manifest import read_split
    from pipeline.data.test_labels import match_labels, read_archived_labels, read_test_labels
    from pipeline.evaluation import ensemble, test_scores
    from pipeline.evaluation.slices import all_patients_known

    config = load_config()
    labels = read_test_labels(file) if file else read_archived_labels(Path("data/raw.zip"))
    predictions, quarantine = read_csv(Path("predictions/test.csv")), read_csv(Path("data/quarantine.csv"))
    labels = match_labels(labels, pd.concat([predictions["file"], quarantine["file"]]))
    is_excluded = labels.index.isin(quarantine["file"])
    if is_excluded.any():
        click.echo(
            f"{is_excluded.sum()} labels are of test images that prepare leaves out; they are not scored", err=True
        )
    labels = labels[~is_excluded]
    images = read_split(Path("data")).set_index("file")
    scores = test_scores.score_candidates(
        predictions,
        labels,
        images["group"],
        ensemble.load_candidate_configs(config),
        read_json(Path("metrics/summary.json")),
    )
    write_csv(Path("scores/test.csv"), scores)
    _print_scores(scores)
    counts = scores.iloc[0]
    click.echo(
        f"{counts['images']} of {len(predictions)} test images have a label: {counts['positives']} positive, of "
        f"{counts['positive_patients']} of {counts['patients']} patients"
    )
    if not all_patients_known(images[images["subset"] == "test"]):
        click.echo("an image without a known patient counts as a patient: intervals may be too narrow", err=True)
    click.echo(f"scores/test.csv written; {_log(config, scores)}")


def _log(config: "Config", scores: "pd.DataFrame") -> str:
    """Log the scores to MLflow, and return in words whether they are there."""
    from pipeline.core.errors import UserError
    from pipeline.tracking.test_scores import log_test_scores

    try:
        without_run = log_test_scores(config, scores)
    except UserError as error:
        return f"not logged to MLflow: {error}"
    except FileNotFoundError as error:
        return f"not logged to MLflow: {error.filename} not found"
    if without_run:
        return f"MLflow has no run of {', '.join(without_run)}; run: cxr sync, then cxr score again"
    return "logged to MLflow as test/…"


def _print_scores(scores: "pd.DataFrame") -> None:
    from rich.table import Column, Table

    from pipeline.evaluation.metrics import METRIC_LABELS
    from pipeline.evaluation.test_scores import EXPECTED_COLUMNS, METRICS

    headers = ["candidate", *(METRIC_LABELS[metric] for metric in METRICS), "expected accuracy"]
    table = Table(*(Column(header, overflow="fold") for header in headers))
    for name, rows in scores.groupby("model", sort=False):
        by_metric = rows.set_index("metric")
        cells = [_format_interval(*by_metric.loc[metric, ["value", "low", "high"]]) for metric in METRICS]
        table.add_row(str(name), *cells, _format_interval(*by_metric.loc["accuracy", EXPECTED_COLUMNS[:3]]))
    print_table(table)
    for row in scores[scores["expected_accuracy_reason"].fillna("") != ""].to_dict("records"):
        click.echo(f"accuracy of {row['model']}: {row['expected_accuracy_reason']}")


def _format_interval(value: float | None, low: float | None, high: float | None) -> str:
    """Format a value with its interval, or a range without a value."""
    interval = "" if low is None or high is None or math.isnan(low) else f"{low:.3f} to {high:.3f}"
    if value is None or math.isnan(value):
        return interval or "–"
    return f"{value:.3f}" + (f" ({interval})" if interval else "")


if __name__ == "__main__":
    score()
