"""Formatted tables for the report and the model card; an undefined metric is a dash with a footnote."""

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from pipeline.core.files import read_json
from pipeline.core.markdown import markdown_table
from pipeline.evaluation.metrics import LOWER_IS_BETTER, METRIC_LABELS, apply_threshold
from pipeline.report.data_card import CardSection
from pipeline.report.model_table import MISSING
from pipeline.report.results import Estimate, Results, as_estimate

SHADE_COUNT = 7  # colors, from the worst value of a row to its best
HEADLINE_METRICS = [
    "f1", "recall", "specificity", "precision", "accuracy", "auroc", "average_precision", "brier", "loss",
]  # fmt: skip
BASELINE_LABELS = {
    "source": "source only", "file_metadata": "file metadata only (size, JPEG quantization)",
    "thumbnail": "16×16 thumbnail", "border": "border only (outer eighth on each side)",
}  # fmt: skip
NO_INTERVAL = "too few patients or images for an interval"


@dataclass
class Cell:
    text: str
    interval: str = ""
    note: str = ""  # letter of a footnote
    shade: int | None = None  # 0 to SHADE_COUNT - 1
    is_best: bool = False


@dataclass
class ReportTable:
    """A table whose first column holds the row labels."""

    header: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    muted_rows: list[bool] = field(default_factory=list)  # per row, whether it is imprecise
    reasons: list[str] = field(default_factory=list)  # why values are undefined, without repetition

    def add(self, *cells: "str | Estimate | Cell", muted: bool = False) -> list[Cell]:
        """Append a row, with a footnote for each undefined value or interval."""
        row = [self._build_cell(cell) for cell in cells]
        self.rows.append(row)
        self.muted_rows.append(muted)
        return row

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Letters and texts of the footnotes."""
        return [(_note_letter(index), reason) for index, reason in enumerate(self.reasons)]

    def _build_cell(self, cell: "str | Estimate | Cell") -> Cell:
        if isinstance(cell, str):
            return Cell(cell)
        if isinstance(cell, Cell):
            return cell
        text, interval = format_number(cell.value), format_interval(cell)
        if interval or not cell.reason:
            return Cell(text, interval)
        if cell.reason not in self.reasons:
            self.reasons.append(cell.reason)
        return Cell(text, "" if cell.missing else MISSING, _note_letter(self.reasons.index(cell.reason)))


def format_number(value: float) -> str:
    return MISSING if pd.isna(value) else f"{value:.3f}".replace("-", "−")


def format_signed(value: float) -> str:
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return MISSING if pd.isna(value) else f"{round(value, 3) + 0.0:+.3f}".replace("-", "−")


def format_percent(value: float) -> str:
    return MISSING if pd.isna(value) else f"{100 * value:.1f}\u00a0%"


def format_interval(estimate: Estimate) -> str:
    return "" if pd.isna(estimate.low) else f"{format_number(estimate.low)} to {format_number(estimate.high)}"


def format_estimate(estimate: Estimate) -> str:
    """Format a value with its interval, or a dash with the reason."""
    if estimate.missing:
        return f"{MISSING} ({estimate.reason or 'undefined'})"
    interval = format_interval(estimate)
    return f"{format_number(estimate.value)} ({interval})" if interval else format_number(estimate.value)


def format_difference(estimate: Estimate) -> str:
    """Format a signed difference with its interval, or a dash with the reason."""
    if estimate.missing:
        return f"{MISSING} ({estimate.reason or 'undefined'})"
    cell = _difference_cell(estimate)
    return f"{cell.text} ({cell.interval})" if cell.interval else cell.text


def models_table(results: Results) -> ReportTable:
    """Tabulate metrics (rows) by seed and ensemble (columns), each row colored from its worst to its best value."""
    names = [name for name in results.models if name not in results.baselines]
    table = ReportTable(["", *names])
    for metric in HEADLINE_METRICS:
        estimates = [results.estimate(name, metric) for name in names]
        row = table.add(METRIC_LABELS[metric], *(_without_interval(one.value, one.reason) for one in estimates))
        values = pd.Series([one.value for one in estimates]) * (-1 if metric in LOWER_IS_BETTER else 1)
        _color_row(row[1:], values)
    return table


def operating_point_table(results: Results) -> ReportTable:
    """Tabulate the threshold of each seed and the bag, and the metrics there."""
    operating_points = pd.read_csv("metrics/operating_points.csv")
    models = [*results.config.model_names, results.bag]
    table = ReportTable(["model", "threshold", "estimate", "sensitivity", "specificity", "PPV", "F1"])
    for _, row in operating_points[operating_points["model"].isin(models)].iterrows():
        metrics = [row[key] for key in ("recall", "specificity", "precision", "f1")]
        reason = "no image of this class, or none predicted positive"
        table.add(
            row["model"], format_number(row["threshold"]), row["estimate_type"],
            *(_without_interval(value, reason) for value in metrics),
        )  # fmt: skip
    return table


def calibration_table(results: Results) -> ReportTable:
    """Tabulate the calibration metrics of the best seed and the bag, before and after each recalibration."""
    calibration = pd.read_csv("metrics/calibration.csv")
    keys = ["loss", "brier", "calibration_error"]
    labels = [METRIC_LABELS[key] for key in keys]
    table = ReportTable(["model", "recalibration", "temperature", "bias", *labels])
    for _, row in calibration[calibration["model"].isin([results.best, results.bag])].iterrows():
        reason = "" if pd.isna(row["reason"]) else row["reason"]
        fitted = row["calibration"] != "none"
        parameters = [_without_interval(row[key], reason) if fitted else "" for key in ("temperature", "bias")]
        metrics = [_without_interval(row[key], reason) for key in keys]
        table.add(row["model"], row["calibration"], *parameters, *metrics)
    return table


def prevalence_table(model: str) -> ReportTable:
    """Tabulate PPV, NPV and accuracy of a model by prevalence."""
    by_prevalence = pd.read_csv("metrics/prevalence.csv")
    table = ReportTable(["prevalence", "PPV", "NPV", "accuracy"])
    reason = f"no such prediction, or {NO_INTERVAL}"
    for _, row in by_prevalence[by_prevalence["model"] == model].iterrows():
        estimates = [
            Estimate(float(row[key]), float(row[f"{key}_low"]), float(row[f"{key}_high"]), reason)
            for key in ("ppv", "npv", "accuracy")
        ]
        table.add(f"{100 * row['prevalence']:.3g} %", *estimates)
    return table


def baseline_table(results: Results) -> ReportTable:
    """Tabulate AUROC and F1 of the shortcut baselines, and the gain of the best seed over each."""
    best = results.best
    table = ReportTable(["model", "AUROC", f"gain of {best}", "F1", f"gain of {best}"])
    table.add(best, results.estimate(best, "auroc"), "", results.estimate(best, "f1"), "")
    for model, feature in results.baselines.items():
        cells: list[Estimate | Cell] = []
        for metric in ("auroc", "f1"):
            gain = results.gain_over_baseline(model, metric)
            cells += [results.estimate(model, metric), gain if gain.missing else _difference_cell(gain)]
        table.add(BASELINE_LABELS.get(feature, feature), *cells)
    return table


def slice_table(results: Results) -> ReportTable:
    """Tabulate sensitivity, specificity, F1 and AUROC of the best seed by slice."""
    table = ReportTable(["slice", "images", "positive", "sensitivity", "specificity", "F1", "AUROC"])
    for (by, name), rows in results.slices.groupby(["by", "slice"], sort=False):
        of_best = rows[rows["model"] == results.best].set_index("metric")
        if of_best.empty:
            undefined = Estimate(float("nan"), reason=rows["reason"].iloc[0])
            table.add(f"{by}: {name}" if name else str(by), *[undefined] * 6)
            continue
        by_metric = {str(metric): row for metric, row in of_best.iterrows()}
        estimates = [as_estimate(by_metric[key]) for key in ("recall", "specificity", "f1", "auroc")]
        first = rows.iloc[0]
        counts = [f"{first[key]:.0f}" for key in ("images", "positives")]
        table.add(f"{by}: {name}", *counts, *estimates, muted=bool(first["small"]))
    return table


def ensemble_table(results: Results) -> ReportTable:
    """Compare the ensembles by combination method with the best seed."""
    best = results.best
    table = ReportTable(["method", "F1", f"difference in F1 from {best}", "sensitivity", "specificity", "AUROC"])
    for name in results.models:
        if name.startswith("bag"):
            difference = results.difference(name, best, "f1")
            table.add(
                name.removeprefix("bag (").removesuffix(")") + (" (the bag)" if name == results.bag else ""),
                results.estimate(name, "f1"), difference if difference.missing else _difference_cell(difference),
                *(results.estimate(name, metric) for metric in ("recall", "specificity", "auroc")),
            )  # fmt: skip
    return table


def seed_table(results: Results) -> ReportTable:
    """Tabulate the mean, standard deviation, minimum and maximum of each metric over the seeds."""
    statistics = results.seed_statistics.loc[HEADLINE_METRICS]
    table = ReportTable(["", *(METRIC_LABELS[metric] for metric in HEADLINE_METRICS)])
    labels = {"mean": "mean", "deviation": "standard deviation", "lowest": "minimum", "highest": "maximum"}
    for key, row in statistics[list(labels)].T.iterrows():
        table.add(labels[str(key)], *map(_without_interval, row, statistics["reason"]))
    return table


def disagreement_table() -> ReportTable:
    """Tabulate the percentage of validation images on which two members disagree, darker for more."""
    disagreement = pd.read_csv("metrics/disagreement.csv")
    names = list(dict.fromkeys([*disagreement["model"], *disagreement["other"]]))
    pairs = disagreement[["model", "other", "share"]].itertuples(index=False)
    shares = {frozenset(pair): share for *pair, share in pairs}
    highest = max(shares.values(), default=0) or 1

    def build_cell(model: str, other: str) -> Cell:
        share = shares.get(frozenset((model, other)))
        if share is None:
            return Cell("")
        return Cell(f"{100 * share:.1f}", shade=round((SHADE_COUNT - 1) * share / highest))

    table = ReportTable(["", *names])
    for model in names:
        table.add(model, *(build_cell(model, other) for other in names))
    return table


def data_table(results: Results) -> ReportTable:
    """Count the images, patients and sources of each subset, by class where labels are known."""
    table = ReportTable(["subset", "images", "negative", "positive", "prevalence", "patients", "sources"])
    unknown = Estimate(float("nan"), reason="not known")
    for subset, rows in results.table.groupby("subset", sort=False):
        labels = rows["label"].dropna()
        by_class: list[str | Estimate] = [unknown] * 3
        if len(labels):
            by_class = [*(str(int((labels == label).sum())) for label in (0, 1)), format_percent(float(labels.mean()))]
        patients, sources = ({value for value in rows[key] if value} for key in ("patient", "source"))
        table.add(
            str(subset), str(len(rows)), *by_class,
            str(len(patients)) if patients else unknown, ", ".join(sorted(sources)) if sources else unknown,
        )  # fmt: skip
    return table


def counts_table(section: CardSection) -> ReportTable:
    """Return the counts of a section of the data card."""
    table = ReportTable(section.header)
    for row in section.rows:
        table.add(*row)
    return table


def confusion_table(results: Results) -> ReportTable:
    """Tabulate the confusion matrix of the best seed at its threshold."""
    labels, threshold = results.validation["label"], results.summary["best"]["threshold"]
    predicted = apply_threshold(results.validation[results.best], threshold)
    table = ReportTable([results.best, "predicted negative", "predicted positive"])
    for label, name in enumerate(["actual negative", "actual positive"]):
        table.add(name, *(str(int(((labels == label) & (predicted == other)).sum())) for other in (0, 1)))
    return table


def version_table(results: Results) -> ReportTable:
    """Tabulate run, epoch, software, device and weights of each seed."""
    table = ReportTable(
        ["run in MLflow", "best epoch", "torch", "device", "CPU threads", "processes", "weights (SHA-256)"]
    )
    for name in results.config.model_names:
        folder = Path("models", name)
        description, metrics = read_json(folder / "model.json"), read_json(folder / "metrics.json")
        environment = [description["environment"][key] for key in ("torch", "device", "cpu_threads", "processes")]
        cells = [metrics["run"], metrics["epoch"], *environment, description["weights_sha256"][:12]]
        table.add(*map(str, cells))
    return table


def format_markdown(table: ReportTable) -> str:
    """Format a table as Markdown, with the reason after each undefined value."""
    reasons = dict(table.notes)
    rows = ([f"{cell.text} ({reasons[cell.note]})" if cell.note else cell.text for cell in row] for row in table.rows)
    return markdown_table(table.header, rows)


def _color_row(cells: list[Cell], values: pd.Series) -> None:
    """Shade cells from the lowest to the highest value; equal values have the middle shade."""
    lowest, highest = values.min(), values.max()
    for cell, value in zip(cells, values, strict=True):
        if not pd.isna(value):
            spread = highest - lowest
            cell.shade = round((SHADE_COUNT - 1) * (value - lowest) / spread) if spread > 0 else SHADE_COUNT // 2
            cell.is_best = bool(value == highest)


def _without_interval(value: float, reason: str) -> Estimate:
    """Return an estimate without an interval, and with the reason only if the value is undefined."""
    return Estimate(value, reason=reason if pd.isna(value) else "")


def _difference_cell(estimate: Estimate) -> Cell:
    interval = "" if pd.isna(estimate.low) else f"{format_signed(estimate.low)} to {format_signed(estimate.high)}"
    return Cell(format_signed(estimate.value), interval)


def _note_letter(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else str(index)
