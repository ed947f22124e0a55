"""Run a command, such as `dvc repro`, whose stages are forked from a process that has imported their libraries.

python -m stages.fork_server COMMAND ...

A stage spends up to half of its time on imports. Here they happen once, beside the first stage. A stage that this
process does not answer, because it still imports or was killed, runs by itself. The results are the same.
"""

import gc
import importlib
import json
import os
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any

from pipeline.core.threads import limit_spinning

ADDRESS = "CXR_FORK_SERVER"  # environment variable; relative, so that a copy of the workspace does not find it
WAKE_SECONDS = 1.0  # a signal does not wake the waiting main thread if a library's thread gets it
# No modules of the project: each stage imports them as they are when it starts.
LIBRARIES = [
    "torch._dynamo", "timm", "mlflow.system_metrics.system_metrics_monitor", "mlflow.store.tracking.sqlalchemy_store",
    "matplotlib.pyplot", "scipy.stats", "sklearn.linear_model",
]  # fmt: skip


def run_in_fork() -> None:
    """Let the fork server, if there is one, run this process's stage, and end like it; else return."""
    spec = sys.modules["__main__"].__spec__
    if not spec:  # no stage, but `cxr`, whose own stages may be forked
        return
    address = os.environ.pop(ADDRESS, "")  # popped: the fork must run it itself
    if not address:
        return
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
            socket.send_fds(connection, [b" "], [0, 1, 2])
            request = [spec.name, sys.argv, str(Path.cwd()), dict(os.environ)]
            connection.sendall(json.dumps(request).encode() + b"\n")
            replies = connection.makefile()
            worker = int(replies.readline())
        except (OSError, ValueError):  # it still imports, or was killed
            return

        def forward(number: int, _frame: FrameType | None) -> None:
            with suppress(ProcessLookupError):
                os.kill(worker, number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, forward)
        status = replies.readline()
    if not status:
        sys.exit("Error: the fork server, which waits for this stage, was killed; run the same command again")
    code = os.waitstatus_to_exitcode(int(status))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(command: list[str]) -> str:
    """Run the command and fork a process for each of its stages; return the module to run, in that process only."""
    # Not its process id, which a container may use again while the socket of a killed server is still there.
    address = Path(f".dvc/tmp/fork-server-{secrets.token_hex(8)}")
    address.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(command, env={**os.environ, ADDRESS: str(address)})
    workers: dict[int, socket.socket] = {}

    def reap(*_: int | FrameType | None) -> None:
        for pid in [*workers, process.pid]:
            with suppress(ChildProcessError):  # the next signal may interrupt this function, which then runs twice
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended and pid in workers:
                    with workers.pop(pid) as connection, suppress(OSError):  # nobody waits for it any more
                        connection.sendall(f"{status}\n".encode())
                elif ended:
                    address.unlink(missing_ok=True)
                    code = os.waitstatus_to_exitcode(status)
                    os._exit(code if code >= 0 else 128 - code)

    handlers: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.SIG_IGN,  # the command gets Ctrl-C, too, and ends first
        signal.SIGHUP: signal.SIG_IGN,  # and what a terminal sends when it is closed
        signal.SIGTERM: lambda *_: process.terminate(),
        signal.SIGCHLD: reap,
    }
    inherited = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    reap()
    limit_spinning()
    if sys.platform == "linux":  # elsewhere, libraries do not survive a fork
        for library in LIBRARIES:
            with suppress(ImportError):  # a stage that needs it reports it
                importlib.import_module(library)
    gc.freeze()  # the forks share the memory as long as garbage collection does not touch it
    connection = _fork_stages(address, workers, reap)
    while not connection:
        time.sleep(WAKE_SECONDS)  # `reap` ends this process
    for number, handler in inherited.items():
        signal.signal(number, handler)
    return _read_request(connection)


def _fork_stages(address: Path, workers: dict[int, socket.socket], reap: Callable[[], None]) -> socket.socket | None:
    """Fork a process for each stage that connects; return its connection, in that process only, or None on failure."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as listener:  # some file systems have no sockets
        listener.bind(str(address))
        listener.listen()
        listener.settimeout(WAKE_SECONDS)
        while True:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            try:
                pid = os.fork()
            except OSError:  # not enough memory; this stage runs by itself
                connection.close()
                continue
            if not pid:
                return connection
            workers[pid] = connection
            reap()  # it may have ended before
    return None


def _read_request(connection: socket.socket) -> str:
    """Give this process the files, arguments, folder and environment of the stage; return its module."""
    os.setsid()  # signals come from the process of the stage only
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    module: str
    module, sys.argv, folder, environment = json.loads(connection.makefile().readline())
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    connection.sendall(f"{os.getpid()}\n".encode())

    def end_with_stage() -> None:
        connection.recv(1)  # returns when the process of the stage is gone
        os.kill(os.getpid(), signal.SIGKILL)

    Thread(target=end_with_stage, daemon=True).start()
    return module


if __name__ == "__main__":
    runpy.run_module(serve(sys.argv[1:]), run_name="__main__", alter_sys=True)
