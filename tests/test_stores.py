"""Tracking stores: sqlite, PostgreSQL, and a server with users, PostgreSQL and a bucket hold the same runs."""

import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import alembic.command
import mlflow
import pytest
from click.testing import CliRunner
from conftest import (
    copy_project,
    error_line_of,
    error_message,
    free_port,
    invoke,
    output_of,
    run_mlflow_server,
    run_s3_server,
)
from mlflow.cli import cli as mlflow_commands
from mlflow.server.auth.client import AuthServiceClient
from mlflow.store.db.utils import _get_alembic_config
from sqlalchemy import create_engine, text
from test_interruptions import Proxy

from pipeline.core import config
from pipeline.tracking import prune, registry, runs
from pipeline.tracking.fingerprint import training_fingerprint
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.store import connect

pytestmark = pytest.mark.slow

NAME = "covid-xray-demo"
PASSWORD = "a password for tests"


@pytest.fixture
def project(demo_project, tmp_path, monkeypatch) -> Path:
    """A copy of the demo project as the working directory."""
    monkeypatch.chdir(copy_project(demo_project, tmp_path / "project"))
    return tmp_path / "project"


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory) -> Iterator[Callable[[str], str]]:
    """A PostgreSQL server: a function that creates a new database and returns its URI."""
    debian = os.pathsep.join(map(str, Path("/usr/lib/postgresql").glob("*/bin")))  # not in PATH on Debian
    binaries = Path(shutil.which("initdb", path=debian) or shutil.which("initdb") or "").parent
    if not binaries.name:
        pytest.skip("PostgreSQL is not installed")
    # PostgreSQL refuses to run as root.
    user = ["runuser", "-u", "nobody", "--"] if os.getuid() == 0 else []
    port = free_port()
    folder = Path("/tmp") / f"cxr-postgresql-{port}"
    folder.mkdir()
    if user:
        shutil.chown(folder, "nobody")

    def call(program: str, *arguments: str) -> None:
        subprocess.run([*user, binaries / program, *arguments], cwd=folder, check=True, capture_output=True)

    def create_database(name: str) -> str:
        call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "cxr", name)
        return f"postgresql://cxr@127.0.0.1:{port}/{name}"

    try:
        call("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "cxr")
        call("pg_ctl", "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", f"-p {port} -k {folder}", "start")
        yield create_database
        mlflow.set_tracking_uri(None)
        call("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of a local S3 server."""
    with run_s3_server() as s3:
        s3.create_bucket(Bucket="models")
        yield "models"


@pytest.fixture(scope="module")
def server(tmp_path_factory, postgresql, bucket) -> Iterator[SimpleNamespace]:
    """An MLflow server with users, PostgreSQL, and a bucket for artifacts, for which clients have no credentials."""
    folder, port, database = tmp_path_factory.mktemp("server"), free_port(), postgresql("server")
    settings = folder / "auth.ini"
    settings.write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
        f"admin_password = {PASSWORD}\ndatabase_uri = sqlite:///{folder / 'auth.db'}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 600\n"  # checking a password takes a tenth of a second by design
    )
    secrets = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key for tests"}
    options = ["--app-name", "basic-auth", "--artifacts-destination", f"s3://{bucket}/mlflow"]
    with run_mlflow_server(folder, port, *options, store=database, **secrets) as uri:
        with pytest.MonkeyPatch.context() as patch:
            log_in(patch, "admin")
            users = AuthServiceClient(uri)
            for name in ("anna", "bert", "carl"):
                users.create_user(name, PASSWORD)
        yield SimpleNamespace(uri=uri, port=port, database=database, users=users, bucket=bucket)


def log_in(monkeypatch, user: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)


def log_seed(seed: int, name: str = NAME) -> None:
    loaded = config.load_config()
    opened = connect(name)
    parent = runs.parent_run(opened, loaded, training_fingerprint(loaded))
    run = runs.SeedRun(opened, loaded, parent, seed, f"{seed:064}")
    row = {"epoch": 1, "train_loss": 0.5, "lr": 0.1, "f1": seed / 10, "loss": 0.4}
    run.log_epoch(0, row)
    weights = Path(f"weights-{seed}")
    weights.write_bytes(b"weights")
    run.upload_checkpoint(weights)
    run.close("FINISHED")


def objects(bucket: str) -> dict[str, str]:
    """Return the key and the hash of every object in a bucket."""
    boto3 = pytest.importorskip("boto3")
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return {one["Key"]: one["ETag"] for page in pages for one in page.get("Contents", [])}


def test_users_of_a_server_share_runs_and_versions_in_postgresql_and_a_bucket(project, server, monkeypatch):
    shutil.rmtree("mlartifacts")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    log_in(monkeypatch, "anna")
    assert "No run yet; " in output_of("cxr ui")
    for command in ("cxr sync", "cxr ui"):
        links = f"{server.uri}/#/experiments/{connect(NAME).experiment_id}/runs?"
        assert output_of(command).count(links) == 2
    stored = objects(server.bucket)
    assert not Path("mlartifacts").exists()
    # One copy of a seed's weights in its version, one in the bag's; none in its run.
    weights = [key for key in stored if key.endswith("model.safetensors")]
    assert len(weights) == 4
    assert not [key for key in weights if "/checkpoint/" in key]
    output_of("cxr sync")
    assert objects(server.bucket) == stored
    assert output_of("cxr verify").count("OK (checksums match)") == 3
    with zipfile.ZipFile("data/raw.zip") as archive:
        archive.extractall("radiographs")
    assert "p.csv: 8 files" in output_of("cxr predict radiographs/test --csv p.csv")
    opened = connect(NAME)
    all_runs = opened.client.search_runs([opened.experiment_id])
    assert len(all_runs) == 3
    assert {run.info.status for run in all_runs} == {"FINISHED"}
    champion = opened.client.get_model_version_by_alias(NAME, "champion")
    assert champion.tags["candidate"] == json.loads(Path("metrics/promotion.json").read_text())["candidate"]

    others = [number for number in ("1", "2", "3") if number != str(champion.version)]
    promote = f"cxr promote --reason 'it is smaller' --model {others[0]}"
    for user in ("bert", "carl"):
        log_in(monkeypatch, user)
        assert "Champion history" in output_of("cxr history")
        refused = f"MLflow at {server.uri} cannot be used: {user} may not do this; ask the server's administrator "
        assert error_line_of(promote).startswith(f"Error: {refused}")
        with Outbox(lambda: log_seed(3)) as outbox:
            pass
        assert error_message(outbox.check).startswith(refused)
    log_in(monkeypatch, "anna")
    for kind, name in (("experiment", opened.experiment_id), ("registered_model", NAME)):
        server.users.grant_user_permission("bert", kind, name, "EDIT")
    log_in(monkeypatch, "bert")
    assert "is champion: manual: it is smaller" in output_of(promote)
    log_in(monkeypatch, "anna")
    assert "but a person chose version" in output_of("cxr sync")


def test_a_server_accepts_passwords_and_tokens_and_a_wrong_one_is_a_one_line_error(project, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    log_in(monkeypatch, "anna")
    log_seed(3)
    opened = connect(NAME)
    (run,) = opened.client.search_runs([opened.experiment_id], "params.seed = '3'")
    assert run.info.status == "FINISHED"
    assert [file.path for file in opened.client.list_artifacts(run.info.run_id, "checkpoint")]
    used = {"MLFLOW_TRACKING_USERNAME": "anna", "MLFLOW_TRACKING_PASSWORD": "not the password"}
    proxy = Proxy(server.port, "a token", f"anna:{PASSWORD}")
    for uri, variables, reason in (
        (server.uri, used, "wrong username or password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (server.uri, {}, "it needs a username and a password, or a token; set MLFLOW_TRACKING_USERNAME and "),
        (
            proxy.uri,
            {"MLFLOW_TRACKING_TOKEN": "not the token"},
            "wrong or expired token; correct MLFLOW_TRACKING_",
        ),
        (
            proxy.uri,
            used | {"MLFLOW_TRACKING_TOKEN": "a token"},
            "wrong username or password; set MLFLOW_TRACKING_",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", uri)
            for key in used:
                patch.delenv(key)
            for key, value in variables.items():
                patch.setenv(key, value)
            line = error_line_of("cxr history")
        assert line.startswith(f"Error: MLflow at {uri} cannot be used: {reason}")
        assert "not the" not in line
    for key in used:
        monkeypatch.delenv(key)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a token")
    log_seed(4)
    assert len(connect(NAME).client.search_runs([opened.experiment_id], "params.seed = '4'")) == 1
    proxy.shutdown()


def test_files_of_pruned_runs_are_freed_in_the_bucket_by_the_printed_command(project, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    log_in(monkeypatch, "admin")
    log_seed(5)
    opened = connect(NAME)
    (run,) = opened.client.search_runs([opened.experiment_id], "params.seed = '5'")
    stored = objects(server.bucket)
    prune.remove_runs(opened, NAME, [run])
    assert objects(server.bucket) == stored
    command, _, hint = prune.gc_command().partition(" (")
    assert hint == "DATABASE is the server's --backend-store-uri)"
    program, *arguments = shlex.split(os.path.expandvars(command.replace("DATABASE", server.database)))
    assert (program, CliRunner().invoke(mlflow_commands, arguments).exit_code) == ("mlflow", 0)
    freed = stored.keys() - objects(server.bucket).keys()
    assert freed == {key for key in stored if run.info.run_id in key}
    assert len(freed) == 1


def run_at_once(functions: list[Callable[[], object]]) -> None:
    """Call each function in a process of its own."""
    forked = multiprocessing.get_context("fork")  # saves the processes the imports
    processes = [forked.Process(target=function) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def copy_workspace(project: Path) -> Path:
    """Return a copy of a project, as on another machine: no lock is shared."""
    return shutil.copytree(project, project.with_name("other"), symlinks=True)


def in_folder(folder: Path, function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    def call() -> None:
        os.chdir(folder)
        function(*arguments)

    return call


def test_machines_that_sync_a_new_database_at_once_create_runs_and_versions_once(project, postgresql, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgresql("machines"))
    run_at_once([in_folder(folder, output_of, "cxr sync") for folder in (project, copy_workspace(project))])
    opened = connect(NAME)
    assert sorted(version.tags["candidate"] for version in registry.list_versions(opened, NAME)) == [
        "bag", "seed-0", "seed-1",
    ]  # fmt: skip
    all_runs = opened.client.search_runs([opened.experiment_id])
    assert {run.info.status for run in all_runs} == {"FINISHED"}
    assert len({run.data.tags.get("mlflow.parentRunId") for run in all_runs}) == 2
    assert len(all_runs) == 3
    assert len(opened.client.search_logged_models([opened.experiment_id])) == 3
    assert output_of("cxr sync").count("http://127.0.0.1:5000/#/experiments/1/runs?") == 2  # of `cxr ui`
    output_of("cxr verify")
    error_line_of("cxr predict report --model champion")


@pytest.mark.parametrize("machines", [1, 2])
def test_simultaneous_seeds_on_a_new_store_create_complete_runs(project, machines, request, monkeypatch):
    """Ten of one machine on a new sqlite file, and five each of two machines in a new experiment on a server."""
    uri = f"sqlite:///{project / 'new.db'}" if machines == 1 else request.getfixturevalue("server").uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    log_in(monkeypatch, "admin")
    name, folders = f"{machines} machines", [project, copy_workspace(project)][:machines]
    run_at_once([in_folder(folders[seed % machines], log_seed, seed, name) for seed in range(10)])
    client = mlflow.MlflowClient(uri)
    all_runs = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in all_runs if "mlflow.parentRunId" in run.data.tags}
    children = {run.data.params["seed"]: run for run in all_runs if run.info.run_id != parent}
    assert len(all_runs) == 11
    assert {seed: run.data.metrics["validation/f1"] for seed, run in children.items()} == {
        str(seed): seed / 10 for seed in range(10)
    }
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert client.search_runs(["0"]) == []


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_store_of_another_release_of_mlflow_is_not_changed_but_named(
    project, empty_store, kind, request, monkeypatch
):
    if kind == "sqlite":
        uri = f"sqlite:///{shutil.copy(empty_store, project / 'other.db')}"
    else:
        uri = request.getfixturevalue("postgresql")("other")
        mlflow.MlflowClient(uri).search_experiments()  # creates the tables
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    engine = create_engine(uri)

    def revision() -> str:
        with engine.connect() as connection:
            return str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar())

    present = revision()
    alembic.command.downgrade(_get_alembic_config(uri), "-1")
    older = revision()
    assert older != present
    line = error_line_of("cxr history")
    assert line.startswith("Error: MLflow at ")
    assert " cannot be used: its tables are of an older MLflow than the installed 3." in line
    program, *arguments = shlex.split(os.path.expandvars(line.rpartition("run: ")[2]))
    assert revision() == older
    assert (program, CliRunner().invoke(mlflow_commands, arguments).exit_code) == ("mlflow", 0)
    assert revision() == present
    assert "has had no champion yet" in output_of("cxr history")
    assert output_of("cxr verify") == f"{NAME}: nothing is registered yet\n"
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'ffffffffffff'"))
    assert "its tables are of a newer MLflow than the installed 3." in error_line_of("cxr history")
    engine.dispose()


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
