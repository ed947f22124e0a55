"""What a reader must know, in sentences that the figures decide."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.report.gradcam import UNIFORM_BORDER_SHARE
from pipeline.report.results import Estimate, Results, as_estimate
from pipeline.report.tables import BASELINE_LABELS, format_difference, format_estimate, format_number, format_percent

MIN_POSITIVES = 100  # positive validation images, below which intervals are wide
CHANCE_AUROC = 0.5  # AUROC of what knows nothing
CONFOUNDED_AUROC = 0.6  # AUROC of the source alone, above which it gives labels away
MAX_PREVALENCE_DIFFERENCE = 0.1  # difference of prevalence, above which a set is another population


@dataclass(frozen=True)
class Caveat:
    what: str
    why: str
    section: str  # of the page, that shows it


def compare_with_bag(results: Results) -> str:
    """Say whether the bag is better than the best model."""
    found = results.difference(results.bag, results.best, "f1")
    if found.missing or pd.isna(found.low):
        return f"How the {results.bag} compares with it cannot be said: {found.reason or 'no resample differs'}."
    verdict = _verdict(found.low, found.high, "is better", "is worse", "is not distinguishable from it")
    return f"The {results.bag} {verdict}: F1 {format_difference(found)}."


def describe_gain(results: Results, shortcut: str) -> str:
    """Say what the best model adds to a shortcut, in AUROC, for which no threshold had to be chosen, and in F1."""
    name, auroc = _short(results, shortcut), results.added(shortcut, "auroc")
    if auroc.missing:
        return f"{name}: – ({auroc.reason})."
    figures = f"AUROC {format_difference(auroc)}, F1 {format_difference(results.added(shortcut, 'f1'))}"
    if pd.isna(auroc.low):
        return f"{name}: the model adds {figures}; without an interval this may be chance."
    told_apart = "the model is better", "the shortcut is better", "by AUROC the two are not distinguishable"
    return f"{name}: {_verdict(auroc.low, auroc.high, *told_apart)}; the model adds {figures}."


def unbeaten_baselines(results: Results) -> list[str]:
    """Return the shortcuts that the best model does not surely surpass in AUROC."""
    found = {name: results.added(name, "auroc") for name in results.shortcuts}
    return [name for name, more in found.items() if not more.missing and not more.low > 0]


def find_caveats(results: Results, outside: np.ndarray) -> list[Caveat]:
    """Return what to beware of, what matters most first.

    Args:
        results: of all stages before.
        outside: of the images that were explained, the share of the model's evidence in the border, NaN where none.
    """
    found: list[tuple[str, str, str]] = []
    if results.config.active.download.source == "phantom":
        found.append(("The radiographs are drawings", "What is measured on them says nothing of people.", "data"))
    found += _of_sources(results)
    if len(results.config.model_names) > 1:
        mean, deviation = (format_number(float(results.spread[key]["f1"])) for key in ("mean", "deviation"))
        why = f"The {len(results.config.model_names)} seeds have F1 {mean} ± {deviation}. Expect that of another one."
        found.append(("It is the best by the same images that measure it", why, "models"))
    if results.positives < MIN_POSITIVES:
        each = f"; each is {format_percent(1 / results.positives)} of sensitivity" if results.positives else ""
        why = f"{results.positives} of {len(results.validation)}{each}. Models differ by chance."
        found.append(("Few positive images validate", why, "models"))
    share, there = results.validation["label"].mean(), results.summary["best"]["estimated_test_prevalence"]
    if there is not None and abs(there - share) > MAX_PREVALENCE_DIFFERENCE:
        why = f"{format_percent(there)} of its images look positive, {format_percent(share)} of the validation set are."
        found.append(("The test set is another population", why, "prevalence"))
    known = outside[~np.isnan(outside)]
    if len(known) and known.mean() > UNIFORM_BORDER_SHARE:
        why = f"{format_percent(known.mean())} of what Grad-CAM marks is there, on {format_percent(UNIFORM_BORDER_SHARE)} of the area."
        found.append(("It looks at the border", why, "gradcam"))
    if not results.table["patient"].any():
        why = "The same one may be in training and validation, which flatters and makes intervals too narrow."
        found.append(("Patients are not known", why, "data"))
    if results.estimate_type(results.best) == "apparent":
        why = "The images that measure also chose the threshold: there are too few to keep the two apart."
        found.append(("Figures flatter", why, "operating"))
    return [Caveat(*parts) for parts in found]


def _of_sources(results: Results) -> list[tuple[str, str, str]]:
    found = []
    if shortcuts := unbeaten_baselines(results):
        figures = [f"{_short(results, name)} {format_estimate(results.estimate(name, 'auroc'))}" for name in shortcuts]
        why = f"AUROC of {'; '.join(figures)}. It may have learned where images come from."
        found.append(("It does not surely surpass what needs no radiology", why, "shortcuts"))
    source = next((model for model, name in results.shortcuts.items() if name == "source"), None)
    alone = results.estimate(source, "auroc") if source else Estimate(np.nan, reason="not estimate_type")
    if alone.missing:
        why = f"The source alone: – ({alone.reason})."
        found.append(("Disease and source cannot be told apart", why, "shortcuts"))
    elif alone.value > CONFOUNDED_AUROC:
        why = f"Alone it has AUROC {format_estimate(alone)}. On images from elsewhere, and at other prevalences, expect less."
        found.append(("The source gives labels away", why, "prevalence"))
    within = results.slices.query("by == 'source' and metric == 'auroc' and model == @results.best")
    unsure = within[within["low"].fillna(within["value"]) <= CHANCE_AUROC].sort_values("value")
    if len(unsure):
        why = f"Among those of {unsure['slice'].iloc[0]} it has AUROC {format_estimate(as_estimate(unsure.iloc[0]))}."
        found.append(("On images of one source it may know nothing", why, "slices"))
    return found


def _short(results: Results, shortcut: str) -> str:
    return BASELINE_LABELS.get(results.shortcuts[shortcut], shortcut)


def _verdict(low: float, high: float, above: str, below: str, neither: str) -> str:
    """Choose by the side of 0 on which an interval lies."""
    return above if low > 0 else below if high < 0 else neither
