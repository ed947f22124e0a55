"""One seed's training, from first weights to the epoch with the best validation F1."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.core import memory
from pipeline.core.config import TrainParams
from pipeline.core.errors import Interrupted, UserError
from pipeline.data.dataset import PackedImages
from pipeline.evaluation.metrics import Scores, score_predictions
from pipeline.models.classifier import Architecture, Classifier, load_pretrained
from pipeline.training.augment import augment, draw_epoch_order, mixup
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.determinism import make_generator, seed_global_generators
from pipeline.training.distributed import ProcessGroup
from pipeline.training.schedule import build_optimizer, learning_rate_at

AUTOCAST_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKPOINT_SECONDS = 300  # an epoch that lasts longer is put on disk in between


@dataclass(frozen=True)
class EpochMetrics:
    """What the end of an epoch tells; all but rate and time are functions of the run's inputs."""

    epoch: int
    train_loss: float
    lr: float
    scores: Scores
    images_per_second: float
    ended_at: float  # seconds since 1970

    def row(self) -> dict[str, float | None]:
        """Return the row of `history.csv`."""
        return {"epoch": self.epoch, "train_loss": self.train_loss, "lr": self.lr, **self.scores}  # type: ignore[dict-item]


@dataclass(frozen=True)
class TrainingResult:
    network: Classifier  # with the weights of the best epoch
    best: EpochMetrics
    history: list[EpochMetrics]


class Trainer:
    """One seed's training, which can be put on disk between any two steps and taken up again.

    `state` holds all that a step changes, and what a step draws at random follows from (seed, epoch, step, purpose).
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
        """Build the network and load its first weights.

        Args:
            params: the recipe.
            seed: with the epoch, the step and a purpose, the origin of all random numbers.
            table: one row per image of the pack, with `subset` and `label`.
            pack: the images.
            weights: the folder of the backbone's first weights.
            group: the processes that share the work; each holds the whole pack and ends with the same model.
        """
        self.params, self.seed, self.pack, self.group = params, seed, pack, group
        self.labels = torch.tensor(table["label"].fillna(0).to_numpy(dtype=int))
        self.train_rows, self.validation_rows = (
            torch.tensor(table.index[table["subset"] == subset].to_numpy()) for subset in ("train", "validation")
        )
        self.steps = len(_batches(self.train_rows, params.batch_size))  # of an epoch
        self.class_weights = torch.tensor(params.class_weights, device=pack.device)
        self.memory_format = torch.channels_last if params.channels_last else torch.contiguous_format
        seed_global_generators(seed, "initial weights")
        self.network = Classifier(
            Architecture(
                params.backbone,
                params.head_hidden,
                params.dropout,
                params.size,
                params.normalization,
                packed_size=pack.size,
                resize=pack.resize,
            )
        )
        load_pretrained(self.network, weights)
        self.network.to(pack.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(self.network.parameters(), params)
        self.scaler = torch.amp.GradScaler(pack.device.type, enabled=params.precision == "float16")
        self.averaged: AveragedModel | None = None
        if params.ema_decay:
            self.averaged = AveragedModel(
                self.network, multi_avg_fn=get_ema_multi_avg_fn(params.ema_decay), use_buffers=True
            )
        self.epoch, self.step = 1, 0  # the epoch that is being trained, and how many of its steps are done
        self.losses: list[Tensor] = []  # of these steps
        self.history: list[EpochMetrics] = []
        self.best_weights: dict[str, Tensor] = {}
        self.forward: Any = None  # runs the network while it trains

    def run(
        self,
        checkpoint: Checkpoint,
        on_epoch: Callable[[EpochMetrics, Classifier | None], None],
        stop: Callable[[], int],
    ) -> TrainingResult:
        """Train to the end.

        Args:
            checkpoint: taken up if it is there, and written after every epoch.
            on_epoch: called after every epoch, with the model where it is the best so far; first, without a model,
                for the epochs that the checkpoint holds.
            stop: asked after every step; a signal's number, or 0, which means to go on.

        Raises:
            UserError: the loss is not finite, or the memory does not suffice.
            Interrupted: `stop` said so; the checkpoint is written.
        """
        self.stop = stop
        if state := self.group.broadcast_object(checkpoint.load() if self.group.is_main_process else None):
            self.restore(state)
            for entry in self.history:
                on_epoch(entry, None)
        with _progress(self.group.is_main_process) as self.progress, report_out_of_memory(self.params):
            total = self.params.epochs * self.steps
            self.bar = self.progress.add_task(f"seed {self.seed}", total=total, loss="–", f1="–", rate="–")
            try:
                while not self.finished:
                    if self.forward is None or self.epoch == self.params.frozen_epochs + 1:
                        self._start_phase()
                    rate = self._train_epoch(checkpoint)
                    self._validate_epoch(rate)
                    self._save(checkpoint)
                    self._report_epoch(self.history[-1])
                    on_epoch(self.history[-1], self.eval_model if self.best is self.history[-1] else None)
            except Interrupted:
                self._save(checkpoint)
                raise
        self.eval_model.load_state_dict(self.best_weights)
        return TrainingResult(self.eval_model.eval(), self.best, self.history)

    @property
    def eval_model(self) -> Classifier:
        """The network that validates and is kept: the one that is trained, or its average over the steps."""
        return self.averaged.module if self.averaged else self.network  # type: ignore[return-value]

    @property
    def best(self) -> EpochMetrics:
        """The epoch with the best validation F1; a later one wins a tie."""
        return max(self.history, key=lambda entry: (entry.scores["f1"], entry.epoch))

    @property
    def finished(self) -> bool:
        patience, done = self.params.early_stopping_patience, len(self.history)
        return done == self.params.epochs or bool(patience and done and done - self.best.epoch >= patience)

    def state(self) -> dict[str, Any]:
        """Return all that changes while it trains, as numbers, texts and tensors."""
        return {
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "losses": self.losses,
            "history": [asdict(entry) for entry in self.history],
            "best_weights": self.best_weights,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.averaged:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.losses = [loss.to(self.pack.device) for loss in state["losses"]]
        self.history = [EpochMetrics(**entry) for entry in state["history"]]
        self.best_weights = state["best_weights"]

    def _start_phase(self) -> None:
        """Freeze the backbone or set it free, which what runs the network has to know beforehand."""
        frozen = self.epoch <= self.params.frozen_epochs
        self.network.backbone.requires_grad_(not frozen)
        self.forward = self.group.data_parallel(self.network)
        if self.params.compile:
            self.forward = torch.compile(self.forward)

    def _train_epoch(self, checkpoint: Checkpoint) -> float:
        """Take the steps of the epoch that are not done yet; return images per second."""
        params, first = self.params, self.step
        started = shown = saved = time.perf_counter()
        self.network.train()
        self.network.backbone.train(self.epoch > params.frozen_epochs)  # frozen, it keeps its batch statistics
        if params.reset_optimizer_each_epoch and not first:
            self.optimizer = build_optimizer(self.network.parameters(), params)
        order = draw_epoch_order(self.labels[self.train_rows], params, make_generator(self.seed, self.epoch, "order"))
        batches = _batches(self.train_rows[order], params.batch_size)
        for rows, pixels in self.pack.batches(batches[first:], params.loader_threads):
            self.losses.append(self._train_step(rows, pixels))
            self.step += 1
            self.progress.update(self.bar, completed=(self.epoch - 1) * self.steps + self.step)
            now = time.perf_counter()
            if now - shown > 1 and self.group.count == 1:  # reading the loss waits for the device, and for the others
                shown = now
                self._check_losses()
                rate = (self.step - first) * params.batch_size / (now - started)
                self.progress.update(self.bar, loss=f"{self.losses[-1].item():.3f}", rate=f"{rate:.0f}")
            self.raise_if_interrupted()
            if now - saved > CHECKPOINT_SECONDS:
                saved = now
                self._save(checkpoint)
        self._check_losses()
        return (self.step - first) * params.batch_size / (time.perf_counter() - started)

    def _train_step(self, rows: Tensor, pixels: Tensor) -> Tensor:
        """Take one step on a batch; every process augments and mixes all of it, and computes its share."""
        params, moment = self.params, (self.seed, self.epoch, self.step)
        lr = learning_rate_at(self.epoch - 1 + (self.step + 0.5) / self.steps, params)
        for options in self.optimizer.param_groups:
            options["lr"] = lr
        # Augmented while they have one channel, for a third of the work.
        images = augment(self.network.resize(pixels), params, make_generator(*moment, "augment"))
        images = self.network.normalize(images)
        seed_global_generators(*moment, "mixup")
        images, targets = mixup(images, self.labels[rows].to(images.device), params.mixup_alpha)
        masks = self.network.head.dropout_masks(len(rows), make_generator(*moment, "dropout"))
        seed_global_generators(*moment, "backbone", self.group.rank)  # some backbones drop paths

        share, count = self.group.local_slice(len(rows)), self.group.count
        pieces = max(1, min(params.gradient_accumulation_steps, len(rows) // count))
        split = (tensor[share].tensor_split(pieces) for tensor in (images, targets, *masks))
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=images.device)
        for index, (piece, target, *piece_masks) in enumerate(zip(*split, strict=True), start=1):
            with self.group.gradient_sync(self.forward, index == pieces):
                with self._autocast():
                    logits = self.forward(piece.contiguous(memory_format=self.memory_format), piece_masks)
                    total = cross_entropy(logits.float(), target, self.class_weights, reduction="sum")
                self.scaler.scale(total / len(rows) * count).backward()
            loss += total.detach() / len(rows)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged:
            self.averaged.update_parameters(self.network)
        return self.group.all_reduce_sum(loss)

    def _validate_epoch(self, rate: float) -> None:
        """Validate, and keep the weights if they are the best so far."""
        params = self.params
        found = self._predict(self.validation_rows)
        if not found.isfinite().all():
            raise self._diverged(f"epoch {self.epoch}: not all predictions are finite")
        entry = EpochMetrics(
            self.epoch,
            float(torch.stack(self.losses).mean()),
            learning_rate_at(self.epoch - 0.5 / self.steps, params),
            score_predictions(self.labels[self.validation_rows].numpy(), found.numpy()),
            rate,
            time.time(),
        )
        self.history.append(entry)
        if self.best is entry:
            self.best_weights = copy.deepcopy(self.eval_model.state_dict())
        self.epoch, self.step, self.losses = self.epoch + 1, 0, []

    def _report_epoch(self, entry: EpochMetrics) -> None:
        rate = f"{entry.images_per_second:.0f}"
        figures = {"loss": f"{entry.train_loss:.3f}", "f1": f"{entry.scores['f1']:.3f}", "rate": rate}
        self.progress.update(self.bar, **figures)  # type: ignore[arg-type]
        if self.group.is_main_process:
            self.progress.print(EPOCH.format(seed=self.seed, epoch=entry.epoch, epochs=self.params.epochs, **figures))

    def _predict(self, rows: Tensor) -> Tensor:
        """Predict the given rows (B,) of the pack: P(positive), float32 (B,), on the CPU."""
        network = self.eval_model.eval()
        found = torch.zeros(len(rows), device=self.pack.device)
        places = torch.arange(len(rows)).split(self.params.batch_size)
        for start in range(0, len(places), self.group.count):
            self.raise_if_interrupted()
            for place in places[start + self.group.rank :][:1]:  # the last round may have none for the last processes
                found[place.to(found.device)] = network.predict_proba(self.pack.pixels(rows[place]))
        return self.group.all_reduce_sum(found).cpu()

    def raise_if_interrupted(self) -> None:
        if signal := self.group.all_reduce_max(self.stop()):
            raise Interrupted(signal, f"seed {self.seed} stopped in epoch {self.epoch} after step {self.step}")

    def _save(self, checkpoint: Checkpoint) -> None:
        if self.group.is_main_process:
            checkpoint.save(self.state())

    def _check_losses(self) -> None:
        finite = torch.stack(self.losses).isfinite()
        if not finite.all():
            step = int((~finite).nonzero()[0])
            raise self._diverged(f"epoch {self.epoch}, batch {step + 1}: the loss is {self.losses[step].item()}")

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"seed {self.seed}, {what}; lower train.lr = {self.params.lr:g}, or look at "
            f"train.precision = {self.params.precision} and train.normalization = {self.params.normalization}"
        )

    def _autocast(self) -> torch.autocast:
        precision = self.params.precision
        return torch.autocast(self.pack.device.type, AUTOCAST_DTYPES[precision], enabled=precision != "float32")


EPOCH = "seed {seed}  epoch {epoch}/{epochs}  loss {loss}  F1 {f1}  {rate} images/s"


def _batches(rows: Tensor, batch_size: int) -> list[Tensor]:
    """Cut into batches, without a leftover of one, of which batch norm could take no deviation."""
    batches = list(rows.split(batch_size))
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 < batch_size else batches


@contextmanager
def report_out_of_memory(params: TrainParams) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory.is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory with train.batch_size = {params.batch_size} at train.size = {params.size}; raise "
            f"train.gradient_accumulation_steps = {params.gradient_accumulation_steps} (the same batch in more parts), or lower one of the two"
        ) from error


def _progress(shown: bool) -> Progress:
    columns = "loss {task.fields[loss]}", "F1 {task.fields[f1]}", "{task.fields[rate]} images/s"
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *map(TextColumn, columns),
        TimeRemainingColumn(),
        disable=not shown,
    )
