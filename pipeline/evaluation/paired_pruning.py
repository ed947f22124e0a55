"""Paired comparison of the trials of a hyperparameter search, seed by seed, on the images that validate them.

One seed says little of a recipe, and a trial that was stopped for its first seed's sake may have been the best. So the
difference to the best trial has an interval for new patients and new seeds. How much it varies between seeds is
estimated from all trials together, which is why few seeds of each suffice (`bench/tuning.py`).
"""

import numpy as np
import pandas as pd

from pipeline.evaluation.compare_recipes import Recipe, seed_mean_interval
from pipeline.evaluation.metric_tables import Predictions, ValidationSet
from pipeline.evaluation.metrics import CONFIDENCE_LEVEL, apply_threshold


def resample_metric(recipe: Recipe, metric: str) -> pd.DataFrame:
    """Return a metric of a trial's seeds: a column per seed, a row for the validation set and for each resample.

    Metrics that need a threshold are those at 0.5.
    """
    table = recipe.predictions["validation"]
    validation = ValidationSet(
        table["label"].to_numpy(), table["group"].to_numpy(), recipe.config.active.evaluate.resamples
    )
    scores = {name: table[name].to_numpy() for name in recipe.config.model_names}
    models = {name: Predictions(apply_threshold(values), values) for name, values in scores.items()}
    return pd.DataFrame({name: validation.bootstrap_metrics(model)[metric] for name, model in models.items()})


def is_worse(trial: pd.DataFrame, best: pd.DataFrame, seed_metrics: pd.DataFrame, comparisons: int) -> bool:
    """Tell whether the interval of a trial's mean difference to the best trial, over the seeds of both, is below zero.

    The confidence level is 1 - (1 - `CONFIDENCE_LEVEL`) / `comparisons`: the best of many trials had luck.

    Args:
        trial: its metric on every resample, from `resample_metric`.
        best: that of the best trial.
        seed_metrics: (trials, seeds) the metric of all trials, these two too, NaN where a seed has not been trained.
            A repetition of a trial must be left out, since it would pass for one whose seeds do not vary.
        comparisons: number of trials of which the best one is the best.
    """
    variance, degrees = residual_variance(seed_metrics.to_numpy(dtype=float))
    if not degrees or np.isclose(variance, 0, atol=1e-12):
        return False  # nothing is known of the variance between seeds
    seeds = [seed for seed in trial if seed in best]
    confidence = 1 - (1 - CONFIDENCE_LEVEL) / comparisons
    differences = (trial[seeds] - best[seeds]).to_numpy()
    return seed_mean_interval(differences, (2 * variance, degrees), confidence)[1] < 0


def residual_variance(values: np.ndarray) -> tuple[float, int]:
    """Return the variance of values (rows, columns) about the sum of effects of row and column, and its degrees.

    Missing values are NaN. The variance is NaN without degrees of freedom.
    """
    rows, columns = np.nonzero(~np.isnan(values))
    design = np.hstack([np.eye(values.shape[0])[rows], np.eye(values.shape[1])[columns]])
    present = values[rows, columns]
    effects, _, rank, _ = np.linalg.lstsq(design, present, rcond=None)
    degrees = len(rows) - int(rank)
    return (float(((present - design @ effects) ** 2).sum()) / degrees if degrees else np.nan), degrees
