"""Train one seed."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.common import stage

if TYPE_CHECKING:
    from pipeline.models.classifier import Classifier
    from pipeline.tracking.runs import SeedRun
    from pipeline.training.loop import Epoch


@stage
@click.option("--seed", type=int, required=True, help="K, the origin of all random numbers.")
def train(seed: int) -> None:
    """Write models/seed-K/, and log to MLflow while it trains; go on where an interrupted training stopped."""
    import pandas as pd

    from pipeline.core import memory
    from pipeline.core.config import load
    from pipeline.core.files import write_csv, write_json
    from pipeline.data.dataset import Pack
    from pipeline.data.manifest import read_split
    from pipeline.models import classifier
    from pipeline.tracking import fingerprint, tracking_uri
    from pipeline.tracking.outbox import Outbox
    from pipeline.training import determinism, distributed
    from pipeline.training.checkpoint import Checkpoint
    from pipeline.training.loop import Training
    from pipeline.training.signals import Interruption

    config = load()
    data, folder = Path("data"), Path(f"models/seed-{seed}")
    params = config.active.train
    determinism.make_deterministic(params.cpu_threads, compiled=params.compile)
    memory.keep_freed()
    with Interruption() as stop, distributed.joined() as processes:
        pack = Pack(data / "images.npy", determinism.device())
        environment = determinism.environment(processes.count)
        mark = fingerprint.of_training(config, seed=seed, environment=environment)
        checkpoint = Checkpoint(tracking_uri.root() / "checkpoints", mark)
        table = read_split(data, config.active.split.fold(seed))
        training = Training(params, seed, table, pack, data / "weights", processes)
        if not processes.leads:
            training.run(checkpoint, lambda *_: None, stop)
            return

        def open_run() -> "SeedRun":
            from pipeline.tracking.runs import SeedRun, parent_run
            from pipeline.tracking.store import connect

            store = connect(config.model_name)
            return SeedRun(store, config, parent_run(store, config), seed, mark).watch()

        tracking_uri.check_reachable()
        with checkpoint.alone(), tempfile.TemporaryDirectory() as scratch, Outbox(open_run) as outbox:

            def asked_to_stop() -> int:
                outbox.check()
                return stop()

            def log(epoch: "Epoch", best: "Classifier | None") -> None:
                outbox.put(lambda run: run.log_epoch(epoch.row(), epoch.ended, epoch.images_per_second))
                if best:
                    classifier.save(best, Path(scratch))  # while MLflow is away, over what it has not yet taken
                    outbox.put(lambda run: run.take_checkpoint(Path(scratch, classifier.WEIGHTS)))

            trained = training.run(checkpoint, log, asked_to_stop)
            facts = {"fingerprint": mark, "environment": environment}
            classifier.save(trained.network, folder)
            classifier.describe(trained.network, folder, facts)
            write_csv(folder / "history.csv", pd.DataFrame([epoch.row() for epoch in trained.history]))
            name = fingerprint.seed_name(config, seed, mark)  # by which DVC's figures name the MLflow run
            write_json(folder / "metrics.json", {"run": name, "epoch": trained.best.epoch, **trained.best.scores})
            outbox.put(lambda run: run.finish(folder))
        checkpoint.remove()


if __name__ == "__main__":
    train()
