"""Decoding of images from strangers in worker processes; one that hangs, crashes or eats memory harms no other image.

A worker sends JSON and pixels, no pickles: who takes over a decoder with a crafted image cannot run code in the server.
"""

import contextlib
import json
import logging
import math
import multiprocessing
import queue
import resource
import signal
import threading
import time
import warnings
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pipeline.core.config import Resize
from pipeline.data.image_checks import UnusableError
from pipeline.inference.decoding import DecodedImage, decode_image

log = logging.getLogger(__name__)

WORKER_MEMORY = 3 * 2**30  # of the address space, bytes; what `image_checks` lets pass needs up to 1.5 GB
MAX_REPLY = 16 * 2**20  # bytes of a part of what a worker sends
START_SECONDS = 60
RESTART_SECONDS = 1.0  # before another worker is started if one did not start


class DecoderError(UnusableError):
    """The decoder of an image was stopped or crashed; `outcome` is timeout or crash."""

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome


@dataclass(frozen=True)
class DecodeJob:
    data: bytes | bytearray
    size: int
    resize: Resize
    with_preview: bool
    result: "Future[DecodedImage]" = field(default_factory=Future)


class DecoderPool:
    """Worker processes, each with a thread that gives it one image at a time."""

    def __init__(self, workers: int, seconds: float, *, with_description: bool = False) -> None:
        """Start the workers.

        Args:
            workers: their number.
            seconds: the time for one image, after which its worker is killed.
            with_description: whether to describe the images for the log of predictions.
        """
        self._seconds, self._with_description = seconds, with_description
        self._jobs: queue.SimpleQueue[DecodeJob | None] = queue.SimpleQueue()
        self._workers: list[_Worker | None] = [None] * workers
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._serve, args=[index], daemon=True) for index in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def is_ready(self) -> bool:
        return any(self._workers)

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    def decode(
        self, data: bytes | bytearray, size: int, resize: Resize, *, with_preview: bool
    ) -> "Future[DecodedImage]":
        """Return a future of what `decode_image` returns or raises, or with a DecoderError."""
        job = DecodeJob(data, size, resize, with_preview)
        self._jobs.put(job)
        return job.result

    def close(self) -> None:
        """End the workers, after the images that wait."""
        self._closed.set()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self, index: int) -> None:
        resource_tracker.ensure_running()  # of multiprocessing, whose start would change the mask
        # The workers inherit the mask. Ctrl-C, which all processes get, is for the server, which then ends its workers.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        while self._start_worker(index):
            job = self._jobs.get()
            # The worker may have been killed while it waited, such as by a system that is short of memory.
            worker = self._start_worker(index)
            if job is None or worker is None:
                break
            if job.result.set_running_or_notify_cancel():  # else its client has gone
                try:
                    job.result.set_result(worker.decode(job))
                except UnusableError as error:
                    # Its traceback would keep the image in memory until the next garbage collection.
                    job.result.set_exception(error.with_traceback(None))
            del job  # or it would be in memory until the next one comes
        worker = self._workers[index]
        if worker:
            worker.stop()

    def _start_worker(self, index: int) -> "_Worker | None":
        """Return the worker, a new one if it does not run; None if none starts before the pool is closed."""
        worker = self._workers[index]
        while not (worker and worker.is_alive()):
            if worker:
                worker.stop()
            try:
                worker = self._workers[index] = _Worker(self._seconds, self._with_description)
            except OSError as error:
                worker = self._workers[index] = None
                if self._closed.is_set():
                    break
                log.warning("a decoder does not start: %s", error)
                self._closed.wait(RESTART_SECONDS)
        return worker


class _Worker:
    """A worker process and the connection to it."""

    def __init__(self, seconds: float, with_description: bool) -> None:
        """Start the process and wait for it.

        Raises:
            OSError: it does not start.
        """
        self._seconds = seconds
        # Spawned: a fork would have the memory of this process with its models, and locks that its threads hold.
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=[other, seconds, with_description], daemon=True)
        self._process.start()
        other.close()
        try:
            is_ready = self._connection.poll(START_SECONDS) and self._connection.recv_bytes()
        except (EOFError, OSError):
            is_ready = False
        if not is_ready:
            self.stop()
            raise OSError(f"its process ended, or needs more than {START_SECONDS} s to start")

    def is_alive(self) -> bool:
        return not self._connection.closed and self._process.is_alive()

    def stop(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()
        self._process.close()

    def decode(self, job: DecodeJob) -> DecodedImage:
        """Decode an image.

        Raises:
            DecoderError: the worker was killed, after too long a time or by itself; it cannot be used again.
            UnusableError: the image cannot be used.
        """
        start = time.monotonic()
        killer = threading.Timer(self._seconds, self._process.kill)
        killer.start()
        try:
            return self._exchange(job)
        except UnusableError:
            raise
        except Exception:  # noqa: BLE001  # no reply, or one that no decoder sends
            is_late = time.monotonic() - start >= self._seconds
            self._connection.close()  # so that it counts as ended
            if is_late:
                raise DecoderError("timeout", f"broken image: decoding takes longer than {self._seconds:g} s") from None
            raise DecoderError("crash", "broken image: its decoder crashed") from None
        finally:
            killer.cancel()
            killer.join()

    def _exchange(self, job: DecodeJob) -> DecodedImage:
        self._connection.send_bytes(json.dumps([job.size, job.resize, job.with_preview]).encode())
        self._connection.send_bytes(job.data)
        reply = json.loads(self._connection.recv_bytes(MAX_REPLY))
        if "reason" in reply:
            raise UnusableError(reply["reason"])
        pixels, preview = (np.frombuffer(self._connection.recv_bytes(MAX_REPLY), np.uint8) for _ in range(2))
        pixels, preview = pixels.reshape(job.size, job.size), preview.reshape(reply["preview_shape"])
        return DecodedImage(pixels, preview, reply["width"], reply["height"], reply["description"])


def _work(connection: Connection, seconds: float, with_description: bool) -> None:
    """Decode images until the connection is closed."""
    warnings.simplefilter("ignore")  # of decoders
    with contextlib.suppress(ValueError, OSError):  # not every system limits memory
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash writes no image to the disk
    if with_description:  # import what takes seconds before the first image comes
        import pipeline.inference.prediction_log  # noqa: F401
    with contextlib.suppress(EOFError, OSError):
        connection.send_bytes(b"ready")
        while True:
            request = json.loads(connection.recv_bytes())
            data = connection.recv_bytes()
            signal.alarm(math.ceil(seconds) + 1)  # if the server was killed, who else would end a decoder that hangs
            reply, *arrays = _decode(data, *request, with_description=with_description)
            signal.alarm(0)
            del data
            for part in (json.dumps(reply).encode(), *arrays):
                connection.send_bytes(part)


def _decode(data: bytes, size: int, resize: Resize, with_preview: bool, *, with_description: bool) -> list[Any]:
    """Return what describes the image, its pixels and its preview; or only the reason why it cannot be used."""
    try:
        image = decode_image(data, size, resize, with_preview=with_preview, with_description=with_description)
    except UnusableError as error:
        return [{"reason": str(error)}]
    except MemoryError:
        return [{"reason": "broken image: decoding takes too much memory"}]
    reply = {"width": image.width, "height": image.height, "description": image.description}
    return [reply | {"preview_shape": image.preview.shape}, image.pixels.tobytes(), image.preview.tobytes()]
