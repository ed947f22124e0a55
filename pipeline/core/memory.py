"""How the C library holds memory, and what it looks like when there is no more."""

import contextlib
import ctypes

# The numbers of mallopt(3).
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def retain_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensors instead of giving it back to the kernel.

    Every step on a CPU frees activations of tens of megabytes and asks for as much again; fetched from the kernel page
    by page, and filled with zeros, they take a quarter of the time. Where there is no glibc, nothing changes.
    """
    with contextlib.suppress(AttributeError, TypeError):  # no mallopt, as on a Mac; no name for the process, on Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, 0)  # nothing is fetched for one tensor alone, to be given back with it
        libc.mallopt(TRIM_THRESHOLD, -1)  # and nothing is given back from the end of the heap


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether Python, CUDA or torch's allocator on the CPU, whose error has no type of its own, had no memory."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)
