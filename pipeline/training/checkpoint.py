"""What is on disk of a training that is not at its end."""

import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from pipeline.core import memory
from pipeline.core.errors import first_line
from pipeline.core.files import atomic_path

log = logging.getLogger(__name__)


class Checkpoint:
    """The one file, named by the run's fingerprint, from which a training can be taken up again."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path = folder / f"{fingerprint}.pt"
        self._fingerprint = fingerprint

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let no other process train the same run while the block runs; the first of two makes the second wait."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_suffix(".lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.warning("another process trains this run; waiting for its end")
        with lock:
            yield
            Path(lock.lock_file).unlink()

    def save(self, state: dict[str, Any]) -> None:
        """Put the state, which is made of numbers, texts and tensors, in place of the last one."""
        with atomic_path(self.path) as aside, aside.open("wb") as out:
            torch.save({"fingerprint": self._fingerprint, "state": state}, out)
            out.flush()
            os.fsync(out.fileno())
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name, too, survives a power cut
        os.close(folder)

    def load(self) -> dict[str, Any] | None:
        """Return what was saved, on the CPU; None where nothing was.

        A damaged or foreign file is set aside with a warning.
        """
        try:
            return self._read()
        except FileNotFoundError:
            return None
        except Exception as error:
            if isinstance(error, OSError) or memory.is_out_of_memory(error):
                raise  # it may be whole
            aside = self.path.with_suffix(".unusable")
            self.path.replace(aside)
            reason = first_line(error)
            log.warning("%s cannot be used: %s; training starts anew (kept as %s)", self.path, reason, aside.name)
            return None

    def _read(self) -> dict[str, Any]:
        with zipfile.ZipFile(self.path) as archive:
            broken = archive.testzip()  # torch writes check sums, but does not look at them
        if broken:
            raise ValueError(f"{broken} is damaged")
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        if content["fingerprint"] != self._fingerprint:
            raise ValueError(f"it is of the run {content['fingerprint']}")
        state: dict[str, Any] = content["state"]
        return state

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
