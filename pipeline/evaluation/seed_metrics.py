"""Scores and curves of the seeds on the validation set."""

from pathlib import Path

import pandas as pd

from pipeline.core.config import Config
from pipeline.core.files import write_json
from pipeline.evaluation import curves, operating_point
from pipeline.evaluation.metrics import apply_threshold, best_model, score_predictions


def write_seed_metrics(config: Config, validation: pd.DataFrame, groups: pd.Series) -> None:
    """Write `metrics/evaluate.json` with the scores of every seed, and its plots.

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
    plots, best = Path("plots"), best_model(scores)
    curves.draw_roc(plots / "roc.png", labels, models)
    curves.draw_precision_recall(plots / "precision_recall.png", labels, models)
    curves.draw_confusion_matrix(plots / "confusion.png", labels, predicted[best].to_numpy(), f"{best}, validation set")
    histories = {name: pd.read_csv(Path("models", name, "history.csv")) for name in config.model_names}
    curves.draw_learning_curves(plots / "training.png", histories)
