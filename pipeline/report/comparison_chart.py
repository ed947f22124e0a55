"""The forest plot of a comparison of two recipes, as PNG."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.core.files import atomic_path
from pipeline.evaluation.compare_recipes import LABELS, LOSSES

MARKERS = ("o", "s", "^", "D")
COLORS = ("#1f5fa8", "#b3541e", "#7db3e8", "#e6a97f")  # told apart by color-blind readers too


def write_comparison(path: Path, metrics: pd.DataFrame, a: str, b: str) -> None:
    """Draw the differences with their intervals; what is right of 0 is better with b.

    Args:
        path: of the PNG.
        metrics: from `compare_recipes`.
        a: name of one recipe.
        b: name of the other.
    """
    if "external" in set(metrics["images"]):
        metrics = metrics.assign(model=metrics["model"] + ", " + metrics["images"])
    is_loss = metrics["metric"].isin(LOSSES)
    heights = [metrics.loc[rows, "metric"].nunique() for rows in (~is_loss, is_loss)]
    figure = Figure(figsize=(7, 1.8 + 0.45 * sum(heights)), layout="constrained")
    panels = figure.subplots(2, 1, height_ratios=heights)
    for axes, rows in zip(panels, (~is_loss, is_loss), strict=True):
        _draw_differences(axes, metrics[rows])
    panels[0].set_title(f"{b} minus {a}, with 95 % intervals", fontsize=10)
    panels[0].legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.1), ncols=2)
    panels[1].invert_xaxis()
    panels[1].set_xlabel(f"← better with {a}        better with {b} →", fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _draw_differences(axes: Axes, metrics: pd.DataFrame) -> None:
    names = list(dict.fromkeys(metrics["metric"]))
    models = list(dict.fromkeys(metrics["model"]))
    for number, (model, rows) in enumerate(metrics.groupby("model", sort=False)):
        x = rows["difference"].to_numpy(dtype=float)
        offset = (number - (len(models) - 1) / 2) * 0.78 / (len(models) + 1)
        y = np.array([names.index(name) for name in rows["metric"]]) + offset
        errors = np.nan_to_num([x - rows["low"], rows["high"] - x])
        axes.errorbar(x, y, xerr=errors, fmt=MARKERS[number], color=COLORS[number], markersize=5, label=str(model))
    axes.axvline(0, color="#666666", linewidth=0.8)
    axes.set_yticks(range(len(names)), [LABELS[name] for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
