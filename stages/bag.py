"""Combine the models, and evaluate each of them and the bag."""

from pathlib import Path

from stages.common import stage


@stage
def bag() -> None:
    """Write the bag, the configuration of every candidate, metrics with intervals, and the table of all models."""
    from pipeline.core.config import load_config
    from pipeline.data.manifest import read_split
    from pipeline.evaluation import evaluate_models
    from pipeline.report import model_table

    config = load_config()
    scores = evaluate_models.write_ensembles(config)
    model_table.write_table(Path("report"), model_table.build_table(scores))
    evaluate_models.write_evaluation(config, read_split(Path("data")).set_index("file"))


if __name__ == "__main__":
    bag()
