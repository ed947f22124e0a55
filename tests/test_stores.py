"""Whatever keeps the runs — sqlite, a server, one with passwords, PostgreSQL — they are the same runs."""

import json
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from conftest import copy, free_port, mlflow_server, refused, said, typed
from test_interruptions import Proxy

from pipeline.core import config
from pipeline.tracking import runs
from pipeline.tracking.store import connect

pytestmark = pytest.mark.slow

NAME = "covid-xray-demo"
LOGIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "a password for tests"}


@pytest.fixture
def project(built, tmp_path, monkeypatch) -> Path:
    """A copy of the built project as the working directory."""
    monkeypatch.chdir(copy(built, tmp_path / "project"))
    return tmp_path / "project"


@pytest.fixture
def with_passwords(tmp_path, port, monkeypatch) -> Iterator[str]:
    """A server that wants a name and a password."""
    settings = tmp_path / "auth.ini"
    settings.write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
        f"admin_password = {LOGIN['MLFLOW_TRACKING_PASSWORD']}\n"
        f"database_uri = sqlite:///{tmp_path / 'auth.db'}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    secrets = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key for tests"}
    store = f"sqlite:///{tmp_path / 'server.db'}"
    with mlflow_server(tmp_path, port, "--app-name", "basic-auth", store=store, **secrets) as uri:
        for key, value in LOGIN.items():
            monkeypatch.setenv(key, value)
        yield uri


@pytest.fixture
def postgresql(tmp_path, port) -> Iterator[str]:
    """A PostgreSQL database of its own."""
    places = os.pathsep.join(map(str, Path("/usr/lib/postgresql").glob("*/bin")))  # where Debian hides it
    binaries = Path(shutil.which("initdb", path=places) or shutil.which("initdb") or "").parent
    if not binaries.name:
        pytest.skip("PostgreSQL is not installed")
    # PostgreSQL refuses to run as root.
    user = ["runuser", "-u", "nobody", "--"] if os.getuid() == 0 else []
    folder = Path("/tmp") / f"cxr-postgresql-{port}"
    folder.mkdir()
    if user:
        shutil.chown(folder, "nobody")

    def do(program: str, *arguments: str) -> None:
        subprocess.run([*user, binaries / program, *arguments], cwd=folder, check=True, capture_output=True)

    try:
        do("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "cxr")
        do("pg_ctl", "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", f"-p {port} -k {folder}", "start")
        do("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "cxr", "cxr")
        yield f"postgresql://cxr@127.0.0.1:{port}/cxr"
        mlflow.set_tracking_uri(None)
        do("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def before_postgresql(tmp_path, postgresql) -> Iterator[str]:
    """A server that keeps its runs in PostgreSQL."""
    with mlflow_server(tmp_path, free_port(), store=postgresql) as uri:
        yield uri


@pytest.mark.parametrize("kind", ["before_postgresql", "postgresql"])
def test_a_store_of_another_kind_is_filled_and_serves_as_the_first_one_did(project, kind, request, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue(kind))
    said("cxr sync")
    said("cxr verify")
    refused("cxr predict report --model champion")
    opened = connect(NAME)
    found = opened.client.search_runs([opened.experiment_id])
    assert sorted(run.info.run_name.split(" ")[0] for run in found)[:2] == ["seed-0", "seed-1"]
    assert len(found) == 3
    assert {run.info.status for run in found} == {"FINISHED"}
    candidate = opened.client.get_model_version_by_alias(NAME, "champion").tags["candidate"]
    assert candidate == json.loads((project / "metrics/promotion.json").read_text())["candidate"]


def test_a_server_that_wants_a_password_takes_it_and_says_in_one_line_that_it_is_wrong(
    project, with_passwords, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", with_passwords)
    log_a_seed(3)
    opened = connect(NAME)
    (run,) = opened.client.search_runs([opened.experiment_id], "params.seed = '3'")
    assert run.info.status == "FINISHED"
    assert [file.path for file in opened.client.list_artifacts(run.info.run_id, "checkpoint")]
    for password in ("not the password", None):
        if password:
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        else:
            for key in LOGIN:
                monkeypatch.delenv(key)
        ended = typed("cxr history")
        assert ended.exit_code == 2
        (line,) = ended.stderr.strip().splitlines()
        assert line.startswith(f"Error: MLflow at {with_passwords} cannot be used: ")
        assert "MLFLOW_TRACKING_USERNAME" in line
        assert "not the password" not in line


@pytest.mark.parametrize("command", ["history", "rollback", "verify", "predict report"])
def test_a_server_that_fails_is_not_taken_for_one_that_holds_nothing(project, command, monkeypatch):
    failing = Proxy(behind=0)
    failing.mood = "broken"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", failing.uri.replace("//", "//user:secret@"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    ended = typed(f"cxr {command}")
    failing.shutdown()
    assert ended.exit_code == 2, ended.output
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith(f"Error: MLflow at {failing.uri} cannot be used: ")
    assert "secret" not in line


def test_a_database_that_does_not_answer_is_said_in_one_line(project, port, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://user:secret@127.0.0.1:{port}/runs")
    ended = typed("cxr history")
    assert ended.exit_code == 2, ended.output
    assert ended.stderr.startswith(f"Error: MLflow at postgresql://127.0.0.1:{port}/runs cannot be used: ")


def log_a_seed(seed: int) -> None:
    loaded = config.load_config()
    opened = connect(NAME)
    run = runs.SeedRun(opened, loaded, runs.parent_run(opened, loaded), seed, f"{seed:064}")
    row = {"epoch": 1, "train_loss": 0.5, "lr": 0.1, "f1": seed / 10, "loss": 0.4}
    run.log_epoch(row)
    weights = Path(f"weights-{seed}")
    weights.write_bytes(b"weights")
    run.upload_checkpoint(weights)
    run.close("FINISHED")


@pytest.mark.parametrize("trial", range(int(os.environ.get("CXR_TRIALS", "2"))))
def test_ten_seeds_at_once_on_a_new_store_are_ten_good_runs(project, trial, monkeypatch):
    uri = f"sqlite:///{project / 'new.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    forked = multiprocessing.get_context("fork")  # which saves ten processes the imports
    trainings = [forked.Process(target=log_a_seed, args=(seed,)) for seed in range(10)]
    for training in trainings:
        training.start()
    for training in trainings:
        training.join(120)
    assert [training.exitcode for training in trainings] == [0] * 10
    client = mlflow.MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(NAME).experiment_id])
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in found if "mlflow.parentRunId" in run.data.tags}
    children = {run.data.params["seed"]: run for run in found if run.info.run_id != parent}
    assert len(found) == 11
    assert {seed: run.data.metrics["validation/f1"] for seed, run in children.items()} == {
        str(seed): seed / 10 for seed in range(10)
    }
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert client.search_runs(["0"]) == []
