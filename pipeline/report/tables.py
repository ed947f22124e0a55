"""Tables as a page or a text shows them: every figure that is missing is a dash, and a note below says why."""

from dataclasses import dataclass, field

import pandas as pd

from pipeline.core.markdown import markdown_table
from pipeline.evaluation.metrics import LOWER_IS_BETTER, METRIC_LABELS
from pipeline.report.model_table import MISSING
from pipeline.report.results import Estimate, Results, as_estimate

SHADE_COUNT = 7  # from the worst of a row to its best
HEADLINE_METRICS = [
    "f1",
    "recall",
    "specificity",
    "precision",
    "accuracy",
    "auroc",
    "average_precision",
    "brier",
    "loss",
]
BASELINE_LABELS = {
    "source": "source alone", "file_metadata": "size of image and JPEG traits alone", "thumbnail": "16×16 thumbnail",
    "border": "border, lungs blacked out",
}  # fmt: skip


@dataclass
class Cell:
    text: str
    under: str = ""  # in small letters
    note: str = ""  # the letter of a note
    shade: int | None = None
    best: bool = False


@dataclass
class ReportTable:
    """A table whose first column names the rows."""

    head: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    gray: list[bool] = field(default_factory=list)  # rows that say little
    reasons: list[str] = field(default_factory=list)

    def add(self, *cells: "str | Estimate | Cell", gray: bool = False) -> list[Cell]:
        """Add a row; what is missing is noted."""
        row = [self._cell(cell) for cell in cells]
        self.rows.append(row)
        self.gray.append(gray)
        return row

    @property
    def notes(self) -> list[tuple[str, str]]:
        return [(_letter(index), reason) for index, reason in enumerate(self.reasons)]

    def _cell(self, cell: "str | Estimate | Cell") -> Cell:
        if isinstance(cell, str):
            return Cell(cell)
        if isinstance(cell, Cell):
            return cell
        text, under = format_number(cell.value), format_interval(cell)
        if (cell.missing or not under) and cell.reason:
            if cell.reason not in self.reasons:
                self.reasons.append(cell.reason)
            return Cell(text, under or (MISSING if not cell.missing else ""), _letter(self.reasons.index(cell.reason)))
        return Cell(text, under)


def format_number(value: float) -> str:
    return MISSING if pd.isna(value) else f"{value:.3f}".replace("-", "−")


def format_signed(value: float) -> str:
    # Adding 0 takes the sign off a 0 that is negative or is rounded to one.
    return MISSING if pd.isna(value) else f"{round(value, 3) + 0.0:+.3f}".replace("-", "−")


def format_percent(value: float) -> str:
    return MISSING if pd.isna(value) else f"{100 * value:.1f}\u00a0%"


def format_interval(estimate: Estimate) -> str:
    return "" if pd.isna(estimate.low) else f"{format_number(estimate.low)} to {format_number(estimate.high)}"


def format_estimate(estimate: Estimate) -> str:
    """Put a figure into a sentence."""
    if estimate.missing:
        return f"{MISSING} ({estimate.reason or 'it cannot be had'})"
    ends = format_interval(estimate)
    return f"{format_number(estimate.value)} ({ends})" if ends else format_number(estimate.value)


def format_difference(estimate: Estimate) -> str:
    if estimate.missing:
        return f"{MISSING} ({estimate.reason or 'it cannot be had'})"
    if pd.isna(estimate.low):
        return format_signed(estimate.value)
    return f"{format_signed(estimate.value)} ({format_signed(estimate.low)} to {format_signed(estimate.high)})"


def models_table(results: Results) -> ReportTable:
    """Give a column to each seed and each way to combine them, and a row to each figure, colored worst to best."""
    shown = [name for name in results.models if name not in results.shortcuts]
    grid = ReportTable(["", *shown])
    for metric in HEADLINE_METRICS:
        estimates = [results.estimate(name, metric) for name in shown]
        row = grid.add(METRIC_LABELS[metric], *(_bare(one.value, one.reason) for one in estimates))
        values = pd.Series([one.value for one in estimates]) * (-1 if metric in LOWER_IS_BETTER else 1)
        spread = values.max() - values.min()
        for cell, value in zip(row[1:], values, strict=True):
            if not pd.isna(value):
                cell.shade = (
                    round((SHADE_COUNT - 1) * (value - values.min()) / spread) if spread > 0 else SHADE_COUNT // 2
                )
                cell.best = bool(value == values.max())
    return grid


def operating_point_table(results: Results) -> ReportTable:
    table = pd.read_csv("metrics/operating_points.csv")
    grid = ReportTable(["model", "threshold", "estimate_type", "sensitivity", "specificity", "PPV", "F1"])
    for _, row in table[table["model"].isin([*results.config.model_names, results.bag])].iterrows():
        figures = [row[key] for key in ("recall", "specificity", "precision", "f1")]
        reason = "nothing is called so, or there is no such image"
        grid.add(
            row["model"], format_number(row["threshold"]), row["estimate_type"],
            *(_bare(value, reason) for value in figures),
        )  # fmt: skip
    return grid


def calibration_table(results: Results) -> ReportTable:
    table = pd.read_csv("metrics/calibration.csv")
    grid = ReportTable(["model", "calibration", "temperature", "bias", "loss", "Brier score", "calibration error"])
    for _, row in table[table["model"].isin([results.best, results.bag])].iterrows():
        reason = "" if pd.isna(row["reason"]) else row["reason"]
        fitted = row["calibration"] != "none"
        chosen = [_bare(row[key], reason) if fitted else "" for key in ("temperature", "bias")]
        figures = [_bare(row[key], reason) for key in ("loss", "brier", "calibration_error")]
        grid.add(row["model"], row["calibration"], *chosen, *figures)
    return grid


def prevalence_table(name: str) -> ReportTable:
    table = pd.read_csv("metrics/prevalence.csv")
    grid = ReportTable(["prevalence", "PPV", "NPV", "accuracy"])
    for _, row in table[table["model"] == name].iterrows():
        figures = [
            _ranged(row, key, "no such call, or no resample with an error") for key in ("ppv", "npv", "accuracy")
        ]
        grid.add(f"{100 * row['prevalence']:.3g} %", *figures)
    return grid


def baseline_table(results: Results) -> ReportTable:
    grid = ReportTable(["", "AUROC", f"{results.best} adds", "F1", f"{results.best} adds"])
    grid.add(results.best, results.estimate(results.best, "auroc"), "", results.estimate(results.best, "f1"), "")
    for model, name in results.shortcuts.items():
        cells: list[Estimate | Cell] = []
        for metric in ("auroc", "f1"):
            added = results.added(model, metric)
            cells += [results.estimate(model, metric), added if added.missing else _difference(added)]
        grid.add(BASELINE_LABELS.get(name, name), *cells)
    return grid


def slice_table(results: Results) -> ReportTable:
    """Give a row to each slice and its F1, sensitivity, specificity and AUROC of the best model."""
    grid = ReportTable(["slice", "images", "positives", "sensitivity", "specificity", "F1", "AUROC"])
    for (by, name), part in results.slices.groupby(["by", "slice"], sort=False):
        own = part[part["model"] == results.best].set_index("metric")
        if own.empty:
            missing = Estimate(float("nan"), reason=part["reason"].iloc[0])
            grid.add(f"{by}: {name}" if name else str(by), *[missing] * 6)
            continue
        rows = {str(metric): row for metric, row in own.iterrows()}
        figures = [as_estimate(rows[key]) for key in ("recall", "specificity", "f1", "auroc")]
        first = part.iloc[0]
        grid.add(
            f"{by}: {name}", f"{first['images']:.0f}", f"{first['positives']:.0f}", *figures, gray=bool(first["small"])
        )
    return grid


def ensemble_table(results: Results) -> ReportTable:
    """Compare every way to combine the models with the best single one."""
    best = results.best
    grid = ReportTable(["combined by", "F1", f"F1 less {best}'s", "sensitivity", "specificity", "AUROC"])
    for name in results.models:
        if name.startswith("bag"):
            less = results.difference(name, best, "f1")
            shown = less if less.missing else _difference(less)
            grid.add(
                name.removeprefix("bag (").removesuffix(")") + (" – the bag" if name == results.bag else ""),
                results.estimate(name, "f1"), shown,
                *(results.estimate(name, metric) for metric in ("recall", "specificity", "auroc")),
            )  # fmt: skip
    return grid


def seed_table(results: Results) -> ReportTable:
    """Say how the figures spread over the seeds."""
    table = results.spread
    grid = ReportTable(["", *(METRIC_LABELS[metric] for metric in HEADLINE_METRICS)])
    names = {"mean": "mean", "deviation": "standard deviation", "lowest": "lowest", "highest": "highest"}
    for key, row in table.loc[HEADLINE_METRICS, list(names)].T.iterrows():
        grid.add(names[str(key)], *map(_bare, row, table.loc[HEADLINE_METRICS, "reason"]))
    return grid


def disagreement_table() -> ReportTable:
    """Give the share of validation images that two members call differently, darker for more."""
    table = pd.read_csv("metrics/disagreement.csv")
    names = list(dict.fromkeys([*table["model"], *table["other"]]))
    shares = {frozenset(pair): share for *pair, share in table[["model", "other", "share"]].itertuples(index=False)}
    most = max(shares.values(), default=0) or 1
    grid = ReportTable(["", *names])
    for one in names:
        found = [shares.get(frozenset((one, other))) for other in names]
        grid.add(
            one,
            *(
                Cell("") if share is None else Cell(f"{100 * share:.1f}", shade=round((SHADE_COUNT - 1) * share / most))
                for share in found
            ),
        )
    return grid


def data_table(results: Results) -> ReportTable:
    """Count images, positives, patients and sources of each subset."""
    grid = ReportTable(["", "images", "negative", "positive", "positives", "patients", "sources"])
    for subset, part in results.table.groupby("subset", sort=False):
        known = part["label"].notna()
        labels = part.loc[known, "label"]
        counts = [str(int((labels == label).sum())) for label in (0, 1)] if known.any() else [MISSING] * 2
        share = format_percent(float(labels.mean())) if known.any() else MISSING
        patients, sources = ({value for value in part[key] if value} for key in ("patient", "source"))
        unknown = Estimate(float("nan"), reason="not known")
        grid.add(
            str(subset), str(len(part)),
            *(Cell(text) if known.any() else unknown for text in [*counts, share]),
            str(len(patients)) if patients else unknown, ", ".join(sorted(sources)) if sources else unknown,
        )  # fmt: skip
    return grid


def format_markdown(grid: ReportTable) -> str:
    """Write a grid as Markdown; the reasons of dashes follow them."""
    reasons = dict(grid.notes)
    rows = ([f"{cell.text} ({reasons[cell.note]})" if cell.note else cell.text for cell in row] for row in grid.rows)
    return markdown_table(grid.head, rows)


def _bare(value: float, reason: str) -> Estimate:
    """Return a figure that is shown without an interval, with the reason only where it is missing."""
    return Estimate(value, reason=reason if pd.isna(value) else "")


def _ranged(row: pd.Series, key: str, reason: str) -> Estimate:
    return Estimate(float(row[key]), float(row[f"{key}_low"]), float(row[f"{key}_high"]), reason)


def _difference(found: Estimate) -> Cell:
    return Cell(
        format_signed(found.value),
        "" if pd.isna(found.low) else f"{format_signed(found.low)} to {format_signed(found.high)}",
    )


def _letter(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else str(index)
