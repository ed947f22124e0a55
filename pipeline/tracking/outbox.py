"""A background thread that logs a training to MLflow, so that training neither waits for MLflow nor fails with it."""

import logging
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from pipeline.core.errors import Interrupted, UnreachableError, UserError, first_line

if TYPE_CHECKING:
    from pipeline.tracking.runs import SeedRun

T = TypeVar("T")

log = logging.getLogger(__name__)

RETRY_DELAYS = (1, 2, 4, 8)  # seconds between tries; the last one repeats
TIMEOUT_SECONDS = 30  # how long the end of a training waits for MLflow


class Outbox:
    """Opens a run and makes calls on it in a background thread, in order; failed calls are retried."""

    def __init__(self, open_run: "Callable[[], SeedRun]") -> None:
        """Set the function that opens the run; the thread calls it, since importing MLflow alone takes seconds."""
        self._open_run = open_run
        self._queue: SimpleQueue[Callable[[SeedRun], None] | None] = SimpleQueue()
        self._warned = self._delivered = False
        self._error: UserError | None = None

    def __enter__(self) -> Self:
        self._thread = Thread(target=self._deliver, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait up to TIMEOUT_SECONDS for the queue to empty; after an error, close the run as failed or killed."""
        if kind:
            status = "KILLED" if kind in (KeyboardInterrupt, Interrupted) else "FAILED"
            self.put(lambda run: run.close(status))
        self._queue.put(None)
        self._thread.join(TIMEOUT_SECONDS)
        if not self._delivered and not kind:
            reason = f" ({self._error})" if self._error else ""
            log.warning("this run is not completely logged to MLflow%s; after the training, run: cxr sync", reason)

    def put(self, call: "Callable[[SeedRun], None]") -> None:
        """Queue a call on the run."""
        self._queue.put(call)

    def check(self) -> None:
        """Raise the error that stopped the thread, if only a user can correct it, such as a wrong password."""
        if self._error:
            raise self._error

    def _deliver(self) -> None:
        try:
            run = self._retry(self._open)
        except UserError as error:
            self._error = error
            return
        while call := self._queue.get():
            self._retry(partial(call, run))
        self._delivered = True

    def _open(self) -> "SeedRun":
        try:
            return self._open_run()
        except Exception as error:
            from pipeline.tracking.store import refusal  # imported already, or nothing refused

            if refused := refusal(error):
                raise refused from None
            raise

    def _retry(self, call: Callable[[], T]) -> T:
        delays = chain(RETRY_DELAYS, repeat(RETRY_DELAYS[-1]))
        while True:
            try:
                return call()
            except Exception as error:  # training continues, whatever a store raises
                if isinstance(error, UserError) and not isinstance(error, UnreachableError):
                    raise
                if not self._warned:
                    log.warning(
                        "logging to MLflow failed (%s); training continues, and logging is retried", first_line(error)
                    )
                    self._warned = True
                time.sleep(next(delays))
