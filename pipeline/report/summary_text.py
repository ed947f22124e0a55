"""Sentences of the report that depend on the metrics: comparison with the bag, gain over baselines, and caveats."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.report.gradcam import UNIFORM_BORDER_SHARE
from pipeline.report.results import Estimate, Results, as_estimate
from pipeline.report.tables import (
    BASELINE_LABELS,
    NO_INTERVAL,
    format_difference,
    format_estimate,
    format_number,
    format_percent,
)

MIN_POSITIVES = 100  # positive validation images; with fewer, intervals are wide
CHANCE_AUROC = 0.5
CONFOUNDED_AUROC = 0.6  # of the source-only baseline; above it, the label is confounded with the source
MAX_PREVALENCE_DIFFERENCE = 0.1  # between test (estimated) and validation set


@dataclass(frozen=True)
class Caveat:
    title: str
    detail: str
    section: str  # id of the section that shows the metrics


def compare_with_bag(results: Results) -> str:
    """Say whether the bag or the best seed has the higher F1."""
    difference = results.difference(results.bag, results.best, "f1")
    if difference.missing or pd.isna(difference.low):
        return f"The {results.bag} cannot be compared with {results.best}: {difference.reason or NO_INTERVAL}."
    verdict = _verdict(difference, "is better than", "is worse than", "does not differ clearly from")
    sentence = f"The {results.bag} {verdict} {results.best}: difference in F1 {format_difference(difference)}."
    if len(results.config.model_names) < 2:
        return sentence
    return f"{sentence} The comparison favors the best seed, which was selected by F1 on these images."


def describe_gain(results: Results, baseline: str) -> str:
    """Give the gain of the best seed over a shortcut baseline in F1 and in AUROC, which needs no threshold."""
    label, auroc = _baseline_label(results, baseline), results.gain_over_baseline(baseline, "auroc")
    if auroc.missing:
        return f"{label}: – ({auroc.reason})."
    gains = f"AUROC {format_difference(auroc)}, F1 {format_difference(results.gain_over_baseline(baseline, 'f1'))}"
    if pd.isna(auroc.low):
        return f"{label}: gain in {gains}; without an interval this may be chance."
    verdict = _verdict(
        auroc, "the model has the higher AUROC", "the baseline has the higher AUROC", "no clear difference in AUROC"
    )
    return f"{label}: {verdict}; gain in {gains}."


def unbeaten_baselines(results: Results) -> list[str]:
    """Return the shortcut baselines over which the gain in AUROC has an interval that includes 0 or is negative."""
    gains = {name: results.gain_over_baseline(name, "auroc") for name in results.baselines}
    return [name for name, gain in gains.items() if not gain.missing and not gain.low > 0]


def find_caveats(results: Results, border_shares: np.ndarray) -> list[Caveat]:
    """Return the caveats that apply, the most important first.

    Args:
        results: of the earlier stages.
        border_shares: the share of the Grad-CAM heatmap in the border, per example image; NaN for an empty heatmap.
    """
    caveats = [
        *_synthetic_images(results), *_confounding(results), *_selection(results), *_few_positives(results),
        *_prevalence_shift(results), *_border_attention(border_shares),
    ]  # fmt: skip
    if not results.table["patient"].any():
        detail = "The same patient may be in training and validation: metrics may be optimistic, intervals too narrow."
        caveats.append(Caveat("Patient identifiers are missing", detail, "data"))
    if results.estimate_type(results.best) == "apparent":
        detail = "The threshold was chosen on the images it is evaluated on: too few of a class for cross-fitting."
        caveats.append(Caveat("Apparent estimates are optimistically biased", detail, "operating-point"))
    return caveats


def _synthetic_images(results: Results) -> list[Caveat]:
    if results.config.active.download.source != "phantom":
        return []
    return [Caveat("Synthetic images", "The metrics say nothing about real patients.", "data")]


def _confounding(results: Results) -> list[Caveat]:
    caveats = []
    if baselines := unbeaten_baselines(results):
        aurocs = [
            f"{_baseline_label(results, name)} {format_estimate(results.estimate(name, 'auroc'))}" for name in baselines
        ]
        detail = f"AUROC: {'; '.join(aurocs)}. The model may rely on such shortcuts."
        caveats.append(Caveat("Not clearly better than the shortcut baselines", detail, "shortcuts"))
    model = next((name for name, feature in results.baselines.items() if feature == "source"), None)
    auroc = results.estimate(model, "auroc") if model else Estimate(np.nan, reason="not evaluated")
    if auroc.missing:
        detail = f"Source-only baseline: – ({auroc.reason})."
        caveats.append(Caveat("Confounding by source cannot be assessed", detail, "shortcuts"))
    elif auroc.value > CONFOUNDED_AUROC:
        detail = (
            f"The source alone predicts the label with AUROC {format_estimate(auroc)}. "
            "Sensitivity and specificity may differ for other sources, and so may the PPV and NPV."
        )
        caveats.append(Caveat("The label is confounded with the source", detail, "shortcuts"))
    slices = results.slices.query("by == 'source' and metric == 'auroc' and model == @results.best")
    near_chance = slices[slices["low"].fillna(slices["value"]) <= CHANCE_AUROC].sort_values("value")
    if len(near_chance):
        worst = near_chance.iloc[0]
        detail = f"AUROC on the images of source {worst['slice']}: {format_estimate(as_estimate(worst))}."
        caveats.append(Caveat("Not clearly better than chance within one source", detail, "slices"))
    return caveats


def _selection(results: Results) -> list[Caveat]:
    count = len(results.config.model_names)
    if count < 2:
        return []
    mean, deviation = (format_number(float(results.seed_statistics[key]["f1"])) for key in ("mean", "deviation"))
    detail = (
        f"{results.best} has the highest validation F1. Over the {count} seeds, F1 has mean {mean} and standard "
        f"deviation {deviation}; expect about the mean for a new seed, and less on new images, because every seed's "
        "epoch was selected on these images too."
    )
    return [Caveat("Selected and evaluated on the same images (optimistic)", detail, "models")]


def _few_positives(results: Results) -> list[Caveat]:
    count = results.positive_count
    if count >= MIN_POSITIVES:
        return []
    if count == 0:
        return [Caveat("No positive validation images", "Sensitivity cannot be estimated.", "models")]
    patients = results.table.query("subset == 'validation' and label == 1")["patient"]
    of_patients = f" ({_plural(patients.nunique(), 'patient')})" if patients.all() else ""
    detail = f"One error changes sensitivity by {100 / count:.1f} points. Differences between models may be chance."
    return [Caveat(f"Only {_plural(count, 'positive validation image')}{of_patients}", detail, "models")]


def _prevalence_shift(results: Results) -> list[Caveat]:
    validation, test = results.validation["label"].mean(), results.summary["best"]["estimated_test_prevalence"]
    if test is None or abs(test - validation) <= MAX_PREVALENCE_DIFFERENCE:
        return []
    detail = f"{format_percent(test)} of test images (estimated), {format_percent(validation)} of validation images."
    return [Caveat("Different estimated prevalence in the test set", detail, "prevalence")]


def _border_attention(border_shares: np.ndarray) -> list[Caveat]:
    defined = border_shares[~np.isnan(border_shares)]
    if not len(defined) or defined.mean() <= UNIFORM_BORDER_SHARE:
        return []
    detail = (
        f"{format_percent(defined.mean())} of the Grad-CAM heatmaps lies in the border, which is "
        f"{format_percent(UNIFORM_BORDER_SHARE)} of the area."
    )
    return [Caveat("Grad-CAM highlights the image border", detail, "gradcam")]


def _baseline_label(results: Results, baseline: str) -> str:
    return BASELINE_LABELS.get(results.baselines[baseline], baseline)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _verdict(difference: Estimate, better: str, worse: str, unclear: str) -> str:
    """Choose by whether the interval of the difference lies above 0, below 0, or includes 0."""
    return better if difference.low > 0 else worse if difference.high < 0 else unclear
