import functools
import io
import json
import os
import runpy
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import yaml
from filelock import FileLock
from PIL import Image

from pipeline.core.errors import UserError

if TYPE_CHECKING:
    from botocore.client import BaseClient
    from click.testing import Result
    from mlflow import MlflowClient
    from mlflow.entities import Run

ROOT = Path(__file__).parents[1]

# Parameters with which every profile runs in seconds: few and small images, two seeds, one or two epochs.
ONE_THREAD = {"cpu_threads": 1}  # other tests use the other cores
QUICK_TRAINING = {"epochs": 2, "frozen_epochs": 1, "image_size": 32, "batch_size": 8} | ONE_THREAD
TINY_PARAMS = {
    "demo": {
        "download": {"train": 32, "test": 8, "prevalence": 0.25},
        "prepare": {"image_size": 48},
        "train": QUICK_TRAINING,
    },
    "local": {"prepare": {"image_size": 48}, "train": QUICK_TRAINING},
    "competition": {
        "weights": {"source": "none"},
        "train": {"epochs": 1, "frozen_epochs": 0} | ONE_THREAD,
    },
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def encode_jpeg(rng: np.random.Generator, size: int = 64, *, bright: bool = False) -> bytes:
    """Encode random gray pixels as in the competition; `bright` adds a bright square in the middle."""
    pixels = rng.integers(40, 90, (size, size)).astype(np.uint8)
    if bright:
        pixels[size // 4 : -size // 4, size // 4 : -size // 4] += 120
    stream = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(stream, "JPEG", quality=75)
    return stream.getvalue()


def archive_members(train: int = 24, test: int = 4, nested: bool = True) -> dict[str, bytes]:
    """Return the files of a small archive in the layout of the competition; every third training image is positive."""
    rng = np.random.default_rng(0)
    labels = {f"a{index:03}.jpg": int(index % 3 == 0) for index in range(train)}
    tests = [f"t{index:03}.jpg" for index in range(test)]
    folder = {subset: f"{subset}/{subset}" if nested else subset for subset in ("train", "test")}
    members = {f"{folder['train']}/{name}": encode_jpeg(rng, bright=bool(label)) for name, label in labels.items()}
    members |= {f"{folder['test']}/{name}": encode_jpeg(rng) for name in tests}
    members["train_labels.csv"] = ("File,Label\n" + "".join(f"{n},{v}\n" for n, v in labels.items())).encode()
    members["sample_submission.csv"] = ("File,Label\n" + "".join(f"{n},0\n" for n in tests)).encode()
    return members


def write_files(folder: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def raw_zip(tmp_path: Path) -> Path:
    """A small archive in the layout of the competition."""
    return write_zip(tmp_path / "raw.zip", archive_members())


def clone_project(target: Path) -> Path:
    """Copy the project's working tree to a new repository whose demo takes seconds."""
    list_files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(list_files, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    edit_params(target, make_tiny)
    (target / "dvc.lock").unlink()  # it has all seeds of the full demo, and DVC keeps entries that it does not run
    assert run(target, "git", "init", "-q").returncode == 0
    commit_all(target)
    return target


def mlflow_client(project: Path) -> "MlflowClient":
    """Return a client for the project's MLflow store."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")
    return mlflow.MlflowClient()


def seed_runs(project: Path) -> list["Run"]:
    """Return the runs of the demo's seeds in the order of the seeds."""
    client = mlflow_client(project)
    experiment = client.get_experiment_by_name("covid-xray-demo")
    runs = client.search_runs([experiment.experiment_id])
    return sorted(
        (run for run in runs if run.info.run_name.startswith("seed-")), key=lambda run: str(run.info.run_name)
    )


def copy_project(project: Path, target: Path) -> Path:
    """Copy a project with its MLflow store, whose artifact paths are absolute and are replaced."""
    shutil.copytree(project, target, symlinks=True, ignore=shutil.ignore_patterns("mlflow.db*"))
    with closing(sqlite3.connect(project / "mlflow.db")) as old, closing(sqlite3.connect(target / "mlflow.db")) as new:
        new.executescript("\n".join(old.iterdump()).replace(str(project), str(target)))
    return target


def commit_all(project: Path) -> None:
    for command in (["add", "-A"], ["commit", "-qm", "test"]):
        assert run(project, "git", *command).returncode == 0


def edit_params(project: Path, edit: Callable[[dict], None]) -> None:
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    edit(params)
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def make_tiny(params: dict) -> None:
    params["seeds"] = [0, 1]
    for profile, sections in TINY_PARAMS.items():
        params[profile]["split"]["folds"] = 4
        params[profile]["promote"] |= {"min_sensitivity": 0.0, "min_specificity": 0.0, "max_calibration_error": 1.0}
        for section, values in sections.items():
            params[profile][section] |= values


def clean_environment(**changes: str) -> dict[str, str]:
    """Return an environment without settings for MLflow and DVC, in which `python` is the one that runs the tests."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "DVC_"))}
    mlflow = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}  # these trainings take a second or two
    ray = {"RAY_AUTH_MODE": "disabled"}  # Ray stores one token for all clusters of a user
    path = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
    git = {f"GIT_{role}_{field}": "test@localhost" for role in ("AUTHOR", "COMMITTER") for field in ("NAME", "EMAIL")}
    return {**inherited, **git, "PATH": path, "DVC_NO_ANALYTICS": "1", **mlflow, **ray, **changes}


# A fork server for the stages of any project, which ends when its standard input is closed. Its fork imports the
# project's modules from the project's folder.
STAGE_SERVER = """
import runpy, sys
from stages import fork_server
module = fork_server.serve(["sh", "-c", 'echo "$PWD/$CXR_FORK_SERVER"; cat; rm -r "$PWD"'])
for name in [name for name in sys.modules if name.partition(".")[0] in ("pipeline", "stages")]:
    del sys.modules[name]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@functools.cache
def start_stage_server() -> subprocess.Popen[str]:
    """Start a server that ends with this process; its first line of output is its address."""
    command, folder = [sys.executable, "-c", STAGE_SERVER], tempfile.mkdtemp(prefix="stages-")
    return subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@functools.cache
def stage_server() -> dict[str, str]:
    """Return the environment in which stages are forked, which saves the imports."""
    return {"CXR_FORK_SERVER": start_stage_server().stdout.readline().strip()}


@pytest.fixture
def forked_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stages of every command, also of one that `invoke` runs in this process, be forked, as `run` does."""
    for name, value in stage_server().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("stages.common.run_in_fork", lambda: None)  # to which `python -m pytest` looks like a stage


def run(project: Path, *command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the project and return its exit code and output; its stages are forked (see fork_server)."""
    has_stages = command[0] in ("cxr", "dvc") or command[:2] == ("python", "-m")
    forked = stage_server() if has_stages else {}
    environment = clean_environment(**{**forked, **changes})
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, check=False, timeout=900
    )


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Start the longest tests first, then those that train, then those that need the demo, to balance the workers."""
    slow_fixtures = ("make_prepared_project", "demo_project")
    items.sort(
        key=lambda item: (
            item.get_closest_marker("long") is None,
            *(fixture not in item.fixturenames for fixture in slow_fixtures),
        )
    )


@pytest.fixture(scope="session")
def cloned_project(tmp_path_factory) -> Path:
    return clone_project(tmp_path_factory.mktemp("clone") / "project")


@pytest.fixture
def project(cloned_project: Path, tmp_path: Path) -> Path:
    """A clone of the project in which no stage has run."""
    return shutil.copytree(cloned_project, tmp_path / "project", symlinks=True)


@pytest.fixture(scope="session")
def build_once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], object]], Path]:
    """Returns a function that builds a folder once for all test processes: the first caller fills it."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def build(name: str, fill: Callable[[Path], object]) -> Path:
        folder, complete = shared / name, shared / f"{name}.complete"
        with FileLock(shared / f"{name}.lock"):
            if not complete.exists():
                fill(folder)
                complete.touch()
        return folder

    return build


@pytest.fixture(scope="session")
def empty_store(build_once, tmp_path_factory) -> Path:
    """An empty MLflow store; creating one takes seconds."""

    def create(folder: Path) -> None:
        from mlflow import MlflowClient

        folder.mkdir()
        MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()

    return shutil.copy(build_once("store", create) / "mlflow.db", tmp_path_factory.mktemp("store") / "mlflow.db")


@pytest.fixture(scope="session")
def demo_project(build_once, empty_store, tmp_path_factory) -> Path:
    """A clone in which the demo has run, shared by the tests of a process; they may add files but must change none."""

    def run_demo(project: Path) -> None:
        shutil.copy(empty_store, clone_project(project) / "mlflow.db")
        completed = run(project, "dvc", "repro")
        assert completed.returncode == 0, completed.stdout + completed.stderr

    return copy_project(build_once("demo", run_demo), tmp_path_factory.mktemp("demo-copy") / "project")


@pytest.fixture(scope="session")
def make_prepared_project(demo_project, empty_store, tmp_path_factory) -> Callable[..., Path]:
    """Returns a function that makes projects with prepared data, no models and an empty MLflow store."""

    def make(**train) -> Path:
        target = tmp_path_factory.mktemp("prepared") / "project"
        shutil.copytree(demo_project, target, symlinks=True)
        for folder in ("models", "checkpoints", "mlartifacts"):
            shutil.rmtree(target / folder)
        shutil.copy(empty_store, target / "mlflow.db")
        edit_params(target, lambda params: params["demo"]["train"].update(train))
        return target

    return make


@contextmanager
def run_in_background(
    project: Path, *command: str, is_ready: Callable[[str], bool], stop_signal: str = "TERM", **changes: str
) -> Iterator[None]:
    """Run a command in the background during the block, which starts when `is_ready` accepts the command's output."""
    log = project / f"{command[0]}-{time.monotonic_ns()}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=project, env=clean_environment(**changes), stdout=out, stderr=out, start_new_session=True
        )
    try:
        while not is_ready(log.read_text()):
            assert process.poll() is None, log.read_text()
            time.sleep(0.3)
        yield
    finally:
        subprocess.run(["pkill", f"-{stop_signal}", "-s", str(process.pid)], check=False)
        process.wait(90)


def run_server(project: Path, *command: str, health_url: str, **changes: str) -> AbstractContextManager[None]:
    """Run a server during the block, which starts when the server answers at `health_url`."""

    def answers(_: str) -> bool:
        with suppress(OSError):
            urllib.request.urlopen(health_url, timeout=5).close()
            return True
        return False

    return run_in_background(project, *command, is_ready=answers, **changes)


@contextmanager
def run_mlflow_server(folder: Path, port: int, *options: str, store: str, **changes: str) -> Iterator[str]:
    """Run an MLflow server on `store` during the block; its artifacts are in folder/artifacts."""
    uri = f"http://127.0.0.1:{port}"
    command = ["mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    stores = ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **changes}
    with run_server(folder, *command, *stores, *options, health_url=f"{uri}/health", **environment):
        yield uri


@contextmanager
def run_s3_server() -> Iterator["BaseClient"]:
    """Run a local S3 server during the block, to which the environment points, and yield a client of it."""
    moto_server, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # of clients of an earlier server
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "AKIAKEY", "AWS_SECRET_ACCESS_KEY": "topsecret", "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }.items():  # fmt: skip
            patch.setenv(name, value)
        yield boto3.client("s3")
    server.stop()


def use_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the project the working directory and use its own MLflow store."""
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def invoke(command: str, answer: str | None = None) -> "Result":
    """Run a `cxr` command in this process, which saves the imports; `answer` is typed at its prompts."""
    from click.testing import CliRunner

    from stages.cli import cxr

    program, *arguments = shlex.split(command)
    assert program == "cxr"
    return CliRunner().invoke(cxr, arguments, input=answer)


def output_of(command: str) -> str:
    """Return the output of a `cxr` command that must succeed."""
    result = invoke(command)
    assert result.exit_code == 0, result.output
    return result.output


def error_line_of(command: str) -> str:
    """Return the last error line of a `cxr` command that must fail."""
    result = invoke(command)
    assert result.exit_code == 2, result.output
    return result.stderr.strip().splitlines()[-1]


def json_lines(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


@pytest.fixture
def run_here(monkeypatch, capsys) -> Callable[..., list[dict]]:
    """Returns a function that runs a benchmark in this process, which saves the imports."""

    def run_script(command: str, *arguments: str) -> list[dict]:
        script = command.removeprefix("python ")
        use_project(ROOT, monkeypatch)
        monkeypatch.syspath_prepend("bench")
        monkeypatch.setattr("sys.argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")
        return json_lines(capsys.readouterr().out)

    return run_script


def error_message(function: Callable[..., object], *arguments: object) -> str:
    """Return the message of the UserError that the function must raise; it is one line."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def file_error_message(function: Callable[..., object], path: Path) -> str:
    """Return the message of the UserError that the function must raise for a file, without the file name in front."""
    message = error_message(function, path)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def port() -> int:
    return free_port()
