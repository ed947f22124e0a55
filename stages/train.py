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
@click.option("--seed", type=int, required=True, help="The seed K, from which all random numbers derive.")
def train(seed: int) -> None:
    """Train one seed, or resume its interrupted training: write models/seed-K/ and log to MLflow."""
    import pandas as pd

    from pipeline.core import memory
    from pipeline.core.config import load_config
    from pipeline.core.files import write_csv, write_json
    from pipeline.data.dataset import PackedImages
    from pipeline.data.manifest import read_split, validation_fold
    from pipeline.models import classifier
    from pipeline.tracking import fingerprint, tracking_uri
    from pipeline.tracking.outbox import Outbox
    from pipeline.training import determinism, distributed
    from pipeline.training.checkpoint import Checkpoint
    from pipeline.training.loop import Trainer
    from pipeline.training.progress import progress_path
    from pipeline.training.signals import SignalHandler

    config = load_config()
    data, folder = Path("data"), Path(f"models/seed-{seed}")
    params = config.active.train
    determinism.make_deterministic(params.cpu_threads, compiled=params.compile)
    memory.retain_freed_memory()
    with SignalHandler() as stop, distributed.init_distributed() as group:
        pack = PackedImages(data / "images.npy", determinism.select_device())
        environment = determinism.describe_environment(group.count)
        parent_fingerprint = fingerprint.training_fingerprint(config)
        run_fingerprint = fingerprint.seed_fingerprint(parent_fingerprint, seed, environment)
        checkpoint = Checkpoint(tracking_uri.workspace_root() / "checkpoints", run_fingerprint)
        table = read_split(data, validation_fold(config.active.split, seed))
        trainer = Trainer(params, seed, table, pack, data / "weights", group)
        if not group.is_main_process:
            trainer.run(checkpoint, lambda *_: None, stop)
            return

        def open_run() -> "SeedRun":
            from pipeline.tracking.runs import SeedRun, parent_run
            from pipeline.tracking.store import connect

            store = connect(config.model_name)
            parent = parent_run(store, config, parent_fingerprint)
            return SeedRun(store, config, parent, seed, run_fingerprint).monitor_system_metrics()

        tracking_uri.check_reachable()
        with checkpoint.exclusive(), tempfile.TemporaryDirectory() as scratch, Outbox(open_run) as outbox:

            def check_outbox_and_signals() -> int:
                outbox.check()
                return stop()

            def log_epoch(epoch: "EpochMetrics", best: "Classifier | None") -> None:
                outbox.put(lambda run: run.log_epoch(epoch.row(), epoch.ended_at, epoch.images_per_second))
                if best:
                    # If MLflow has not uploaded the last best weights yet, the better ones replace them.
                    classifier.save_weights(best, Path(scratch))
                    outbox.put(lambda run: run.upload_checkpoint(Path(scratch, classifier.WEIGHTS_FILE)))

            result = trainer.run(checkpoint, log_epoch, check_outbox_and_signals, progress_path(seed))
            metadata = {
                "fingerprint": run_fingerprint,
                "parent_fingerprint": parent_fingerprint,
                "environment": environment,
            }
            classifier.save_weights(result.network, folder)
            classifier.save_description(result.network, folder, metadata)
            write_csv(folder / "history.csv", pd.DataFrame([epoch.row() for epoch in result.history]))
            name = fingerprint.seed_run_name(config, seed, run_fingerprint)  # links DVC's metrics to the MLflow run
            write_json(folder / "metrics.json", {"run": name, "epoch": result.best.epoch, **result.best.scores})
            outbox.put(lambda run: run.finish(folder))
        checkpoint.remove()


if __name__ == "__main__":
    train()
