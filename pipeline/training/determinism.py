"""Determinism: deterministic kernels, a fixed number of threads, and random seeds derived from one seed."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch
from torch import Generator

from pipeline.core.errors import UserError


def make_deterministic(cpu_threads: int, *, compiled: bool = False) -> None:
    """Allow only deterministic kernels; must be called before CUDA is initialized.

    Args:
        cpu_threads: the number of threads, which sets the order in which the CPU sums floats, and so the result.
        compiled: whether the network will be compiled.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if compiled:
        torch.use_deterministic_algorithms(True)
    else:  # the same, without importing torch.compile, which takes two seconds
        torch.set_deterministic_debug_mode("error")
    torch.backends.cudnn.benchmark = False
    _set_float32_precision("ieee")  # cuDNN's default is TF32, which rounds its inputs to 11 bits
    # This code reads no uninitialized memory, and filling it takes 5% of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(cpu_threads)


@contextmanager
def use_tensor_float32(*, enabled: bool) -> Iterator[None]:
    """Let CUDA's convolutions and matrix products round their inputs to 11 bits in the block, if `enabled`."""
    _set_float32_precision("tf32" if enabled else "ieee")
    try:
        yield
    finally:
        _set_float32_precision("ieee")


def _set_float32_precision(precision: str) -> None:
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = precision


def derive_seed(seed: int, *purpose: int | str) -> int:
    """Derive a 63-bit seed that is unique to a purpose, such as (epoch, "order")."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(seed: int, *purpose: int | str) -> Generator:
    return Generator().manual_seed(derive_seed(seed, *purpose))


def seed_global_generators(seed: int, *purpose: int | str) -> None:
    """Seed torch's global generators, for library code without a generator argument, such as stochastic depth."""
    torch.manual_seed(derive_seed(seed, *purpose))


def select_device() -> torch.device:
    """Return this process's CUDA device if there is one (see CUDA_VISIBLE_DEVICES), else the CPU.

    Raises:
        UserError: NVIDIA MPS does not let this process use its GPU.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    # The driver counts a GPU also if CUDA cannot be initialized, which torch reports as no GPU.
    if os.environ.get("CUDA_MPS_PIPE_DIRECTORY") and torch.cuda.device_count():
        raise UserError("NVIDIA MPS does not give access to the GPU; train fewer seeds on it at once, or stop MPS")
    return torch.device("cpu")


def describe_environment(processes: int) -> dict[str, str | int | None]:
    """Describe what bitwise reproducibility depends on, besides parameters, data and code."""
    device = select_device()
    return {
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "timm": version("timm"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else None,
        "cpu_threads": torch.get_num_threads(),
        "processes": processes,
    }
