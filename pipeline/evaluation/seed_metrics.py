"""Scores and learning curves of the seeds."""

from pathlib import Path

import pandas as pd

from pipeline.core.config import Config
from pipeline.core.files import write_csv, write_json
from pipeline.evaluation import operating_point
from pipeline.evaluation.metrics import apply_threshold, score_predictions


def write_seed_metrics(config: Config, validation: pd.DataFrame, groups: pd.Series) -> None:
    """Write the scores of every seed to `metrics/evaluate.json`, and their histories to `plots/learning_curves.csv`.

    Args:
        config: names the seeds and contains the rule that chooses thresholds.
        validation: `file`, `label` and P(positive), with a column per seed.
        groups: the name of each image's group, indexed by file.
    """
    labels, models = validation["label"].to_numpy(dtype=int), validation[config.model_names]
    names = groups.loc[validation["file"]].to_numpy()
    predicted = {
        model: apply_threshold(
            scores, operating_point.choose_threshold(labels, scores.to_numpy(), names, config.active.evaluate)
        )
        for model, scores in models.items()
    }
    scores = {
        name: score_predictions(labels, models[name].to_numpy(), predicted[name].to_numpy())
        for name in config.model_names
    }
    write_json(Path("metrics/evaluate.json"), scores)
    histories = {name: pd.read_csv(Path("models", name, "history.csv")) for name in config.model_names}
    write_csv(Path("plots/learning_curves.csv"), pd.concat(histories, names=["model"]).reset_index("model"))
