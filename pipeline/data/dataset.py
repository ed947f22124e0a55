"""The packed images, and batches of them on the device."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.core.config import Resize
from pipeline.core.files import read_json
from pipeline.core.parallel import map_in_threads


class PackedImages:
    """All images, uint8 (N, S, S), memory-mapped, so that processes share one copy and memory does not limit N."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        self.images = np.load(path, mmap_mode="r")
        self.device = device

    @property
    def size(self) -> int:
        """Edge of the images, pixels."""
        return int(self.images.shape[-1])

    @property
    def resize(self) -> Resize:
        """The method that made the images square."""
        method: Resize = read_json(self._path.with_suffix(".json"))["resize"]
        return method

    def read(self, rows: Tensor, *, pin_memory: bool = False) -> Tensor:
        """Return the images at `rows` (B,): uint8 (B, S, S), on the CPU.

        Raises:
            IndexError: there is no such row.
        """
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self.images):
            raise IndexError(f"{self._path}: {len(self.images)} images, so no row {int(rows.max())}")
        pixels = torch.empty((len(rows), self.size, self.size), dtype=torch.uint8, pin_memory=pin_memory)
        # NumPy gathers in the calling thread; torch would start a thread pool per calling thread.
        np.take(self.images, rows.numpy(), axis=0, out=pixels.numpy(), mode="clip")
        return pixels

    def batches(self, row_batches: Sequence[Tensor], threads: int = 1) -> Iterator[Tensor]:
        """Yield the pixels of each batch on the device, in order; threads prefetch the next ones from disk."""
        read = partial(self.read, pin_memory=self.device.type == "cuda")
        for pixels in map_in_threads(read, row_batches, threads, ahead=threads + 1):
            yield pixels.to(self.device, non_blocking=True)
