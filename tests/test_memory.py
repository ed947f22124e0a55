"""What training and judging free stays with the process, ready for the next step."""

import platform
import subprocess
import sys

import pytest
import torch

from pipeline.core import memory

MEASURE = """
from pathlib import Path
from resource import getpagesize
from pipeline.core import memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize() >> 20

{first}
before = resident()
block = b"x" * (100 << 20)
del block
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_once_asked_for():
    kept, plain = (
        int(subprocess.check_output([sys.executable, "-c", MEASURE.format(first=first)]))
        for first in ("memory.retain_freed_memory()", "")
    )
    assert kept > 90
    assert plain < 10


def test_an_allocation_that_fails_is_known_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_out_of_memory(caught.value)
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(RuntimeError("a damaged checkpoint"))
