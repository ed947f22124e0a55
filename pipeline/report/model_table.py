"""The table of metrics (rows) by model (columns), as CSV, Markdown and PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pipeline.core.files import atomic_path, write_csv
from pipeline.core.markdown import markdown_table
from pipeline.evaluation.metrics import LOWER_IS_BETTER, METRIC_LABELS, Scores

MISSING = "–"  # an undefined metric
CORRECTED = ", corrected"  # added to the name of a model


def build_table(
    models: Mapping[str, Scores], intervals: pd.DataFrame | None = None, headline: Sequence[str] = ()
) -> pd.DataFrame:
    """Arrange scores as metrics (rows) by models (columns).

    Args:
        models: the scores of every model on the validation set, by name.
        intervals: `metrics/intervals.csv`.
        headline: models whose corrected metrics, if there are any, come first, in columns of their own.
    """
    table = pd.DataFrame(models, dtype=float)
    columns = {}
    if intervals is not None:
        corrected = intervals[intervals["estimate_type"] == "corrected"].set_index("metric")
        for name in dict.fromkeys(headline):
            if (of_model := corrected["model"] == name).any():
                columns[f"{name}{CORRECTED}"] = corrected.loc[of_model, "value"].reindex(table.index).astype(float)
    return pd.concat([pd.DataFrame(columns, table.index), table], axis="columns")


def describe_estimates(table: pd.DataFrame, intervals: pd.DataFrame) -> str:
    """Say which columns of `build_table` are corrected, which apparent, and in which nothing was selected.

    At a fitted threshold a column is apparent, because the table has no cross-fitted metrics.
    """
    types = intervals[intervals["metric"] == "f1"].drop_duplicates("model").set_index("model")["estimate_type"]
    columns: dict[str, list[str]] = {"corrected": [], "fixed": [], "apparent": []}
    for name in table.columns:
        if name.endswith(CORRECTED):
            columns["corrected"].append(name.removesuffix(CORRECTED))
        else:
            columns["fixed" if types.get(name) == "fixed" else "apparent"].append(name)
    meanings = {
        "corrected": "Corrected for selection on the validation set",
        "fixed": "Not selected on the validation set",
        "apparent": "Apparent, that is selected on the validation set and therefore optimistic",
    }
    kinds = [f"{meanings[kind]}: {', '.join(names)}." for kind, names in columns.items() if names]
    return " ".join([*kinds, "Log loss is that of the scores, before recalibration."])


def write_table(folder: Path, table: pd.DataFrame, note: str = "") -> None:
    """Write `table.csv`, `table.md`, with the note below the table, and `table.png`."""
    write_csv(folder / "table.csv", table.rename_axis("metric").reset_index())
    text = table.map(_format_value)
    markdown = markdown_table(["", *table.columns], ([METRIC_LABELS[key], *text.loc[key]] for key in table.index))
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(f"{markdown}\n\n{note}\n" if note else f"{markdown}\n", encoding="utf-8")
    with atomic_path(folder / "table.png") as temporary:
        _draw_table(table, text).savefig(temporary, format="png", dpi=130)


def _draw_table(table: pd.DataFrame, text: pd.DataFrame) -> Figure:
    """Color each row from its worst value (red) to its best (green)."""
    values = table.to_numpy(copy=True)
    values[[key in LOWER_IS_BETTER for key in table.index]] *= -1
    low, high = (limit.reduce(values, axis=1, keepdims=True) for limit in (np.fmin, np.fmax))  # both ignore NaN
    shade = (values - low) / np.where(high > low, high - low, 1)
    figure = Figure(figsize=(1.6 + 0.85 * table.shape[1], 0.6 + 0.42 * len(table)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(np.ma.masked_invalid(shade), cmap="RdYlGn", vmin=-0.25, vmax=1.25, aspect="auto")
    for (row, column), value in np.ndenumerate(text.to_numpy()):
        axes.text(column, row, value, ha="center", va="center", fontsize=9)
    axes.set_xticks(range(table.shape[1]), list(table.columns), fontsize=9)
    axes.set_yticks(range(len(table)), [METRIC_LABELS[key] for key in table.index], fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _format_value(value: float) -> str:
    return MISSING if pd.isna(value) else f"{value:.3f}"
