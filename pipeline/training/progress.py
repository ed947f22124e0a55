"""Progress of a training: a bar on the terminal, a line per epoch, and a JSON file that other processes read."""

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.core.errors import Interrupted
from pipeline.core.files import read_json, write_json


@dataclass(frozen=True)
class TrainingProgress:
    """The content of the JSON file; a value is None until it is known."""

    seed: int
    epoch: int  # the one in progress, or the last one
    epochs: int
    f1: float | None = None  # on the validation set, of the last complete epoch
    loss: float | None = None  # on the training set
    images_per_second: float | None = None
    state: Literal["training", "finished", "interrupted", "failed"] = "training"
    fold: int | None = None  # that validates, in cross-validation

    @property
    def label(self) -> str:
        return f"seed {self.seed}" if self.fold is None else f"seed {self.seed}  fold {self.fold}"


def progress_path(seed: int) -> Path:
    return Path("logs", f"seed-{seed}.json")


def read_progress(seed: int) -> TrainingProgress | None:
    """Return what the training of the seed wrote last, or None if it has written nothing."""
    try:
        return TrainingProgress(**read_json(progress_path(seed)))
    except FileNotFoundError:
        return None


class ProgressReporter:
    """Reports one training while the `with` block runs."""

    def __init__(self, progress: TrainingProgress, steps_per_epoch: int, path: Path | None, *, enabled: bool) -> None:
        """Set up the report.

        Args:
            progress: where the training starts or resumes.
            steps_per_epoch: number of steps of an epoch.
            path: of the JSON file, if one is written.
            enabled: whether to report at all; of several processes that share a training, only one does.
        """
        self._progress, self._steps, self._enabled = progress, steps_per_epoch, enabled
        self._path = path if enabled else None
        columns = "loss {task.fields[loss]}", "F1 {task.fields[f1]}", "{task.fields[rate]} images/s"
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *map(TextColumn, columns),
            TimeRemainingColumn(),
            disable=not enabled,
        )

    def __enter__(self) -> Self:
        self._bar.start()
        total = self._progress.epochs * self._steps
        self._task = self._bar.add_task(self._progress.label, total=total, **self._fields())
        self._update()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._update(
            state="finished" if error is None else "interrupted" if isinstance(error, Interrupted) else "failed"
        )

    def report_step(self, epoch: int, step: int) -> None:
        """Advance the bar to a step of an epoch; cheap enough for every step."""
        self._bar.update(self._task, completed=(epoch - 1) * self._steps + step)

    def report_loss(self, epoch: int, loss: float, images_per_second: float) -> None:
        """Report the latest loss within an epoch; meant for once a second."""
        self._update(epoch=epoch, loss=loss, images_per_second=images_per_second)

    def report_epoch(self, epoch: int, loss: float, f1: float, images_per_second: float | None) -> None:
        """Report a complete epoch, and print its line."""
        self._update(epoch=epoch, loss=loss, f1=f1, images_per_second=images_per_second)
        if self._enabled:
            line = "{label}  epoch {epoch}/{epochs}  loss {loss}  F1 {f1}  {rate} images/s"
            self._bar.print(line.format(label=self._progress.label, **{**asdict(self._progress), **self._fields()}))

    def _update(self, **changes: Any) -> None:
        self._progress = replace(self._progress, **changes)
        self._bar.update(self._task, **self._fields())
        if self._path:
            with suppress(OSError):  # no reason to stop a training
                write_json(self._path, asdict(self._progress))

    def _fields(self) -> dict[str, Any]:
        loss, f1, rate = self._progress.loss, self._progress.f1, self._progress.images_per_second
        return {
            "loss": "–" if loss is None else f"{loss:.3f}",
            "f1": "–" if f1 is None else f"{f1:.3f}",
            "rate": "–" if rate is None else f"{rate:.0f}",
        }
