"""The report as one HTML page, and the model card in Markdown."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import torch

from pipeline.core.config import Profile
from pipeline.core.files import atomic_path, read_csv, read_json
from pipeline.evaluation.metrics import METRIC_LABELS, has_single_class
from pipeline.models import classifier
from pipeline.report import charts, data_card, gradcam, image_encoding, summary_text, tables
from pipeline.report.results import Results
from pipeline.report.tables import ReportTable

MAX_DISAGREEMENTS = 12  # images on the page
SECTIONS = {
    "models": "Models", "curves": "Curves", "operating-point": "Operating point",
    "calibration": "Calibration of predicted probabilities", "prevalence": "Prevalence",
    "shortcuts": "Shortcut baselines", "slices": "Slices", "bag": "Seed ensemble (bag)", "gradcam": "Grad-CAM",
    "data": "Data", "parameters": "Parameters", "versions": "Versions and runs",
}  # fmt: skip
TILE_METRICS = ["f1", "recall", "specificity", "auroc"]
LEARNING_CURVES = {"f1": "validation F1", "loss": "validation loss", "train_loss": "training loss"}  # by history column


@dataclass(frozen=True)
class ExampleImage:
    file: str
    caption: str
    images: list[str]  # `data:` URIs of the radiograph and, if there is one, of its heatmap
    kind: str = ""  # one of `gradcam.KINDS`
    border_share: float = np.nan  # of the heatmap


def write_report(folder: Path, results: Results) -> None:
    """Write `index.html`, which embeds everything it needs, and `model-card.md`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = (tables.format_percent, tables.format_number, tables.format_estimate, tables.format_markdown)
    for function in (*formats, tables.counts_table):
        environment.filters[function.__name__] = function
    context = _template_context(results) | {"style": environment.get_template("style.css").render()}
    for name in ("index.html", "model-card.md"):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(environment.get_template(name).render(context), encoding="utf-8")


def gradcam_examples(results: Results) -> list[ExampleImage]:
    """Compute heatmaps of the most and least confident validation images of the best seed."""
    threshold = results.summary["best"]["threshold"]
    files, labels = results.validation["file"], results.validation["label"].to_numpy()
    probabilities = results.validation[results.best].to_numpy()
    examples = gradcam.most_and_least_confident(labels, probabilities, threshold)
    radiographs = [_radiograph(results, files.iloc[row]) for row in examples["row"]]
    predicted = [int(probabilities[row] >= threshold) for row in examples["row"]]
    network = classifier.load_classifier(Path("models", results.best), torch.device("cpu"))
    heatmaps = gradcam.compute_heatmaps(network, torch.from_numpy(np.stack(radiographs)), predicted)
    return [
        ExampleImage(
            files.iloc[row],
            f"validation{_format_label(labels[row])}; P(positive) {probabilities[row]:.3f}",
            [image_encoding.image_data_uri(radiograph), image_encoding.heatmap_data_uri(radiograph, heatmap)],
            kind,
            border_share,
        )
        for kind, row, radiograph, heatmap, border_share in zip(
            examples["kind"], examples["row"], radiographs, heatmaps, gradcam.border_share(heatmaps), strict=True
        )
    ]


def disagreement_examples(results: Results) -> list[ExampleImage]:
    """Return the images on which the votes of the members are closest to a tie."""
    count = len(results.config.bag_members)
    table = read_csv(Path("predictions/disputed.csv"))
    table["margin"] = (2 * table["votes"] - count).abs()
    return [
        ExampleImage(
            row["file"],
            f"{row['subset']}{_format_label(row['label'])}; {row['votes']} of {count} members predict positive, "
            f"mean P(positive) {row['mean']:.3f}",
            [image_encoding.image_data_uri(_radiograph(results, row["file"]))],
        )
        for _, row in table.sort_values(["margin", "file"]).head(MAX_DISAGREEMENTS).iterrows()
    ]


def _template_context(results: Results) -> dict[str, Any]:
    """Return the variables of the templates."""
    best, bag, params = results.best, results.bag, results.config.active
    examples = gradcam_examples(results)
    border_shares = np.array([example.border_share for example in examples])
    defined_shares = border_shares[~np.isnan(border_shares)]
    return {
        # What was evaluated
        "results": results,
        "best": best,
        "bag": bag,
        "params": params,
        "parameters": _format_parameters(params),
        "sections": SECTIONS,
        "quarantined_count": len(pd.read_csv("data/quarantine.csv")),
        "card_sections": data_card.card_sections(read_json(Path("data/card.json"))),
        # Metrics
        "summary": results.summary,
        "metric_labels": METRIC_LABELS,
        "headline": {key: [results.estimate(name, key) for name in (best, bag)] for key in TILE_METRICS},
        "expected_prevalence": params.evaluate.expected_prevalence,
        "validation_prevalence": results.validation["label"].mean(),
        "tables": _build_tables(results),
        "charts": _draw_charts(results),
        # Sentences
        "bag_comparison": summary_text.compare_with_bag(results),
        "caveats": summary_text.find_caveats(results, border_shares),
        "unbeaten_baselines": summary_text.unbeaten_baselines(results),
        "baseline_gains": [summary_text.describe_gain(results, name) for name in results.baselines],
        # Example images
        "gradcam_kinds": gradcam.KINDS,
        "gradcam_examples": examples,
        "border_share": defined_shares.mean() if len(defined_shares) else np.nan,
        "uniform_border_share": gradcam.UNIFORM_BORDER_SHARE,
        "disagreement_examples": disagreement_examples(results),
        "disagreement_count": len(pd.read_csv("predictions/disputed.csv")),
    }


def _build_tables(results: Results) -> dict[str, ReportTable]:
    return {
        "models": tables.models_table(results),
        "seeds": tables.seed_table(results),
        "confusion": tables.confusion_table(results),
        "operating_points": tables.operating_point_table(results),
        "calibration": tables.calibration_table(results),
        "prevalence": tables.prevalence_table(results.best),
        "baselines": tables.baseline_table(results),
        "slices": tables.slice_table(results),
        "ensembles": tables.ensemble_table(results),
        "disagreement": tables.disagreement_table(),
        "data": tables.data_table(results),
        "versions": tables.version_table(results),
    }


def _draw_charts(results: Results) -> dict[str, str]:
    """Draw the charts whose metrics are defined, as SVG by name."""
    labels, best, names = results.validation["label"].to_numpy(), results.best, results.config.model_names
    histories = {name: pd.read_csv(f"models/{name}/history.csv") for name in names}
    learning_curves = [
        charts.learning_curve_chart(histories, column, title, best) for column, title in LEARNING_CURVES.items()
    ]
    bins = pd.read_csv("metrics/reliability.csv")
    drawn = {
        "training": "".join(learning_curves),
        "reliability": charts.reliability_chart(bins[bins["model"] == best], "temperature and bias"),
    }
    if not has_single_class(labels):
        seeds = results.validation[names]
        drawn["curves"] = charts.roc_chart(
            labels, seeds, best, pd.read_csv("plots/bag_roc.csv")
        ) + charts.precision_recall_chart(labels, seeds, best, pd.read_csv("plots/bag_precision_recall.csv"))
    by_prevalence = pd.read_csv("metrics/prevalence.csv").query("model == @best")
    if by_prevalence["accuracy"].notna().any():
        references = {
            "validation": labels.mean(),
            "test, estimated": results.summary["best"]["estimated_test_prevalence"],
            "expected": results.config.active.evaluate.expected_prevalence,
        }
        references = {name: prevalence for name, prevalence in references.items() if prevalence is not None}
        drawn["prevalence"] = charts.prevalence_chart(by_prevalence, references)
    if len(results.config.bag_members) > 1:
        drawn["ensemble_size"] = charts.ensemble_size_chart(pd.read_csv("plots/bag_growth.csv"))
    return drawn


def _format_parameters(params: Profile) -> list[tuple[str, str]]:
    """List the parameters that affect the report; a path as its name only, because its folder differs by machine."""
    rows = []
    for section in ("download", "weights", "prepare", "split", "train", "evaluate", "bag"):
        for key, value in getattr(params, section):
            plain = value.name if isinstance(value, Path) else value
            rows.append((f"{section}.{key}", plain if isinstance(plain, str) else json.dumps(plain)))
    return rows


def _radiograph(results: Results, file: str) -> np.ndarray:
    """Return the packed image of a file, uint8 (S, S)."""
    image: np.ndarray = results.images[int(results.table.index[results.table["file"] == file][0])]
    return image


def _format_label(label: float) -> str:
    """Return ", positive" or ", negative"; nothing for a test image, whose label is not known."""
    return "" if np.isnan(label) else ", positive" if label else ", negative"
