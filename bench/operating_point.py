"""Whether `operating_point: sensitivity` keeps its promise, and whether intervals at a fitted threshold cover.

Scores are normal in both classes and correlated between the images of a patient. Their AUROC is that of one member; the
ten members of a bag correlate by 0.8. The old rule takes the threshold with the highest specificity at a sensitivity of
at least 0.9 on the images, and lets each member of a vote have its own.

python bench/operating_point.py [REPLICATES]

Prints a JSON line per situation and model: the mean true sensitivity, how often it is at least 0.9 with the Monte Carlo
standard error, and the mean specificity, by the old and the new rule. Then the same for the coverage of 95 % intervals
of metrics at a fitted threshold, of fixed predictions and with the threshold fitted again in each resample.
"""

import json
import sys
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import norm

from pipeline.core.config import Config, EvaluateParams
from pipeline.evaluation import operating_point
from pipeline.evaluation.cross_fitted_predictor import CrossFittedPredictor
from pipeline.evaluation.intervals import confidence_intervals
from pipeline.evaluation.metric_tables import ValidationSet, include_threshold_variation

SIZES = [(175, 20), (1527, 157)]  # images and positive images
CLUSTERS = {"singletons": (1, 0.0), "mild": (2, 0.3), "clustered": (4, 0.7)}  # most images of a patient; correlation
AUROCS = [0.9, 0.955]
MEMBERS, MEMBER_CORRELATION = 10, 0.8
MIN_SENSITIVITY = 0.9
POPULATION = 20_000  # images per class
COMBINE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one model": lambda members: members[:, 0],
    "mean of 10": lambda members: members.mean(axis=1),
    "vote of 10": lambda members: np.median(members, axis=1),
}
REPLICATES = 400


def draw(
    rng: np.random.Generator, counts: tuple[int, int], auroc: float, largest: int, correlation: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw labels (N,), groups (N,) and the members' P(positive) (N, MEMBERS); `counts` are negatives and positives."""
    labels, total = np.repeat([0, 1], counts), sum(counts)
    groups = np.concatenate([label * total + _groups(rng, count, largest) for label, count in enumerate(counts)])
    _, index = np.unique(groups, return_inverse=True)
    own = np.sqrt(correlation) * rng.normal(size=len(index))[index] + np.sqrt(1 - correlation) * rng.normal(size=total)
    separation = np.sqrt(2) * norm.ppf(auroc)
    noise = rng.normal(size=(total, MEMBERS))
    members = np.sqrt(MEMBER_CORRELATION) * own[:, None] + np.sqrt(1 - MEMBER_CORRELATION) * noise
    latent = members + separation * labels[:, None]
    return labels, groups, expit(separation * latent - separation**2 / 2 + logit(0.1))


def _groups(rng: np.random.Generator, count: int, largest: int) -> np.ndarray:
    sizes = rng.integers(1, largest + 1, count)
    return np.repeat(np.arange(count), sizes)[:count]


def keep_sensitivity(images: int, positives: int, auroc: float, clusters: str, replicates: int) -> None:
    """Print the delivered sensitivity and specificity of the old and the new rule."""
    rng, params = np.random.default_rng(0), EvaluateParams(operating_point="sensitivity", min_sensitivity=0.9)
    labels, _, population = draw(rng, (POPULATION, POPULATION), auroc, 1, 0)
    combined = {model: combine(population) for model, combine in COMBINE.items()}
    results: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(replicates):
        validation, groups, members = draw(rng, (images - positives, positives), auroc, *CLUSTERS[clusters])
        for model, combine in COMBINE.items():
            scores = combine(members)
            predicted = {
                "new": combined[model] >= operating_point.choose_threshold(validation, scores, groups, params),
                "old": combined[model] >= point_threshold(validation, scores),
            }
            if model.startswith("vote"):
                own = [point_threshold(validation, member) for member in members.T]
                predicted["old"] = 2 * (population >= own).sum(axis=1) >= MEMBERS
            for rule, positive in predicted.items():
                rates = positive[labels == 1].mean(), 1 - positive[labels == 0].mean()
                results.setdefault((model, rule), []).append(rates)
    for (model, rule), rates in results.items():
        sensitivity, specificity = np.array(rates).T
        kept = (sensitivity >= MIN_SENSITIVITY).mean()
        line = {"images": images, "positives": positives, "auroc": auroc, "clusters": clusters}
        line |= {"model": model, "rule": rule, "sensitivity": round(sensitivity.mean(), 3), "kept": round(kept, 3)}
        error = np.sqrt(kept * (1 - kept) / replicates)
        print(json.dumps(line | {"error": round(error, 3), "specificity": round(specificity.mean(), 3)}), flush=True)


def point_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the highest threshold with a sensitivity of at least 0.9 on these images, the old rule."""
    positives = np.sort(scores[labels == 1])
    return float(positives[int(np.floor(len(positives) * (1 - MIN_SENSITIVITY) + 1e-9))])


def cover(images: int, positives: int, clusters: str, rule: str, replicates: int, auroc: float = 0.955) -> None:
    """Print the coverage of the intervals of one model's metrics at a fitted threshold."""
    rng, separation = np.random.default_rng(1), np.sqrt(2) * norm.ppf(auroc)
    settings = {"operating_point": rule, "recalibration": "none", "resamples": 300}
    params = EvaluateParams.model_validate(settings)
    config = Config.model_validate({"profile": "bench", "bench": {"evaluate": params.model_dump()}})
    prevalence = positives / images
    results: dict[tuple[str, str], list[tuple[bool, float]]] = {}
    for _ in range(replicates):
        labels, groups, members = draw(rng, (images - positives, positives), auroc, *CLUSTERS[clusters])
        validation = ValidationSet(labels, groups, params.resamples)
        predictor = CrossFittedPredictor(config, validation, pd.DataFrame(members[:, :1], columns=["one"]))
        cut = (logit(predictor.ensemble_config.threshold) - logit(0.1)) / separation + separation / 2
        recall, fpr = norm.sf(cut - separation), norm.sf(cut)
        f1 = 2 * prevalence * recall / (prevalence * recall + (1 - prevalence) * fpr + prevalence)
        truth = {"f1": f1, "recall": recall, "specificity": 1 - fpr}
        fixed = confidence_intervals(labels, predictor.predictions.predicted, groups)
        refitted = include_threshold_variation(fixed, predictor.bootstrap_metrics(validation))
        for kind, table in {"fixed": fixed, "refitted": refitted}.items():
            for metric, value in truth.items():
                row = table.set_index("metric").loc[metric]
                covers = row["low"] - 1e-9 <= value <= row["high"] + 1e-9
                results.setdefault((metric, kind), []).append((covers, row["high"] - row["low"]))
    for (metric, kind), values in results.items():
        coverage, width = np.mean(values, axis=0)
        line = {"images": images, "positives": positives, "auroc": auroc, "clusters": clusters, "rule": rule}
        line |= {"metric": metric, "threshold": kind, "coverage": round(coverage, 3)}
        error = np.sqrt(coverage * (1 - coverage) / replicates)
        print(json.dumps(line | {"error": round(error, 3), "width": round(width, 3)}), flush=True)


def main(replicates: int = REPLICATES) -> None:
    for images, positives in SIZES:
        for clusters in CLUSTERS:
            for auroc in AUROCS:
                keep_sensitivity(images, positives, auroc, clusters, replicates)
            for rule in ("best_f1", "sensitivity"):
                cover(images, positives, clusters, rule, replicates // 2)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
