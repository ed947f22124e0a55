"""Tracking stores: sqlite, an MLflow server, a server with passwords and PostgreSQL hold the same runs."""

import json
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from conftest import copy_project, error_line_of, free_port, invoke, output_of, run_mlflow_server
from test_interruptions import Proxy

from pipeline.core import config
from pipeline.tracking import runs
from pipeline.tracking.fingerprint import training_fingerprint
from pipeline.tracking.store import connect

pytestmark = pytest.mark.slow

NAME = "covid-xray-demo"
LOGIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "a password for tests"}


@pytest.fixture
def project(demo_project, tmp_path, monkeypatch) -> Path:
    """A copy of the demo project as the working directory."""
    monkeypatch.chdir(copy_project(demo_project, tmp_path / "project"))
    return tmp_path / "project"


@pytest.fixture
def with_passwords(tmp_path, port, monkeypatch) -> Iterator[str]:
    """An MLflow server with basic authentication."""
    settings = tmp_path / "auth.ini"
    settings.write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
        f"admin_password = {LOGIN['MLFLOW_TRACKING_PASSWORD']}\n"
        f"database_uri = sqlite:///{tmp_path / 'auth.db'}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    secrets = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key for tests"}
    store = f"sqlite:///{tmp_path / 'server.db'}"
    with run_mlflow_server(tmp_path, port, "--app-name", "basic-auth", store=store, **secrets) as uri:
        for key, value in LOGIN.items():
            monkeypatch.setenv(key, value)
        yield uri


@pytest.fixture
def postgresql(tmp_path, port) -> Iterator[str]:
    """A new PostgreSQL database."""
    debian = os.pathsep.join(map(str, Path("/usr/lib/postgresql").glob("*/bin")))  # not in PATH on Debian
    binaries = Path(shutil.which("initdb", path=debian) or shutil.which("initdb") or "").parent
    if not binaries.name:
        pytest.skip("PostgreSQL is not installed")
    # PostgreSQL refuses to run as root.
    user = ["runuser", "-u", "nobody", "--"] if os.getuid() == 0 else []
    folder = Path("/tmp") / f"cxr-postgresql-{port}"
    folder.mkdir()
    if user:
        shutil.chown(folder, "nobody")

    def call(program: str, *arguments: str) -> None:
        subprocess.run([*user, binaries / program, *arguments], cwd=folder, check=True, capture_output=True)

    try:
        call("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "cxr")
        call("pg_ctl", "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", f"-p {port} -k {folder}", "start")
        call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "cxr", "cxr")
        yield f"postgresql://cxr@127.0.0.1:{port}/cxr"
        mlflow.set_tracking_uri(None)
        call("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def server_on_postgresql(tmp_path, postgresql) -> Iterator[str]:
    """An MLflow server with PostgreSQL as its backend store."""
    with run_mlflow_server(tmp_path, free_port(), store=postgresql) as uri:
        yield uri


@pytest.mark.parametrize("kind", ["server_on_postgresql", "postgresql"])
def test_sync_fills_an_empty_store_of_another_kind(project, kind, request, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue(kind))
    output_of("cxr sync")
    output_of("cxr verify")
    error_line_of("cxr predict report --model champion")
    opened = connect(NAME)
    all_runs = opened.client.search_runs([opened.experiment_id])
    assert sorted(run.info.run_name.split(" ")[0] for run in all_runs)[:2] == ["seed-0", "seed-1"]
    assert len(all_runs) == 3
    assert {run.info.status for run in all_runs} == {"FINISHED"}
    candidate = opened.client.get_model_version_by_alias(NAME, "champion").tags["candidate"]
    assert candidate == json.loads((project / "metrics/promotion.json").read_text())["candidate"]


def test_a_server_accepts_the_password_and_a_wrong_one_is_a_one_line_error(project, with_passwords, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", with_passwords)
    log_seed(3)
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
        result = invoke("cxr history")
        assert result.exit_code == 2
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith(f"Error: MLflow at {with_passwords} cannot be used: wrong username or password")
        assert "MLFLOW_TRACKING_USERNAME" in line
        assert "not the password" not in line


@pytest.mark.parametrize("command", ["history", "rollback", "verify", "predict report"])
def test_a_failing_server_is_not_mistaken_for_an_empty_one(project, command, monkeypatch):
    failing = Proxy(upstream=0)
    failing.mode = "fail"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", failing.uri.replace("//", "//user:secret@"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    result = invoke(f"cxr {command}")
    failing.shutdown()
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"Error: MLflow at {failing.uri} cannot be used: ")
    assert "secret" not in line


def test_an_unreachable_database_is_a_one_line_error(project, port, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://user:secret@127.0.0.1:{port}/runs")
    result = invoke("cxr history")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"Error: MLflow at postgresql://127.0.0.1:{port}/runs cannot be used: ")


def log_seed(seed: int) -> None:
    loaded = config.load_config()
    opened = connect(NAME)
    parent = runs.parent_run(opened, loaded, training_fingerprint(loaded))
    run = runs.SeedRun(opened, loaded, parent, seed, f"{seed:064}")
    row = {"epoch": 1, "train_loss": 0.5, "lr": 0.1, "f1": seed / 10, "loss": 0.4}
    run.log_epoch(0, row)
    weights = Path(f"weights-{seed}")
    weights.write_bytes(b"weights")
    run.upload_checkpoint(weights)
    run.close("FINISHED")


@pytest.mark.parametrize("trial", range(int(os.environ.get("CXR_TRIALS", "2"))))
def test_ten_simultaneous_seeds_on_a_new_store_create_ten_complete_runs(project, trial, monkeypatch):
    uri = f"sqlite:///{project / 'new.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    forked = multiprocessing.get_context("fork")  # saves ten processes the imports
    trainings = [forked.Process(target=log_seed, args=(seed,)) for seed in range(10)]
    for training in trainings:
        training.start()
    for training in trainings:
        training.join(120)
    assert [training.exitcode for training in trainings] == [0] * 10
    client = mlflow.MlflowClient(uri)
    all_runs = client.search_runs([client.get_experiment_by_name(NAME).experiment_id])
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in all_runs if "mlflow.parentRunId" in run.data.tags}
    children = {run.data.params["seed"]: run for run in all_runs if run.info.run_id != parent}
    assert len(all_runs) == 11
    assert {seed: run.data.metrics["validation/f1"] for seed, run in children.items()} == {
        str(seed): seed / 10 for seed in range(10)
    }
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert client.search_runs(["0"]) == []
