"""Coverage of the intervals of `cxr compare` for the mean over the seeds, by simulation.

python bench/recipe_intervals.py [SIMULATIONS] [SEEDS] [SEED_SD]

Two recipes of equal quality are compared on 175 images (20 positive) of patients with 1 to 4 images. Both err on the
same patients, each recipe also on its own, and each training on its own; SEED_SD is the standard deviation of what a
training adds to the separation of the classes and to the intercept, on the scale of the score. `coverage` is the share
of 95 % intervals that contain 0, the true difference for new seeds and new patients, and `patients_only` that of the
bootstrap over patients, which takes the seeds as fixed.
"""

import json
import sys

import numpy as np
import pandas as pd
from common import compare_metrics
from scipy.special import expit

from pipeline.evaluation.compare_recipes import compare_seeds
from pipeline.evaluation.intervals import bootstrap_weights
from pipeline.evaluation.metrics import compute_metrics

IMAGES, POSITIVES, RESAMPLES = 175, 20, 400
SEPARATION = 2.6  # gives an AUROC of about 0.955
PATIENT_SD, IMAGE_SD, RECIPE_SD, TRAINING_SD = 0.6, 0.5, 0.4, 0.5
METRICS = ["f1", "recall", "specificity", "auroc", "average_precision", "loss", "brier"]


def draw_groups(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return the patient of each of `count` images."""
    return np.repeat(np.arange(count), rng.integers(1, 5, count))[:count]


def train(rng: np.random.Generator, labels: np.ndarray, shared: np.ndarray, seed_sd: float) -> pd.Series:
    separation, intercept = rng.normal((SEPARATION, 0), seed_sd)
    logits = shared + separation * (labels - 0.5) + intercept + rng.normal(0, TRAINING_SD, len(labels))
    return expit(1.6 * logits - 1)


def main(simulations: int = 400, seeds: int = 10, seed_sd: float = 0.15) -> None:
    rng = np.random.default_rng(0)
    labels = (np.arange(IMAGES) < POSITIVES).astype(int)
    tables = []
    for _ in range(simulations):
        groups = np.concatenate([draw_groups(rng, POSITIVES), IMAGES + draw_groups(rng, IMAGES - POSITIVES)])
        weights = bootstrap_weights(groups, RESAMPLES)
        case = rng.normal(0, PATIENT_SD, 2 * IMAGES)[groups] + rng.normal(0, IMAGE_SD, IMAGES)
        recipes = []
        for _ in range(2):
            shared = case + rng.normal(0, RECIPE_SD, 2 * IMAGES)[groups]
            models = [train(rng, labels, shared, seed_sd) for _ in range(seeds)]
            recipes.append([compute_metrics(labels, model >= 0.5, model, weights) for model in models])
        table = compare_seeds(*recipes, METRICS).set_index("metric")
        fixed_seeds = compare_metrics(*(sum(samples) / seeds for samples in recipes), METRICS).set_index("metric")
        tables.append(table[["low", "high"]].join(fixed_seeds[["low", "high"]].add_suffix("_fixed")))
    results = pd.concat(tables)
    results["coverage"] = (results["low"] <= 0) & (results["high"] >= 0)
    results["width"] = results["high"] - results["low"]
    results["patients_only"] = (results["low_fixed"] <= 0) & (results["high_fixed"] >= 0)
    means = results.groupby("metric", sort=False)[["coverage", "patients_only", "width"]].mean()
    for metric, row in means.round(3).iterrows():
        print(json.dumps({"seeds": seeds, "seed_sd": seed_sd, "metric": metric} | row.to_dict()))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:3]), *(float(argument) for argument in sys.argv[3:4]))
