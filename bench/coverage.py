"""How often 95 % intervals cover the truth, in simulations where it is known: before (`old`) and now (`new`).

Scores of both classes are normal with equal variances (binormal model), and those of a patient's images are correlated.
Patients are simulated until each class has its number of images; these numbers are fixed, as a stratified split fixes
them, and the truth is the metric of the population at their ratio. Only for the calibration intercept, which is about
the prevalence, the classes of the patients are drawn. Probabilities are the true ones, and the threshold has the
highest F1 in the population. The second model of the differences has an AUROC 1.3 times as far from 1, and its scores
correlate with those of the first by 0.8.

python bench/coverage.py [REPLICATES] [PROCESSES]

Prints a JSON line per situation and metric: coverage among the replicates that have an interval, its Monte Carlo
standard error, the mean width, and the share without an interval; then Markdown tables.
"""

import json
import sys
from collections.abc import Iterator
from multiprocessing import Pool
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from scipy.stats import binomtest, norm

from pipeline.core.markdown import markdown_table
from pipeline.evaluation.intervals import (
    bootstrap_weights,
    compare_predictions,
    confidence_intervals,
    percentile_interval,
)
from pipeline.evaluation.metric_tables import Predictions
from pipeline.evaluation.metrics import THRESHOLD_METRICS, compute_metrics, metrics_of_counts

SIZES = [(175, 20), (1527, 157)]  # images and positive images
CLUSTERS = {"singletons": (1, 0.0), "mild": (2, 0.3), "clustered": (4, 0.7)}  # most images of a patient; correlation
AUROCS = [0.8, 0.9, 0.955, 0.99, 0.999, 0.99999]
SECOND_MODEL_LOSS, SCORE_CORRELATION = 1.3, 0.8
BOOTSTRAP_RESAMPLES = 300  # of the old method
REPLICATES = 200
GRID = np.linspace(-9, 16, 100_001)  # of the scores, for integrals


def population_metrics(images: int, positives: int, auroc: float) -> tuple[float, dict[str, float]]:
    """Return the threshold on the probability and the true metrics."""
    separation, prevalence = np.sqrt(2) * norm.ppf(auroc), positives / images

    def confusion(cut: float) -> tuple[np.ndarray, ...]:
        sensitivity, fpr = norm.sf(cut - separation), norm.sf(cut)
        return tuple(
            np.array([share])
            for share in (
                prevalence * sensitivity,
                (1 - prevalence) * fpr,
                prevalence * norm.cdf(cut - separation),
                (1 - prevalence) * norm.cdf(cut),
            )
        )

    def f1(cut: float) -> float:
        return float(metrics_of_counts(*confusion(cut))[0, THRESHOLD_METRICS.index("f1")])

    cut = minimize_scalar(lambda cut: -f1(cut), bounds=(-2, separation + 3), method="bounded").x
    truth = dict(zip(THRESHOLD_METRICS, metrics_of_counts(*confusion(cut))[0], strict=True))
    logits = logit(prevalence) + separation * GRID - separation**2 / 2
    steps = np.gradient(GRID)
    weights = {1: prevalence * norm.pdf(GRID - separation) * steps, 0: (1 - prevalence) * norm.pdf(GRID) * steps}
    tp, fp = prevalence * norm.sf(GRID - separation), (1 - prevalence) * norm.sf(GRID)
    precision = np.divide(tp, tp + fp, out=np.ones_like(tp), where=tp > 0)
    truth |= {
        "auroc": auroc,
        "average_precision": (weights[1] * precision).sum() / prevalence,
        "brier": (weights[1] * expit(-logits) ** 2 + weights[0] * expit(logits) ** 2).sum(),
        "loss": (weights[1] * np.logaddexp(0, -logits) + weights[0] * np.logaddexp(0, logits)).sum(),
        "calibration_intercept": 0,
        "calibration_slope": 1,
    }
    threshold = expit(logit(prevalence) + separation * cut - separation**2 / 2)
    return float(threshold), {metric: float(value) for metric, value in truth.items()}


def draw_scores(
    rng: np.random.Generator, images: int, positives: int, clusters: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels (N,), groups (N,) and the scores of two models (N, 2), standard normal in both classes."""
    largest, correlation = CLUSTERS[clusters]
    sizes = np.concatenate([_draw_sizes(rng, count, largest) for count in (positives, images - positives)])
    groups, labels = np.repeat(np.arange(len(sizes)), sizes), np.repeat([1, 0], [positives, images - positives])
    scores = np.sqrt(correlation) * rng.standard_normal((len(sizes), 2))[groups]
    scores += np.sqrt(1 - correlation) * rng.standard_normal((images, 2))
    scores[:, 1] = SCORE_CORRELATION * scores[:, 0] + np.sqrt(1 - SCORE_CORRELATION**2) * scores[:, 1]
    return labels, groups, scores


def _draw_sizes(rng: np.random.Generator, images: int, largest: int) -> list[int]:
    """Return numbers of images per patient, from 1 to the largest, that add up to `images`."""
    sizes: list[int] = []
    while sum(sizes) < images:
        sizes.append(min(int(rng.integers(1, largest + 1)), images - sum(sizes)))
    return sizes


def draw_positives(rng: np.random.Generator, images: int, positives: int, clusters: str) -> int:
    """Return the number of positive images if each patient is positive with the probability `positives / images`."""
    sizes = np.array(_draw_sizes(rng, images, CLUSTERS[clusters][0]))
    return max(1, int(sizes[rng.random(len(sizes)) < positives / images].sum()))


def old_intervals(
    labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray, samples: pd.DataFrame
) -> dict[str, tuple[float, float]]:
    """Compute percentile intervals of the bootstrap, or Wilson's for proportions of independent images or no errors."""
    denominators = {
        "accuracy": np.ones(len(labels), bool), "recall": labels == 1, "specificity": labels == 0,
        "precision": predicted == 1,
    }  # fmt: skip
    intervals: dict[str, tuple[float, float]] = {}
    for metric, sample in samples.items():
        if metric in denominators and (len(np.unique(groups)) == len(groups) or sample[0] in (0, 1)):
            size = len(np.unique(groups[denominators[str(metric)]]))
            ends = binomtest(round(sample[0] * size), size).proportion_ci(method="wilson")
            intervals[str(metric)] = (ends.low, ends.high)
        else:
            low, high = percentile_interval(sample)
            intervals[str(metric)] = (low, high) if low < high else (np.nan, np.nan)
    return intervals


def simulate(situation: tuple[int, int, str, float, int]) -> list[dict[str, Any]]:
    """Return a row per method and metric: the situation, `coverage`, `error`, `width` and `none`."""
    images, positives, clusters, auroc, replicates = situation
    # A generator per situation, so that their Monte Carlo errors are independent.
    key = [images, list(CLUSTERS).index(clusters), AUROCS.index(auroc)]
    rng, rng_of_counts = np.random.default_rng(key), np.random.default_rng([*key, 1])
    separations, thresholds, truths = [], [], []
    for value in (auroc, 1 - (1 - auroc) * SECOND_MODEL_LOSS):
        threshold, truth = population_metrics(images, positives, value)
        separations.append(np.sqrt(2) * norm.ppf(value))
        thresholds.append(threshold)
        truths.append(truth)
    prefix = "difference in "
    truth = truths[0] | {prefix + metric: truths[0][metric] - truths[1][metric] for metric in truths[0]}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def predict(labels: np.ndarray, scores: np.ndarray) -> list[Predictions]:
        models = []
        for column, (separation, threshold) in enumerate(zip(separations, thresholds, strict=True)):
            logits = logit(positives / images) + separation * (scores[:, column] + separation * (labels - 0.5))
            probabilities = expit(logits)
            models.append(Predictions((probabilities >= threshold).astype(int), probabilities))
        return models

    for _ in range(replicates):
        labels, groups, scores = draw_scores(rng, images, positives, clusters)
        for method, metric, low, high in _intervals(labels, groups, predict(labels, scores), prefix):
            if metric in truth and metric != "calibration_intercept":
                found.setdefault((metric, method), []).append((low, high))
        count = draw_positives(rng_of_counts, images, positives, clusters)
        labels, groups, scores = draw_scores(rng_of_counts, images, count, clusters)
        model = predict(labels, scores)[0]
        table = confidence_intervals(labels, model.predicted, groups, model.probabilities).set_index("metric")
        interval = table.loc["calibration_intercept", ["low", "high"]]
        found.setdefault(("calibration_intercept", "new"), []).append(tuple(interval))
    rows = []
    for (metric, method), intervals in found.items():
        ends = np.array(intervals)
        ends = ends[~np.isnan(ends).any(axis=1)]
        row = {"images": images, "positives": positives, "patients": clusters, "auroc": auroc}
        row |= {"metric": metric, "method": method, "none": round(1 - len(ends) / replicates, 3)}
        if len(ends):
            coverage = ((ends[:, 0] <= truth[metric]) & (truth[metric] <= ends[:, 1])).mean()
            error = np.sqrt(coverage * (1 - coverage) / len(ends))
            row |= {"coverage": coverage, "error": error, "width": (ends[:, 1] - ends[:, 0]).mean()}
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def _intervals(
    labels: np.ndarray, groups: np.ndarray, models: list[Predictions], prefix: str
) -> Iterator[tuple[str, str, float, float]]:
    """Yield method, metric and the ends of the interval."""
    ours, theirs = models
    weights = bootstrap_weights(groups, BOOTSTRAP_RESAMPLES)
    samples = [compute_metrics(labels, model.predicted, model.probabilities, weights) for model in models]
    for name, (low, high) in old_intervals(labels, ours.predicted, groups, samples[0]).items():
        yield "old", name, low, high
    for metric, sample in (samples[0] - samples[1]).items():
        yield "old", prefix + str(metric), *percentile_interval(sample)
    new = confidence_intervals(labels, ours.predicted, groups, ours.probabilities)
    for name, low, high in new[["metric", "low", "high"]].to_numpy():
        yield "new", name, low, high
    for name, low, high in compare_predictions(labels, groups, ours, theirs)[["metric", "low", "high"]].to_numpy():
        yield "new", prefix + name, low, high


def main(replicates: int = REPLICATES, processes: int = 2) -> None:
    situations = [
        (images, positives, clusters, auroc, replicates)
        for images, positives in SIZES
        for clusters in CLUSTERS
        for auroc in AUROCS
    ]
    rows = []
    with Pool(processes) as pool:
        for result in pool.imap(simulate, situations):
            rows += result
            for row in result:
                print(json.dumps(row), flush=True)
    print_tables(pd.DataFrame(rows))


def print_tables(table: pd.DataFrame) -> None:
    """Print a table of all metrics, with the lowest and highest coverage of each, and one per metric."""
    columns = ["coverage", "error", "width", "none"]
    lines = []
    for metric, of_metric in table.groupby("metric", sort=False):
        cells = [str(metric)]
        for method in ("old", "new"):
            values = of_metric[(of_metric["method"] == method) & (of_metric["none"] < 0.5)]
            known = values["coverage"].dropna()
            cells.append(f"{known.min():.3f} to {known.max():.3f}" if len(known) else "–")
        lines.append([*cells, str((of_metric.query("method == 'new'")["none"] > 0.05).sum())])
    print("\n" + markdown_table(["metric", "old", "new", "situations without interval in more than 5 %"], lines))
    for metric, of_metric in table.groupby("metric", sort=False):
        wide = of_metric.pivot_table(
            index=["images", "positives", "patients", "auroc"], columns="method", values=columns, sort=False
        )
        header = ["images", "positive", "patients", "AUROC", "old", "width", "none", "new", "width", "none"]
        lines = []
        for index, row in wide.iterrows():
            cells = [str(key) for key in index]  # type: ignore[attr-defined]
            for method in ("old", "new"):
                coverage, error, width, none = (row.get((column, method), np.nan) for column in columns)
                cells += [f"{coverage:.3f} ± {error:.3f}", f"{width:.3f}", f"{none:.2f}"]
            lines.append(cells)
        print(f"\n{metric}\n\n" + markdown_table(header, lines))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
