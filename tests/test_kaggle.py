"""Tests of Kaggle's client and of submissions against a fake server with injected faults."""

import json
import multiprocessing
import random
import shlex
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import yaml
from click.testing import Result
from conftest import (
    ROOT,
    archive_members,
    clone_project,
    edit_params,
    error_message,
    free_port,
    invoke,
    output_of,
    use_project,
    write_zip,
)
from kaggle_server import COMPETITION, DATASET, KEY, SIGNATURE, TOKEN, USERNAME, Kaggle, serve
from kagglehub import config as kagglehub_config
from kagglesdk import kaggle_env

from pipeline.core.config import KaggleParams, load_config
from pipeline.core.files import write_json
from pipeline.data import sources
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.kaggle import client, submit
from pipeline.tracking import fingerprint, runs
from pipeline.tracking.store import connect

PARAMS = KaggleParams(source="kaggle", competition=COMPETITION, dataset=None)
PAGE = f"https://www.kaggle.com/competitions/{COMPETITION}"
PASSWORD = "hunter2-of-the-proxy"
PARTIAL = f".{COMPETITION}.part"
CHUNK = 2**20  # of a download that kagglehub writes at once, bytes
SECRETS = [TOKEN, KEY, SIGNATURE, PASSWORD]


@pytest.fixture
def kaggle(tmp_path, monkeypatch) -> Kaggle:
    """The server, with its token in the environment and no other credentials."""
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    (home / ".kaggle").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(kagglehub_config, "DEFAULT_KAGGLE_CREDENTIALS_FOLDER", str(home / ".kaggle"))
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setattr(client, "RETRY_DELAYS", (0, 0, 0, 0))
    members = {
        "other.bin": random.Random(0).randbytes(3 * CHUNK),
        **archive_members(),
    }  # half of it is more than a chunk
    archive = write_zip(tmp_path / "kaggle.zip", members).read_bytes()
    with serve(archive) as server:
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, server.endpoint)
        yield server


@pytest.fixture
def target(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data/raw.zip"


def download(target: Path, params: KaggleParams = PARAMS) -> bytes:
    sources.fetch_source(params, target)
    return target.read_bytes()


def file_sizes(target: Path) -> dict[str, int]:
    """Return the sizes of the files in the target's folder by name."""
    return {path.name: path.stat().st_size for path in target.parent.iterdir()}


def test_the_zip_is_downloaded_unchanged_and_no_other_file_is_left(kaggle, target):
    assert download(target) == kaggle.archive
    assert file_sizes(target) == {"raw.zip": len(kaggle.archive)}


@pytest.mark.parametrize(("dataset", "version"), [(DATASET, None), (f"{DATASET}/versions/3", 3)])
def test_a_data_set_is_downloaded_in_the_same_way(kaggle, target, dataset, version):
    assert download(target, KaggleParams(source="kaggle", competition=None, dataset=dataset)) == kaggle.archive
    assert kaggle.download_request.get("datasetVersionNumber") == version


def write_credentials(name: str, content: str) -> None:
    path = Path("~/.kaggle").expanduser() / name
    path.write_text(content)


@pytest.mark.parametrize(
    "set_credentials",
    [
        lambda env: env.setenv("KAGGLE_API_TOKEN", TOKEN),
        lambda env: write_credentials("access_token", f"{TOKEN}\n"),
        lambda env: (env.setenv("KAGGLE_USERNAME", USERNAME), env.setenv("KAGGLE_KEY", KEY)),
        lambda env: write_credentials("kaggle.json", json.dumps({"username": USERNAME, "key": KEY})),
    ],
    ids=["KAGGLE_API_TOKEN", "access_token", "KAGGLE_KEY", "kaggle.json"],
)
def test_credentials_are_read_from_all_places_where_kaggles_tools_store_them(
    kaggle, target, monkeypatch, set_credentials
):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    set_credentials(monkeypatch)
    assert download(target) == kaggle.archive


def test_an_interrupted_download_is_resumed(kaggle, target):
    kaggle.faults["archive.zip"] = ["cut"]
    assert download(target) == kaggle.archive
    ranges = [headers["Range"] for _, headers in kaggle.requests if "Range" in headers]
    assert ranges == [f"bytes={CHUNK}-"]


def test_the_next_run_resumes_a_failed_download(kaggle, target):
    kaggle.faults["archive.zip"] = ["cut", *[503] * 9]
    assert "run again later" in error_message(download, target)
    assert file_sizes(target) == {PARTIAL: CHUNK}
    kaggle.faults.clear()
    assert download(target) == kaggle.archive
    assert any("Range" in headers for _, headers in kaggle.requests)


@pytest.mark.parametrize("fault", ["no range", "error page", 503])
@pytest.mark.parametrize("hashed", [True, False])
def test_a_server_that_does_not_resume_still_gives_the_whole_zip(kaggle, target, fault, hashed):
    kaggle.hashed = hashed
    (target.parent / PARTIAL).write_bytes(kaggle.archive[:100])
    kaggle.faults["archive.zip"] = ["", fault]  # the first request gets the size, the second resumes
    assert download(target) == kaggle.archive


@pytest.mark.parametrize(
    ("where", "status"),
    [*[(where, status) for where in ("DownloadDataFiles", "archive.zip") for status in (429, 500, 503)],
     ("archive.zip", 403)],  # the signed URL expired
)  # fmt: skip
def test_transient_errors_are_retried(kaggle, target, where, status):
    kaggle.faults[where] = [status] * 3
    assert download(target) == kaggle.archive


def test_the_delays_between_retries_increase(kaggle, target, monkeypatch):
    delays: list[float] = []
    monkeypatch.setattr(client, "RETRY_DELAYS", (1, 2, 4, 8))
    monkeypatch.setattr(client.time, "sleep", delays.append)
    kaggle.faults["DownloadDataFiles"] = [429] * 9
    assert error_message(download, target).endswith("5 attempts failed: Kaggle answers 429; run again later")
    assert delays == [1, 2, 4, 8]


def test_a_download_with_a_wrong_hash_is_repeated_and_never_accepted(kaggle, target):
    kaggle.faults["archive.zip"] = ["wrong hash"]
    assert download(target) == kaggle.archive
    target.unlink()
    kaggle.faults["archive.zip"] = ["wrong hash"] * 9
    assert "the download is corrupt (size or hash differs)" in error_message(download, target)
    assert file_sizes(target) == {}


@pytest.mark.parametrize("hashed", [True, False])
def test_a_download_with_a_wrong_size_is_never_accepted(kaggle, target, hashed):
    kaggle.hashed = hashed
    kaggle.length += 1
    assert "no connection to Kaggle (ChunkedEncodingError)" in error_message(download, target)
    assert "raw.zip" not in file_sizes(target)


@pytest.mark.parametrize("damage", [lambda zip_: zip_[:-30], lambda zip_: zip_.replace(b"\xff\xd8", b"\xff\xd9")])
def test_a_damaged_zip_is_never_accepted(kaggle, target, damage):
    kaggle.archive = damage(kaggle.archive)
    kaggle.length = len(kaggle.archive)
    assert "the zip from Kaggle is damaged" in error_message(download, target)
    assert file_sizes(target) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda env, kaggle: env.delenv("KAGGLE_API_TOKEN"),
            f"Kaggle: no credentials found; {client.TOKEN_ADVICE}",
        ),
        (
            lambda env, kaggle: env.setenv("KAGGLE_API_TOKEN", "KGAT_expired"),
            f"Kaggle rejects these credentials (401: Unauthenticated); {client.TOKEN_ADVICE}",
        ),
        (
            lambda env, kaggle: kaggle.faults.update(Download=[(403, "Do!")]),
            (
                f"{COMPETITION}: no access with this account (403: Do!); accept the rules with the account of these "
                f"credentials at {PAGE}/rules and run again"
            ),
        ),
        (
            lambda env, kaggle: kaggle.faults.update(Download=[(404, "Gone")]),
            f"Kaggle has no competition '{COMPETITION}' (404: Gone); correct download.competition in params.yaml",
        ),
        (
            lambda env, kaggle: kaggle.faults.update(Download=[(418, "I am\na teapot")]),
            f"{PAGE}: Kaggle answers 418: I am a teapot",
        ),
        (
            lambda env, kaggle: env.setitem(
                kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, f"http://127.0.0.1:{free_port()}"
            ),
            (
                f"{PAGE}: 5 attempts failed: no connection to Kaggle (ConnectionError); check the network and "
                "HTTPS_PROXY; run again later"
            ),
        ),
    ],
    ids=["no credentials", "wrong credentials", "rules", "unknown", "other", "no network"],
)
def test_error_messages_say_what_is_wrong_and_what_to_do(kaggle, target, monkeypatch, change, message):
    change(monkeypatch, kaggle)
    assert error_message(download, target) == message
    assert file_sizes(target) == {}


def test_a_data_set_that_does_not_exist_or_is_private_is_named(kaggle, target):
    params = KaggleParams(source="kaggle", competition=None, dataset="no/such")
    assert error_message(download, target, params).startswith("Kaggle has no data set 'no/such' (404")
    kaggle.faults["DownloadDataset"] = [403]
    assert error_message(download, target, params).startswith("https://www.kaggle.com/datasets/no/such: no access with")


def test_a_disk_that_is_too_small_is_an_error_before_the_download(kaggle, target, monkeypatch):
    kaggle.length = 10**18
    assert ": 1000000000.00 GB do not fit, the disk has" in error_message(download, target)
    assert file_sizes(target) == {}


def test_a_resumed_download_needs_disk_space_only_for_the_rest(kaggle, target, monkeypatch):
    (target.parent / PARTIAL).write_bytes(kaggle.archive[:-50])
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 50}))
    assert download(target) == kaggle.archive


def test_a_server_that_does_not_answer_is_a_timeout(kaggle, target, monkeypatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, endpoint)
        monkeypatch.setattr(client, "TIMEOUT", (0.1, 0.1))
        assert "no connection to Kaggle (ReadTimeout)" in error_message(download, target)


# Secrets


@pytest.mark.parametrize(
    "change",
    [
        lambda env, kaggle: env.setenv("KAGGLE_API_TOKEN", f"{TOKEN}\n"),
        lambda env, kaggle: env.setenv("KAGGLE_API_TOKEN", f"{TOKEN}é"),
        lambda env, kaggle: env.setenv("KAGGLE_API_TOKEN", TOKEN * 20),  # longer than a file name can be
        lambda env, kaggle: (
            env.delenv("KAGGLE_API_TOKEN"),
            write_credentials("kaggle.json", f'{{"username": "a", "key": "{KEY}'),
        ),
        lambda env, kaggle: (
            env.delenv("KAGGLE_API_TOKEN"),
            write_credentials("kaggle.json", f'{{"user": "a", "key": "{KEY}"}}'),
        ),
        lambda env, kaggle: env.setenv("HTTP_PROXY", f"http://{USERNAME}:{PASSWORD}@127.0.0.1:{free_port()}"),
        lambda env, kaggle: env.setenv("HTTP_PROXY", f"http://{USERNAME}:{PASSWORD}@:port"),
        lambda env, kaggle: kaggle.faults.update(Download=[(400, f"what is {TOKEN}?")] * 2),
        lambda env, kaggle: kaggle.faults.update({"archive.zip": [404] * 10}),
        lambda env, kaggle: kaggle.faults.update({"archive.zip": ["cut", *[503] * 20]}),
    ],
    ids=["line break", "letter", "long", "half a json", "other json", "proxy", "bad proxy", "echo", "storage", "cut"],
)
def test_error_messages_contain_no_secrets(kaggle, tmp_path, monkeypatch, change, caplog):
    change(monkeypatch, kaggle)
    for debug in ([], ["--debug"]):
        result = run_cxr(write_project(tmp_path / f"project{len(debug)}"), monkeypatch, "download", *debug)
        output = result.output + caplog.text + "".join(traceback.format_exception(*result.exc_info))
        assert result.exit_code == (1 if debug else 2)
        assert f"{'UserError' if debug else 'Error'}: " in output
        assert [secret for secret in SECRETS if secret in output] == []


def test_no_headers_are_printed_in_kaggles_test_environment(kaggle, target, monkeypatch, capsys):
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.TEST, kaggle.endpoint)
    assert download(target) == kaggle.archive
    printed = "".join(capsys.readouterr())
    assert "Authorization" not in printed
    assert [secret for secret in SECRETS if secret in printed] == []


def test_credentials_are_not_sent_to_kaggles_storage(kaggle, target):
    download(target)
    for path, headers in kaggle.requests:
        assert ("Authorization" in headers) == path.startswith("/api/")


# The stage download, and submissions


def write_project(folder: Path) -> Path:
    """Make a folder in which the stage download runs with the profile competition."""
    folder.mkdir()
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    edit_params(folder, lambda params: params.update(profile="competition"))
    return folder


def run_cxr(project: Path, monkeypatch, *arguments: str, answer: str | None = None) -> Result:
    monkeypatch.chdir(project)
    return invoke(shlex.join(["cxr", *arguments]), answer)


def test_the_profile_competition_needs_only_credentials_to_download(kaggle, tmp_path, monkeypatch):
    project = write_project(tmp_path / "project")
    result = run_cxr(project, monkeypatch, "download")
    assert result.exit_code == 0, result.output
    assert (project / "data/raw.zip").read_bytes() == kaggle.archive
    assert [path.name for path in (project / "data").iterdir()] == ["raw.zip"]


def test_no_stage_of_the_pipeline_submits_or_deletes_the_log_of_submissions():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert stages["submit"]["cmd"] == "python -m stages.submit"
    assert not any(submit.SUBMISSION_LOG.is_relative_to(out) for out in stages["submit"]["outs"])  # DVC deletes outs


def ensemble_config(*members: str) -> dict:
    count = len(members)
    return asdict(EnsembleConfig(list(members), "mean", "mean", [1 / count] * count, 0.5))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, empty_store) -> Path:
    """A clone whose profile competition has MLflow runs and submission files."""
    project = clone_project(tmp_path_factory.mktemp("finished") / "project")
    edit_params(project, lambda params: params.update(profile="competition"))
    for name, content in {
        "data/manifest.csv": "file\n", "data/quarantine.csv": "file,reason\n",
        "data/split.csv": "file\n", "data/weights/origin.json": "{}",
        "dvc.lock": "stages: {}",
        "metrics/evaluate.json": json.dumps({"seed-0": {"f1": 0.8, "loss": 0}, "seed-1": {"f1": 0.9, "loss": 0}}),
        "metrics/candidates.json": json.dumps(
            {
                "seed-0": ensemble_config("seed-0"),
                "seed-1": ensemble_config("seed-1"),
                "bag": ensemble_config("seed-0", "seed-1"),
            }
        ),
        "predictions/test.csv": "file,seed-0,seed-1\nt000.jpg,0.1,0.9\nt001.jpg,0.8,0.7\nt002.jpg,0.2,0.6\n",
        "predictions/adapted.csv": "file,best,bag\nt000.jpg,0.4,0.4\nt001.jpg,0.8,0.7\nt002.jpg,0.2,0.6\n",
    }.items():  # fmt: skip
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(content)
    write_zip(project / "data/raw.zip", archive_members(train=6, test=3))
    (project / "mlflow.db").write_bytes(empty_store.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        use_project(project, patch)
        output_of("cxr submit")
        config = load_config()
        store = connect(config.model_name)
        parent = fingerprint.training_fingerprint(config)
        runs.parent_run(store, config, parent)
        for seed in (0, 1):
            run_fingerprint = fingerprint.seed_fingerprint(parent, seed, {})
            write_json(
                Path(f"models/seed-{seed}/model.json"),
                {"fingerprint": run_fingerprint, "parent_fingerprint": parent, "environment": {}},
            )
            runs._find_or_create(store, config, run_fingerprint, f"seed-{seed}", {})
    return project


@pytest.fixture
def send(kaggle, finished, monkeypatch) -> Callable[..., Result]:
    """Returns a function that runs `cxr submit` in the finished project, without its log of submissions."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.01)
    (finished / "submissions.csv").unlink(missing_ok=True)
    return lambda *arguments, answer=None: run_cxr(finished, monkeypatch, "submit", *arguments, answer=answer)


def public_scores(project: Path) -> dict[str, float]:
    """Return the public scores in MLflow by run name."""
    store = connect("covid-xray-competition")
    all_runs = store.client.search_runs([store.experiment_id])
    return {run.info.run_name: run.data.metrics.get("kaggle/public_score") for run in all_runs}


def documented_arguments(send: str) -> list[str]:
    """Return the arguments of the documented command, with another file to send."""
    command = 'cxr submit --send bag -m "ten seeds, majority vote"'
    assert command in (ROOT / "docs/kaggle.md").read_text()
    return shlex.split(command.replace("--send bag", f"--send {send}"))[2:]


@pytest.mark.parametrize(("name", "run"), [("bag", "bag"), ("seed-0", "seed-0"), ("best", "seed-1")])
def test_a_submission_is_sent_scored_and_logged(send, kaggle, finished, name, run):
    kaggle.result["publicScore"] = {"bag": "0.96500", "seed-0": "0.94", "best": "0.97"}[name]
    result = send(*documented_arguments(name), answer="y\n")
    assert result.exit_code == 0, result.output
    assert f"Send submissions/{name}.csv to {COMPETITION}?" in result.output
    assert kaggle.uploaded == (finished / f"submissions/{name}.csv").read_bytes()
    assert kaggle.upload_request["contentLength"] == len(kaggle.uploaded)
    assert kaggle.submissions[0]["description"] == "ten seeds, majority vote"
    expected = float(kaggle.result["publicScore"])
    (logged,) = [score for run_name, score in public_scores(finished).items() if run_name.startswith(run)]
    assert logged == expected
    (row,) = pd.read_csv(finished / "submissions.csv").to_dict("records")
    assert (row["file"], row["competition"], row["submission"], row["public_score"]) == (
        name,
        COMPETITION,
        41,
        expected,
    )
    stored = b"".join((finished / name).read_bytes() for name in ("submissions.csv", "mlflow.db"))
    assert [secret for secret in SECRETS if secret.encode() in result.output.encode() + stored] == []


def test_a_second_submission_is_a_second_row_of_the_log(send, finished):
    for name in ("bag", "seed-0"):
        assert send("--send", name, "-m", 'é, "x"', "--yes").exit_code == 0
    table = pd.read_csv(finished / "submissions.csv")
    assert list(table["file"]) == ["bag", "seed-0"]
    assert list(table["message"]) == ['é, "x"'] * 2
    assert list(table["public_score"]) == [0.965] * 2


@pytest.mark.parametrize("content", ["", "<<<<<<< HEAD\nsent,competition\n", "sent\n1,2,3\n1\n"])
def test_a_damaged_log_of_submissions_is_an_error_before_anything_is_sent(send, kaggle, finished, content):
    (finished / "submissions.csv").write_text(content)
    result = send("--send", "bag", "-m", "x", "--yes")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: submissions.csv")
    assert not kaggle.requests


def test_nothing_is_sent_without_confirmation(send, kaggle, finished):
    assert send("--send", "bag", "-m", "x", answer="n\n").output.endswith("nothing sent\n")
    assert send("--send", "bag", "-m", "x").exit_code == 1  # no answer to the prompt
    assert not kaggle.requests
    assert not (finished / "submissions.csv").exists()


def test_a_submission_is_never_repeated(send, kaggle):
    kaggle.faults["CreateSubmission"] = ["lost"]
    result = send("--send", "bag", "-m", "x", "--yes")
    assert result.exit_code == 2
    assert "Kaggle may have accepted it: check" in result.output
    assert kaggle.count("CreateSubmission") == len(kaggle.submissions) == 1
    kaggle.faults["CreateSubmission"] = [500]
    assert send("--send", "bag", "-m", "x", "--yes").exit_code == 2
    assert kaggle.count("CreateSubmission") == 2


def test_transient_errors_are_retried_when_sending(send, kaggle):
    kaggle.faults |= {"StartSubmissionUpload": [429, 503], "ListSubmissions": [429, 503], "CreateSubmission": [429]}
    kaggle.faults["/upload"] = [403]  # the signed URL expired
    assert send("--send", "bag", "-m", "x", "--yes").exit_code == 0
    assert kaggle.count("StartSubmissionUpload") == 4
    assert len(kaggle.submissions) == 1


def test_the_error_of_a_refused_submission_contains_kaggles_message(send, kaggle):
    kaggle.faults["CreateSubmission"] = [(400, "You have reached your daily limit.")]
    result = send("--send", "bag", "-m", "x", "--yes")
    assert result.exit_code == 2
    assert result.stderr.endswith(
        f"competitions/{COMPETITION}: Kaggle answers 400: You have reached your daily limit.\n"
    )


def test_a_submission_without_a_score_is_in_the_log(send, kaggle, finished, monkeypatch):
    kaggle.result = {"status": "ERROR", "errorDescription": "row 3\nis missing"}
    result = send("--send", "bag", "-m", "x", "--yes")
    assert "submission 41: Kaggle cannot score it: row 3 is missing" in result.stderr
    monkeypatch.setattr(submit, "TIMEOUT_SECONDS", 0.1)
    kaggle.polls_until_scored = 99
    result = send("--send", "bag", "-m", "x", "--yes")
    assert "submission 42 is not scored yet" in result.stderr
    table = pd.read_csv(finished / "submissions.csv")
    assert list(table["submission"]) == [41, 42]
    assert table["public_score"].isna().all()


def test_a_submission_is_in_the_log_when_the_wait_for_its_score_is_killed(send, kaggle, finished):
    kaggle.polls_until_scored = 10**6
    process = multiprocessing.get_context("fork").Process(target=send, args=("--send", "bag", "-m", "x", "--yes"))
    process.start()
    end = time.monotonic() + 60
    while not kaggle.count("ListSubmissions") and process.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert list(pd.read_csv(finished / "submissions.csv")["submission"]) == [41]


def test_invalid_submissions_are_errors_before_anything_is_sent(send, kaggle, finished, monkeypatch, empty_store):
    assert (
        "choose one of best, bag, best-adapted, bag-adapted, seed-0, seed-1"
        in send("--send", "seed-7", "-m", "x", "--yes").stderr
    )
    assert "give both" in send("--send", "bag").stderr
    assert "give both" in send("-m", "x").stderr
    (finished / "data/split.csv").write_text("other\n")
    assert "models/seed-0: trained with other parameters, data or code" in send("--send", "best", "-m", "x").stderr
    (finished / "data/split.csv").write_text("file\n")
    predictions = finished / "predictions/test.csv"
    predictions.write_text(predictions.read_text().replace("0.1,0.9", "0.1,0.2"))
    for name in ("best", "seed-1", "bag"):
        message = f"submissions/{name}.csv: not up to date with the predictions; run: dvc repro submit"
        assert message in send("--send", name, "-m", "x").stderr
    predictions.write_text(predictions.read_text().replace("0.1,0.2", "0.1,0.9"))
    with monkeypatch.context() as patch:
        shutil.copy(empty_store, finished / "other.db")
        patch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
        assert "MLflow has no run of bag to log the score to; run: cxr sync" in send("--send", "bag", "-m", "x").stderr
    edit_params(finished, lambda params: params.update(profile="demo"))
    assert (
        "params.yaml: demo.download: the data do not come from a competition" in send("--send", "bag", "-m", "x").stderr
    )
    edit_params(finished, lambda params: params.update(profile="competition"))
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    assert "Kaggle: no credentials found" in send("--send", "bag", "-m", "x", "--yes").stderr
    assert not kaggle.requests
