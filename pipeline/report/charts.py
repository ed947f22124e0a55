"""Curves as SVG that takes its colors and its font from the page, so that it is legible on dark and light."""

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.evaluation import curves

# Colors that stand for variables of the page's style.
TEXT_COLOR, LINE, FAINT, FIRST, SECOND, THIRD = (f"#0{number}0{number}0{number}" for number in range(1, 7))
VARIABLES = {TEXT_COLOR: "ink", LINE: "line", FAINT: "faint", FIRST: "first", SECOND: "second", THIRD: "third"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "text.color": TEXT_COLOR, "axes.labelcolor": TEXT_COLOR,
    "axes.edgecolor": LINE, "xtick.color": TEXT_COLOR, "ytick.color": TEXT_COLOR, "axes.grid": True, "grid.color": LINE,
    "grid.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "legend.fontsize": 8, "legend.labelcolor": TEXT_COLOR, "axes.titlesize": 9, "xtick.major.size": 0, "ytick.major.size": 0,
    "lines.linewidth": 1.6, "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip
METADATA = dict.fromkeys(["Creator", "Date", "Format", "Type"])


def render_chart(name: str, says: str, draw: Callable[[Axes], Any], **labels: Any) -> str:
    """Draw a chart as SVG.

    Args:
        name: unlike that of any other chart on the page.
        says: what it shows, for those who do not see it.
        draw: puts the content on the axes.
        labels: `xlabel`, `ylabel`, limits and so on, as `Axes.set` takes them.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set(**labels)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=METADATA)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    opening = re.search(r'viewBox="[^"]*"', svg)
    return re.sub(r"<svg[^>]*>", f'<svg {opening and opening[0]} role="img" aria-label="{says}">', svg, count=1)


def draw_lines(
    axes: Axes, tables: Mapping[str, pd.DataFrame], x: str, y: str, best: str, bag: pd.DataFrame | None
) -> None:
    """Draw a line per seed, faint but for the best one, and over them the bag's."""
    others = [name for name in tables if name != best]
    for name in others:
        label = "other seeds" if name == others[0] else None
        axes.plot(tables[name][x], tables[name][y], color=FAINT, linewidth=0.9, label=label)
    axes.plot(tables[best][x], tables[best][y], color=FIRST, label=best)
    if bag is not None:
        axes.plot(bag[x], bag[y], color=SECOND, linestyle="--", label="bag")


def roc_chart(labels: np.ndarray, models: pd.DataFrame, best: str, bag: pd.DataFrame) -> str:
    """Draw the ROC of every seed (a column of P(positive) each) and of the bag, whose points are given."""
    tables = {name: curves.roc_points(labels, models[name].to_numpy()) for name in map(str, models)}

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=LINE, linestyle=":")
        draw_lines(axes, tables, "fpr", "tpr", best, bag)

    return render_chart(
        "roc", "ROC curve of every model", draw, xlabel="1 − specificity", ylabel="sensitivity", aspect=0.8
    )


def precision_recall_chart(labels: np.ndarray, models: pd.DataFrame, best: str, bag: pd.DataFrame) -> str:
    """Draw the precision–recall curve of every seed and of the bag, whose points are given."""
    tables = {name: curves.precision_recall_points(labels, models[name].to_numpy()) for name in map(str, models)}
    return render_chart(
        "precision-recall", "Precision and recall of every model",
        lambda axes: draw_lines(axes, tables, "recall", "precision", best, bag),
        xlabel="sensitivity (recall)", ylabel="PPV (precision)", ylim=(-0.03, 1.03),
    )  # fmt: skip


def learning_curve_chart(histories: Mapping[str, pd.DataFrame], column: str, title: str, best: str) -> str:
    def draw(axes: Axes) -> None:
        draw_lines(axes, histories, "epoch", column, best, None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return render_chart(f"training-{column}", f"{title} by epoch", draw, xlabel="epoch", ylabel=title)


def reliability_chart(bins: pd.DataFrame, before: str, after: str) -> str:
    """Draw the share of positives by probability, before and after calibration; a dot is larger for more images."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=LINE, linestyle=":")
        for kind, color, label in ((before, FIRST, "as it is"), (after, SECOND, f"after {after}")):
            part = bins[bins["calibration"] == kind]
            if len(part):
                axes.plot(part["probability"], part["positives"], color=color, linewidth=0.8, label=label)
                area = 12 + 120 * part["images"] / part["images"].max()
                axes.scatter(part["probability"], part["positives"], s=area, color=color, alpha=0.7, linewidth=0)

    return render_chart(
        "reliability", "Share of positives by probability", draw, xlabel="P(positive)", ylabel="share of positives"
    )


def prevalence_chart(table: pd.DataFrame, marks: Mapping[str, float]) -> str:
    """Draw accuracy, PPV and NPV by prevalence, with intervals, and a line at each of the marks."""

    def draw(axes: Axes) -> None:
        for figure, color in {"ppv": FIRST, "npv": SECOND, "accuracy": THIRD}.items():
            axes.fill_between(
                table["prevalence"],
                table[f"{figure}_low"],
                table[f"{figure}_high"],
                color=color,
                alpha=0.15,
                linewidth=0,
            )
            axes.plot(
                table["prevalence"], table[figure], color=color, label=figure.upper() if "pv" in figure else figure
            )
        for name, place in marks.items():
            axes.axvline(place, color=FAINT, linewidth=1, linestyle="--")
            axes.annotate(
                name, (place, 0.02), (3, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                rotation=90, fontsize=7.5, va="bottom",
            )  # fmt: skip

    return render_chart("prevalence", "Accuracy, PPV and NPV by prevalence", draw, xlabel="prevalence", xlim=(0, 0.92))


def ensemble_size_chart(table: pd.DataFrame) -> str:
    """Draw the F1 of bags by their size, from the lowest to the highest of each size."""

    def draw(axes: Axes) -> None:
        axes.fill_between(table["members"], table["lowest"], table["highest"], color=SECOND, alpha=0.15, linewidth=0)
        axes.plot(table["members"], table["f1"], color=SECOND, marker=".")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return render_chart("growth", "F1 by the number of members", draw, xlabel="members", ylabel="F1")
