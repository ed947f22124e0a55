"""The allocator of the C library, and detection of out-of-memory errors."""

import contextlib
import ctypes
import re

# Parameters of mallopt(3).
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
# torch raises a plain RuntimeError for most of them; the last is of cuBLAS and cuDNN.
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|ALLOC(ATION)?_FAILED")


def retain_freed_memory(max_size: int | None = None) -> None:
    """Let glibc keep freed memory for the next tensors instead of returning it to the kernel.

    Every step on a CPU frees activations of tens of megabytes and allocates as much again; getting them from the kernel
    page by page, filled with zeros, takes a quarter of the time. Without glibc this does nothing.

    Args:
        max_size: larger blocks are still returned, bytes, at most 32 MiB.
    """
    with contextlib.suppress(AttributeError, TypeError):  # macOS has no mallopt; Windows does not accept None
        libc = ctypes.CDLL(None)
        if max_size is None:
            libc.mallopt(MMAP_MAX, 0)  # no separate mapping per tensor, which would be unmapped with it
        else:
            libc.mallopt(MMAP_THRESHOLD, max_size)
        libc.mallopt(TRIM_THRESHOLD, -1)  # no trimming of the end of the heap


def is_out_of_memory(error: Exception) -> bool:
    """Return whether Python, torch's CPU allocator, CUDA, cuBLAS or cuDNN ran out of memory.

    cuDNN's "unable to find an engine" is not among them: it also means a driver that is too old.
    """
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))
