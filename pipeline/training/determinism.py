"""The same seed gives the same bytes: deterministic kernels, a fixed thread count, and no inherited randomness."""

import hashlib
import os

import torch
from torch import Generator


def make_deterministic(cpu_threads: int, *, compiled: bool = False) -> None:
    """Let torch choose only deterministic kernels. Call before CUDA is touched.

    The number of threads sets the order in which the CPU sums floats, so it is part of the result.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if compiled:
        torch.use_deterministic_algorithms(True)
    else:  # the same, without importing torch's compiler, which takes two seconds
        torch.set_deterministic_debug_mode("error")
    torch.backends.cudnn.benchmark = False
    # Nothing here reads memory that it did not write, and filling it costs a twentieth of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(cpu_threads)


def derive_seed(seed: int, *purpose: int | str) -> int:
    """Derive a 63-bit seed for one purpose, such as (epoch, "order"), that no other purpose shares."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(seed: int, *purpose: int | str) -> Generator:
    return Generator().manual_seed(derive_seed(seed, *purpose))


def seed_global_generators(seed: int, *purpose: int | str) -> None:
    """Seed torch's global generators for library code that takes no generator, such as dropout."""
    torch.manual_seed(derive_seed(seed, *purpose))


def select_device() -> torch.device:
    """Return this process's CUDA device where there is one (CUDA_VISIBLE_DEVICES chooses), else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def describe_environment(processes: int) -> dict[str, str | int | None]:
    """Name what the promise of equal bytes rests on, beside parameters, data and code."""
    place = select_device()
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda if place.type == "cuda" else None,
        "device": torch.cuda.get_device_name() if place.type == "cuda" else "cpu",
        "cpu_threads": torch.get_num_threads(),
        "processes": processes,
    }
