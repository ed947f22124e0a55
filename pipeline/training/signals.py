"""Signals that ask a training to stop."""

import signal
from types import FrameType, TracebackType
from typing import Self


class SignalHandler:
    """Keeps SIGINT and SIGTERM until the work can be put down; a second one acts at once."""

    def __init__(self) -> None:
        self._came = 0

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def __call__(self) -> int:
        """Return the number of the signal that came, or 0."""
        return self._came

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._came = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
