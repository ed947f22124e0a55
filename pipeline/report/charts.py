"""Charts as inline SVG with the colors and the font of the page, so that they suit its light and dark scheme."""

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.core.config import BAG

# Placeholder colors, which `render_chart` replaces by the CSS variables of style.css.
TEXT, BORDER, FAINT_LINE, SERIES_1, SERIES_2, SERIES_3 = (f"#0{digit}0{digit}0{digit}" for digit in range(1, 7))
CSS_VARIABLES = {
    TEXT: "text", BORDER: "border", FAINT_LINE: "faint-line",
    SERIES_1: "series-1", SERIES_2: "series-2", SERIES_3: "series-3",
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "text.color": TEXT, "axes.labelcolor": TEXT,
    "axes.edgecolor": BORDER, "xtick.color": TEXT, "ytick.color": TEXT, "axes.grid": True, "grid.color": BORDER,
    "grid.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "legend.fontsize": 8, "legend.labelcolor": TEXT, "axes.titlesize": 9, "xtick.major.size": 0, "ytick.major.size": 0,
    "lines.linewidth": 1.6, "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip
METADATA = dict.fromkeys(["Creator", "Date", "Format", "Type"])


def render_chart(chart_id: str, description: str, draw: Callable[[Axes], Any], **axes_options: Any) -> str:
    """Draw a chart as SVG.

    Args:
        chart_id: prefix of the ids in the SVG, unique on the page.
        description: for screen readers.
        draw: draws the content on the axes.
        axes_options: `xlabel`, `ylabel`, limits and so on, passed to `Axes.set`.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set(**axes_options)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=METADATA)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    for color, variable in CSS_VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{chart_id}-", svg)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    return re.sub(
        r"<svg[^>]*>", f'<svg {view_box and view_box[0]} role="img" aria-label="{description}">', svg, count=1
    )


def draw_lines(
    axes: Axes, tables: Mapping[str, pd.DataFrame], x: str, y: str, best: str, bag: pd.DataFrame | None
) -> None:
    """Draw a line per seed, highlighting the best seed, and the line of the bag if there is one."""
    others = [name for name in tables if name != best]
    for name in others:
        label = "other seeds" if name == others[0] else None
        axes.plot(tables[name][x], tables[name][y], color=FAINT_LINE, linewidth=0.9, label=label)
    axes.plot(tables[best][x], tables[best][y], color=SERIES_1, label=best)
    if bag is not None:
        axes.plot(bag[x], bag[y], color=SERIES_2, linestyle="--", label="bag")


def roc_chart(points: pd.DataFrame, best: str) -> str:
    """Draw the ROC curves of the seeds and the bag, from `plots/roc.csv`."""
    tables = {str(name): table for name, table in points.groupby("model", sort=False)}
    bag = tables.pop(BAG)

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=BORDER, linestyle=":")
        draw_lines(axes, tables, "fpr", "tpr", best, bag)

    return render_chart(
        "roc", "ROC curves of the seeds and the bag", draw, xlabel="1 − specificity", ylabel="sensitivity", aspect=0.8
    )


def precision_recall_chart(points: pd.DataFrame, best: str) -> str:
    """Draw the precision–recall curves of the seeds and the bag, from `plots/precision_recall.csv`."""
    tables = {str(name): table for name, table in points.groupby("model", sort=False)}
    bag = tables.pop(BAG)
    return render_chart(
        "precision-recall", "Precision–recall curves of the seeds and the bag",
        lambda axes: draw_lines(axes, tables, "recall", "precision", best, bag),
        xlabel="sensitivity (recall)", ylabel="PPV (precision)", ylim=(-0.03, 1.03),
    )  # fmt: skip


def learning_curve_chart(histories: Mapping[str, pd.DataFrame], column: str, title: str, best: str) -> str:
    """Draw one column of the training histories of the seeds by epoch."""

    def draw(axes: Axes) -> None:
        draw_lines(axes, histories, "epoch", column, best, None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return render_chart(f"training-{column}", f"{title} by epoch", draw, xlabel="epoch", ylabel=title)


def reliability_chart(bins: pd.DataFrame, recalibration: str) -> str:
    """Draw a reliability diagram of the probabilities in use, with intervals, and without recalibration.

    Args:
        bins: from `calibration.reliability_curve`, with `calibration`; the area of a dot grows with its images.
        recalibration: the `calibration` that is in use.
    """

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=BORDER, linestyle=":")
        kinds = {"none": (FAINT_LINE, "not recalibrated"), recalibration: (SERIES_1, f"in use ({recalibration})")}
        for kind, (color, label) in kinds.items():
            points = bins[bins["calibration"] == kind]
            if not len(points):
                continue
            axes.plot(points["probability"], points["positives"], color=color, linewidth=0.8, label=label)
            area = 12 + 120 * points["images"] / points["images"].max()
            axes.scatter(points["probability"], points["positives"], s=area, color=color, alpha=0.7, linewidth=0)
            if kind == recalibration:
                axes.vlines(points["probability"], points["low"], points["high"], color=color, linewidth=1)

    return render_chart(
        "reliability", "Reliability diagram of the bag", draw, xlabel="predicted P(positive)",
        ylabel="observed share of positives",
    )  # fmt: skip


def decision_curve_chart(table: pd.DataFrame) -> str:
    """Draw the net benefit of the bag, of treating all and of treating none, at one prevalence, by threshold."""
    prevalence = table["prevalence"].iloc[0]
    highest = max(float(table["net_benefit"].max()), prevalence)

    def draw(axes: Axes) -> None:
        lines = {"net_benefit": (SERIES_1, "-", "bag"), "treat_all": (SERIES_2, "--", "treat all"),
                 "treat_none": (TEXT, ":", "treat none")}  # fmt: skip
        for column, (color, style, label) in lines.items():
            axes.plot(table["threshold"], table[column], color=color, linestyle=style, label=label)

    percent = f"{100 * prevalence:.3g}"
    return render_chart(
        f"decision-curve-{percent.replace('.', '-')}", f"Decision curve at {percent} % prevalence", draw,
        xlabel="threshold probability", ylabel=f"net benefit at {percent} % prevalence",
        xlim=(0, 1), ylim=(-0.15 * highest, 1.1 * highest),
    )  # fmt: skip


def referral_chart(table: pd.DataFrame) -> str:
    """Draw accuracy and sensitivity of the predictions that are kept, with intervals, by the share referred."""

    def draw(axes: Axes) -> None:
        for metric, (color, label) in {"accuracy": (SERIES_1, "accuracy"), "recall": (SERIES_2, "sensitivity")}.items():
            low, high = table[f"{metric}_low"], table[f"{metric}_high"]
            axes.fill_between(table["share"], low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(table["share"], table[metric], color=color, marker=".", label=label)

    return render_chart(
        "referral", "Accuracy and sensitivity by share referred", draw, xlabel="share of the images referred"
    )


def rank_chart(ranks: pd.Series) -> str:
    """Draw how often each candidate has the highest F1 in a resample, as bars."""
    ranks = ranks[::-1]

    def draw(axes: Axes) -> None:
        axes.barh([str(name) for name in ranks.index], 100 * ranks, color=SERIES_1, alpha=0.8)
        axes.grid(visible=False, axis="y")

    return render_chart(
        "ranks", "How often each candidate has the highest F1", draw, xlabel="highest F1, % of resamples"
    )


def prevalence_chart(table: pd.DataFrame, reference_prevalences: Mapping[str, float]) -> str:
    """Draw accuracy, PPV and NPV by prevalence, with intervals, and a vertical line at each reference prevalence."""

    def draw(axes: Axes) -> None:
        for metric, (color, label) in {
            "ppv": (SERIES_1, "PPV"), "npv": (SERIES_2, "NPV"), "accuracy": (SERIES_3, "accuracy"),
        }.items():  # fmt: skip
            low, high = table[f"{metric}_low"], table[f"{metric}_high"]
            axes.fill_between(table["prevalence"], low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(table["prevalence"], table[metric], color=color, label=label)
        for name, prevalence in reference_prevalences.items():
            axes.axvline(prevalence, color=FAINT_LINE, linewidth=1, linestyle="--")
            axes.annotate(
                name, (prevalence, 0.02), (3, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                rotation=90, fontsize=7.5, va="bottom",
            )  # fmt: skip

    return render_chart("prevalence", "Accuracy, PPV and NPV by prevalence", draw, xlabel="prevalence", xlim=(0, 0.92))


def ensemble_size_chart(table: pd.DataFrame) -> str:
    """Draw the mean F1 of bags by number of members, with a band from the lowest to the highest."""

    def draw(axes: Axes) -> None:
        axes.fill_between(table["members"], table["lowest"], table["highest"], color=SERIES_2, alpha=0.15, linewidth=0)
        axes.plot(table["members"], table["f1"], color=SERIES_2, marker=".")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return render_chart("ensemble-size", "F1 by number of members", draw, xlabel="members", ylabel="F1")
