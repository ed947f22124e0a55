"""Deferred handling of SIGINT and SIGTERM."""

import signal
from types import FrameType, TracebackType
from typing import Self


class SignalHandler:
    """Records SIGINT and SIGTERM until the program asks for them; a second signal acts at once."""

    def __init__(self) -> None:
        self._received = 0

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._record) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def __call__(self) -> int:
        """Return the number of the received signal, or 0."""
        return self._received

    def _record(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
