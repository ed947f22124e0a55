"""Peak private memory of one epoch of training, on a small pack and on one of the competition's size.

python bench/memory.py [SMALL] [LARGE]
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pandas as pd


def main(small: int = 1000, large: int = 15264) -> None:
    peaks = {}
    for count in (small, large):
        command = [sys.executable, __file__, "train", str(count)]
        peaks[count] = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])
    print(json.dumps({f"peak_private_mb_of_{count}": peak for count, peak in peaks.items()}))


def train(count: int) -> None:
    import torch
    from common import recipe

    from pipeline.core import memory
    from pipeline.data.dataset import PackedImages
    from pipeline.training import determinism, loop
    from pipeline.training.checkpoint import Checkpoint
    from pipeline.training.distributed import ProcessGroup

    determinism.make_deterministic(len(os.sched_getaffinity(0)))
    memory.retain_freed_memory()
    params = recipe(backbone="squeezenet1_1", image_size=64, batch_size=32, epochs=1, frozen_epochs=1, mixup_alpha=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A sparse file: only zeros, which take no space on the disk.
        np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, 512, 512))
        (folder / "images.json").write_text('{"resize": "stretch"}')
        (folder / "origin.json").write_text('{"source": "none"}')
        subset = ["validation"] * 100 + ["train"] * (count - 100)
        table = pd.DataFrame({"label": [index % 2 for index in range(count)], "subset": subset, "source": ""})
        pack = PackedImages(folder / "images.npy", torch.device("cpu"))
        monitor = MemoryMonitor()
        checkpoint = Checkpoint(folder, uuid.uuid4().hex)
        loop.Trainer(params, 0, table, pack, folder, ProcessGroup()).run(checkpoint, lambda *_: None, lambda: 0)
        print(monitor.peak_mb)


class MemoryMonitor:
    """Measures the peak private memory of this process, ten times a second."""

    def __init__(self) -> None:
        self.peak_mb = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            current_mb = int(status.split("RssAnon:")[1].split()[0]) // 1024
            self.peak_mb = max(self.peak_mb, current_mb)
            time.sleep(0.1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(int(sys.argv[2]))
    else:
        main(*map(int, sys.argv[1:]))
