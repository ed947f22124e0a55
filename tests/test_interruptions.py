"""A training that is interrupted in any way resumes and ends in the same bytes."""

import json
import random
import shutil
import signal
import subprocess
import time
from base64 import b64encode
from contextlib import suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from conftest import (
    clean_environment,
    copy_project,
    mlflow_client,
    run,
    run_mlflow_server,
    seed_runs,
    stage_server,
)
from killing import FAULTS

pytestmark = pytest.mark.slow

# Waits for MLflow only as long as a test has time.
TRAIN_WITH_SHORT_TIMEOUT = """
from pipeline.tracking import outbox
from stages.train import train

outbox.TIMEOUT_SECONDS = 3
train()
"""
OUTS = ["model.safetensors", "model.json", "history.csv", "metrics.json", "validation.csv"]
EPOCHS = 8


def read_outs(project: Path, seed: int = 0) -> dict[str, bytes]:
    return {name: (project / f"models/seed-{seed}" / name).read_bytes() for name in OUTS}


def logged_steps(project: Path) -> list[int]:
    (seed_run,) = seed_runs(project)
    return [metric.step for metric in mlflow_client(project).get_metric_history(seed_run.info.run_id, "validation/f1")]


@pytest.fixture(scope="module")
def uninterrupted(make_prepared_project, build_once) -> Path:
    """A folder with the models/ of a project in which seed 0 was trained without interruption."""

    def train(folder: Path) -> None:
        project = make_prepared_project(epochs=EPOCHS)
        result = run(project, "python", "-m", "stages.train", "--seed", "0")
        assert result.returncode == 0, result.stderr
        shutil.copytree(project / "models", folder / "models")

    return build_once("seed", train)


def kill_and_finish(project: Path, faults: list) -> list[int]:
    """Train with these faults, then to the end; return the exit code of each attempt."""
    result = run(project, "python", "-m", "tests.forked", "tests/killing.py", json.dumps(faults))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def assert_equals_uninterrupted(project: Path, uninterrupted: Path) -> None:
    assert read_outs(project) == read_outs(uninterrupted)
    assert logged_steps(project) == list(range(1, EPOCHS + 1))
    (seed_run,) = seed_runs(project)
    assert seed_run.info.status == "FINISHED"
    assert not list((project / "checkpoints").iterdir())
    assert sorted(path.name for path in (project / "models/seed-0").iterdir()) == sorted(OUTS)


def test_a_training_killed_at_critical_points_ends_in_the_same_bytes(make_prepared_project, uninterrupted):
    project = make_prepared_project(epochs=EPOCHS)
    faults = [
        ["in the middle of an epoch", 2],
        ["while a checkpoint is written", 1],
        ["before a checkpoint is renamed", 1],
        ["after a checkpoint", 1],
        ["while an epoch is logged", 3],
        ["before an epoch is logged", 2],
        ["after an epoch is logged", 3],
        ["while a checkpoint is written", 1],
        ["in the middle of an epoch", 4],
        ["while the weights are written", 1],
        ["between the weights and the description", 1],
        ["before the run is finished", 1],
        ["after the run is finished", 1],
    ]
    assert {point for point, _ in faults} == set(FAULTS)
    assert kill_and_finish(project, faults) == [-signal.SIGKILL] * len(faults) + [0]
    assert_equals_uninterrupted(project, uninterrupted)


def test_a_training_killed_at_random_times_ends_in_the_same_bytes(make_prepared_project, uninterrupted):
    project = make_prepared_project(epochs=EPOCHS)
    faults = [["seconds", round(random.uniform(0.2, 2.5), 2)] for _ in range(10)]
    exit_codes = kill_and_finish(project, faults)
    assert set(exit_codes) <= {0, -signal.SIGKILL}, (faults, exit_codes)
    assert exit_codes[-1] == 0
    assert_equals_uninterrupted(project, uninterrupted)


def start_training(
    project: Path, *command: str, log: str = "train.log", epoch: int = 1, **changes: str
) -> subprocess.Popen[str]:
    """Start a command that trains, and return it after the given epoch appears in its log."""
    with (project / "train.log").open("w") as out:
        training = subprocess.Popen(
            command,
            cwd=project,
            env=clean_environment(**changes),
            stdout=out,
            stderr=out,
            text=True,
            start_new_session=True,
        )
    while not (project / log).exists() or f"epoch {epoch}/" not in (project / log).read_text():
        assert training.poll() is None, (project / "train.log").read_text()
        time.sleep(0.01)
    return training


def test_a_signal_stops_training_after_the_step_and_the_next_run_resumes(make_prepared_project):
    project, epochs = make_prepared_project(epochs=30), 0
    command = ["python", "-m", "stages.train", "--seed", "0"]
    for number, server in ((signal.SIGTERM, {}), (signal.SIGINT, stage_server())):
        training = start_training(project, *command, epoch=epochs + 1, **server)
        training.send_signal(number)
        assert training.wait(180) == 128 + number
        log = (project / "train.log").read_text()
        assert f"epoch {epochs}/" not in log
        last_line = log.splitlines()[-1]
        assert last_line.startswith("seed 0 stopped in epoch ")
        assert last_line.endswith("; dvc repro resumes from there")
        assert not list(project.glob("models/**/*"))
        (stopped,) = seed_runs(project)
        assert stopped.info.status == "KILLED"
        assert next(iter(stopped.data.metrics)) == "f1"  # before system metrics: MLflow compares runs by the first one
        epochs = len(logged_steps(project))
        assert epochs < 30

    result = run(project, *command)
    assert result.returncode == 0, result.stderr
    assert f"epoch {epochs}/" not in result.stdout
    assert logged_steps(project) == list(range(1, 31))
    (finished,) = seed_runs(project)
    assert any(key.startswith("system/") for key in finished.data.metrics)
    assert (finished.info.run_id, finished.info.status) == (stopped.info.run_id, "FINISHED")


@pytest.fixture(scope="module")
def killed(make_prepared_project, build_once) -> Path:
    """A project in which `dvc repro` was training seed 0 when the training was killed; tests must not change it."""

    def train(folder: Path) -> None:
        project = make_prepared_project(epochs=EPOCHS)
        training = start_training(project, "dvc", "repro", "-s", "train@0")
        subprocess.run(["pkill", "-KILL", "-s", str(training.pid), "-f", "stages.train"], check=True)
        assert training.wait(180) != 0
        assert len(list((project / "checkpoints").glob("*.pt"))) == 1
        copy_project(project, folder)

    return build_once("killed", train)


def test_a_training_killed_under_dvc_resumes_with_the_next_repro(killed, uninterrupted, tmp_path):
    project = copy_project(killed, tmp_path / "project")
    result = run(project, "dvc", "repro", "-s", "train@0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "epoch 1/" not in result.stdout
    assert_equals_uninterrupted(project, uninterrupted)


def test_the_second_of_two_processes_that_train_the_same_run_waits(make_prepared_project, uninterrupted):
    project = make_prepared_project(epochs=EPOCHS)
    command = ["python", "-m", "stages.train", "--seed", "0"]
    first = start_training(project, *command)
    first.send_signal(signal.SIGSTOP)
    environment = clean_environment(**stage_server())
    second = subprocess.Popen(command, cwd=project, env=environment, stderr=subprocess.PIPE, text=True)
    assert "another process is training this run" in second.stderr.readline()
    first.send_signal(signal.SIGCONT)
    assert first.wait(180) == second.wait(180) == 0
    assert_equals_uninterrupted(project, uninterrupted)


def test_a_damaged_checkpoint_is_set_aside_and_training_starts_again(killed, uninterrupted, tmp_path):
    project = copy_project(killed, tmp_path / "project")
    (checkpoint,) = (project / "checkpoints").glob("*.pt")
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    result = run(project, "python", "-m", "stages.train", "--seed", "0")
    assert result.returncode == 0, result.stderr
    assert f"{checkpoint} cannot be used: " in result.stderr
    assert "epoch 1/" in result.stdout
    assert [path.suffix for path in (project / "checkpoints").iterdir()] == [".unusable"]
    assert read_outs(project) == read_outs(uninterrupted)
    assert logged_steps(project) == list(range(1, EPOCHS + 1))


class Proxy(ThreadingHTTPServer):
    """Forwards requests to the server at port `upstream`, answers 500, closes the connection or does not answer.

    This depends on `mode`. If `token` is set, it answers 401 to requests without this bearer token, and replaces it by
    `login` for the server.
    """

    def __init__(self, upstream: int, token: str = "", login: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.mode, self.token, self.login = upstream, "forward", token, login
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.close_connection = True
        while self.server.mode == "hang":
            time.sleep(0.1)
        if self.server.mode == "fail":
            self.send_error(500)
        if self.server.mode != "forward":
            return
        headers = dict(self.headers)
        if self.server.token:
            if headers.get("Authorization") != f"Bearer {self.server.token}":
                self.send_error(401)
                return
            headers["Authorization"] = f"Basic {b64encode(self.server.login.encode()).decode()}"
        upstream = HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        with suppress(OSError):
            upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            content = response.read()
            self.send_response(response.status)
            self.send_header("Content-Type", response.headers.get("Content-Type", "text/plain"))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

    def log_message(self, *arguments: object) -> None:
        pass


def wait_for_log(training: subprocess.Popen[str], project: Path, text: str) -> None:
    while text not in (project / "train.log").read_text():
        assert training.poll() is None, (project / "train.log").read_text()
        time.sleep(0.05)


@pytest.mark.long
def test_training_survives_a_failing_tracking_server_and_logs_everything_later(make_prepared_project, port):
    project, proxy = make_prepared_project(epochs=40), Proxy(port)
    with run_mlflow_server(project, port, store=f"sqlite:///{project / 'mlflow.db'}"):
        command = ["python", "-m", "stages.train", "--seed", "0"]
        # Without retries of MLflow's own, which may outlast the failing phase.
        settings = {"MLFLOW_TRACKING_URI": proxy.uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        training = start_training(project, *command, **settings, **stage_server())
        phases = {"fail": "logging to MLflow failed", "hang": "epoch 20/40", "forward": "epoch 25/40"}
        for mode, text in {**phases, "close": "epoch 40/40"}.items():
            proxy.mode = mode
            wait_for_log(training, project, text)
        end_of_training = time.time()
        proxy.mode = "forward"
        assert training.wait(300) == 0
    proxy.shutdown()
    log = (project / "train.log").read_text()
    assert log.count("logging to MLflow failed") == 1
    (seed_run,) = seed_runs(project)
    assert seed_run.info.status == "FINISHED"
    metrics = mlflow_client(project).get_metric_history(seed_run.info.run_id, "validation/f1")
    assert [metric.step for metric in metrics] == list(range(1, 41))
    times = [metric.timestamp for metric in metrics]
    assert times == sorted(times)
    assert times[-1] <= end_of_training * 1000
    assert {path.name for path in (project / "artifacts").rglob("checkpoint/*")} == set(OUTS)


@pytest.mark.long
def test_training_finishes_without_its_tracking_server_and_asks_for_sync(make_prepared_project, empty_store, port):
    project = make_prepared_project(epochs=15)
    shutil.copy(empty_store, project / "gone.db")
    (project / "short_timeout.py").write_text(TRAIN_WITH_SHORT_TIMEOUT)
    with run_mlflow_server(project, port, store=f"sqlite:///{project / 'gone.db'}") as uri:
        command = ["python", "-m", "tests.forked", "short_timeout.py", "--seed", "0"]
        training = start_training(project, *command, MLFLOW_TRACKING_URI=uri, **stage_server())
    assert training.wait(300) == 0
    log = (project / "train.log").read_text()
    assert "this run is not completely logged to MLflow; after the training, run: cxr sync" in log
    assert set(read_outs(project)) == set(OUTS)
