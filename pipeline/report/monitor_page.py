"""The page of `cxr monitor`: what differs between the images that came in and those of the model, and since when."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num

from pipeline.evaluation.dataset_shift import SIGNIFICANCE_LEVEL
from pipeline.evaluation.monitoring import COMPARED_FEATURES, OUTLIER_PERCENTILE, PREVALENCE, Comparison, describe
from pipeline.report.charts import FAINT_LINE, SERIES_1, SERIES_2, render_chart
from pipeline.report.model_table import MISSING
from pipeline.report.page import template_environment
from pipeline.report.results import Estimate
from pipeline.report.tables import ReportTable, format_number, format_percent, format_signed, without_interval

TEST_LABELS = {
    "score": "score of the model", "embedding": "embedding by a network", "distance": "distance to the nearest",
    "acquisition": "acquisition and file", PREVALENCE: "share of positives",
}  # fmt: skip
SHARES = {"probability": "mean probability", "positive": "predicted positive"}  # by column of the periods


def render_page(comparison: Comparison, model: str, counts: Mapping[str, str]) -> str:
    """Return the page as HTML that embeds everything it needs.

    Args:
        comparison: what was found.
        model: name and version of the model, for the title.
        counts: what was compared and left out, by label.
    """
    environment = template_environment()
    return environment.get_template("monitor.html").render(
        style=environment.get_template("style.css").render(),
        model=model,
        counts=counts,
        sentences=describe(comparison),
        comparison=comparison,
        estimate=Estimate(
            comparison.prevalence.prevalence,
            comparison.prevalence.low,
            comparison.prevalence.high,
            comparison.prevalence.reason,
        ),
        tables={
            "tests": _test_table(comparison),
            "acquisition": _acquisition_table(comparison),
            "categories": _category_table(comparison),
            "periods": _period_table(comparison),
            "farthest": _farthest_table(comparison),
        },
        charts=_draw_charts(comparison),
        totals=_totals(comparison.periods),
        level=SIGNIFICANCE_LEVEL,
        percentile=OUTLIER_PERCENTILE,
    )


def _totals(periods: pd.DataFrame) -> dict[str, float]:
    """Return the means over all images of the periods, and the number of images."""
    images = periods["images"]
    means = {name: float(np.average(periods[name], weights=images)) for name in ("probability", "positive", "outliers")}
    return means | {"images": int(images.sum())}


def _test_table(comparison: Comparison) -> ReportTable:
    table = ReportTable(["compared by", "differs", "images", "AUROC of telling apart", "p", "adjusted p"])
    for row in comparison.tests.to_dict("records"):
        name = str(row["features"])
        tested = "tested by the mean score" if name == PREVALENCE else "too few images of different patients"
        reason = row["reason"] if pd.isna(row["p"]) else tested
        values = (without_interval(row[key], reason) for key in ("auroc", "p", "adjusted_p"))
        verdict = MISSING if pd.isna(row["p"]) else "yes" if row["adjusted_p"] < SIGNIFICANCE_LEVEL else "no"
        table.add(TEST_LABELS.get(name, name), verdict, str(row["images"]), *values, muted=verdict != "yes")
    return table


def _acquisition_table(comparison: Comparison) -> ReportTable:
    table = ReportTable(["mean", "came in", "of the model", "difference in standard deviations"])
    for row in comparison.acquisition.to_dict("records"):
        values = (without_interval(row[name], "not known of any image") for name in ("new", "reference"))
        table.add(COMPARED_FEATURES[row["feature"]].label, *values, _format_difference(row["difference"]))
    return table


def _format_difference(value: float) -> str:
    return format_signed(value) if pd.isna(value) or abs(value) < 100 else f"{'+' if value > 0 else '−'}100 or more"


def _category_table(comparison: Comparison) -> ReportTable:
    table = ReportTable(["value", "came in", "of the model", "difference"])
    for row in comparison.categories.to_dict("records"):
        shares = (format_percent(row[name]) for name in ("new", "reference"))
        difference = row["new"] - row["reference"]
        points = MISSING if pd.isna(difference) else f"{100 * difference:+.1f} points".replace("-", "−")
        table.add(f"{row['field']} {row['value']}", *shares, points)
    return table


def _period_table(comparison: Comparison) -> ReportTable:
    header = [f"{comparison.unit} from", "images", *SHARES.values(), "members agree", "outliers", "mean gray level"]
    table = ReportTable(header)
    for row in comparison.periods.to_dict("records"):
        shares = (format_percent(row[name]) for name in (*SHARES, "agreement", "outliers"))
        table.add(str(row["period"]), str(row["images"]), *shares, format_number(row["brightness"]))
    shares = (format_percent(comparison.reference[name]) for name in SHARES)
    outliers, brightness = comparison.reference["outliers"], comparison.reference["brightness"]
    table.add("validation images", "", *shares, "", format_percent(outliers), format_number(brightness), muted=True)
    return table


def _farthest_table(comparison: Comparison) -> ReportTable:
    table = ReportTable(["SHA-256 of the file", "time (UTC)", "distance / outlier", "probability"])
    for row in comparison.farthest.to_dict("records"):
        time = f"{row['time']:%Y-%m-%d %H:%M}"
        table.add(row["sha256"][:16], time, format_number(row["distance"]), format_number(row["probability"]))
    return table


def _draw_charts(comparison: Comparison) -> str:
    """Draw the figures of the periods as SVG; there is nothing to see in a single period."""
    periods, reference = comparison.periods, comparison.reference
    if len(periods) < 2:
        return ""
    days = pd.to_datetime(periods["period"])
    width = {"day": 0.8, "week": 5.5, "month": 24}[comparison.unit]

    def set_dates(axes: Axes) -> None:
        first, last = date2num(days.iloc[[0, -1]])  # type: ignore[no-untyped-call]
        axes.set_xlim(first - width / 2, last + 1.5 * width)
        locator = AutoDateLocator(maxticks=6)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]

    def draw_counts(axes: Axes) -> None:
        axes.bar(days, periods["images"], width=width, align="edge", color=FAINT_LINE)
        set_dates(axes)

    def draw_lines(axes: Axes, names: Mapping[str, str]) -> None:
        for (name, label), color in zip(names.items(), (SERIES_1, SERIES_2), strict=False):
            axes.plot(days, 100 * periods[name], color=color, marker="o", markersize=3, label=label)
            axes.axhline(100 * reference[name], color=color, linestyle=":", linewidth=1)
        set_dates(axes)

    unit = comparison.unit
    outliers = {"outliers": "_outliers"}  # without a legend
    return "".join([
        render_chart("shares", f"Mean probability and share of positives by {unit}",
                     lambda axes: draw_lines(axes, SHARES), ylabel="%", title="Predictions", ylim=(0, None)),
        render_chart("outliers", f"Share of outliers by {unit}",
                     lambda axes: draw_lines(axes, outliers), ylabel="%", title="Outliers", ylim=(0, None)),
        render_chart("counts", f"Images by {unit}", draw_counts, title="Images"),
    ])  # fmt: skip
