"""Combine the models, and evaluate each of them and the bag."""

from pathlib import Path

import click

from stages.common import stage


@stage
def bag() -> None:
    """Write the bag, the configuration of every candidate, metrics with intervals, and the table of all models."""
    from pipeline.core.config import load_config
    from pipeline.data.manifest import read_split
    from pipeline.evaluation import evaluate_models, external_validation, operating_point
    from pipeline.report import model_table

    config = load_config()
    table = read_split(Path("data"), config.active.split.validation_folds).set_index("file")
    scores = evaluate_models.write_ensembles(config, table["group"])
    evaluation = evaluate_models.write_evaluation(config, table)
    intervals = evaluation.tables["metrics/intervals.csv"]
    roles = {role: evaluation.summary[role]["model"] for role in ("bag", "best")}
    external_validation.write_external(config, table["group"], roles)
    models = model_table.build_table(scores, intervals, list(roles.values()))
    model_table.write_table(Path("report"), models, model_table.describe_estimates(models, intervals))
    validation = table[table["subset"] == "validation"]
    labels, groups = validation["label"].to_numpy(int), validation["group"].to_numpy()
    if caveat := operating_point.sensitivity_caveat(labels, groups, config.active.evaluate):
        click.echo(f"warning: {caveat}", err=True)


if __name__ == "__main__":
    bag()
