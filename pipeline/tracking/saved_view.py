"""The saved view with which the runs page of MLflow's UI opens on seeds and bag by F1, and the links to it.

MLflow 3.17 reads it from a tag of the experiment, in a private format. A UI that reads it no more shows its own one.
"""

import json
from typing import Any

from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_EXPERIMENT_PRIMARY_METRIC_NAME, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

from pipeline.core.config import Config
from pipeline.core.errors import redact_credentials
from pipeline.tracking import registry
from pipeline.tracking.fingerprint import NO_EFFECT
from pipeline.tracking.runs import DVC_EXPERIMENT, REPORT_HASH, epoch_prefixes
from pipeline.tracking.store import Store
from pipeline.tracking.tracking_uri import tracking_uri

KEY = "by-f1"  # of the view in its link
NAME = "Seeds and bag by F1"
METRICS = ["f1", "recall", "specificity", "precision", "accuracy", "auroc"]  # as columns and as bars
REPORT = "report/index.html"  # among the artifacts of a parent run
DEFAULT_SERVER = "http://127.0.0.1:5000"  # of `cxr ui`
CURVES = ["validation/f1", "validation/loss", "train/loss"]  # by epoch


def save_view(store: Store, config: Config) -> None:
    """Write the saved view and the links in the experiment's note; what is unchanged is not written again."""
    name = config.model_name
    experiment = store.client.get_experiment(store.experiment_id)
    runs = store.client.search_runs([store.experiment_id], max_results=50_000)  # newest first
    parents = [run for run in runs if MLFLOW_PARENT_RUN_ID not in run.data.tags]
    created = experiment.creation_time  # in milliseconds since 1970; a view needs times, and this one does not change
    view = {"name": NAME, "createdAt": created, "updatedAt": created, "state": json.dumps(_state(config, parents))}
    links = paths(store)
    if champion := registry.get_champion(store, name):
        links[f"champion: version {champion.version}"] = f"/models/{name}/versions/{champion.version}"
    if complete := [run for run in parents if REPORT_HASH in run.data.tags]:
        run_id = complete[0].info.run_id
        links["report"] = f"/experiments/{store.experiment_id}/runs/{run_id}/artifacts/{REPORT}"
    note = experiment.tags.get(MLFLOW_RUN_NOTE, "")  # the experiment's tag has the same name
    tags = {
        f"mlflow.sharedViewState.{KEY}": json.dumps(view),
        MLFLOW_EXPERIMENT_PRIMARY_METRIC_NAME: "f1",
        MLFLOW_RUN_NOTE: _replace_links(note, " · ".join(f"[{text}](#{path})" for text, path in links.items())),
    }
    for key, value in tags.items():
        if experiment.tags.get(key) != value:
            store.client.set_experiment_tag(store.experiment_id, key, value)


def paths(store: Store) -> dict[str, str]:
    """Return the paths in MLflow's UI of the view as a table and as charts, by their names."""
    path = f"/experiments/{store.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={KEY}"
    return {NAME: path, "as charts": f"{path}&compareRunsMode=CHART"}


def format_links(store: Store, server: str | None = None) -> str:
    """Format the links to the view as lines; by default on the tracking server, or else where `cxr ui` serves it."""
    uri = tracking_uri()
    if server is None and uri.startswith("http"):
        server = redact_credentials(uri).rstrip("/")
    lines = [f"{text}: {server or DEFAULT_SERVER}/#{path}" for text, path in paths(store).items()]
    return "\n".join([*lines, *(["(while `cxr ui` or `make ui` runs)"] if server is None else [])])


def _varied_columns(parents: list[Run]) -> list[str]:
    """Return the columns in which the experiments of these parent runs differ, and F1 over their seeds."""
    params = [run.data.params for run in parents]
    names = {name for one in params for name in one} - NO_EFFECT
    varied = sorted(name for name in names if len({one[name] for one in params if name in one}) > 1)
    if not varied:
        return [_column("params", "lr")]
    return [
        *(_column("params", name) for name in varied),
        *(_column("metrics", f"seeds/f1_{part}") for part in ("mean", "sd")),
        _column("tags", DVC_EXPERIMENT),
    ]


def _state(config: Config, parents: list[Run]) -> dict[str, Any]:
    """Return the state of the runs page."""
    prefixes = epoch_prefixes(config.active.split).values()
    charts = [_chart("BAR", "summary", metric, [metric]) for metric in METRICS]
    charts += [_chart("LINE", "curves", metric, [f"{prefix}{metric}" for prefix in prefixes]) for metric in CURVES]
    columns = [_column("tags", tag) for tag in ("champion", "version")]
    columns += [*(_column("metrics", metric) for metric in METRICS), *_varied_columns(parents)]
    widths = {_column("attributes", "Run Name"): 265, **dict.fromkeys(columns, 84)}  # pixels
    return {
        "searchFilter": "",
        "orderByKey": _column("metrics", "f1"),
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "columnOrder": list(widths),
        "columnWidths": widths,
        "runsHiddenMode": "SHOW_ALL",
        "groupsExpanded": {},
        "hideEmptyCharts": True,
        "isAccordionReordered": True,
        "compareRunCharts": charts,
        "compareRunSections": [_section("summary", NAME), _section("curves", "By epoch")],
    }


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"


def _chart(kind: str, section: str, name: str, metrics: list[str]) -> dict[str, Any]:
    chart = {"type": kind, "uuid": name, "metricSectionId": section, "displayName": name, "deleted": False}
    chart |= {"isGenerated": False, "runsCountToCompare": 50, "metricKey": metrics[0], "selectedMetricKeys": metrics}
    if kind == "LINE":
        chart |= {"xAxisKey": "step", "xAxisScaleType": "linear", "scaleType": "linear", "lineSmoothness": 0}
    return chart


def _section(section: str, name: str) -> dict[str, Any]:
    return {"uuid": section, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}


def _replace_links(note: str, links: str) -> str:
    """Put the links first in the note in place of the former ones; what people wrote stays."""
    written = "\n".join(line for line in note.splitlines() if not line.startswith(f"[{NAME}]("))
    return f"{links}\n\n{written.strip()}".strip()
