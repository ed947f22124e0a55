"""Stages that `python -m stages.fork_server` forks behave like stages that run by themselves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

# A library that is imported at once takes the place of those of the stages.
SERVER = (
    "import runpy, sys; from stages import fork_server; fork_server.LIBRARIES[:] = ['wave']; "
    "runpy.run_module(fork_server.serve(sys.argv[1:]), run_name='__main__', alter_sys=True)"
)
PROBE = """
import os, signal, sys, time
from pathlib import Path

import click
from pipeline.core.errors import UserError
from stages.common import stage

@stage
@click.argument("action")
def probe(action):
    with Path("runs").open("a") as runs:
        print("forked" if "wave" in sys.modules else "alone", os.getpid(), file=runs)
    print(action, Path.cwd(), os.environ.get("COLOR"), "CXR_FORK_SERVER" in os.environ)
    match action:
        case "error":
            raise UserError("no such thing")
        case "abort":
            os.kill(os.getpid(), signal.SIGABRT)
        case "wait":
            Path("waiting").touch()
            time.sleep(60)

if __name__ == "__main__":
    probe()
"""
# A library whose thread gets the signals at the end of a stage and of the command, in place of the waiting main thread.
THREADED = """
import signal, threading, time
threading.Thread(target=time.sleep, args=[60], daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
"""
WAIT_FOR_SERVER = 'until [ -S "$CXR_FORK_SERVER" ]; do sleep 0.05; done'


@pytest.fixture
def run_beside_server(tmp_path):
    """Return a function that runs a shell script, in which `$probe` is a stage, beside a fork server."""
    (tmp_path / "probe.py").write_text(PROBE)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "probe": f"{sys.executable} -m probe"}

    def run(script: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SERVER, "sh", "-c", f"{WAIT_FOR_SERVER}; {script}"]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    return run


def runs(folder: Path) -> list[str]:
    return [line.split()[0] for line in (folder / "runs").read_text().splitlines()]


def test_a_stage_is_forked_once_with_its_folder_environment_output_and_exit_code(run_beside_server, tmp_path):
    result = run_beside_server("COLOR=red $probe fine; $probe error; echo $?; $probe --wrong; echo $?; exit 7")
    assert result.returncode == 7
    assert result.stdout.splitlines() == [
        f"fine {tmp_path} red False", f"error {tmp_path} None False", "2", "2",
    ]  # fmt: skip
    assert "Error: no such thing" in result.stderr
    assert "Usage: " in result.stderr
    assert runs(tmp_path) == ["forked", "forked"]
    assert not list((tmp_path / ".dvc/tmp").iterdir())


def test_a_command_that_is_no_module_runs_by_itself_and_leaves_the_server_to_its_stages(run_beside_server, tmp_path):
    result = run_beside_server(f"{sys.executable} -c 'import probe; probe.probe()' fine")
    assert result.stdout == f"fine {tmp_path} None True\n"
    assert runs(tmp_path) == ["alone"]


def test_a_stage_that_a_signal_ends_ends_its_process_in_the_same_way(run_beside_server, tmp_path):
    wait = "until [ -e waiting ]; do sleep 0.05; done"
    result = run_beside_server(f"$probe abort; echo $?; $probe wait & {wait}; kill -TERM $!; wait $!; echo $?")
    codes = [line for line in result.stdout.splitlines() if line.isdigit()]
    assert codes == [str(128 + signal.SIGABRT), str(128 + signal.SIGTERM)]
    assert runs(tmp_path) == ["forked", "forked"]


def test_ctrl_c_reaches_a_forked_stage(run_beside_server):
    result = run_beside_server(
        f"""{sys.executable} - <<'END'
import os, signal, subprocess, sys, time
stage = subprocess.Popen([sys.executable, "-m", "probe", "wait"])
while not os.path.exists("waiting"):
    time.sleep(0.05)
stage.send_signal(signal.SIGINT)
print(stage.wait())
END"""
    )
    assert result.stdout.splitlines()[-1] == str(128 + signal.SIGINT)


def test_the_fork_of_a_killed_stage_is_killed(run_beside_server, tmp_path):
    run_beside_server("$probe wait & until [ -e waiting ]; do sleep 0.05; done; kill -KILL $!; wait $!")
    pid = (tmp_path / "runs").read_text().split()[1]
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_without_a_live_server_a_stage_runs_by_itself(run_beside_server, tmp_path):
    result = run_beside_server("kill -KILL $PPID; $probe fine; CXR_FORK_SERVER=missing $probe fine > other")
    assert result.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while not (tmp_path / "other").exists() or not (tmp_path / "other").stat().st_size:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert runs(tmp_path) == ["alone", "alone"]


def test_stages_that_end_at_the_same_time_are_all_answered(run_beside_server, tmp_path):
    result = run_beside_server("for n in 1 2 3 4 5 6; do $probe fine & done; wait; exit 7")
    assert (result.returncode, result.stderr) == (7, "")
    assert runs(tmp_path) == ["forked"] * 6


def test_a_stage_whose_server_is_killed_fails_with_one_line(run_beside_server, tmp_path):
    wait = "until [ -e waiting ]; do sleep 0.05; done"
    run_beside_server(
        f"$probe wait 2> errors & {wait}; kill -KILL $PPID; kill $(cut -d' ' -f2 runs); wait $!; echo $? > code"
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "code").exists() or not (tmp_path / "code").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (tmp_path / "code").read_text() == "1\n"
    assert len((tmp_path / "errors").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ("fork_server.LIBRARIES[:] = ['no_such_library', 'wave']", "forked"),
        ("os.fork = lambda: os.open('no such file', 0)", "alone"),
        ("fork_server.LIBRARIES[:] = ['threaded', 'wave']", "forked"),
    ],
)
def test_a_server_that_fails_ends_with_its_command(tmp_path, failure, expected):
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "threaded.py").write_text(THREADED)
    code = SERVER.replace("import runpy, sys;", "import os, runpy, sys;").replace(
        "fork_server.LIBRARIES[:] = ['wave']", failure
    )
    script = f"{WAIT_FOR_SERVER}; {sys.executable} -m probe fine; exit 7"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = subprocess.run(
        [sys.executable, "-c", code, "sh", "-c", script],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (7, "")
    assert runs(tmp_path) == [expected]


def test_without_sockets_in_the_file_system_stages_run_by_themselves(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    code = SERVER.replace("fork_server.LIBRARIES", "fork_server.socket.AF_UNIX = -2; fork_server.LIBRARIES")
    result = subprocess.run(
        [sys.executable, "-c", code, "sh", "-c", f"{sys.executable} -m probe fine; exit 7"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (7, "")
    assert runs(tmp_path) == ["alone"]
