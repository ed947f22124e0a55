"""The training step on a CUDA device: its input comes in one asynchronous copy, and it is replayed as a CUDA graph."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.core import memory
from pipeline.core.errors import first_line

log = logging.getLogger(__name__)

ALIGNMENT = 16  # bytes; a multiple of the size of every number
EAGER_STEPS = 3  # before the capture; libraries choose kernels and allocate memory in them
QUEUED_STEPS = 8  # that the host is ahead of the device at most

Inputs = Mapping[str, Tensor]


@contextmanager
def use_stream(device: torch.device) -> Iterator[None]:
    """Do the block's work on a CUDA stream of its own, which a capture needs; on the CPU, do nothing special."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)


def join_tensors(tensors: Inputs) -> Tensor:
    """Copy the tensors, on the CPU, into one pinned block: uint8 (bytes,)."""
    block = torch.empty(sum(_aligned_sizes(tensors)), dtype=torch.uint8, pin_memory=True)
    for view, tensor in zip(split_block(block, tensors).values(), tensors.values(), strict=True):
        view.numpy()[...] = tensor.numpy()  # in the calling thread; torch would start a thread pool for it
    return block


def split_block(block: Tensor, tensors: Inputs) -> dict[str, Tensor]:
    """Return views of a copy of a block from `join_tensors`, with the types and shapes of `tensors`."""
    parts = block.split(_aligned_sizes(tensors))
    return {
        name: part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for part, (name, tensor) in zip(parts, tensors.items(), strict=True)
    }


def _aligned_sizes(tensors: Inputs) -> list[int]:
    return [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors.values()]


class CapturedStep:
    """Runs a step on the current stream of a CUDA device: a few times as it is, then as a CUDA graph.

    A graph launches the same kernels, so it gives the same bytes, without the host's work for each of them. Batches of
    another size than `batch_size` run as they are, and so do all if CUDA refuses the capture or `enabled` is False.
    """

    def __init__(
        self, step: Callable[[Inputs], Tensor], batch_size: int, device: torch.device, *, enabled: bool
    ) -> None:
        """Set up the step.

        Args:
            step: computes the loss, a scalar on the device, from its inputs, in which `targets` has a row per image; it
                must not wait for the device.
            batch_size: number of images of the captured batch.
            device: the CUDA device.
            enabled: whether to capture.
        """
        self._step, self._batch_size, self._device, self._enabled = step, batch_size, device, enabled
        self._eager_steps = 0
        self._block: Tensor | None = None  # on the device, read by the graph
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss = torch.empty(())  # of the graph, on the device
        self._queue: deque[torch.cuda.Event] = deque()

    def run(self, block: Tensor, tensors: Inputs, loss_out: Tensor) -> None:
        """Start the step.

        Args:
            block: from `join_tensors`.
            tensors: what was joined; only types and shapes are read.
            loss_out: pinned, a scalar; the loss is written there when the step is finished.
        """
        if not self._enabled or len(tensors["targets"]) != self._batch_size:
            loss = self._step(split_block(block.to(self._device, non_blocking=True), tensors))
        else:
            loss = self._run_full_batch(block, tensors)
        loss_out.copy_(loss, non_blocking=True)
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._queue.append(event)
        if len(self._queue) > QUEUED_STEPS:  # else pinned memory would grow
            self._queue.popleft().synchronize()

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    @property
    def queued(self) -> int:
        """Number of started steps that may not be finished."""
        return len(self._queue)

    def wait(self) -> None:
        """Wait until all started steps are finished."""
        while self._queue:
            self._queue.popleft().synchronize()

    def _run_full_batch(self, block: Tensor, tensors: Inputs) -> Tensor:
        if self._block is None:
            self._block = torch.empty_like(block, device=self._device, pin_memory=False)
        self._block.copy_(block, non_blocking=True)
        inputs = split_block(self._block, tensors)
        if self._graph is None and self._eager_steps == EAGER_STEPS:  # once: a refused capture is not tried again
            self._capture(inputs)
        if self._graph is None:
            self._eager_steps += 1
            return self._step(inputs)
        self._graph.replay()
        return self._loss

    def _capture(self, inputs: Inputs) -> None:
        """Record the step as a graph, without running it."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The loader's threads may allocate pinned memory meanwhile, which the default mode forbids to all threads.
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self._loss = self._step(inputs)
            self._graph = graph
        except RuntimeError as error:
            if memory.is_out_of_memory(error):
                raise
            log.warning("training without a CUDA graph, which is slower: %s", first_line(error))
