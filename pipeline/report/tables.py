"""Formatted tables for the report and the model card; an undefined metric is a dash with a footnote."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.core.files import read_csv, read_json
from pipeline.core.markdown import markdown_table
from pipeline.evaluation.external_validation import NEW_SOURCE, SUMMARY
from pipeline.evaluation.metrics import (
    BIN_COUNT,
    CALIBRATION_METRICS,
    LOWER_IS_BETTER,
    METRIC_LABELS,
    SCORE_METRICS,
    THRESHOLD_METRICS,
)
from pipeline.evaluation.slices import COUNTS, MIN_PER_CLASS, too_few_patients
from pipeline.evaluation.test_scores import METRICS as TEST_METRICS
from pipeline.report.data_card import CardSection
from pipeline.report.model_table import MISSING
from pipeline.report.results import Estimate, Results, as_estimate, fill_texts

SHADE_COUNT = 7  # colors, from the worst value of a row to its best
COMPARED_METRICS = [
    "f1", "recall", "specificity", "precision", "accuracy", "mcc", "positive_likelihood_ratio",
    "negative_likelihood_ratio", "auroc", "average_precision", "brier", "loss",
]  # fmt: skip
SEED_METRICS = [
    "f1", "recall", "specificity", "precision", "accuracy", "auroc", "average_precision", "brier", "loss",
]  # fmt: skip
BASELINE_LABELS = {
    "source": "source only", "view": "view only", "demographics": "sex and age only",
    "file_metadata": "file metadata only (size, JPEG quantization)",
    "thumbnail": "16×16 thumbnail", "border": "border only (outer eighth on each side)",
}  # fmt: skip
NO_INTERVAL = "too few patients or images for an interval"
FEW_PATIENTS = f"fewer than {MIN_PER_CLASS} positive or negative patients"


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
        if (interval and not cell.missing) or not cell.reason:
            return Cell(text, interval)
        if cell.reason not in self.reasons:
            self.reasons.append(cell.reason)
        return Cell(text, interval if cell.missing else MISSING, _note_letter(self.reasons.index(cell.reason)))


def format_number(value: float) -> str:
    if pd.isna(value):
        return MISSING
    digits = 3 if abs(value) < 10 else 1 if abs(value) < 100 else 0  # of likelihood ratios
    return f"{value:.{digits}f}".replace("-", "−")


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


def headline_table(results: Results) -> ReportTable:
    """Tabulate all metrics of the bag and the best seed with their intervals and estimate types."""
    names = list(dict.fromkeys([results.bag, results.best]))
    table = ReportTable(["", *(column for name in names for column in (name, "estimate"))])
    for metric in [*THRESHOLD_METRICS, *SCORE_METRICS, *CALIBRATION_METRICS]:
        cells: list[Estimate | Cell] = []
        for name in names:
            estimate, apparent = results.estimate(name, metric), results.apparent(name, metric)
            beside = f"apparent {format_number(apparent.value)}" if estimate.estimate_type == "corrected" else ""
            cells += [estimate, Cell("") if estimate.missing else Cell(estimate.estimate_type, beside)]
        table.add(METRIC_LABELS[metric], *cells)
    return table


def models_table(results: Results) -> ReportTable:
    """Tabulate metrics (rows) by seed and ensemble (columns), each row colored from its worst to its best value.

    All are as predicted on the validation images; the first row has the estimate type, and a footnote is on every value
    with another one.
    """
    names = [name for name in results.models if name not in results.baselines]
    types = {name: results.apparent(name, "f1").estimate_type for name in names}
    table = ReportTable(["", *names])
    table.add("estimate", *(types[name] or MISSING for name in names))
    for metric in COMPARED_METRICS:
        estimates = [results.apparent(name, metric) for name in names]
        cells = [
            Estimate(one.value, reason=one.reason if one.missing else _other_type(one, types[name]))
            for name, one in zip(names, estimates, strict=True)
        ]
        row = table.add(METRIC_LABELS[metric], *cells)
        values = pd.Series([one.value for one in estimates]) * (-1 if metric in LOWER_IS_BETTER else 1)
        _color_row(row[1:], values)
    return table


def operating_point_table(results: Results) -> ReportTable:
    """Tabulate the threshold of each seed and the bag, with the counts and the metrics there."""
    header = ["model", "threshold", "estimate", "TP", "FP", "FN", "TN", "sensitivity", "specificity", "PPV", "F1"]
    table = ReportTable(header)
    reason = "no image of this class, or none predicted positive"
    for _, row in results.operating_points[results.operating_points["model"].isin(results.candidates)].iterrows():
        table.add(
            row["model"], format_number(row["threshold"]), operating_point_type(results, row),
            *(str(row[key]) for key in ("tp", "fp", "fn", "tn")),
            *(without_interval(row[key], reason) for key in ("recall", "specificity", "precision", "f1")),
        )  # fmt: skip
    return table


def operating_point_type(results: Results, row: pd.Series) -> str:
    """Return the estimate type of a row of `operating_points.csv`, in which a selected model is apparent."""
    is_selected = results.apparent(row["model"], "f1").estimate_type == "apparent"
    if not is_selected or row["estimate_type"] == "apparent":
        return str(row["estimate_type"])
    return "apparent" if row["estimate_type"] == "fixed" else f"apparent (threshold {row['estimate_type']})"


def confusion_table(results: Results) -> ReportTable:
    """Tabulate the confusion matrix of the bag: the counts of its first row in `operating_points.csv`."""
    row, names = results.operating_point, results.config.active.finding.class_names
    table = ReportTable(["", *(f"predicted {name}" for name in names)])
    for name, keys in zip(names, (("tn", "fp"), ("fn", "tp")), strict=True):
        table.add(f"actual {name}", *(str(row[key]) for key in keys))
    return table


def calibration_table(results: Results) -> ReportTable:
    """Tabulate the calibration metrics of the bag without recalibration and after each."""
    calibration = read_csv(Path("metrics/calibration.csv"))
    keys = ["loss", "brier", "calibration_error"]
    table = ReportTable(["recalibration", "temperature", "bias", "estimate", *(METRIC_LABELS[key] for key in keys)])
    score_type = results.apparent(results.bag, "auroc").estimate_type
    for _, row in calibration[calibration["model"] == results.bag].iterrows():
        reason = "" if pd.isna(row["reason"]) else row["reason"]
        fitted = row["calibration"] != "none"
        parameters = [without_interval(row[key], reason) if fitted else "" for key in ("temperature", "bias")]
        metrics = [without_interval(row[key], reason) for key in keys]
        estimate_type = "cross-fitted" if fitted and score_type == "fixed" else score_type
        label = f"{row['calibration']} (in use)" if row["calibration"] == results.recalibration else row["calibration"]
        table.add(label, *parameters, estimate_type, *metrics)
    return table


def reliability_table(bins: pd.DataFrame) -> ReportTable:
    """Tabulate the counts and the share of positives by bin of P(positive)."""
    header = ["P(positive)", "images", "positive", "patients", "positive patients", "negative patients"]
    table = ReportTable([*header, "mean P(positive)", "share of positives"])
    columns = ["images", "positive_images", "groups", "positive_groups", "negative_groups"]
    for _, row in bins.iterrows():
        edges = f"{row['bin'] / BIN_COUNT:.1f} to {(row['bin'] + 1) / BIN_COUNT:.1f}"
        counts = [f"{row[key]:.0f}" for key in columns]
        share = Estimate(row["positives"], row["low"], row["high"])
        table.add(edges, *counts, format_number(row["probability"]), share)
    return table


def prevalence_table(results: Results) -> ReportTable:
    """Tabulate PPV, NPV and accuracy of the bag by prevalence."""
    table = ReportTable(["prevalence", "PPV", "NPV", "accuracy"])
    reason = f"no such prediction, or {NO_INTERVAL}"
    for _, row in results.prevalence.iterrows():
        estimates = [as_estimate({"reason": reason, **row}, key) for key in ("ppv", "npv", "accuracy")]
        table.add(f"{100 * row['prevalence']:.3g} %", *estimates)
    return table


def rank_table(results: Results) -> ReportTable:
    """Tabulate how often each candidate has the highest F1 in a resample."""
    table = ReportTable(["model", "highest F1 in"])
    for name, share in results.ranks.items():
        table.add(str(name), format_percent(share))
    return table


def shift_table(results: Results) -> ReportTable:
    """Tabulate the tests of whether the test images are distributed like the labeled ones."""
    header = ["compared by", "labeled images", "positive patients", "negative patients", "test images"]
    table = ReportTable([*header, "AUROC of telling apart", "p", "adjusted p"])
    counts = ["labeled_images", "positive_groups", "negative_groups", "images"]
    for _, row in results.shift.iterrows():
        values = [without_interval(row[key], row["reason"]) for key in ("auroc", "p", "adjusted_p")]
        table.add(row["features"], *(str(row[key]) for key in counts), *values)
    return table


def strata_table() -> ReportTable:
    """Tabulate, by stratum of the test images, what the expected accuracy is made of."""
    strata = fill_texts(read_csv(Path("metrics/strata.csv")), "stratum")
    header = ["test images of", "images", "predicted positive", "estimated prevalence"]
    for name, label in (("sensitivity", "positive"), ("specificity", "negative")):
        header += [name, f"{label} validation images", f"{label} patients"]
    table = ReportTable(header)
    reason = "no such validation image"
    for _, row in strata.iterrows():
        cells: list[str | Estimate] = [str(row["images"]), str(row["predicted_positive_images"])]
        cells.append(without_interval(row["prevalence"], reason))
        for name, label in (("sensitivity", "positive"), ("specificity", "negative")):
            counts = (str(row[f"{label}_{unit}"]) for unit in ("images", "patients"))
            cells += [without_interval(row[name], reason), *counts]
        table.add(row["stratum"] or "all", *cells)
    return table


def cluster_table(results: Results) -> ReportTable:
    """Tabulate the acquisition clusters with their share of positives."""
    table = ReportTable(
        [
            "cluster",
            "labeled images",
            "positive",
            "share of positives",
            "positive patients",
            "negative patients",
            "test",
        ]
    )
    for _, row in results.clusters.iterrows():
        counts = [str(row[key]) for key in ("positive_groups", "negative_groups", "test")]
        share = format_percent(row["positives"])
        table.add(row["name"], str(row["labeled"]), str(row["positive"]), share, *counts)
    return table


def baseline_table(results: Results) -> ReportTable:
    """Tabulate AUROC and F1 of the shortcut baselines, and the gain of the bag over each."""
    table = ReportTable(["baseline", "AUROC", "gain of the bag", "F1", "gain of the bag"])
    for model, feature in results.baselines.items():
        cells: list[Estimate | Cell] = []
        for metric in ("auroc", "f1"):
            gain = results.gain_over_baseline(model, metric)
            cells += [results.estimate(model, metric), gain if gain.missing else _difference_cell(gain)]
        table.add(BASELINE_LABELS.get(feature, feature), *cells)
    return table


def source_probe_table(results: Results) -> ReportTable:
    """Tabulate how well the features of the network, and a thumbnail, tell source or cluster, given the label."""
    labels = {"network": f"features of {results.config.bag_members[0]}", "thumbnail": BASELINE_LABELS["thumbnail"]}
    table = ReportTable(["probe on", f"AUROC of telling the {results.probed_property}"])
    for name, row in results.source_probe.items():
        estimate = as_estimate(row)
        is_signed = name == "difference" and not estimate.missing
        table.add(labels.get(name, name), _difference_cell(estimate) if is_signed else estimate)
    return table


def slice_table(results: Results) -> ReportTable:
    """Tabulate sensitivity, specificity, F1 and AUROC of the bag by slice; a small slice has counts only."""
    metrics = ["recall", "specificity", "f1", "auroc"]
    header = ["slice", "images", "positive", "patients", "positive patients", "negative patients"]
    table = ReportTable([*header, *(METRIC_LABELS[metric] for metric in metrics)])
    names = {
        str(cluster): name for cluster, name in zip(results.clusters["cluster"], results.clusters["name"], strict=True)
    }
    of_bag = results.slices[results.slices["model"].isin([results.bag, ""])]
    for (by, name), rows in of_bag.groupby(["by", "slice"], sort=False):
        counts = [f"{rows.iloc[0][key]:.0f}" for key in COUNTS]
        reason = FEW_PATIENTS if name and too_few_patients(dict(rows.iloc[0][COUNTS])) else str(rows.iloc[0]["reason"])
        by_metric = {} if reason == FEW_PATIENTS else {row["metric"]: as_estimate(row) for _, row in rows.iterrows()}
        unknown = Estimate(float("nan"), reason=reason)
        label = names.get(str(name), str(name)) if by == "acquisition" else str(name)
        table.add(f"{by}: {label or 'not known'}", *counts, *(by_metric.get(metric, unknown) for metric in metrics))
    return table


def external_table(rows: pd.DataFrame) -> ReportTable:
    """Tabulate sources that were held out, one row per source and model, and the summary over the sources.

    Args:
        rows: with the columns of `external_validation.COLUMNS`.
    """
    metrics = ["auroc", "recall", "specificity"]
    header = ["held-out source", "model", "images", "positive", "patients", "positive patients", "negative patients"]
    table = ReportTable([*header, *(METRIC_LABELS[metric] for metric in metrics)])
    rows = fill_texts(rows, "role", "model", "reason")
    labels: dict[Any, str] = {SUMMARY: "mean of sources", NEW_SOURCE: "a new source (prediction interval)"}
    for (source, role), group in rows.groupby(["source", "role"], sort=False) if len(rows) else []:
        first, by_metric = group.iloc[0], {row["metric"]: row for _, row in group.iterrows()}
        missing = Estimate(float("nan"), reason=str(first["reason"]))
        cells: list[Estimate | Cell] = []
        for metric in metrics:
            estimate = as_estimate(by_metric[metric]) if metric in by_metric else missing
            is_range = estimate.missing and estimate.has_interval
            cells.append(Cell(format_interval(estimate)) if is_range else estimate)
        model = str(first["model"]) or ("best seed" if role == "best" else str(role) or MISSING)
        table.add(labels.get(source, str(source)), model, *(f"{first[key]:.0f}" for key in COUNTS), *cells)
    return table


def test_table(scores: pd.DataFrame) -> ReportTable:
    """Tabulate the scores of the bag and the best seed on the test set, from `test_scores.score_candidates`."""
    table = ReportTable(["model", *(METRIC_LABELS[metric] for metric in TEST_METRICS), "expected accuracy"])
    for model, rows in scores.groupby("model", sort=False) if len(scores) else []:
        by_metric = {row["metric"]: row for _, row in rows.iterrows()}
        estimates = [as_estimate(by_metric[metric]) for metric in TEST_METRICS]
        table.add(str(model), *estimates, as_estimate(by_metric["accuracy"], "expected_accuracy"))
    return table


def ensemble_table(results: Results) -> ReportTable:
    """Compare the ensembles by combination method, and the best seed, with the bag."""
    table = ReportTable(
        ["method", "F1", "difference in F1 from the bag", "estimate", "sensitivity", "specificity", "AUROC"]
    )
    for name in [*(name for name in results.models if name.startswith("bag")), results.best]:
        difference = results.difference(name, results.bag, "f1")
        change: Estimate | Cell = difference if difference.missing else _difference_cell(difference)
        estimates = {metric: results.apparent(name, metric) for metric in ("f1", "recall", "specificity", "auroc")}
        table.add(
            name.removeprefix("bag (").removesuffix(")") + (" (the bag)" if name == results.bag else ""),
            estimates["f1"], Cell("") if name == results.bag else change, estimates["f1"].estimate_type or MISSING,
            *(estimates[metric] for metric in ("recall", "specificity", "auroc")),
        )  # fmt: skip
    return table


def seed_table(results: Results) -> ReportTable:
    """Tabulate the mean, standard deviation, minimum and maximum of each metric over the seeds."""
    statistics = results.seed_statistics.loc[SEED_METRICS]
    table = ReportTable(["", *(METRIC_LABELS[metric] for metric in SEED_METRICS)])
    labels = {"mean": "mean", "deviation": "standard deviation", "lowest": "minimum", "highest": "maximum"}
    for key, row in statistics[list(labels)].T.iterrows():
        table.add(labels[str(key)], *map(without_interval, row, statistics["reason"]))
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
    names = results.config.active.finding.class_names
    header = ["subset", "images", *names, "prevalence", "patients", *(f"{name} patients" for name in names), "sources"]
    table = ReportTable(header)
    unknown = Estimate(float("nan"), reason="not known")
    for subset, rows in results.table.groupby("subset", sort=False):
        known, by_class = rows[rows["label"].notna()], [rows[rows["label"] == label] for label in (0, 1)]
        labels: list[str | Estimate] = [unknown] * 3
        if len(known):
            labels = [*(str(len(of_class)) for of_class in by_class), format_percent(float(known["label"].mean()))]
        patients, sources = ({value for value in rows[key] if value} for key in ("patient", "source"))
        patients_of_class = [len(set(of_class["patient"]) - {""}) for of_class in by_class]
        table.add(
            str(subset), str(len(rows)), *labels, str(len(patients)) if patients else unknown,
            *(str(count) if patients and len(known) else unknown for count in patients_of_class),
            ", ".join(sorted(sources)) if sources else unknown,
        )  # fmt: skip
    return table


def counts_table(section: CardSection) -> ReportTable:
    """Return the counts of a section of the data card."""
    table = ReportTable(section.header)
    for row in section.rows:
        table.add(*row)
    return table


def version_table(results: Results) -> ReportTable:
    """Tabulate run, epoch, software, device and weights of each seed."""
    table = ReportTable(
        ["run in MLflow", "kept epoch", "torch", "device", "CPU threads", "processes", "weights (SHA-256)"]
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


def _other_type(estimate: Estimate, expected: str) -> str:
    return estimate.estimate_type if estimate.estimate_type != expected else ""


def without_interval(value: float, reason: str) -> Estimate:
    """Return an estimate without an interval, and with the reason only if the value is undefined."""
    return Estimate(value, reason=reason if pd.isna(value) else "")


def _difference_cell(estimate: Estimate) -> Cell:
    interval = "" if pd.isna(estimate.low) else f"{format_signed(estimate.low)} to {format_signed(estimate.high)}"
    return Cell(format_signed(estimate.value), interval)


def _note_letter(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else str(index)
