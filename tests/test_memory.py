"""Retention of freed memory, and detection of out-of-memory errors."""

import platform
import subprocess
import sys

import pytest
import torch

from pipeline.core import memory

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


def test_out_of_memory_errors_are_distinguished_from_others():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_out_of_memory(caught.value)
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(RuntimeError("a damaged checkpoint"))
