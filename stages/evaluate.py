"""Predict every image with every model."""

from pathlib import Path

from stages.common import stage


@stage
def evaluate() -> None:
    """Write the predictions of the models, the model soup and the shortcut baselines, with scores and curves."""
    from pipeline.core import memory
    from pipeline.core.config import load_config
    from pipeline.data.manifest import read_split
    from pipeline.evaluation import seed_metrics, shortcuts
    from pipeline.inference import dataset
    from pipeline.training import determinism

    config = load_config()
    determinism.make_deterministic(config.active.evaluate.cpu_threads)
    memory.retain_freed_memory()
    table = read_split(Path("data"))
    validation = dataset.predict_dataset(config, table, determinism.select_device())
    shortcuts.write_baselines(table)
    seed_metrics.write_seed_metrics(config, validation)


if __name__ == "__main__":
    evaluate()
