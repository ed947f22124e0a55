"""Retention of freed memory, sharing of the pack, and detection of out-of-memory errors."""

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core import memory
from pipeline.data.dataset import PackedImages

SCRIPT = """
from pathlib import Path
from resource import getpagesize
from pipeline.core import memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize() >> 20

{setup}
before = resident()
block = b"x" * (100 << 20)
del block
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_stays_with_the_process():
    retained, default = (
        int(subprocess.check_output([sys.executable, "-c", SCRIPT.format(setup=setup)]))
        for setup in ("memory.retain_freed_memory()", "")
    )
    assert retained > 90
    assert default < 10


def private_megabytes() -> int:
    """Return the resident memory of this process that it shares with no file and so with no other process."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) >> 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_processes_share_the_memory_of_the_pack(tmp_path):
    np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (1024, 512, 512))  # 256 MB, sparse
    before = private_megabytes()
    pack = PackedImages(tmp_path / "images.npy", torch.device("cpu"))
    for pixels in pack.batches(torch.arange(1024).split(8), threads=2):
        assert not pixels.any()
    assert private_megabytes() - before < 128


def test_out_of_memory_errors_are_distinguished_from_others():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_out_of_memory(caught.value)
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(RuntimeError("a damaged checkpoint"))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    ],
)
def test_messages_of_cuda_and_its_libraries_are_recognized(message):
    assert memory.is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
        "FIND was unable to find an engine to execute this computation",
    ],
)
def test_other_messages_of_cuda_and_its_libraries_are_not_out_of_memory(message):
    assert not memory.is_out_of_memory(RuntimeError(message))
