"""Predict every image with every model."""

from pathlib import Path

from stages.common import stage


@stage
def evaluate() -> None:
    """Write the predictions of the models, the model soup and the shortcut baselines, scores, curves and features."""
    import numpy as np

    from pipeline.core import memory
    from pipeline.core.config import load_config
    from pipeline.data.manifest import read_split
    from pipeline.evaluation import acquisition, seed_metrics, shortcuts
    from pipeline.inference import dataset
    from pipeline.training import determinism

    config = load_config()
    determinism.make_deterministic(cpu_threads=1)  # per network and batch; `apply_networks` uses every core
    memory.retain_freed_memory()
    table = read_split(Path("data"), config.active.split.validation_folds)
    validation = dataset.predict_dataset(config, table, determinism.select_device())
    shortcuts.write_baselines(table)
    acquisition.write_acquisition(table, np.load("data/images.npy", mmap_mode="r"))
    seed_metrics.write_seed_metrics(config, validation, table.set_index("file")["group"])


if __name__ == "__main__":
    evaluate()
