"""Make MLflow show what DVC holds, and promote the best model."""

from pathlib import Path

import click

from stages.common import stage


@stage
def promote() -> None:
    """Complete the MLflow runs, register the best model and move its aliases; write metrics/promotion.json."""
    import numpy as np

    from pipeline.config import load
    from pipeline.dataset import read_table
    from pipeline.evaluation.metrics import best_model
    from pipeline.files import read_json, write_json
    from pipeline.tracking import registry
    from pipeline.tracking.runs import SeedRun, finish_parent, parent_run
    from pipeline.tracking.store import connect

    config = load()
    store = connect(config.model_name)
    parent = parent_run(store, config)
    models, runs = Path("models"), {}
    for seed in config.seeds:
        folder = models / f"seed-{seed}"
        # The environment is part of the fingerprint, and may have been another machine's.
        runs[folder.name] = SeedRun(store, config, parent, seed, read_json(folder / "model.json")["fingerprint"])
        runs[folder.name].finish(folder)
    bag = read_json(Path("metrics/bag.json"))[config.active.bag.method]
    finish_parent(store, parent, Path("report"), bag)

    scores = read_json(Path("metrics/evaluate.json"))
    best = best_model(scores)
    table = read_table(Path("data"))
    example = np.load("data/images.npy", mmap_mode="r")[table.index[table["subset"] == "validation"][0]]
    version = registry.register(store, config.model_name, runs[best], models / best, example, scores[best])
    standing = registry.promote(store, config.model_name, version)
    write_json(Path("metrics/promotion.json"), {"candidate": best, **standing})
    verdict = "is champion" if standing["promoted"] else "is challenger; the champion stays"
    click.echo(f"{config.model_name}: {best} {verdict} (validation F1 {standing['challenger']['validation_f1']:.4f})")


if __name__ == "__main__":
    promote()
