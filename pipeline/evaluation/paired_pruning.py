"""Paired comparison of the trials of a hyperparameter search, seed by seed, on the images that validate them.

One seed says little of a recipe, and a trial that was stopped for its first seed's sake may have been the best. So the
difference to the best trial has an interval for new patients and new seeds. How much differences vary between seeds is
estimated from all trials together, which is why few seeds of each suffice (`bench/tuning.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.core.config import load_config
from pipeline.core.files import read_csv
from pipeline.evaluation.compare_recipes import Recipe, seed_mean_interval
from pipeline.evaluation.metric_tables import Predictions, ValidationSet
from pipeline.evaluation.metrics import apply_threshold, kept_epoch

TABLES = ["params.yaml", "data/manifest.csv", "data/split.csv"]


def seed_files(seeds: Sequence[int]) -> list[str]:
    """Return the paths that `load_trial` reads."""
    names = ("history.csv", "validation.csv")
    return [*TABLES, *(f"models/seed-{seed}/{name}" for seed in seeds for name in names)]


def load_trial(folder: Path, name: str, seeds: Sequence[int]) -> Recipe:
    """Read what the seeds predicted for the validation images, after the epochs whose weights are kept."""
    config = load_config(folder / "params.yaml")
    manifest, split = (
        pd.read_csv(folder / "data" / table, dtype=str, keep_default_na=False).set_index("file")
        for table in ("manifest.csv", "split.csv")
    )
    columns = {}
    for seed in seeds:
        models = folder / f"models/seed-{seed}"
        histories = dict(list(read_csv(models / "history.csv").groupby("fold")))
        columns[f"seed-{seed}"] = pd.concat(
            rows.set_index("file")[_kept_column(histories[fold], config.active.train.keep)]
            for fold, rows in read_csv(models / "validation.csv").groupby("fold")
        )
    labels = manifest["label"].replace("", "-1").astype(int)
    predictions = pd.DataFrame(columns).join(labels).join(manifest["xxh128"]).join(split["group"])
    return Recipe(name, config, predictions.sort_index())


def _kept_column(history: pd.DataFrame, keep: str) -> str:
    return f"epoch-{history['epoch'].iloc[kept_epoch(history.to_dict('records'), keep)]}"  # type: ignore[arg-type]


@dataclass(frozen=True)
class TrialMetrics:
    """A metric of a trial's seeds: a column per seed, a row for the validation set and for each of its resamples."""

    recipe: Recipe
    metric: str

    @cached_property
    def samples(self) -> pd.DataFrame:
        table = self.recipe.predictions
        resamples = self.recipe.config.active.evaluate.resamples
        validation = ValidationSet(table["label"].to_numpy(), table["group"].to_numpy(), resamples)
        return pd.DataFrame(
            {
                name: validation.bootstrap_metrics(Predictions(apply_threshold(scores), scores))[self.metric]
                for name, scores in ((name, table[name].to_numpy()) for name in table.filter(regex="^seed-"))
            }
        )

    @property
    def values(self) -> dict[str, float]:
        """The metric of each seed, by name."""
        return {str(name): float(value) for name, value in self.samples.iloc[0].items()}


def paired_difference(
    trial: pd.DataFrame, best: pd.DataFrame, others: Sequence[Mapping[str, float]] = ()
) -> tuple[float, float, float]:
    """Return the mean difference of a trial to the best one over the seeds of both, and the ends of its 95 % interval.

    Args:
        trial: `TrialMetrics.samples`.
        best: those of the best trial.
        others: `TrialMetrics.values` of other trials, from which the variance between seeds is estimated too.

    Returns:
        NaN for the ends if nothing is known of the variance between seeds, or if nothing varies.
    """
    seeds = [seed for seed in trial if seed in best]
    differences = (trial[seeds] - best[seeds]).to_numpy()
    reference = best.iloc[0]
    pool = [np.array([value - reference[seed] for seed, value in other.items() if seed in best]) for other in others]
    pool = [values for values in pool if len(values) > 1]
    low, high = seed_mean_interval(differences, pool) if pool or len(seeds) > 1 else (np.nan, np.nan)
    return float(differences[0].mean()), low, high
