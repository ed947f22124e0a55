"""What a training tells MLflow, told by a thread, so that training neither waits for MLflow nor fails with it."""

import logging
import time
from collections.abc import Callable
from itertools import chain, repeat
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Self

from mlflow.exceptions import MlflowException

from pipeline.errors import Interrupted
from pipeline.tracking.runs import SeedRun

log = logging.getLogger(__name__)

PAUSES = (1, 2, 4, 8)  # seconds before another try; from then on the last one
PATIENCE = 30  # seconds that the end of a training waits for MLflow


class Outbox:
    """Makes calls on a run, in order; a call that fails is made again until it is answered."""

    def __init__(self, run: SeedRun) -> None:
        self._run = run
        self._calls: SimpleQueue[Callable[[SeedRun], None] | None] = SimpleQueue()
        self._warned = False

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
        self._thread.join(PATIENCE)
        if self._thread.is_alive() and not kind:
            log.warning("MLflow did not take all of this run; cxr sync completes it")

    def put(self, call: Callable[[SeedRun], None]) -> None:
        """Have `call` made on the run, after all that were put before."""
        self._calls.put(call)

    def _deliver(self) -> None:
        while call := self._calls.get():
            self._insist(call)

    def _insist(self, call: Callable[[SeedRun], None]) -> None:
        for pause in chain(PAUSES, repeat(PAUSES[-1])):
            try:
                call(self._run)
            except (MlflowException, OSError) as error:
                if not self._warned:
                    reason = (str(error) or type(error).__name__).splitlines()[0]
                    log.warning("MLflow does not answer (%s); training goes on and tells it later", reason)
                    self._warned = True
                time.sleep(pause)
            else:
                return
