"""Train one seed."""

import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.common import stage

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.core.config import Config
    from pipeline.models.classifier import Classifier
    from pipeline.tracking.runs import SeedRun
    from pipeline.training.loop import EpochMetrics, TrainingResult


@stage
@click.option("--seed", type=int, required=True, help="The seed K, from which all random numbers derive.")
def train(seed: int) -> None:
    """Train one seed, or resume its interrupted training: write models/seed-K/ and log to MLflow.

    With split.cross_validate, it trains one network per fold.
    """
    from pipeline.core import memory
    from pipeline.data.dataset import PackedImages
    from pipeline.data.manifest import read_split
    from pipeline.models import classifier
    from pipeline.tracking import fingerprint, tracking_uri
    from pipeline.tracking.outbox import Outbox
    from pipeline.training import determinism, distributed
    from pipeline.training.checkpoint import Checkpoint
    from pipeline.training.loop import Trainer
    from pipeline.training.progress import progress_path
    from pipeline.training.signals import SignalHandler

    config = _load_config(seed)
    data, folder = Path("data"), Path(f"models/seed-{seed}")
    params, folds = config.active.train, config.active.split.validation_folds
    determinism.make_deterministic(params.cpu_threads, compiled=params.compile)
    memory.retain_freed_memory()
    with SignalHandler() as stop, distributed.init_distributed() as group:
        pack = PackedImages(data / "images.npy", determinism.select_device())
        environment = determinism.describe_environment(group.count)
        parent_fingerprint = fingerprint.training_fingerprint(config)
        run_fingerprint = fingerprint.seed_fingerprint(parent_fingerprint, seed, environment)
        checkpoints = [
            Checkpoint(tracking_uri.workspace_root() / "checkpoints", f"{run_fingerprint}-{fold}") for fold in folds
        ]
        tables = [read_split(data, [fold]) for fold in folds]
        if not group.is_main_process:
            for table, checkpoint in zip(tables, checkpoints, strict=True):
                Trainer(params, seed, table, pack, data / "weights", group).run(checkpoint, lambda *_: None, stop)
            return

        def open_run() -> "SeedRun":
            from pipeline.tracking.runs import SeedRun, parent_run
            from pipeline.tracking.store import connect

            store = connect(config.model_name)
            parent = parent_run(store, config, parent_fingerprint)
            return SeedRun(store, config, parent, seed, run_fingerprint).monitor_system_metrics()

        tracking_uri.check_reachable()
        with ExitStack() as stack:
            for checkpoint in checkpoints:
                stack.enter_context(checkpoint.exclusive())
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            outbox = stack.enter_context(Outbox(open_run))

            def check_outbox_and_signals() -> int:
                outbox.check()
                return stop()

            results = []
            for fold, table, checkpoint in zip(folds, tables, checkpoints, strict=True):

                def log_epoch(epoch: "EpochMetrics", kept: "Classifier | None", fold: int = fold) -> None:
                    outbox.put(lambda run: run.log_epoch(fold, epoch.row(), epoch.ended_at, epoch.images_per_second))
                    if kept:
                        # If MLflow has not uploaded the last kept weights yet, the newer ones replace them.
                        classifier.save_weights([kept], Path(scratch))
                        outbox.put(lambda run: run.upload_checkpoint(Path(scratch, classifier.WEIGHTS_FILE)))

                trainer, progress = Trainer(params, seed, table, pack, data / "weights", group), progress_path(seed)
                label = fold if config.active.split.cross_validate else None
                results.append(trainer.run(checkpoint, log_epoch, check_outbox_and_signals, progress, label))

            name = fingerprint.seed_run_name(config, seed, run_fingerprint)  # links DVC's metrics to the MLflow run
            metadata = {
                "fingerprint": run_fingerprint,
                "parent_fingerprint": parent_fingerprint,
                "environment": environment,
            }
            _write_outs(folder, name, metadata, tables, results)
            outbox.put(lambda run: run.finish(folder))
        for checkpoint in checkpoints:
            checkpoint.remove()


def _load_config(seed: int) -> "Config":
    from pipeline.core.config import load_config
    from pipeline.core.errors import UserError

    config = load_config()
    if seed not in config.seeds:
        raise UserError(f"--seed {seed}: not in seeds of params.yaml; add it there")
    return config


def _write_outs(
    folder: Path, run_name: str, metadata: dict[str, Any], tables: "list[pd.DataFrame]", results: "list[TrainingResult]"
) -> None:
    """Write the outs of one seed from the results of its folds, which `tables` split into training and validation."""
    import pandas as pd

    from pipeline.core.files import write_csv, write_json
    from pipeline.evaluation.metrics import score_predictions
    from pipeline.models import classifier

    networks = [result.network for result in results]
    classifier.save_weights(networks, folder)
    classifier.save_description(networks[0], folder, metadata)
    histories, predictions = [], []
    for fold, (table, result) in enumerate(zip(tables, results, strict=True)):
        histories.append(pd.DataFrame([{"fold": fold, **epoch.row()} for epoch in result.history]))
        epochs = pd.DataFrame(result.predictions.numpy(), columns=[f"epoch-{epoch.epoch}" for epoch in result.history])
        images = table.loc[table["subset"] == "validation", ["file", "label"]].reset_index(drop=True).assign(fold=fold)
        kept = epochs[f"epoch-{result.kept.epoch}"].rename("kept")
        predictions.append(pd.concat([images, kept, epochs], axis="columns"))
    validation = pd.concat(predictions)
    scores = score_predictions(validation.pop("label").to_numpy(int), validation.pop("kept").to_numpy())
    write_csv(folder / "history.csv", pd.concat(histories))
    write_csv(folder / "validation.csv", validation)
    epoch = statistics.mean(result.kept.epoch for result in results)
    write_json(folder / "metrics.json", {"run": run_name, "epoch": epoch, **scores})


if __name__ == "__main__":
    train()
