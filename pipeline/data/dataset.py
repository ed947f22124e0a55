"""The pack as a tensor, and batches of rows on the device."""

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
    """All images, uint8 (N, S, S): on the CUDA device when half its free memory holds them, else mapped from disk."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        # Copy-on-write gives torch the writable array it asks for; nothing is ever written.
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
        """How the images became square."""
        how: Resize = read_json(self._path.with_suffix(".json"))["resize"]
        return how

    def pixels(self, rows: Tensor) -> Tensor:
        """Gather the given rows (B,) on the device: uint8 (B, S, S)."""
        if self.images.device.type == "cpu":
            # NumPy gathers in the thread that asks; torch would give each such thread a team of its own.
            return torch.from_numpy(self.images.numpy()[rows.numpy()]).to(self.device, non_blocking=True)
        return self.images[rows.to(self.images.device)]

    def batches(self, parts: Sequence[Tensor], threads: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each part's rows (B,) and pixels, in order; threads gather the next ones from disk meanwhile."""
        with ThreadPoolExecutor(threads) as pool:
            ahead: deque[tuple[Tensor, Future[Tensor]]] = deque()
            for rows in parts:
                ahead.append((rows, pool.submit(self.pixels, rows)))
                if len(ahead) > threads:
                    rows_of_first, pixels = ahead.popleft()
                    yield rows_of_first, pixels.result()
            for rows, pixels in ahead:
                yield rows, pixels.result()
