"""The checkpoint of an unfinished training."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from pipeline.core import memory
from pipeline.core.errors import first_line
from pipeline.core.files import atomic_path, check_zip, detect_damage

log = logging.getLogger(__name__)


class Checkpoint:
    """The file, named by the run's fingerprint, from which an interrupted training resumes."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path = folder / f"{fingerprint}.pt"
        self._fingerprint = fingerprint

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold a lock while the block runs, so that a second process that trains the same run waits."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_suffix(".lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.warning("another process is training this run; waiting until it ends")
        with lock:
            yield
            Path(lock.lock_file).unlink()

    def save(self, state: dict[str, Any]) -> None:
        """Replace the last checkpoint; `state` consists of numbers, strings and tensors.

        Raises:
            OSError: it cannot be written, such as on a full disk; the last one is kept.
        """
        with atomic_path(self.path) as temporary, temporary.open("wb") as out:
            try:
                torch.save({"fingerprint": self._fingerprint, "state": state}, out)
            except RuntimeError as error:  # torch raises it, too, for what it failed to write
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
            out.flush()
            os.fsync(out.fileno())
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)  # so that the new name, too, survives a power failure
        os.close(folder)

    def load(self) -> dict[str, Any] | None:
        """Return the saved state, on the CPU, or None if there is none.

        A damaged checkpoint, or one of another run, is renamed to `.unusable` with a warning.

        Raises:
            OSError: the file cannot be read; it may be intact.
        """
        try:
            return self._read()
        except FileNotFoundError:
            return None
        except Exception as error:
            if isinstance(error, OSError) or memory.is_out_of_memory(error):
                raise  # the file may be intact
            unusable = self.path.with_suffix(".unusable")
            self.path.replace(unusable)
            reason = first_line(error)
            log.warning("%s cannot be used: %s; training starts again (kept as %s)", self.path, reason, unusable.name)
            return None

    def _read(self) -> dict[str, Any]:
        check_zip(self.path)  # torch.save writes checksums, but torch.load does not compare them
        with detect_damage():
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        if content["fingerprint"] != self._fingerprint:
            raise ValueError(f"it belongs to run {content['fingerprint']}")
        state: dict[str, Any] = content["state"]
        return state

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
