import io
import os
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
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
    from click.testing import Result
    from mlflow import MlflowClient
    from mlflow.entities import Run

ROOT = Path(__file__).parents[1]

# Runs of all profiles in seconds: few and small images, two seeds, one or two epochs.
ALONE = {"cpu_threads": 1}  # other tests have the other cores
QUICK = {"epochs": 2, "frozen_epochs": 1, "size": 32, "batch_size": 8} | ALONE
TINY = {
    "demo": {
        "download": {"train": 32, "test": 8, "prevalence": 0.25},
        "prepare": {"size": 48},
        "train": QUICK,
        "evaluate": ALONE,
    },
    "local": {"prepare": {"size": 48}, "train": QUICK, "evaluate": ALONE},
    "competition": {
        "weights": {"source": "none"},
        "train": {"epochs": 1, "frozen_epochs": 0} | ALONE,
        "evaluate": ALONE,
    },
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


def jpeg(rng: np.random.Generator, size: int = 64, *, bright: bool = False) -> bytes:
    """Encode a gray picture as the competition does; a bright one has a blob in the middle."""
    pixels = rng.integers(40, 90, (size, size)).astype(np.uint8)
    if bright:
        pixels[size // 4 : -size // 4, size // 4 : -size // 4] += 120
    stream = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(stream, "JPEG", quality=75)
    return stream.getvalue()


def archive_members(train: int = 24, test: int = 4, nested: bool = True) -> dict[str, bytes]:
    """Return the files of a small archive in the competition's layout; every third training image is positive."""
    rng = np.random.default_rng(0)
    labels = {f"a{index:03}.jpg": int(index % 3 == 0) for index in range(train)}
    tests = [f"t{index:03}.jpg" for index in range(test)]
    folder = {subset: f"{subset}/{subset}" if nested else subset for subset in ("train", "test")}
    members = {f"{folder['train']}/{name}": jpeg(rng, bright=bool(label)) for name, label in labels.items()}
    members |= {f"{folder['test']}/{name}": jpeg(rng) for name in tests}
    members["train_labels.csv"] = ("File,Label\n" + "".join(f"{n},{v}\n" for n, v in labels.items())).encode()
    members["sample_submission.csv"] = ("File,Label\n" + "".join(f"{n},0\n" for n in tests)).encode()
    return members


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A small archive in the competition's layout."""
    return write_zip(tmp_path / "raw.zip", archive_members())


def clone(target: Path) -> Path:
    """Copy what git knows of the project, as it is now, into a repository of its own whose demo takes seconds."""
    known = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(known, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    edit_params(target, make_tiny)
    (target / "dvc.lock").unlink()  # it holds the whole demo's seeds, and DVC keeps what it does not run
    assert run(target, "git", "init", "-q").returncode == 0
    commit(target)
    return target


def store(project: Path) -> "MlflowClient":
    """Return a client of the project's own MLflow store."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")
    return mlflow.MlflowClient()


def seed_runs(project: Path) -> list["Run"]:
    """Return the demo's runs of seeds, in the seeds' order."""
    client = store(project)
    experiment = client.get_experiment_by_name("covid-xray-demo")
    found = [one for one in client.search_runs([experiment.experiment_id]) if one.info.run_name.startswith("seed-")]
    return sorted(found, key=lambda one: one.info.run_name)


def copy(project: Path, target: Path) -> Path:
    """Copy a project with its MLflow store, in which the places of artifacts are written out."""
    shutil.copytree(project, target, symlinks=True, ignore=shutil.ignore_patterns("mlflow.db*"))
    with closing(sqlite3.connect(project / "mlflow.db")) as old, closing(sqlite3.connect(target / "mlflow.db")) as new:
        new.executescript("\n".join(old.iterdump()).replace(str(project), str(target)))
    return target


def commit(project: Path) -> None:
    for command in (["add", "-A"], ["commit", "-qm", "as it is"]):
        assert run(project, "git", *command).returncode == 0


def edit_params(project: Path, edit: Callable[[dict], None]) -> None:
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    edit(params)
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def make_tiny(params: dict) -> None:
    params["seeds"] = [0, 1]
    for profile, sections in TINY.items():
        params[profile]["split"]["folds"] = 4
        params[profile]["promote"] |= {"min_sensitivity": 0.0, "min_specificity": 0.0, "max_calibration_error": 1.0}
        for section, values in sections.items():
            params[profile][section] |= values


def environment(**changes: str) -> dict[str, str]:
    """Return an environment in which `python` is the one that runs the tests and nothing else is set for MLflow."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "DVC_"))}
    fast = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}  # these trainings last a second or two
    alone = {"RAY_AUTH_MODE": "disabled"}  # Ray keeps one token for all clusters of a user
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    identity = {f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return {**clean, **identity, "PATH": path, "DVC_NO_ANALYTICS": "1", **fast, **alone, **changes}


def run(project: Path, *command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the project and return it ended, with what it printed."""
    return subprocess.run(
        command, cwd=project, env=environment(**changes), capture_output=True, text=True, check=False, timeout=900
    )


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Start the longest tests first, then those that train, then what needs the built demo: nobody waits at the end."""
    needed = ("ready", "built")
    items.sort(
        key=lambda item: (item.get_closest_marker("long") is None, *(one not in item.fixturenames for one in needed))
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A clone of the project in which nothing has run."""
    return clone(tmp_path / "project")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An MLflow store with nothing in it, which takes seconds to make."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a folder for all processes that share the tests: the first one that asks fills it."""
    base = tmp_path_factory.getbasetemp()
    common = base if worker_id == "master" else base.parent

    def fill(name: str, make: Callable[[Path], object]) -> Path:
        folder, whole = common / name, common / f"{name}.whole"
        with FileLock(common / f"{name}.lock"):
            if not whole.exists():
                make(folder)
                whole.touch()
        return folder

    return fill


@pytest.fixture(scope="session")
def built(once, tmp_path_factory) -> Path:
    """A clone in which the demo has run; tests may add to it but not spoil it."""

    def run_demo(project: Path) -> None:
        ended = run(clone(project), "dvc", "repro")
        assert ended.returncode == 0, ended.stdout + ended.stderr

    return copy(once("built", run_demo), tmp_path_factory.mktemp("own") / "project")


@pytest.fixture(scope="session")
def ready(built, empty_store, tmp_path_factory) -> Callable[..., Path]:
    """Makes projects whose data are ready, with an MLflow store in which nothing is yet."""

    def make(**train) -> Path:
        target = tmp_path_factory.mktemp("ready") / "project"
        shutil.copytree(built, target, symlinks=True)
        for left in ("models", "checkpoints", "mlartifacts"):
            shutil.rmtree(target / left)
        shutil.copy(empty_store, target / "mlflow.db")
        edit_params(target, lambda params: params["demo"]["train"].update(train))
        return target

    return make


@contextmanager
def background(project: Path, *command: str, ready: Callable[[str], bool], **changes: str) -> Iterator[None]:
    """Run a command and all that it starts while the block runs, from when it is ready by what it printed."""
    log = project / f"{command[0]}-{time.monotonic_ns()}.log"
    with log.open("w") as out:
        started = subprocess.Popen(
            command, cwd=project, env=environment(**changes), stdout=out, stderr=out, start_new_session=True
        )
    try:
        while not ready(log.read_text()):
            assert started.poll() is None, log.read_text()
            time.sleep(0.3)
        yield
    finally:
        subprocess.run(["pkill", "-TERM", "-s", str(started.pid)], check=False)
        started.wait(90)  # a Ray node takes half a minute to drain


def server(project: Path, *command: str, answers_at: str, **changes: str) -> AbstractContextManager[None]:
    """Run a server while the block runs, from when it answers."""

    def answers(_: str) -> bool:
        with suppress(OSError):
            urllib.request.urlopen(answers_at, timeout=5).close()
            return True
        return False

    return background(project, *command, ready=answers, **changes)


@contextmanager
def mlflow_server(folder: Path, port: int, *options: str, store: str, **changes: str) -> Iterator[str]:
    """Run an MLflow server on `store` while the block runs; what it is given to keep is in folder/kept."""
    uri = f"http://127.0.0.1:{port}"
    command = ["mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    places = ["--backend-store-uri", store, "--artifacts-destination", str(folder / "kept")]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **changes}
    with server(folder, *command, *places, *options, answers_at=f"{uri}/health", **environment):
        yield uri


def enter(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the project the working directory, and its own store the one that is used."""
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def typed(command: str, answer: str | None = None) -> "Result":
    """Run a `cxr` command in this process, where it need not import all again; the answer is to what it asks."""
    from click.testing import CliRunner

    from stages.cli import cxr

    program, *arguments = shlex.split(command)
    assert program == "cxr"
    return CliRunner().invoke(cxr, arguments, input=answer)


def said(command: str) -> str:
    ended = typed(command)
    assert ended.exit_code == 0, ended.output
    return ended.output


def refused(command: str) -> str:
    """Return the last line of a command that must fail."""
    ended = typed(command)
    assert ended.exit_code == 2, ended.output
    return ended.stderr.strip().splitlines()[-1]


def refusal(function: Callable[..., object], *arguments: object) -> str:
    """Return the one line with which the function refuses its arguments."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refusal_of_file(function: Callable[..., object], path: Path) -> str:
    """Return the one line with which the file is refused, less the file's name in front."""
    message = refusal(function, path)
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
