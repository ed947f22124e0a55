"""Training of one network, from pretrained weights to the epoch that `train.keep` selects."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.core import memory
from pipeline.core.config import TrainParams
from pipeline.core.errors import Interrupted, UserError
from pipeline.core.parallel import map_in_threads
from pipeline.data.dataset import PackedImages
from pipeline.evaluation.metrics import Scores, kept_epoch, score_predictions
from pipeline.models.classifier import Architecture, Classifier, FeatureScaler, load_pretrained
from pipeline.training.augment import augment, draw_augmentation, draw_epoch_order, draw_mixup, mix
from pipeline.training.captured_step import CapturedStep, Inputs, join_tensors, use_stream
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.determinism import make_generator, seed_global_generators, use_tensor_float32
from pipeline.training.distributed import ProcessGroup
from pipeline.training.fast_gradients import FastGradients
from pipeline.training.feature_cache import FrozenFeatures, load_features
from pipeline.training.objective import PER_IMAGE, Objective
from pipeline.training.progress import ProgressReporter, TrainingProgress
from pipeline.training.schedule import build_optimizer, learning_rate_at

AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKPOINT_SECONDS = 300  # between checkpoints within an epoch
ROWS_AT_ONCE = 1024  # of features that are copied to be standardized


@dataclass(frozen=True)
class EpochMetrics:
    """Metrics at the end of an epoch; all but throughput and time are functions of the run's inputs."""

    epoch: int
    train_loss: float
    lr: float
    scores: Scores
    images_per_second: float | None  # in training; None if the process resumed after the last step of the epoch
    ended_at: float  # Unix time, seconds

    def row(self) -> dict[str, float | None]:
        """Return the row of `history.csv`."""
        return {"epoch": self.epoch, "train_loss": self.train_loss, "lr": self.lr, **self.scores}  # type: ignore[dict-item]


@dataclass(frozen=True)
class TrainingResult:
    network: Classifier  # with the weights of the kept epoch
    kept: EpochMetrics
    history: list[EpochMetrics]
    predictions: Tensor  # P(positive) of the validation images after every epoch, float32 (N, epochs)


class Trainer:
    """The training of one seed, which can be interrupted after any step and resumed to the same result.

    `state` holds everything that a step changes; the random numbers of a step depend only on (seed, epoch, step,
    purpose).
    """

    def __init__(
        self,
        params: TrainParams,
        seed: int,
        table: pd.DataFrame,
        pack: PackedImages,
        weights: Path,
        group: ProcessGroup,
    ) -> None:
        """Build the network and load its pretrained weights.

        Args:
            params: the hyperparameters.
            seed: the origin of all random numbers.
            table: one row per image of the pack, with `subset`, `label` and `source`.
            pack: the images.
            weights: the folder of the backbone's pretrained weights.
            group: the processes that share the work; each reads the whole pack and ends with the same model.
        """
        self.params, self.seed, self.pack, self.group = params, seed, pack, group
        self.labels = torch.tensor(table["label"].fillna(0).to_numpy(dtype=int))
        self.sources = torch.from_numpy(pd.factorize(table["source"], sort=True)[0])
        self.train_rows, self.validation_rows = (
            torch.tensor(table.index[table["subset"] == subset].to_numpy()) for subset in ("train", "validation")
        )
        self.steps_per_epoch = len(_split_batches(self.train_rows, params.batch_size))
        self.memory_format = torch.channels_last if params.channels_last else torch.contiguous_format
        seed_global_generators(seed, "initial weights")
        self.network = Classifier(
            Architecture(
                params.backbone,
                params.head_hidden,
                params.dropout,
                params.image_size,
                params.normalization,
                packed_size=pack.size,
                resize=pack.resize,
                intensity_normalization=params.intensity_normalization,
                lung_crop=params.lung_crop,
                border_mask=params.border_mask,
                marker_mask=params.marker_mask,
                test_time_augmentation=params.test_time_augmentation,
                feature_maps=params.feature_maps,
            )
        )
        load_pretrained(self.network, weights)
        self.network.to(pack.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        seed_global_generators(seed, "adversary")
        self.objective = Objective(self.network, params, self.labels, self.sources, self.train_rows).to(pack.device)
        self.optimizer = build_optimizer([*self.network.parameters(), *self.objective.parameters()], params)
        self.scaler = torch.amp.GradScaler(pack.device.type, enabled=params.precision == "float16")
        averages = params.ema_decay or params.swa_epochs
        self.averaged: Classifier | None = copy.deepcopy(self.network) if averages else None
        self.epoch, self.step = 1, 0  # the epoch in progress, and the number of its steps so far
        # Of these steps, on the CPU; those on a CUDA device arrive later, without anyone waiting for them.
        self.losses = torch.zeros(self.steps_per_epoch, pin_memory=pack.device.type == "cuda")
        self.history: list[EpochMetrics] = []
        self.predictions: list[Tensor] = []  # P(positive) of the validation images after each epoch in the history
        self.kept_weights: dict[str, Tensor] = {}
        self.features: FrozenFeatures | None = None  # with `feature_views`, of the training and validation images
        self.forward: Any = None  # the network as it is called in training: data parallel, compiled
        self.captured_step: CapturedStep | None = None  # on CUDA
        self.use_cuda_graph = group.count == 1
        self.is_captured = False  # whether the last steps of a training that ended ran as a graph

    def run(
        self,
        checkpoint: Checkpoint,
        on_epoch: Callable[[EpochMetrics, Classifier | None], None],
        stop: Callable[[], int],
        progress_path: Path | None = None,
        fold: int | None = None,
    ) -> TrainingResult:
        """Train until the last epoch, or until early stopping.

        Args:
            checkpoint: loaded if it exists, and written after every epoch.
            on_epoch: called after every epoch, with the model if its weights are kept so far; on resuming, called
                first for every epoch in the checkpoint, without a model.
            stop: called after every step; returns the number of a signal that asks to stop, or 0.
            progress_path: the JSON file for the progress, if one is written.
            fold: in cross-validation, the fold that validates; only shown.

        Raises:
            UserError: the loss is not finite, or there is not enough memory.
            Interrupted: `stop` returned a signal; the checkpoint is written.
        """
        self.stop = stop
        if self.params.feature_views:
            self._load_features(checkpoint.path.parent)
        if state := self.group.broadcast_object(checkpoint.load() if self.group.is_main_process else None):
            self.restore(state)
            for entry in self.history:
                on_epoch(entry, None)
        f1 = self.history[-1].scores["f1"] if self.history else None
        epoch, epochs = min(self.epoch, self.params.epochs), self.params.epochs
        progress = TrainingProgress(self.seed, epoch, epochs, f1, fold=fold)
        self.reporter = ProgressReporter(
            progress, self.steps_per_epoch, progress_path, enabled=self.group.is_main_process
        )
        with self.reporter, report_out_of_memory(self.params), use_stream(self.pack.device):
            try:
                while not self.finished:
                    if self.forward is None or self.epoch == self.params.frozen_epochs + 1:
                        self._start_phase()
                    images_per_second = self._train_epoch(checkpoint)
                    entry = self._validate_epoch(images_per_second)
                    self._save(checkpoint)
                    self.reporter.report_epoch(entry.epoch, entry.train_loss, entry.scores["f1"], images_per_second)
                    on_epoch(entry, self.eval_model if self.kept is entry else None)
            except Interrupted:
                self._save(checkpoint)
                raise
            finally:
                if self.captured_step:
                    self.is_captured = self.captured_step.is_captured
                    self.captured_step = None  # its memory on the device is for the next fold
            self.eval_model.load_state_dict(self.kept_weights)
        return TrainingResult(self.eval_model.eval(), self.kept, self.history, torch.stack(self.predictions, dim=1))

    @property
    def eval_model(self) -> Classifier:
        """The network that is evaluated and saved: the trained one, or its average with `ema_decay` or `swa_epochs`."""
        return self.averaged or self.network

    @property
    def kept(self) -> EpochMetrics:
        """The epoch whose weights `train.keep` keeps; a later one wins a tie."""
        return self.history[kept_epoch([entry.scores for entry in self.history], self.params.keep)]

    @property
    def finished(self) -> bool:
        patience, done = self.params.early_stopping_patience, len(self.history)
        return done == self.params.epochs or bool(patience and done and done - self.kept.epoch >= patience)

    def state(self) -> dict[str, Any]:
        """Return everything that training changes, as numbers, strings and tensors."""
        optimizer = self.optimizer.state_dict()
        for param_group in optimizer["param_groups"]:
            param_group["lr"] = self.params.lr  # each step sets its own; on CUDA it would bring along a whole batch
        return {
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged else {},
            "objective": self.objective.state_dict(),
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "losses": self.losses[: self.step].clone(),
            "history": [asdict(entry) for entry in self.history],
            "predictions": self.predictions,
            "kept_weights": self.kept_weights,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.averaged:
            self.averaged.load_state_dict(state["averaged"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.losses[: self.step] = state["losses"]
        self.history = [EpochMetrics(**entry) for entry in state["history"]]
        self.predictions, self.kept_weights = state["predictions"], state["kept_weights"]

    def _load_features(self, folder: Path) -> None:
        rows = torch.cat([self.train_rows, self.validation_rows]).sort()[0]
        with report_out_of_memory(self.params):
            self.features = load_features(self.network, self.params, self.pack, rows, folder, self.stop)
            scaler = self.network.head.scaler
            if isinstance(scaler, FeatureScaler):
                batches = self.train_rows.split(ROWS_AT_ONCE)
                scaler.fit(self.features.read(rows)[:, 0].numpy() for rows in batches)  # the images as they are
                self.eval_model.head.scaler.load_state_dict(scaler.state_dict())
        self.memory_format = torch.contiguous_format  # of features, which have no height and width

    def _start_phase(self) -> None:
        """Freeze or unfreeze the backbone; data parallelism and compilation must be set up after that."""
        frozen = self.epoch <= self.params.frozen_epochs
        self.network.backbone.requires_grad_(not frozen)
        trained = self.network.head if self.features else self.objective.trained_network(self.network)
        self.forward = self.group.data_parallel(trained)
        if self.params.compile:
            self.forward = torch.compile(self.forward)
        if self.pack.device.type == "cuda":
            self.captured_step = CapturedStep(
                self._update_weights, self.params.batch_size, self.pack.device, enabled=self.use_cuda_graph
            )

    def _train_epoch(self, checkpoint: Checkpoint) -> float | None:
        """Run the remaining steps of the epoch, and return images per second, or None if none remain."""
        params, first_step = self.params, self.step
        started = reported = saved = time.perf_counter()
        images = 0
        self.network.train()
        self.network.backbone.train(self.epoch > params.frozen_epochs)  # frozen, it keeps its batch statistics
        if params.reset_optimizer_each_epoch and not first_step:
            self._reset_optimizer()
        labels, sources = self.labels[self.train_rows], self.sources[self.train_rows]
        order = draw_epoch_order(labels, sources, params, make_generator(self.seed, self.epoch, "order"))
        batches = _split_batches(self.train_rows[order], params.batch_size)
        steps, threads = range(first_step, len(batches)), params.loader_threads
        prefetched = map_in_threads(lambda step: self._load_batch(step, batches[step]), steps, threads, threads + 1)
        with use_tensor_float32(enabled=params.precision == "tf32"):
            for block, tensors in prefetched:
                self._train_step(block, tensors)
                images += len(batches[self.step])
                self.step += 1
                if params.swa_epochs and self.step == self.steps_per_epoch:
                    self._average_epochs()
                self.reporter.report_step(self.epoch, self.step)
                now = time.perf_counter()
                # With several processes, all would have to stop at the same step.
                if now - reported > 1 and self.group.count == 1:
                    reported = now
                    self._report_loss(images / (now - started))
                self.raise_if_interrupted()
                if now - saved > CHECKPOINT_SECONDS:
                    saved = now
                    self._save(checkpoint)
        self._wait_for_device()
        self._check_losses(self.step)
        return images / (time.perf_counter() - started) if images else None

    def _load_batch(self, step: int, rows: Tensor) -> tuple[Tensor | None, Inputs]:
        """Read the images of a step and draw its random numbers, in a thread of the loader.

        Every process draws for the whole batch, so that all draw the same numbers.

        Returns:
            The block to be copied to a CUDA device, or None on the CPU, and the inputs of `_update_weights`.
        """
        params, step_key = self.params, (self.seed, self.epoch, step)
        epochs_done = self.epoch - 1 + (step + 0.5) / self.steps_per_epoch
        masks = self.network.head.dropout_masks(len(rows), make_generator(*step_key, "dropout"))
        if self.features:
            images = {"features": self.features.draw(rows, make_generator(*step_key, "views"))}
        else:
            drawn = draw_augmentation(len(rows), params, make_generator(*step_key, "augment"))
            images = {"pixels": self.pack.read(rows), **drawn}
        inputs = {
            "lr": torch.tensor(learning_rate_at(epochs_done, params)),
            **images,
            **draw_mixup(self.labels[rows], self.sources[rows], params, make_generator(*step_key, "mixup")),
            **{f"dropout_mask_{index}": mask for index, mask in enumerate(masks)},
            **self.objective.draw_inputs(rows, epochs_done / params.epochs),
        }
        return join_tensors(inputs) if self.pack.device.type == "cuda" else None, inputs

    def _train_step(self, block: Tensor | None, inputs: Inputs) -> None:
        """Run one optimizer step on a batch from `_load_batch`, and record its loss."""
        # Some backbones use stochastic depth, in each process for its own images.
        seed_global_generators(self.seed, self.epoch, self.step, "backbone", self.group.rank)
        if self.captured_step and block is not None:
            self.captured_step.run(block, inputs, self.losses[self.step])
        else:
            self.losses[self.step] = self._update_weights(inputs)

    def _update_weights(self, inputs: Inputs) -> Tensor:
        """Compute the gradients, of this process's slice of the batch, and change the weights; return the loss.

        On CUDA, nothing here may wait for the device, nor depend on anything that changes from step to step but
        `inputs`: it becomes a graph.
        """
        params, count = self.params, len(inputs["targets"])
        # On the CPU, optimizers are much faster with a plain number.
        lr = inputs["lr"] if self.captured_step else inputs["lr"].item()
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = lr
        if self.features:
            images = mix(inputs["features"], inputs)
        else:
            # Augmenting and mixing before the gray channel is repeated three times costs a third of the work.
            images = augment(self.network.resize(inputs["pixels"]), inputs)
            images = self.network.normalize(mix(images, inputs))

        local, process_count = self.group.local_slice(count), self.group.count
        micro_batches = max(1, min(params.gradient_accumulation_steps, count // process_count))
        rows = {"images": images} | {name: tensor for name, tensor in inputs.items() if name.startswith(PER_IMAGE)}
        split = (tensor[local].tensor_split(micro_batches) for tensor in rows.values())
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=images.device)
        for index, tensors in enumerate(zip(*split, strict=True), start=1):
            part = dict(zip(rows, tensors, strict=True))
            with self.group.gradient_sync(self.forward, now=index == micro_batches):
                with self._autocast(), self._fast_gradients():
                    part["images"] = part["images"].contiguous(memory_format=self.memory_format)
                    loss_sum = self.objective(self.forward, part, inputs.get("reversal"))
                # Data parallelism averages the gradients of the processes; this makes the average a sum.
                self.scaler.scale(loss_sum / count * process_count).backward()
            loss += loss_sum.detach() / count
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.objective.update_weights(count, self.group)
        if params.ema_decay:
            is_first_step = (self.epoch, self.step) == (1, 0)  # which only copies, and is never captured
            _update_average(self.eval_model, self.network, 0 if is_first_step else params.ema_decay)
        return self.group.all_reduce_sum(loss)

    def _average_epochs(self) -> None:
        """Average the weights at the ends of the last `swa_epochs` epochs (Izmailov et al. 2018, arXiv:1803.05407).

        Batch statistics are averaged, too; in the paper, they are computed anew. Until these epochs, the average is the
        network itself.
        """
        averaged_epochs = max(0, self.epoch - 1 - (self.params.epochs - self.params.swa_epochs))
        _update_average(self.eval_model, self.network, averaged_epochs / (averaged_epochs + 1))

    def _reset_optimizer(self) -> None:
        """Forget all that the optimizer has learned, in place, where a CUDA graph expects it."""
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def _validate_epoch(self, images_per_second: float | None) -> EpochMetrics:
        """Evaluate on the validation set, keep the weights if `train.keep` selects them, and start the next epoch."""
        probabilities = self._predict_proba(self.validation_rows)
        if not probabilities.isfinite().all():
            raise self._divergence_error(f"epoch {self.epoch}: not all predictions are finite")
        entry = EpochMetrics(
            self.epoch,
            self.losses.mean().item(),
            learning_rate_at(self.epoch - 0.5 / self.steps_per_epoch, self.params),
            score_predictions(self.labels[self.validation_rows].numpy(), probabilities.numpy()),
            images_per_second,
            time.time(),
        )
        self.history.append(entry)
        self.predictions.append(probabilities)
        if self.kept is entry:
            self.kept_weights = copy.deepcopy(self.eval_model.state_dict())
        self.epoch, self.step = self.epoch + 1, 0
        return entry

    def _predict_proba(self, rows: Tensor) -> Tensor:
        """Predict the given rows (B,) of the pack: P(positive), float32 (B,), on the CPU."""
        network = self.eval_model.eval()
        if self.features:
            return network.predict_from_features(self.features.read(rows).to(self.pack.device)).cpu()
        probabilities = torch.zeros(len(rows), device=self.pack.device)
        row_batches, outputs = rows.split(self.params.batch_size), probabilities.split(self.params.batch_size)
        mine = slice(self.group.rank, None, self.group.count)
        batches = zip(self.pack.batches(row_batches[mine], self.params.loader_threads), outputs[mine], strict=True)
        for _ in range(0, len(row_batches), self.group.count):
            self.raise_if_interrupted()
            for pixels, output in islice(batches, 1):  # in the last round, some processes may have none
                output.copy_(network.predict_proba(pixels))
        return self.group.all_reduce_sum(probabilities).cpu()

    def raise_if_interrupted(self) -> None:
        if signal := self.group.all_reduce_max(self.stop()):
            where = f"seed {self.seed} stopped in epoch {self.epoch} after step {self.step}"
            raise Interrupted(signal, f"{where}; dvc repro resumes from there")

    def _save(self, checkpoint: Checkpoint) -> None:
        self._wait_for_device()
        if self.group.is_main_process:
            checkpoint.save(self.state())

    def _wait_for_device(self) -> None:
        if self.captured_step:
            self.captured_step.wait()

    def _report_loss(self, images_per_second: float) -> None:
        """Report the loss of the last step that is known to be finished; on CUDA, others are queued."""
        finished = self.step - (self.captured_step.queued if self.captured_step else 0)
        if finished > 0:
            self._check_losses(finished)
            self.reporter.report_loss(self.epoch, self.losses[finished - 1].item(), images_per_second)

    def _check_losses(self, count: int) -> None:
        finite = self.losses[:count].isfinite()
        if not finite.all():
            step = int((~finite).nonzero()[0])
            raise self._divergence_error(
                f"epoch {self.epoch}, batch {step + 1}: the loss is {self.losses[step].item()}"
            )

    def _divergence_error(self, problem: str) -> UserError:
        return UserError(
            f"seed {self.seed}, {problem}; lower train.lr = {self.params.lr:g}, or check "
            f"train.precision = {self.params.precision} and train.normalization = {self.params.normalization}"
        )

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST_DTYPES.get(self.params.precision)
        return torch.autocast(self.pack.device.type, dtype, enabled=dtype is not None)

    def _fast_gradients(self) -> AbstractContextManager[object]:
        return nullcontext() if self.pack.device.type == "cuda" or self.params.compile else FastGradients()


@torch.no_grad()
def _update_average(averaged: Classifier, network: Classifier, decay: float) -> None:
    """Move the weights and batch statistics of `averaged` towards those of `network`, which count as 1 - decay."""
    old, new = averaged.state_dict(), network.state_dict()
    numbers = [name for name, value in old.items() if value.is_floating_point()]
    get_ema_multi_avg_fn(decay)([old[name] for name in numbers], [new[name] for name in numbers], 0)
    for name in old.keys() - numbers:
        old[name].copy_(new[name])  # counts of batches


def _split_batches(rows: Tensor, batch_size: int) -> list[Tensor]:
    """Split into batches; a last batch of one is dropped, because batch norm cannot compute a variance from it."""
    batches = list(rows.split(batch_size))
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 < batch_size else batches


@contextmanager
def report_out_of_memory(params: TrainParams) -> Iterator[None]:
    """Raise a `UserError` that names the parameters to change when the block runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory.is_out_of_memory(error):
            raise
        if params.feature_views:
            raise UserError(
                f"out of memory with train.feature_views = {params.feature_views} at train.image_size = "
                f"{params.image_size}; lower one of the two"
            ) from error
        raise UserError(
            f"out of memory with train.batch_size = {params.batch_size} at train.image_size = {params.image_size}; "
            f"raise train.gradient_accumulation_steps = {params.gradient_accumulation_steps} (the same batch in "
            "smaller parts), or lower one of the two"
        ) from error
