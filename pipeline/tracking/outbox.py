"""What a training tells MLflow, told by a thread, so that training neither waits for MLflow nor fails with it."""

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

RETRY_DELAYS = (1, 2, 4, 8)  # seconds before another try; from then on the last one
TIMEOUT_SECONDS = 30  # seconds that the end of a training waits for MLflow


class Outbox:
    """Opens a run and makes calls on it, in order; a call that fails is made again until it is answered."""

    def __init__(self, open_run: "Callable[[], SeedRun]") -> None:
        """Name what opens the run: it is called by the thread, for importing MLflow alone takes seconds."""
        self._open_run = open_run
        self._calls: SimpleQueue[Callable[[SeedRun], None] | None] = SimpleQueue()
        self._warned = self._delivered = False
        self._refusal: UserError | None = None

    def __enter__(self) -> Self:
        self._thread = Thread(target=self._deliver, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until everything is delivered, but not for ever; a block that did not end well closes the run."""
        if kind:
            status = "KILLED" if kind in (KeyboardInterrupt, Interrupted) else "FAILED"
            self.put(lambda run: run.close(status))
        self._calls.put(None)
        self._thread.join(TIMEOUT_SECONDS)
        if not self._delivered and not kind:
            reason = f" ({self._refusal})" if self._refusal else ""
            log.warning("MLflow did not take all of this run%s; cxr sync completes it", reason)

    def put(self, call: "Callable[[SeedRun], None]") -> None:
        """Have `call` made on the run, after all that were put before."""
        self._calls.put(call)

    def check(self) -> None:
        """Raise what only a user can mend, such as a wrong password, once it is known."""
        if self._refusal:
            raise self._refusal

    def _deliver(self) -> None:
        try:
            run = self._retry(self._open_run)
        except UserError as refusal:
            self._refusal = refusal
            return
        while call := self._calls.get():
            self._retry(partial(call, run))
        self._delivered = True

    def _retry(self, call: Callable[[], T]) -> T:
        pauses = chain(RETRY_DELAYS, repeat(RETRY_DELAYS[-1]))
        while True:
            try:
                return call()
            except Exception as error:  # whatever a store raises, training goes on
                if isinstance(error, UserError) and not isinstance(error, UnreachableError):
                    raise
                if not self._warned:
                    log.warning("MLflow does not answer (%s); training goes on and tells it later", first_line(error))
                    self._warned = True
                time.sleep(next(pauses))
