"""The report as one page, and the model card, from what the stages before have measured."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import torch

from pipeline.core.files import atomic_path, read_csv, read_json
from pipeline.evaluation.metrics import METRIC_LABELS, has_single_class
from pipeline.models import classifier
from pipeline.report import charts, gradcam, image_encoding, summary_text, tables
from pipeline.report.results import Results
from pipeline.report.tables import ReportTable

MAX_DISAGREEMENTS = 12  # images that are shown, at most
SECTIONS = {
    "models": "Models", "curves": "Curves", "operating": "Operating point", "calibration": "Calibration",
    "prevalence": "Prevalence", "shortcuts": "Disease or source?", "slices": "Slices", "bag": "The bag",
    "gradcam": "Where it looks", "data": "Data", "parameters": "Parameters", "versions": "Versions and runs",
}  # fmt: skip
LEARNING_CURVES = {
    "f1": "validation F1",
    "loss": "validation loss",
    "train_loss": "training loss",
}  # columns of a history


@dataclass(frozen=True)
class ExampleImage:
    file: str
    says: str  # beside it
    pictures: list[str]
    kind: str = ""
    outside: float = np.nan  # share of what the model looked at that is in the border


def write_report(folder: Path, results: Results) -> None:
    """Write `index.html`, which needs no other file, and `model-card.md`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        made.__name__: made
        for made in (tables.format_percent, tables.format_number, tables.format_estimate, tables.format_markdown)
    }
    content = _content(results) | {"style": environment.get_template("style.css").render()}
    for name in ("index.html", "model-card.md"):
        with atomic_path(folder / name) as aside:
            aside.write_text(environment.get_template(name).render(content), encoding="utf-8")


def _content(results: Results) -> dict[str, Any]:
    best, summary, params = results.best, results.summary, results.config.active
    looked = gradcam_examples(results)
    outside = np.array([image.outside for image in looked])
    known = outside[~np.isnan(outside)]
    return {
        "results": results, "best": best, "bag": results.bag, "summary": summary, "params": params, "names": METRIC_LABELS,
        "headline": {key: [results.estimate(name, key) for name in (best, results.bag)] for key in
                     ("f1", "recall", "specificity", "auroc")},
        "expected": params.evaluate.expected_prevalence, "versus_bag": summary_text.compare_with_bag(results),
        "cautions": summary_text.find_caveats(results, outside), "sections": SECTIONS, "rivals": summary_text.unbeaten_baselines(results),
        "added": [summary_text.describe_gain(results, name) for name in results.shortcuts],
        "models": tables.models_table(results), "spread": tables.seed_table(results), "calibration": tables.calibration_table(results),
        "operating_points": tables.operating_point_table(results), "prevalence": tables.prevalence_table(best),
        "shortcuts": tables.baseline_table(results), "slices": tables.slice_table(results), "bags": tables.ensemble_table(results),
        "disagreement": tables.disagreement_table(), "data": tables.data_table(results), "charts": _charts(results),
        "confusion": _confusion(results), "parameters": _parameters(params),
        "versions": _versions(results), "looked": looked, "outside": known.mean() if len(known) else np.nan,
        "even": gradcam.UNIFORM_BORDER_SHARE, "disputed": disagreement_examples(results), "disputes": len(pd.read_csv("predictions/disputed.csv")),
        "quarantined": len(pd.read_csv("data/quarantine.csv")), "prior": results.validation["label"].mean(),
        "data_card": Path("data/card.md").read_text(encoding="utf-8"),
    }  # fmt: skip


def gradcam_examples(results: Results) -> list[ExampleImage]:
    """Explain the surest right, the surest wrong and the least sure validation images of the best model."""
    best, threshold = results.best, results.summary["best"]["threshold"]
    labels, probabilities = results.validation["label"].to_numpy(), results.validation[best].to_numpy()
    chosen = gradcam.most_and_least_confident(labels, probabilities, threshold)
    folder = Path("models", best)
    network = classifier.load_classifier(folder, torch.device("cpu"))
    pixels = [results.images[_place(results, results.validation["file"].iloc[row])] for row in chosen["row"]]
    answers = [int(probabilities[row] >= threshold) for row in chosen["row"]]
    maps = gradcam.compute_heatmaps(network, torch.from_numpy(np.stack(pixels)), answers)
    return [
        ExampleImage(
            results.validation["file"].iloc[row],
            f"validation{_class(labels[row])}; P(positive) {probabilities[row]:.3f}",
            [image_encoding.image_data_uri(radiograph), image_encoding.heatmap_data_uri(radiograph, heat)],
            kind,
            outside,
        )
        for kind, row, radiograph, heat, outside in zip(
            chosen["kind"], chosen["row"], pixels, maps, gradcam.border_share(maps), strict=True
        )
    ]


def disagreement_examples(results: Results) -> list[ExampleImage]:
    """Show the images on which most members disagree."""
    count = len(results.config.bag_members)
    table = read_csv(Path("predictions/disputed.csv"))  # the most disputed ones of each subset come first
    table["margin"] = (2 * table["votes"] - count).abs()
    return [
        ExampleImage(
            row["file"],
            f"{row['subset']}{_class(row['label'])}; {row['votes']} of {count} say positive, mean {row['mean']:.3f}",
            [image_encoding.image_data_uri(results.images[_place(results, row["file"])])],
        )
        for _, row in table.sort_values(["margin", "file"]).head(MAX_DISAGREEMENTS).iterrows()
    ]


def _charts(results: Results) -> dict[str, str]:
    """Draw every chart that there are figures for."""
    labels, best = results.validation["label"].to_numpy(), results.best
    models = results.validation[results.config.model_names]
    histories = {name: pd.read_csv(f"models/{name}/history.csv") for name in results.config.model_names}
    found = {
        "training": "".join(
            charts.learning_curve_chart(histories, column, title, best) for column, title in LEARNING_CURVES.items()
        )
    }
    if not has_single_class(labels):
        found["curves"] = charts.roc_chart(
            labels, models, best, pd.read_csv("plots/bag_roc.csv")
        ) + charts.precision_recall_chart(labels, models, best, pd.read_csv("plots/bag_precision_recall.csv"))
    bins = pd.read_csv("metrics/reliability.csv")
    found["reliability"] = charts.reliability_chart(bins[bins["model"] == best], "none", "temperature and bias")
    carried, summary = pd.read_csv("metrics/prevalence.csv"), results.summary["best"]
    expected = results.config.active.evaluate.expected_prevalence
    marks = {"validation": labels.mean(), "test, estimated": summary["estimated_test_prevalence"], "expected": expected}
    own = carried[carried["model"] == best]
    if own["accuracy"].notna().any():
        found["prevalence"] = charts.prevalence_chart(
            own, {name: mark for name, mark in marks.items() if mark is not None}
        )
    if len(results.config.bag_members) > 1:
        found["growth"] = charts.ensemble_size_chart(pd.read_csv("plots/bag_growth.csv"))
    return found


def _confusion(results: Results) -> ReportTable:
    """Count what the best model calls right and wrong at its operating point."""
    labels, threshold = results.validation["label"], results.summary["best"]["threshold"]
    positive = results.validation[results.best] >= threshold
    grid = ReportTable([results.best, "called negative", "called positive"])
    for label, name in enumerate(["negative", "positive"]):
        grid.add(name, *(str(int(((labels == label) & (positive == call)).sum())) for call in (False, True)))
    return grid


def _parameters(params: Any) -> list[tuple[str, str]]:
    """List what shapes the report; of a path only the name, for where it lies is one machine's business."""
    found = []
    for section in ("download", "weights", "prepare", "split", "train", "evaluate", "bag"):
        for key, value in getattr(params, section):
            shown = value.name if isinstance(value, Path) else value
            found.append((f"{section}.{key}", shown if isinstance(shown, str) else json.dumps(shown)))
    return found


def _versions(results: Results) -> ReportTable:
    grid = ReportTable(
        ["run in MLflow", "best epoch", "torch", "device", "CPU threads", "processes", "weights (SHA-256)"]
    )
    for name in results.config.model_names:
        folder = Path("models", name)
        facts, metrics = read_json(folder / "model.json"), read_json(folder / "metrics.json")
        own = facts["environment"]
        parts = [own[key] for key in ("torch", "device", "cpu_threads", "processes")]
        grid.add(metrics["run"], *(str(part) for part in [metrics["epoch"], *parts]), facts["weights_sha256"][:12])
    return grid


def _place(results: Results, file: str) -> int:
    return int(results.table.index[results.table["file"] == file][0])


def _class(label: float) -> str:
    """Name the class after a comma; of a test image it is not known."""
    return "" if np.isnan(label) else ", positive" if label else ", negative"
