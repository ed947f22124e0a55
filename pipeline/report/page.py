"""The report as one HTML page, and the model card in Markdown."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import torch

from pipeline.core.config import Profile
from pipeline.core.files import atomic_path, md5_of_file, read_json
from pipeline.core.markdown import escape_markdown
from pipeline.evaluation.metrics import CALIBRATION_METRICS, METRIC_LABELS, has_single_class
from pipeline.models import classifier, heatmaps
from pipeline.models.classifier import Classifier
from pipeline.report import charts, data_card, gradcam, image_encoding, reporting_checklist, summary_text, tables
from pipeline.report.results import Estimate, Results, as_estimate
from pipeline.report.tables import ReportTable

Networks = Mapping[str, Sequence[Classifier]]  # those of every fold, by member of the bag
MAX_DISAGREEMENTS = 12  # images on the page
SECTIONS = {
    "models": "Models", "curves": "Curves", "operating-point": "Operating point",
    "calibration": "Calibration of predicted probabilities", "decisions": "Decision curve and referral",
    "prevalence": "Prevalence", "shift": "Distribution shift", "shortcuts": "Shortcut baselines", "slices": "Slices",
    "external": "External validation", "test": "Test set", "bag": "Seed ensemble (bag)", "gradcam": "Grad-CAM",
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


def template_environment() -> jinja2.Environment:
    """Return the environment of the templates in this folder, with the formats of numbers and the macro of tables."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = (tables.format_percent, tables.format_number, tables.format_interval, tables.format_estimate)
    for function in (*formats, tables.format_markdown, tables.counts_table, escape_markdown):
        environment.filters[function.__name__] = function
    environment.globals["grid"] = vars(environment.get_template("table.html").module)["grid"]
    return environment


def write_report(folder: Path, results: Results) -> None:
    """Write `index.html`, which embeds everything it needs, and `model-card.md`."""
    environment = template_environment()
    context = _template_context(results) | {"style": environment.get_template("style.css").render()}
    for name in ("index.html", "model-card.md"):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(environment.get_template(name).render(context), encoding="utf-8")


def gradcam_examples(results: Results, networks: Networks) -> list[ExampleImage]:
    """Compute mean heatmaps of the members for the most and least confident validation images of the bag."""
    validation, bag = results.validation, results.bag_predictions
    labels, scores = validation["label"].to_numpy(int), bag["score"].to_numpy()
    class_names = results.config.active.finding.class_names
    examples = gradcam.most_and_least_confident(labels, scores, results.summary["bag"]["threshold"])
    rows = examples["row"].to_numpy()
    members = list(networks)
    heatmaps = np.mean([compute_heatmaps(results, networks, rows, [member] * len(rows)) for member in members], axis=0)
    return [
        ExampleImage(
            validation["file"].iloc[row],
            f"validation{_format_label(labels[row], class_names)}; P(positive) {bag['probability'].iloc[row]:.3f}",
            [image_encoding.image_data_uri(radiograph), image_encoding.heatmap_data_uri(radiograph, heatmap)],
            kind,
        )
        for kind, row, heatmap in zip(examples["kind"], rows, heatmaps, strict=True)
        for radiograph in [_radiograph(results, validation["file"].iloc[row])]
    ]


def estimate_border_share(results: Results, networks: Networks) -> Estimate:
    """Return the mean share of the heatmaps in the border, over a random sample of the validation images.

    Each image is explained by one member of the bag, the members in turn.
    """
    rows = gradcam.draw_sample(len(results.validation))
    members = list(networks)
    heatmaps = compute_heatmaps(results, networks, rows, [members[index % len(members)] for index in range(len(rows))])
    value, low, high = gradcam.mean_border_share(gradcam.border_share(heatmaps), results.groups[rows])
    return Estimate(value, low, high, "all heatmaps are empty" if np.isnan(value) else "")


def compute_heatmaps(results: Results, networks: Networks, rows: np.ndarray, members: Sequence[str]) -> np.ndarray:
    """Compute heatmaps (N, size, size) of validation images for the class that the bag predicts.

    Args:
        results: of the earlier stages.
        networks: those of every fold, by member.
        rows: (N,), of the validation images.
        members: (N,), the member that explains each image, with the network of its fold.
    """
    files, predicted = results.validation["file"].iloc[rows], results.bag_predictions["predicted"].iloc[rows]
    folds = results.table.set_index("file")["fold"].loc[files].to_numpy(int)
    radiographs = np.stack([_radiograph(results, file) for file in files])
    keys, by_position = list(zip(members, folds, strict=True)), dict[int, np.ndarray]()
    for member, fold in dict.fromkeys(keys):
        positions = [position for position, key in enumerate(keys) if key == (member, fold)]
        pixels, classes = torch.from_numpy(radiographs[positions]), predicted.iloc[positions].astype(int).tolist()
        maps = heatmaps.compute_heatmaps(networks[member][fold], pixels, classes)
        by_position |= dict(zip(positions, maps, strict=True))
    return np.stack([by_position[position] for position in range(len(rows))])


def disagreement_examples(results: Results) -> list[ExampleImage]:
    """Return the images on which the votes of the members are closest to a tie."""
    count, class_names = len(results.config.bag_members), results.config.active.finding.class_names
    table = results.disagreements.assign(margin=(2 * results.disagreements["votes"] - count).abs())
    return [
        ExampleImage(
            row["file"],
            f"{row['subset']}{_format_label(row['label'], class_names)}; {row['votes']} of {count} members predict "
            f"positive, mean score {row['mean']:.3f}",
            [image_encoding.image_data_uri(_radiograph(results, row["file"]))],
        )
        for _, row in table.sort_values(["margin", "file"]).head(MAX_DISAGREEMENTS).iterrows()
    ]


def _template_context(results: Results) -> dict[str, Any]:
    """Return the variables of the templates."""
    params, bag = results.config.active, results.bag
    device = torch.device("cpu")
    networks = {name: classifier.load_networks(Path("models", name), device) for name in results.config.bag_members}
    border = estimate_border_share(results, networks)
    descriptions = [read_json(Path("models", name, "model.json")) for name in results.config.model_names]
    fingerprints = sorted({str(one.get("parent_fingerprint", "not known")) for one in descriptions})
    return {
        # What was evaluated
        "results": results,
        "best": results.best,
        "bag": bag,
        "params": params,
        "class_names": params.finding.class_names,
        "parameters": _format_parameters(params),
        "sections": SECTIONS,
        "quarantined_count": len(pd.read_csv("data/quarantine.csv")),
        "unusual_images": data_card.UNUSUAL_IMAGES,
        "contact_sheet": image_encoding.jpeg_data_uri(Path("data/contact_sheet.jpg").read_bytes()),
        "card_sections": data_card.card_sections(read_json(Path("data/card.json"))),
        "hashes": {
            "data (MD5 of data/manifest.csv)": md5_of_file(Path("data/manifest.csv")),
            "split (MD5 of data/split.csv)": md5_of_file(Path("data/split.csv")),
            "code and data of the training (fingerprint)": ", ".join(fingerprints),
        },
        # Metrics
        "metric_labels": METRIC_LABELS,
        "headline": {key: results.estimate(bag, key) for key in TILE_METRICS},
        "source_probe": as_estimate(results.source_probe["network"]),
        "best_f1": results.estimate(results.best, "f1"),
        "calibration": [(METRIC_LABELS[key], results.estimate(bag, key)) for key in CALIBRATION_METRICS],
        "summary": results.summary["bag"],
        "expected_accuracy": as_estimate(results.summary["bag"], "expected_accuracy"),
        "tables": _build_tables(results),
        "charts": _draw_charts(results),
        "operating_point": results.operating_point,
        "operating_point_type": tables.operating_point_type(results, results.operating_point),
        "recalibration_evaluated": _is_recalibration_evaluated(results),
        "types": {key: results.apparent(bag, key).estimate_type for key in ("f1", "auroc", "brier")},
        # Sentences
        "text": summary_text,
        "caveats": summary_text.find_caveats(results, border),
        "unbeaten_baselines": summary_text.unbeaten_baselines(results),
        "checklist": reporting_checklist.fill_checklist(results, border),
        # Example images
        "gradcam_kinds": gradcam.KINDS,
        "gradcam_examples": gradcam_examples(results, networks),
        "border": border,
        "sample_size": min(gradcam.SAMPLE_SIZE, len(results.validation)),
        "uniform_border_share": gradcam.UNIFORM_BORDER_SHARE,
        "disagreement_examples": disagreement_examples(results),
        "disagreement_count": len(results.disagreements),
    }


def _build_tables(results: Results) -> dict[str, ReportTable]:
    return {
        "headline": tables.headline_table(results),
        "models": tables.models_table(results),
        "ranks": tables.rank_table(results),
        "seeds": tables.seed_table(results),
        "confusion": tables.confusion_table(results),
        "operating_points": tables.operating_point_table(results),
        "calibration": tables.calibration_table(results),
        "reliability": tables.reliability_table(_bins_in_use(results)),
        "prevalence": tables.prevalence_table(results),
        "shift": tables.shift_table(results),
        "strata": tables.strata_table(),
        "clusters": tables.cluster_table(results),
        "baselines": tables.baseline_table(results),
        "source_probe": tables.source_probe_table(results),
        "slices": tables.slice_table(results),
        "external": tables.external_table(results.external),
        "test": tables.test_table(results.test_scores),
        "ensembles": tables.ensemble_table(results),
        "disagreement": tables.disagreement_table(),
        "data": tables.data_table(results),
        "versions": tables.version_table(results),
    }


def _draw_charts(results: Results) -> dict[str, str]:
    """Draw the charts whose metrics are defined, as SVG by name."""
    labels, best, names = results.validation["label"].to_numpy(), results.best, results.config.model_names
    histories = {
        name: pd.read_csv(f"models/{name}/history.csv").groupby("epoch", as_index=False).mean() for name in names
    }
    learning_curves = [
        charts.learning_curve_chart(histories, column, title, best) for column, title in LEARNING_CURVES.items()
    ]
    drawn = {
        "training": "".join(learning_curves),
        "reliability": charts.reliability_chart(results.reliability, results.recalibration),
    }
    if summary_text.describe_ranks(results):
        drawn["ranks"] = charts.rank_chart(results.ranks)
    if not has_single_class(labels):
        drawn["curves"] = charts.roc_chart(pd.read_csv("plots/roc.csv"), best) + charts.precision_recall_chart(
            pd.read_csv("plots/precision_recall.csv"), best
        )
    decisions = pd.read_csv("plots/bag_decision_curve.csv")
    if len(decisions):
        of_prevalence = decisions.groupby("prevalence", sort=False)
        drawn["decision_curve"] = "".join(charts.decision_curve_chart(curve) for _, curve in of_prevalence)
    referral = pd.read_csv("plots/bag_referral.csv")
    if referral["accuracy"].notna().any():
        drawn["referral"] = charts.referral_chart(referral)
    if results.prevalence["accuracy"].notna().any():
        references = {
            "validation": labels.mean(),
            "test, estimated": results.summary["bag"]["estimated_test_prevalence"],
            "expected": results.config.active.evaluate.expected_prevalence,
        }
        references = {name: prevalence for name, prevalence in references.items() if prevalence is not None}
        drawn["prevalence"] = charts.prevalence_chart(results.prevalence, references)
    if len(results.config.bag_members) > 1:
        drawn["ensemble_size"] = charts.ensemble_size_chart(pd.read_csv("plots/bag_ensemble_size.csv"))
    return drawn


def _is_recalibration_evaluated(results: Results) -> bool:
    """Return whether the probabilities in use are those of a recalibration that could be cross-fitted, or the score."""
    return results.recalibration in set(results.reliability["calibration"])


def _bins_in_use(results: Results) -> pd.DataFrame:
    """Return the reliability curve of the probabilities in use, or of the score if these cannot be cross-fitted."""
    kind = results.recalibration if _is_recalibration_evaluated(results) else "none"
    return results.reliability[results.reliability["calibration"] == kind]


def _format_parameters(params: Profile) -> list[tuple[str, str]]:
    """List the parameters that affect the report."""
    rows = []
    for section in ("finding", "download", "weights", "prepare", "split", "train", "evaluate", "bag"):
        for key, value in getattr(params, section).model_dump(mode="json").items():
            plain = [_hide_folder(one) for one in value] if isinstance(value, list) else _hide_folder(value)
            rows.append((f"{section}.{key}", plain if isinstance(plain, str) else json.dumps(plain)))
    return rows


def _hide_folder(value: Any) -> Any:
    """Return an absolute path as its name only, because its folder differs by machine; any other value as it is."""
    return Path(value).name if isinstance(value, str) and Path(value).expanduser().is_absolute() else value


def _radiograph(results: Results, file: str) -> np.ndarray:
    """Return the packed image of a file, uint8 (S, S)."""
    image: np.ndarray = results.images[int(results.table.index[results.table["file"] == file][0])]
    return image


def _format_label(label: float, class_names: Sequence[str]) -> str:
    """Return ", " and the name of the class; nothing for a test image, whose label is not known."""
    return "" if np.isnan(label) else f", {class_names[int(label)]}"
