"""NVIDIA MPS: with it, processes that share a GPU compute at the same time; without it, they take turns."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import UserError

CONTROL = "nvidia-cuda-mps-control"


def is_running() -> bool:
    """Return whether the user runs MPS: CUDA_MPS_PIPE_DIRECTORY is set, or a daemon answers at the default place.

    Raises:
        UserError: MPS is not installed.
    """
    return "CUDA_MPS_PIPE_DIRECTORY" in os.environ or _run({}, Path(os.devnull), command="get_server_list") == 0


@contextmanager
def start_mps(device: str) -> Iterator[dict[str, str]]:
    """Start an MPS control daemon for one GPU, and stop it after the block, in which all its clients must end.

    Args:
        device: the GPU or MIG device, as CUDA_VISIBLE_DEVICES names it.

    Yields:
        The environment variables of a process that computes on this GPU.

    Raises:
        UserError: MPS is not installed, or does not start.
    """
    with tempfile.TemporaryDirectory(prefix="mps-", ignore_cleanup_errors=True) as folder:
        log = Path(folder, "start.log")
        client = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        # A daemon for each GPU, since it opens all that it sees, and of MIG devices only the first.
        daemon = client | {"CUDA_VISIBLE_DEVICES": device}
        if _run(daemon, log, "-d"):
            reason = log.read_text(errors="replace").strip().partition("\n")[0] or "is there such a GPU?"
            raise UserError(f"NVIDIA MPS does not start for GPU {device}: {reason}")
        try:
            # Clients number the GPUs that the daemon sees; a UUID is valid for both.
            yield client | {"CUDA_VISIBLE_DEVICES": "0" if device.isdigit() else device}
        finally:
            _run(daemon, log, command="quit")


def _run(variables: dict[str, str], log: Path, *options: str, command: str = "") -> int:
    """Run the control program with a command for its daemon as its input, and return its exit code."""
    with log.open("a") as out:  # a pipe would stay open as long as the daemon that inherits it
        try:
            return subprocess.run(
                [CONTROL, *options],
                input=command,
                env=os.environ | variables,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # Ctrl-C is for the caller, who stops the daemon last
                check=False,
            ).returncode
        except OSError:
            raise UserError(f"NVIDIA MPS ({CONTROL}) is not installed") from None
