"""A project works in any folder, whatever the characters of its path mean in a URI."""

import re
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, error_line_of, error_message
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import make_url

from pipeline.tracking.tracking_uri import check_reachable, sqlite_path, sqlite_uri, tracking_uri

ODD_NAME = "a %41 #b?c d"


@given(st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1).filter(lambda name: name.strip(".")))
def test_a_sqlite_uri_means_its_path(name):
    path = Path("/folder", name, "mlflow.db")
    assert make_url(sqlite_uri(path)).database == str(path)
    assert sqlite_path(sqlite_uri(path)) == path


def test_a_usual_path_is_in_the_uri_as_it_is():
    assert sqlite_uri(Path("/home/a b/mlflow.db")) == "sqlite:////home/a b/mlflow.db"


@pytest.mark.parametrize("name", ["plain", ODD_NAME])
def test_a_relative_sqlite_uri_starts_at_the_root(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert sqlite_path(tracking_uri()) == tmp_path / name / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db?timeout=9")
    uri = make_url(tracking_uri())
    assert (uri.database, dict(uri.query)) == (str(tmp_path / name / "other.db"), {"timeout": "9"})
    for uri in ("sqlite:////elsewhere/a.db?timeout=9", "http://127.0.0.1:5000", "postgresql://host/db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert tracking_uri() == uri


def test_an_address_that_is_none_is_an_error(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://[::1")
    assert error_message(check_reachable).startswith("MLflow at http://[::1 cannot be used: Invalid IPv6 URL; ")


@pytest.mark.parametrize("uri", ["mlruns", "./mlruns", "file:///tmp/mlruns"])
def test_a_folder_is_no_store(monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert error_message(check_reachable) == (
        f"MLFLOW_TRACKING_URI={uri}: not the URI of a server or a database; set one, or unset it "
        "to use mlflow.db in the repository's root"
    )


def test_a_used_port_is_named_before_links_to_it_are_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert error_line_of(f"cxr ui --port {port}") == (
            f"Error: port {port}: Address already in use; choose another with --port (make ui PORT=…)"
        )
    assert not Path("mlflow.db").exists()


@pytest.mark.slow
def test_runs_and_artifacts_are_stored_in_a_project_with_an_odd_path(tmp_path, monkeypatch):
    from pipeline.tracking.store import connect

    project = tmp_path / ODD_NAME
    project.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = connect("experiment")
    run = store.client.create_run(store.experiment_id).info.run_id
    Path("file.txt").write_text("content")
    store.client.log_artifact(run, "file.txt", "folder")
    assert Path(store.client.download_artifacts(run, "folder/file.txt")).read_text() == "content"
    assert [path.name for path in tmp_path.iterdir()] == [ODD_NAME]
    assert {"mlflow.db", "mlartifacts", "mlflow.db.lock", "file.txt"} == {path.name for path in project.iterdir()}


@pytest.mark.parametrize("command", ["cxr train-all --jobs 1", "cxr external-validation", "cxr sync --prune"])
def test_without_git_the_message_says_git_init(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    assert error_line_of(command) == f"Error: {tmp_path}: no Git repository, which DVC needs; run: git init"


def test_make_run_says_git_init_too(tmp_path):
    (recipe,) = re.findall(r"^run: .*\n\t@(.*)\n", (ROOT / "Makefile").read_text(), re.MULTILINE)
    command = ["sh", "-c", recipe.replace("$$", "$")]
    completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert completed.returncode == 2
    assert completed.stderr == "no Git repository, which DVC needs; run: git init\n"
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0
