"""Sentences of the report that depend on the metrics: headline, counts, comparisons and caveats.

Every statement about a difference is decided by an interval or a test, not by the size of the difference.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import chi2_contingency

from pipeline.evaluation import dataset_shift
from pipeline.evaluation.metrics import CONFIDENCE_LEVEL
from pipeline.evaluation.sample_size import HALF_WIDTH
from pipeline.report.gradcam import UNIFORM_BORDER_SHARE
from pipeline.report.results import Estimate, Results, as_estimate
from pipeline.report.tables import (
    BASELINE_LABELS,
    NO_INTERVAL,
    format_difference,
    format_estimate,
    format_interval,
    format_number,
    format_percent,
)

CHANCE_AUROC = 0.5
NAMED_WINNERS = 3  # candidates in the sentence about ranks
ESTIMATE_TYPES = {
    "fixed": "fixed: nothing was chosen on these images",
    "cross-fitted": "cross-fitted: what was chosen for an image was chosen on other patients",
    "corrected": "corrected for the choice of {} on these images",
    "apparent": "apparent: chosen and evaluated on the same images, so optimistic",
}


@dataclass(frozen=True)
class Caveat:
    title: str
    detail: str
    section: str  # id of the section that shows the metrics


def describe_headline(results: Results) -> str:
    """Return the title of the page: the pre-specified bag with its F1."""
    count, estimate = len(results.config.bag_members), results.estimate(results.bag, "f1")
    return f"Bag of {_plural(count, 'seed')}: F1 {format_estimate(estimate)}"


def describe_estimate(results: Results, model: str) -> str:
    """Say in words what kind of estimate the F1 of a model is, with the apparent one if it was corrected."""
    estimate = results.estimate(model, "f1")
    if estimate.missing:
        return f"undefined ({estimate.reason})"
    params = results.config.active
    choices = ["epochs"] if params.train.keep != "last" else []
    choices += ["the weights"] if model == results.bag and params.bag.method == "greedy" else []
    choices += ["the seed"] if model == results.best and len(results.config.model_names) > 1 else []
    choices += ["the threshold"] if params.evaluate.operating_point != "half" else []
    sentence = ESTIMATE_TYPES[estimate.estimate_type].format(_join(choices))
    if estimate.estimate_type == "corrected":
        sentence += f"; apparent F1 {format_estimate(results.apparent(model, 'f1'))}"
    return f"{sentence}; no epoch was selected" if params.train.keep == "last" else sentence


def describe_images(results: Results) -> str:
    """Say on how many images and patients the metrics are, and how they were predicted."""
    counts, cross_validated = results.counts, results.config.active.split.cross_validate
    images, method = f"{counts['images']} validation images", ""
    if cross_validated:
        images = f"all {counts['images']} labeled images"
        method = ", each predicted out of fold by networks that were not trained on its patient"
    negatives = counts["images"] - counts["positives"]
    if not results.patients_known:
        unknown = "their patients are not known: each image, with its duplicates, counts as one"
        images = f"{images}, {counts['positives']} positive and {negatives} negative"
        return f"{images} ({unknown}){method.replace('its patient', 'it')}"
    images = f"{images} of {_plural(counts['patients'], 'patient')}"
    positive = f"{counts['positives']} positive ({_plural(counts['positive_patients'], 'patient')})"
    negative = f"{negatives} negative ({_plural(counts['negative_patients'], 'patient')})"
    return f"{images}, {positive} and {negative}{method}"


def describe_ranks(results: Results) -> str:
    """Say how often each candidate has the highest F1 in a resample of the patients.

    The sentence is empty for a single seed, and where there are too few patients for an interval, and so for resamples.
    """
    ranks = results.ranks
    if (
        len(results.config.model_names) < 2
        or ranks.isna().any()
        or not results.estimate(results.bag, "f1").has_interval
    ):
        return ""
    named = list(dict.fromkeys([*map(str, ranks.index[:NAMED_WINNERS]), results.bag]))
    winners = [f"{name} in {format_percent(float(ranks[name]))}" for name in named]
    sentence = f"The highest F1 in resamples of the patients is that of {', '.join(winners)} ({len(ranks)} candidates)."
    certain = ranks.iloc[0] >= CONFIDENCE_LEVEL
    verdict = (
        ""
        if certain
        else f" No candidate wins in {100 * CONFIDENCE_LEVEL:g} %: these images do not say which is the best."
    )
    return sentence + verdict


def describe_sample_size(results: Results) -> str:
    """Say how many more patients narrow intervals of sensitivity and specificity would take."""
    needs, unknown = [], []
    for metric, kind, label in (("recall", "positive", "sensitivity"), ("specificity", "negative", "specificity")):
        more = results.more_patients[metric]
        if more is None:
            unknown.append(f"How many {kind} patients the {label} takes cannot be said: there are fewer than two.")
        elif more:
            needs.append(f"about {more} more {kind} patients for the {label}")
    if needs:
        needs = [f"A half-width of {HALF_WIDTH} would take {', and '.join(needs)}."]
    return " ".join([*needs, *unknown]) or f"The intervals of sensitivity and specificity are within ± {HALF_WIDTH}."


def compare_with_bag(results: Results) -> str:
    """Say whether the best seed or the bag has the higher F1."""
    difference = results.difference(results.best, results.bag, "f1")
    if difference.missing or not difference.has_interval:
        return f"{results.best} cannot be compared with the bag: {difference.reason or NO_INTERVAL}."
    verdict = _verdict(difference, "has a higher F1 than", "has a lower F1 than", "does not differ clearly from")
    sentence = f"{results.best} {verdict} the bag: difference in F1 {format_difference(difference)}."
    if len(results.config.model_names) < 2:
        return sentence
    return f"{sentence} This favors {results.best}, which was selected by F1 on these images."


def describe_gain(results: Results, baseline: str) -> str:
    """Give the gain of the bag over a shortcut baseline in AUROC, which needs no threshold, and in F1."""
    label, auroc = _baseline_label(results, baseline), results.gain_over_baseline(baseline, "auroc")
    if auroc.missing:
        return f"{label}: – ({auroc.reason})."
    gains = f"AUROC {format_difference(auroc)}, F1 {format_difference(results.gain_over_baseline(baseline, 'f1'))}"
    if not auroc.has_interval:
        return f"{label}: gain in {gains}; without an interval this may be chance."
    verdict = _verdict(
        auroc, "the bag has the higher AUROC", "the baseline has the higher AUROC", "no clear difference in AUROC"
    )
    return f"{label}: {verdict}; gain in {gains}."


def unbeaten_baselines(results: Results) -> list[str]:
    """Return the shortcut baselines over which the gain in AUROC has an interval that includes 0 or is negative."""
    gains = {name: results.gain_over_baseline(name, "auroc") for name in results.baselines}
    return [name for name, gain in gains.items() if not gain.missing and not gain.low > 0]


def describe_source_probe(results: Results) -> str:
    """Say how well the features of the network tell source or cluster, given the label, compared with a thumbnail."""
    row = results.source_probe["network"]
    names = ("network", "thumbnail", "difference")
    network, thumbnail, difference = (as_estimate(results.source_probe[name]) for name in names)
    if network.missing:
        return f"Unavailable: {network.reason}."
    kind = results.probed_property
    sentence = (
        f"The features of {results.config.bag_members[0]} tell the {kind} with AUROC {format_estimate(network)}, 16×16 "
        f"thumbnails with {format_estimate(thumbnail)}"
    )
    if difference.has_interval:
        verdict = _verdict(difference, "better than", "worse than", "not clearly better or worse than")
        sentence += f": {verdict} a thumbnail, difference {format_difference(difference)}"
    counts = (
        f"{row['images']:.0f} images of {row['patients']:.0f} patients, {row['sources']:.0f} {kind}s in "
        f"{_plural(int(row['labels']), 'label')}"
    )
    return f"{sentence} ({counts}; the network was trained on none of them)."


def describe_expected_accuracy(results: Results) -> str:
    """Give the expected accuracy on the test set, or why there is none."""
    accuracy = as_estimate(results.summary["bag"], "expected_accuracy")
    if accuracy.missing:
        limits = f"; the range that this leaves is {format_interval(accuracy)}" if accuracy.has_interval else ""
        return f"{accuracy.reason}{limits}"
    return f"{format_estimate(accuracy)}, {describe_estimation(results)}"


def describe_estimation(results: Results) -> str:
    """Say how the accuracy was estimated, and whether from apparent predictions."""
    method = str(results.summary["bag"]["expected_accuracy_method"])
    is_apparent = results.apparent(results.bag, "f1").estimate_type == "apparent"
    return f"{method}, from apparent predictions, so optimistic" if is_apparent else method


def describe_test_prevalence(results: Results) -> str:
    """Give the estimated prevalence of the test set, and whether it differs from that of the validation set."""
    estimate = as_estimate(results.summary["bag"], "estimated_test_prevalence")
    if estimate.missing:
        return "– (no test images, or the probabilities cannot be calibrated)"
    if not estimate.has_interval:
        return f"{format_percent(estimate.value)} ({NO_INTERVAL})"
    interval = f"({format_percent(estimate.low)} to {format_percent(estimate.high)})"
    verdict = (
        "which differs from"
        if results.summary["bag"]["test_prevalence_differs"]
        else "which does not differ clearly from"
    )
    validation = format_percent(float(results.validation["label"].mean()))
    return f"{format_percent(estimate.value)} {interval}, {verdict} the {validation} of the validation set"


def describe_shift(results: Results) -> str:
    """Say whether any test of distribution shift fails."""
    if found := dataset_shift.describe_shift(results.shift):
        return f"{found[0].upper()}{found[1:]}."
    tested = results.shift[results.shift["p"].notna()]
    if tested.empty:
        return "Not tested."
    level = dataset_shift.SIGNIFICANCE_LEVEL
    return (
        f"No test finds a difference (lowest adjusted {format_p(tested['adjusted_p'].min())}, level {level}). "
        "This does not prove that there is none: with few patients a test sees only large differences."
    )


def describe_clusters(results: Results) -> str:
    """Say whether the label depends on how an image was acquired and stored."""
    clusters = results.clusters
    if clusters.empty:
        return "No acquisition clusters were found."
    p = cluster_p(clusters)
    auroc = format_number(float(clusters["auroc"].iloc[0]))
    if np.isnan(p):
        return f"{len(clusters)} acquisition clusters; whether the label depends on them cannot be tested."
    verdict = "depends" if p < dataset_shift.SIGNIFICANCE_LEVEL else "does not clearly depend"
    return (
        f"The label {verdict} on the cluster of an image (χ² test in which a patient counts once per cluster, "
        f"{format_p(p)}); the clusters alone predict it with AUROC {auroc} (apparent)."
    )


def format_p(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def cluster_p(clusters: pd.DataFrame) -> float:
    """Test whether positive and negative patients are distributed alike over the clusters; NaN without both."""
    counts = clusters[["positive_groups", "negative_groups"]].to_numpy()
    counts = counts[counts.sum(axis=1) > 0]
    if len(counts) < 2 or not counts.sum(axis=0).all():
        return np.nan
    return float(chi2_contingency(counts).pvalue)


def find_caveats(results: Results, border: Estimate) -> list[Caveat]:
    """Return the caveats that apply, the most important first.

    Args:
        results: of the earlier stages.
        border: the mean share of the Grad-CAM heatmaps in the border.
    """
    caveats = [
        *_synthetic_images(results), *_distribution_shift(results), *_confounding(results), *_few_positives(results),
        *_prevalence_shift(results), *_border_attention(border),
    ]  # fmt: skip
    if not results.patients_known:
        detail = "The same patient may be in training and validation: metrics may be optimistic, intervals too narrow."
        caveats.append(Caveat("Patient identifiers are missing", detail, "data"))
    if results.estimate(results.bag, "f1").estimate_type == "apparent":
        detail = "What was chosen on these images is evaluated on them: too few patients to cross-fit or to correct it."
        caveats.append(Caveat("Apparent estimates are optimistically biased", detail, "operating-point"))
    if caveat := next(iter(results.operating_points["caveat"]), ""):
        caveats.append(Caveat("Sensitivity is not assured", f"{caveat[0].upper()}{caveat[1:]}.", "operating-point"))
    if not results.is_externally_validated:
        detail = "All metrics are of the sources that the models were trained on."
        caveats.append(Caveat("No external validation", detail, "external"))
    return caveats


def _synthetic_images(results: Results) -> list[Caveat]:
    if results.config.active.download.source != "phantom":
        return []
    return [Caveat("Synthetic images", "The metrics say nothing about real patients.", "data")]


def _distribution_shift(results: Results) -> list[Caveat]:
    if not dataset_shift.describe_shift(results.shift):
        return []
    return [Caveat("The test images differ from the labeled ones", describe_shift(results), "shift")]


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
    if auroc.missing or not auroc.has_interval:
        detail = f"AUROC of the source alone: {format_estimate(auroc)}."
        if auroc.reason and not auroc.missing:
            detail = f"{detail[:-1]}, without an interval ({auroc.reason})."
        caveats.append(Caveat("Confounding by source cannot be assessed", detail, "shortcuts"))
    elif auroc.low > CHANCE_AUROC:
        detail = (
            f"The source alone predicts the label with AUROC {format_estimate(auroc)}. "
            "Sensitivity and specificity may differ for other sources, and so may the PPV and NPV."
        )
        caveats.append(Caveat("The label is confounded with the source", detail, "shortcuts"))
    probe = as_estimate(results.source_probe["network"])
    if probe.low > CHANCE_AUROC:
        kind = results.probed_property
        detail = (
            f"Given the label, a linear classifier on the features of {results.config.bag_members[0]} tells the {kind} "
            f"with AUROC {format_estimate(probe)}. The model can use the {kind} in place of the disease."
        )
        caveats.append(Caveat(f"The features tell the {kind} beyond the label", detail, "shortcuts"))
    if auroc.missing and cluster_p(results.clusters) < dataset_shift.SIGNIFICANCE_LEVEL:
        caveats.append(Caveat("The label depends on how images were acquired", describe_clusters(results), "shift"))
    slices = results.slices.query("by == 'source' and metric == 'auroc' and model == @results.bag")
    near_chance = slices[slices["low"] <= CHANCE_AUROC].sort_values("value")
    if len(near_chance):
        worst = near_chance.iloc[0]
        detail = f"AUROC on the images of source {worst['slice']}: {format_estimate(as_estimate(worst))}."
        caveats.append(Caveat("Not clearly better than chance within one source", detail, "slices"))
    return caveats


def _few_positives(results: Results) -> list[Caveat]:
    count = results.counts["positives"]
    if count == 0:
        return [Caveat("No positive validation images", "Sensitivity cannot be estimated.", "models")]
    if results.more_patients["recall"] == 0:
        return []
    of_patients = f" ({_plural(results.counts['positive_patients'], 'patient')})" if results.patients_known else ""
    sensitivity = results.estimate(results.bag, "recall")
    detail = f"Sensitivity {format_estimate(sensitivity)}. {describe_sample_size(results)}"
    return [Caveat(f"Only {_plural(count, 'positive validation image')}{of_patients}", detail, "models")]


def _prevalence_shift(results: Results) -> list[Caveat]:
    if not results.summary["bag"]["test_prevalence_differs"]:
        return []
    detail = f"Estimated: {describe_test_prevalence(results)}."
    return [Caveat("Another prevalence in the test set", detail, "prevalence")]


def _border_attention(border: Estimate) -> list[Caveat]:
    if not border.low > UNIFORM_BORDER_SHARE:
        return []
    detail = (
        f"{format_percent(border.value)} ({format_percent(border.low)} to {format_percent(border.high)}) of the "
        f"heatmaps of a random sample lies in the border, which is {format_percent(UNIFORM_BORDER_SHARE)} of the area."
    )
    return [Caveat("Grad-CAM highlights the image border", detail, "gradcam")]


def _baseline_label(results: Results, baseline: str) -> str:
    return BASELINE_LABELS.get(results.baselines[baseline], baseline)


def _join(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _verdict(difference: Estimate, better: str, worse: str, unclear: str) -> str:
    """Choose by whether the interval of the difference lies above 0, below 0, or includes 0."""
    return better if difference.low > 0 else worse if difference.high < 0 else unclear
