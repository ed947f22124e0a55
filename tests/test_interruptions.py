"""A training that is stopped in any way goes on and ends as if it had not been."""

import json
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from conftest import ROOT, environment, mlflow_server, run, seed_runs, store
from killing import FAULTS

pytestmark = pytest.mark.slow

# Trains, but waits for MLflow no longer than a test has time.
IMPATIENT = "from pipeline.tracking import outbox; outbox.PATIENCE = 3; from stages.train import train; train()"
OUTS = ["model.safetensors", "model.json", "history.csv", "metrics.json"]
EPOCHS = 8


def outs(project: Path, seed: int = 0) -> dict[str, bytes]:
    return {name: (project / f"models/seed-{seed}" / name).read_bytes() for name in OUTS}


def logged_steps(project: Path) -> list[int]:
    (seed_run,) = seed_runs(project)
    return [metric.step for metric in store(project).get_metric_history(seed_run.info.run_id, "validation/f1")]


@pytest.fixture(scope="module")
def whole(ready, once) -> Path:
    """A folder with the models/ of a project in which seed 0 was trained without a stop."""

    def train(folder: Path) -> None:
        project = ready(epochs=EPOCHS)
        ended = run(project, "python", "-m", "stages.train", "--seed", "0")
        assert ended.returncode == 0, ended.stderr
        shutil.copytree(project / "models", folder / "models")

    return once("seed", train)


def kill_and_finish(project: Path, faults: list) -> list[int]:
    """Kill as told, then train to the end; return how each try ended."""
    ended = run(project, "python", str(ROOT / "tests/killing.py"), json.dumps(faults), PYTHONPATH=str(project))
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def assert_as_if_never_stopped(project: Path, whole: Path) -> None:
    assert outs(project) == outs(whole)
    assert logged_steps(project) == list(range(1, EPOCHS + 1))
    (seed_run,) = seed_runs(project)
    assert seed_run.info.status == "FINISHED"
    assert not list((project / "checkpoints").iterdir())
    assert sorted(path.name for path in (project / "models/seed-0").iterdir()) == sorted(OUTS)


def test_killed_wherever_it_hurts_a_seed_ends_in_the_same_bytes(ready, whole):
    project = ready(epochs=EPOCHS)
    faults = [
        ["in the middle of an epoch", 2],
        ["in the middle of a checkpoint", 1],
        ["before a checkpoint has its name", 1],
        ["after a checkpoint", 1],
        ["in the middle of an epoch's log", 3],
        ["before an epoch is logged", 2],
        ["after an epoch is logged", 3],
        ["in the middle of a checkpoint", 1],
        ["in the middle of an epoch", 4],
        ["in the middle of the model", 1],
        ["between the model and its description", 1],
        ["before the run is closed", 1],
    ]
    assert {where for where, _ in faults} == set(FAULTS) - {"after the run is closed"}
    assert kill_and_finish(project, faults) == [-signal.SIGKILL] * len(faults) + [0]
    assert_as_if_never_stopped(project, whole)


def test_killed_at_any_moment_a_seed_ends_in_the_same_bytes(ready, whole):
    project = ready(epochs=EPOCHS)
    moments = [["seconds", round(random.uniform(0.2, 2.5), 2)] for _ in range(10)]
    ended = kill_and_finish(project, moments)
    assert set(ended) <= {0, -signal.SIGKILL}, (moments, ended)
    assert ended[-1] == 0
    assert_as_if_never_stopped(project, whole)


def test_killed_after_its_run_was_closed_a_seed_repeats_nothing_in_mlflow(ready, whole):
    project = ready(epochs=EPOCHS)
    assert kill_and_finish(project, [["after the run is closed", 1]]) == [-signal.SIGKILL, 0]
    assert_as_if_never_stopped(project, whole)


def start(
    project: Path, *command: str, log: str = "train.log", epoch: int = 1, **changes: str
) -> subprocess.Popen[str]:
    """Start a command that trains, and return it when its log tells the end of an epoch."""
    with (project / "train.log").open("w") as out:
        started = subprocess.Popen(
            command, cwd=project, env=environment(**changes), stdout=out, stderr=out, text=True, start_new_session=True
        )
    while not (project / log).exists() or f"epoch {epoch}/" not in (project / log).read_text():
        assert started.poll() is None, (project / "train.log").read_text()
        time.sleep(0.01)
    return started


def test_a_signal_stops_after_the_step_and_training_goes_on_from_there(ready):
    project, epochs = ready(epochs=30), 0
    for number in (signal.SIGTERM, signal.SIGINT):
        training = start(project, "python", "-m", "stages.train", "--seed", "0", epoch=epochs + 1)
        training.send_signal(number)
        assert training.wait(180) == 128 + number
        said = (project / "train.log").read_text()
        assert f"epoch {epochs}/" not in said
        last = said.splitlines()[-1]
        assert last.startswith("seed 0 stopped in epoch ")
        assert last.endswith("; dvc repro goes on from there")
        assert not list(project.glob("models/**/*"))
        (stopped,) = seed_runs(project)
        assert stopped.info.status == "KILLED"
        epochs = len(logged_steps(project))
        assert epochs < 30

    ended = run(project, "python", "-m", "stages.train", "--seed", "0")
    assert ended.returncode == 0, ended.stderr
    assert f"epoch {epochs}/" not in ended.stdout
    assert logged_steps(project) == list(range(1, 31))
    (finished,) = seed_runs(project)
    assert any(key.startswith("system/") for key in finished.data.metrics)
    assert (finished.info.run_id, finished.info.status) == (stopped.info.run_id, "FINISHED")


def test_a_seed_killed_under_dvc_goes_on_with_the_next_repro(ready, whole):
    project = ready(epochs=EPOCHS)
    training = start(project, "dvc", "repro", "-s", "train@0")
    subprocess.run(["pkill", "-KILL", "-s", str(training.pid), "-f", "stages.train"], check=True)
    assert training.wait(180) != 0
    assert len(list((project / "checkpoints").glob("*.pt"))) == 1
    ended = run(project, "dvc", "repro", "-s", "train@0")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "epoch 1/" not in ended.stdout
    assert_as_if_never_stopped(project, whole)


def test_of_two_processes_that_train_the_same_run_one_waits_and_no_epoch_is_logged_twice(ready, whole):
    project = ready(epochs=EPOCHS)
    command = ["python", "-m", "stages.train", "--seed", "0"]
    first = start(project, *command)
    first.send_signal(signal.SIGSTOP)
    second = subprocess.Popen(command, cwd=project, env=environment(), stderr=subprocess.PIPE, text=True)
    assert "another process trains this run" in second.stderr.readline()
    first.send_signal(signal.SIGCONT)
    assert first.wait(180) == second.wait(180) == 0
    assert_as_if_never_stopped(project, whole)


def test_an_unusable_checkpoint_is_set_aside_and_the_seed_starts_anew(ready, whole):
    project = ready(epochs=EPOCHS)
    training = start(project, "python", "-m", "stages.train", "--seed", "0")
    training.kill()
    training.wait(180)
    (checkpoint,) = (project / "checkpoints").glob("*.pt")
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    ended = run(project, "python", "-m", "stages.train", "--seed", "0")
    assert ended.returncode == 0, ended.stderr
    assert f"{checkpoint} cannot be used: " in ended.stderr
    assert "epoch 1/" in ended.stdout
    assert [path.suffix for path in (project / "checkpoints").iterdir()] == [".unusable"]
    assert outs(project) == outs(whole)
    assert logged_steps(project) == list(range(1, EPOCHS + 1))


class Proxy(ThreadingHTTPServer):
    """Hands requests on to the server at `behind`, answers 500, or does not answer, as `mood` says."""

    def __init__(self, behind: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind, self.mood = behind, "well"
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def hand_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.close_connection = True
        while self.server.mood == "silent":
            time.sleep(0.1)
        if self.server.mood == "broken":
            self.send_error(500)
            return
        behind = HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
        with suppress(OSError):
            behind.request(self.command, self.path, body, dict(self.headers))
            answer = behind.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = hand_on

    def log_message(self, *arguments: object) -> None:
        pass


def wait_for(training: subprocess.Popen[str], project: Path, text: str) -> None:
    while text not in (project / "train.log").read_text():
        assert training.poll() is None, (project / "train.log").read_text()
        time.sleep(0.05)


@pytest.mark.long
def test_a_server_that_fails_hangs_and_dies_stops_no_training_and_is_told_all_when_it_is_back(ready, port):
    project, proxy = ready(epochs=40), Proxy(port)
    kept = f"sqlite:///{project / 'mlflow.db'}"
    with mlflow_server(project, port, store=kept):
        training = start(project, "python", "-m", "stages.train", "--seed", "0", MLFLOW_TRACKING_URI=proxy.uri)
        for mood, until in {"broken": "epoch 10/40", "silent": "epoch 20/40", "well": "epoch 25/40"}.items():
            proxy.mood = mood
            wait_for(training, project, until)
    wait_for(training, project, "epoch 40/40")
    trained = time.time()
    with mlflow_server(project, port, store=kept):
        assert training.wait(300) == 0
    proxy.shutdown()
    said = (project / "train.log").read_text()
    assert said.count("MLflow does not answer") == 1
    (seed_run,) = seed_runs(project)
    assert seed_run.info.status == "FINISHED"
    metrics = store(project).get_metric_history(seed_run.info.run_id, "validation/f1")
    assert [metric.step for metric in metrics] == list(range(1, 41))
    times = [metric.timestamp for metric in metrics]
    assert times == sorted(times)
    assert times[-1] <= trained * 1000
    assert {path.name for path in (project / "kept").rglob("checkpoint/*")} == set(OUTS)


@pytest.mark.long
def test_a_server_that_stays_away_leaves_the_outs_and_a_run_that_promote_completes(ready, port):
    project = ready(epochs=15)
    with mlflow_server(project, port, store=f"sqlite:///{project / 'gone.db'}") as uri:
        training = start(project, "python", "-c", IMPATIENT, "--seed", "0", MLFLOW_TRACKING_URI=uri)
    assert training.wait(300) == 0
    assert "MLflow did not take all of this run; cxr sync completes it" in (project / "train.log").read_text()
    assert set(outs(project)) == set(OUTS)
