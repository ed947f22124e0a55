"""The packed images as a tensor, and batches of them on the device."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.core.config import Resize
from pipeline.core.files import read_json


class PackedImages:
    """All images, uint8 (N, S, S): on the CUDA device if they fit in half of its free memory, else memory-mapped."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        # torch requires a writable array; copy-on-write provides one, and it is never written to.
        self.images = torch.from_numpy(np.load(path, mmap_mode="c"))
        self.device = device
        if device.type == "cuda" and 2 * self.images.nbytes < torch.cuda.mem_get_info(device)[0]:
            self.images = self.images.to(device)

    @property
    def size(self) -> int:
        """Edge of the images, pixels."""
        return self.images.shape[-1]

    @property
    def resize(self) -> Resize:
        """The method that made the images square."""
        method: Resize = read_json(self._path.with_suffix(".json"))["resize"]
        return method

    def pixels(self, rows: Tensor) -> Tensor:
        """Return the images at `rows` (B,) on the device: uint8 (B, S, S)."""
        if self.images.device.type == "cpu":
            # NumPy gathers in the calling thread; torch would start a thread pool per calling thread.
            return torch.from_numpy(self.images.numpy()[rows.numpy()]).to(self.device, non_blocking=True)
        return self.images[rows.to(self.images.device)]

    def batches(self, row_batches: Sequence[Tensor], threads: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows (B,) and pixels of each batch, in order; threads prefetch the next ones from disk."""
        with ThreadPoolExecutor(threads) as pool:
            prefetched: deque[tuple[Tensor, Future[Tensor]]] = deque()
            for rows in row_batches:
                prefetched.append((rows, pool.submit(self.pixels, rows)))
                if len(prefetched) > threads:
                    first_rows, pixels = prefetched.popleft()
                    yield first_rows, pixels.result()
            for rows, pixels in prefetched:
                yield rows, pixels.result()
