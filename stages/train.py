"""Train one seed."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.common import stage

if TYPE_CHECKING:
    from pipeline.models.classifier import Classifier
    from pipeline.tracking.runs import SeedRun
    from pipeline.training.loop import EpochMetrics


@stage
@click.option("--seed", type=int, required=True, help="K, the origin of all random numbers.")
def train(seed: int) -> None:
    """Write models/seed-K/, and log to MLflow while it trains; go on where an interrupted training stopped."""
    import pandas as pd

    from pipeline.core import memory
    from pipeline.core.config import load_config
    from pipeline.core.files import write_csv, write_json
    from pipeline.data.dataset import PackedImages
    from pipeline.data.manifest import read_split
    from pipeline.models import classifier
    from pipeline.tracking import fingerprint, tracking_uri
    from pipeline.tracking.outbox import Outbox
    from pipeline.training import determinism, distributed
    from pipeline.training.checkpoint import Checkpoint
    from pipeline.training.loop import Trainer
    from pipeline.training.signals import SignalHandler

    config = load_config()
    data, folder = Path("data"), Path(f"models/seed-{seed}")
    params = config.active.train
    determinism.make_deterministic(params.cpu_threads, compiled=params.compile)
    memory.retain_freed_memory()
    with SignalHandler() as stop, distributed.init_distributed() as processes:
        pack = PackedImages(data / "images.npy", determinism.select_device())
        environment = determinism.describe_environment(processes.count)
        mark = fingerprint.training_fingerprint(config, seed=seed, environment=environment)
        checkpoint = Checkpoint(tracking_uri.workspace_root() / "checkpoints", mark)
        table = read_split(data, config.active.split.validation_fold(seed))
        training = Trainer(params, seed, table, pack, data / "weights", processes)
        if not processes.is_main_process:
            training.run(checkpoint, lambda *_: None, stop)
            return

        def open_run() -> "SeedRun":
            from pipeline.tracking.runs import SeedRun, parent_run
            from pipeline.tracking.store import connect

            store = connect(config.model_name)
            return SeedRun(store, config, parent_run(store, config), seed, mark).monitor_system_metrics()

        tracking_uri.check_reachable()
        with checkpoint.exclusive(), tempfile.TemporaryDirectory() as scratch, Outbox(open_run) as outbox:

            def asked_to_stop() -> int:
                outbox.check()
                return stop()

            def log(epoch: "EpochMetrics", best: "Classifier | None") -> None:
                outbox.put(lambda run: run.log_epoch(epoch.row(), epoch.ended_at, epoch.images_per_second))
                if best:
                    classifier.save_weights(best, Path(scratch))  # while MLflow is away, over what it has not yet taken
                    outbox.put(lambda run: run.upload_checkpoint(Path(scratch, classifier.WEIGHTS_FILE)))

            trained = training.run(checkpoint, log, asked_to_stop)
            facts = {"fingerprint": mark, "environment": environment}
            classifier.save_weights(trained.network, folder)
            classifier.save_description(trained.network, folder, facts)
            write_csv(folder / "history.csv", pd.DataFrame([epoch.row() for epoch in trained.history]))
            name = fingerprint.seed_run_name(config, seed, mark)  # by which DVC's figures name the MLflow run
            write_json(folder / "metrics.json", {"run": name, "epoch": trained.best.epoch, **trained.best.scores})
            outbox.put(lambda run: run.finish(folder))
        checkpoint.remove()


if __name__ == "__main__":
    train()
