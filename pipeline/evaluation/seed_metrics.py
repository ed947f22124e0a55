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
    labels, group_names = validation["label"].to_numpy(dtype=int), groups.loc[validation["file"]].to_numpy()
    scores = {}
    for name in config.model_names:
        probabilities = validation[name].to_numpy()
        threshold = operating_point.choose_threshold(labels, probabilities, group_names, config.active.evaluate)
        scores[name] = score_predictions(labels, probabilities, apply_threshold(probabilities, threshold))
    write_json(Path("metrics/evaluate.json"), scores)
    histories = {name: pd.read_csv(Path("models", name, "history.csv")) for name in config.model_names}
    write_csv(Path("plots/learning_curves.csv"), pd.concat(histories, names=["model"]).reset_index("model"))
