"""Kaggle's own client against a server that speaks Kaggle's API and fails as told."""

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
from conftest import ROOT, archive_members, clone, edit_params, enter, free_port, refusal, said, typed, write_zip
from kaggle_server import COMPETITION, DATASET, KEY, SIGNATURE, TOKEN, Kaggle, serve
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
PART = f".{COMPETITION}.part"
CHUNK = 2**20  # as much of a download as kagglehub writes at once
SECRETS = [TOKEN, KEY, SIGNATURE, PASSWORD]


@pytest.fixture
def kaggle(tmp_path, monkeypatch) -> Kaggle:
    """The server, with the right token in the environment and nobody else's credentials in reach."""
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    (home / ".kaggle").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(kagglehub_config, "DEFAULT_KAGGLE_CREDENTIALS_FOLDER", str(home / ".kaggle"))
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setattr(client, "RETRY_DELAYS", (0, 0, 0, 0))
    members = {"other.bin": random.Random(0).randbytes(3 * CHUNK), **archive_members()}  # its half is more than a chunk
    archive = write_zip(tmp_path / "kaggle.zip", members).read_bytes()
    with serve(archive) as running:
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, running.endpoint)
        yield running


@pytest.fixture
def target(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data/raw.zip"


def download(target: Path, params: KaggleParams = PARAMS) -> bytes:
    sources.fetch_source(params, target)
    return target.read_bytes()


def parts(target: Path) -> dict[str, int]:
    """Return what is beside the target by name, and its size."""
    return {path.name: path.stat().st_size for path in target.parent.iterdir()}


def test_the_zip_is_what_kaggle_has_and_nothing_else_is_left(kaggle, target):
    assert download(target) == kaggle.archive
    assert parts(target) == {"raw.zip": len(kaggle.archive)}


@pytest.mark.parametrize(("dataset", "version"), [(DATASET, None), (f"{DATASET}/versions/3", 3)])
def test_a_data_set_is_fetched_in_the_same_way(kaggle, target, dataset, version):
    assert download(target, KaggleParams(source="kaggle", competition=None, dataset=dataset)) == kaggle.archive
    assert kaggle.wanted.get("datasetVersionNumber") == version


def write(name: str, content: str) -> None:
    path = Path("~/.kaggle").expanduser() / name
    path.write_text(content)


@pytest.mark.parametrize(
    "put",
    [
        lambda env: env.setenv("KAGGLE_API_TOKEN", TOKEN),
        lambda env: write("access_token", f"{TOKEN}\n"),
        lambda env: (env.setenv("KAGGLE_USERNAME", "somebody"), env.setenv("KAGGLE_KEY", KEY)),
        lambda env: write("kaggle.json", json.dumps({"username": "somebody", "key": KEY})),
    ],
    ids=["KAGGLE_API_TOKEN", "access_token", "KAGGLE_KEY", "kaggle.json"],
)
def test_credentials_are_found_where_kaggles_tools_keep_them(kaggle, target, monkeypatch, put):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    put(monkeypatch)
    assert download(target) == kaggle.archive


def test_a_broken_download_goes_on_where_it_broke(kaggle, target):
    kaggle.faults["archive.zip"] = ["cut"]
    assert download(target) == kaggle.archive
    ranges = [headers["Range"] for _, headers in kaggle.asked if "Range" in headers]
    assert ranges == [f"bytes={CHUNK}-"]


def test_what_a_download_that_was_given_up_left_is_gone_on_with(kaggle, target):
    kaggle.faults["archive.zip"] = ["cut", *[503] * 9]
    assert "run again later" in refusal(download, target)
    assert parts(target) == {PART: CHUNK}
    kaggle.faults.clear()
    assert download(target) == kaggle.archive
    assert any("Range" in headers for _, headers in kaggle.asked)


@pytest.mark.parametrize("fault", ["no range", "error page", 503])
@pytest.mark.parametrize("hashed", [True, False])
def test_a_server_that_does_not_resume_spoils_nothing(kaggle, target, fault, hashed):
    kaggle.hashed = hashed
    (target.parent / PART).write_bytes(kaggle.archive[:100])
    kaggle.faults["archive.zip"] = ["", fault]  # the first request tells the size, the second one resumes
    assert download(target) == kaggle.archive


@pytest.mark.parametrize(
    ("where", "status"),
    [*[(where, status) for where in ("DownloadDataFiles", "archive.zip") for status in (429, 500, 503)],
     ("archive.zip", 403)],  # the address has run out
)  # fmt: skip
def test_a_busy_server_is_asked_again(kaggle, target, where, status):
    kaggle.faults[where] = [status] * 3
    assert download(target) == kaggle.archive


def test_the_pauses_grow(kaggle, target, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(client, "RETRY_DELAYS", (1, 2, 4, 8))
    monkeypatch.setattr(client.time, "sleep", slept.append)
    kaggle.faults["DownloadDataFiles"] = [429] * 9
    assert refusal(download, target).endswith("tried 5 times: Kaggle answers 429; run again later")
    assert slept == [1, 2, 4, 8]


def test_a_download_whose_hash_is_wrong_is_made_again_and_never_put_in_place(kaggle, target):
    kaggle.faults["archive.zip"] = ["wrong hash"]
    assert download(target) == kaggle.archive
    target.unlink()
    kaggle.faults["archive.zip"] = ["wrong hash"] * 9
    assert "not what Kaggle sent (size or hash differs)" in refusal(download, target)
    assert parts(target) == {}


@pytest.mark.parametrize("hashed", [True, False])
def test_a_download_of_the_wrong_size_is_never_put_in_place(kaggle, target, hashed):
    kaggle.hashed = hashed
    kaggle.length += 1
    assert "no connection to Kaggle (ChunkedEncodingError)" in refusal(download, target)
    assert "raw.zip" not in parts(target)


@pytest.mark.parametrize("spoil", [lambda zip_: zip_[:-30], lambda zip_: zip_.replace(b"\xff\xd8", b"\xff\xd9")])
def test_what_is_no_whole_zip_is_not_put_in_place(kaggle, target, spoil):
    kaggle.archive = spoil(kaggle.archive)
    kaggle.length = len(kaggle.archive)
    assert "no whole zip" in refusal(download, target)
    assert parts(target) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda env, kaggle: env.delenv("KAGGLE_API_TOKEN"),
            f"Kaggle: there are no credentials; {client.TOKEN_ADVICE}",
        ),
        (
            lambda env, kaggle: env.setenv("KAGGLE_API_TOKEN", "KGAT_of_yesterday"),
            f"Kaggle does not accept these credentials (401: Unauthenticated); {client.TOKEN_ADVICE}",
        ),
        (
            lambda env, kaggle: kaggle.faults.update(Download=[(403, "Do!")]),
            (
                f"{COMPETITION} is not open to this account (403: Do!); accept its rules, with the account of these "
                f"credentials, at {PAGE}/rules and run again"
            ),
        ),
        (
            lambda env, kaggle: kaggle.faults.update(Download=[(404, "Gone")]),
            f"Kaggle knows no competition '{COMPETITION}' (404: Gone); correct download.competition in params.yaml",
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
                f"{PAGE}: tried 5 times: no connection to Kaggle (ConnectionError); check the network and HTTPS_PROXY; "
                "run again later"
            ),
        ),
    ],
    ids=["no credentials", "wrong credentials", "rules", "unknown", "other", "no network"],
)
def test_what_is_wrong_is_said_with_what_to_do(kaggle, target, monkeypatch, change, message):
    change(monkeypatch, kaggle)
    assert refusal(download, target) == message
    assert parts(target) == {}


def test_a_data_set_that_is_unknown_or_closed_is_named(kaggle, target):
    params = KaggleParams(source="kaggle", competition=None, dataset="no/body")
    assert refusal(download, target, params).startswith("Kaggle knows no data set 'no/body' (404")
    kaggle.faults["DownloadDataset"] = [403]
    assert refusal(download, target, params).startswith("https://www.kaggle.com/datasets/no/body: not open to this")


def test_a_disk_that_is_too_small_is_told_before_anything_comes(kaggle, target, monkeypatch):
    kaggle.length = 10**18
    assert "1000000000.00 GB are coming from Kaggle and the disk has" in refusal(download, target)
    assert parts(target) == {}


def test_what_is_here_already_needs_no_room(kaggle, target, monkeypatch):
    (target.parent / PART).write_bytes(kaggle.archive[:-50])
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 50}))
    assert download(target) == kaggle.archive


def test_a_silent_server_is_given_up(kaggle, target, monkeypatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, endpoint)
        monkeypatch.setattr(client, "TIMEOUT", (0.1, 0.1))
        assert "no connection to Kaggle (ReadTimeout)" in refusal(download, target)


# Nothing secret


@pytest.mark.parametrize(
    "change",
    [
        lambda env, kaggle: env.setenv("KAGGLE_API_TOKEN", f"{TOKEN}\n"),
        lambda env, kaggle: env.setenv("KAGGLE_API_TOKEN", f"{TOKEN}é"),
        lambda env, kaggle: env.setenv("KAGGLE_API_TOKEN", TOKEN * 20),  # longer than a file's name can be
        lambda env, kaggle: (env.delenv("KAGGLE_API_TOKEN"), write("kaggle.json", f'{{"username": "a", "key": "{KEY}')),
        lambda env, kaggle: (env.delenv("KAGGLE_API_TOKEN"), write("kaggle.json", f'{{"user": "a", "key": "{KEY}"}}')),
        lambda env, kaggle: env.setenv("HTTP_PROXY", f"http://somebody:{PASSWORD}@127.0.0.1:{free_port()}"),
        lambda env, kaggle: env.setenv("HTTP_PROXY", f"http://somebody:{PASSWORD}@:port"),
        lambda env, kaggle: kaggle.faults.update(Download=[(400, f"what is {TOKEN}?")] * 2),
        lambda env, kaggle: kaggle.faults.update({"archive.zip": [404] * 10}),
        lambda env, kaggle: kaggle.faults.update({"archive.zip": ["cut", *[503] * 20]}),
    ],
    ids=["line break", "letter", "long", "half a json", "other json", "proxy", "bad proxy", "echo", "storage", "cut"],
)
def test_no_error_tells_a_secret(kaggle, tmp_path, monkeypatch, change, caplog):
    change(monkeypatch, kaggle)
    for debug in ([], ["--debug"]):
        ended = run_cxr(project_of(tmp_path / f"project{len(debug)}"), monkeypatch, "download", *debug)
        told = ended.output + caplog.text + "".join(traceback.format_exception(*ended.exc_info))
        assert ended.exit_code == (1 if debug else 2)
        assert f"{'UserError' if debug else 'Error'}: " in told
        assert [secret for secret in SECRETS if secret in told] == []


def test_kaggles_test_environment_which_prints_headers_elsewhere_prints_none_here(kaggle, target, monkeypatch, capsys):
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.TEST, kaggle.endpoint)
    assert download(target) == kaggle.archive
    printed = "".join(capsys.readouterr())
    assert "Authorization" not in printed
    assert [secret for secret in SECRETS if secret in printed] == []


def test_the_storage_that_kaggle_points_to_gets_no_credentials(kaggle, target):
    download(target)
    for path, headers in kaggle.asked:
        assert ("Authorization" in headers) == path.startswith("/api/")


# The stage, and sending


def project_of(folder: Path) -> Path:
    """Make a folder in which the stage download of the competition's profile can run."""
    folder.mkdir()
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    edit_params(folder, lambda params: params.update(profile="competition"))
    return folder


def run_cxr(project: Path, monkeypatch, *arguments: str, answer: str | None = None) -> Result:
    monkeypatch.chdir(project)
    return typed(shlex.join(["cxr", *arguments]), answer)


def test_the_shipped_competition_profile_downloads_with_nothing_but_credentials(kaggle, tmp_path, monkeypatch):
    project = project_of(tmp_path / "project")
    ended = run_cxr(project, monkeypatch, "download")
    assert ended.exit_code == 0, ended.output
    assert (project / "data/raw.zip").read_bytes() == kaggle.archive
    assert [path.name for path in (project / "data").iterdir()] == ["raw.zip"]


def test_no_stage_of_the_pipeline_sends_or_deletes_what_was_sent():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert stages["submit"]["cmd"] == "python -m stages.submit"
    assert not any(submit.SUBMISSION_LOG.is_relative_to(out) for out in stages["submit"]["outs"])  # which DVC deletes


def rule(*members: str) -> dict:
    count = len(members)
    return asdict(EnsembleConfig(list(members), "mean", "mean", 0.5, [0.5] * count, [1 / count] * count))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, empty_store) -> Path:
    """A clone whose competition profile has runs in MLflow and submissions to send."""
    project = clone(tmp_path_factory.mktemp("finished") / "project")
    edit_params(project, lambda params: params.update(profile="competition"))
    for name, content in {
        "data/manifest.csv": "file\n", "data/split.csv": "file\n", "data/weights/origin.json": "{}",
        "metrics/evaluate.json": json.dumps({"seed-0": {"f1": 0.8, "loss": 0}, "seed-1": {"f1": 0.9, "loss": 0}}),
        "metrics/candidates.json": json.dumps(
            {"seed-0": rule("seed-0"), "seed-1": rule("seed-1"), "bag": rule("seed-0", "seed-1")}
        ),
        "predictions/test.csv": "file,seed-0,seed-1\nt000.jpg,0.1,0.9\nt001.jpg,0.8,0.7\nt002.jpg,0.2,0.6\n",
        "predictions/adapted.csv": "file,best,bag\nt000.jpg,0.4,0.4\nt001.jpg,0.8,0.7\nt002.jpg,0.2,0.6\n",
    }.items():  # fmt: skip
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(content)
    write_zip(project / "data/raw.zip", archive_members(train=6, test=3))
    (project / "mlflow.db").write_bytes(empty_store.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        enter(project, patch)
        said("cxr submit")
        config = load_config()
        store = connect(config.model_name)
        runs.parent_run(store, config)
        for seed in (0, 1):
            mark = fingerprint.training_fingerprint(config, seed=seed, environment={})
            write_json(Path(f"models/seed-{seed}/model.json"), {"fingerprint": mark, "environment": {}})
            runs._find_or_make(store, config, mark, f"seed-{seed}", {})
    return project


@pytest.fixture
def send(kaggle, finished, monkeypatch) -> Callable[..., Result]:
    """Runs `cxr submit` in the finished project, which forgets what was sent before."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.01)
    (finished / "submissions.csv").unlink(missing_ok=True)
    return lambda *arguments, answer=None: run_cxr(finished, monkeypatch, "submit", *arguments, answer=answer)


def scores(project: Path) -> dict[str, float]:
    """Return the public scores in MLflow by the name of the run."""
    store = connect("covid-xray-competition")
    found = store.client.search_runs([store.experiment_id])
    return {run.info.run_name: run.data.metrics.get("kaggle/public_score") for run in found}


def documented(send: str) -> list[str]:
    """Return the arguments of the command in the documentation."""
    command = 'cxr submit --send bag -m "ten seeds, majority vote"'
    assert command in (ROOT / "docs/kaggle.md").read_text()
    return shlex.split(command.replace("--send bag", f"--send {send}"))[2:]


@pytest.mark.parametrize(("name", "run"), [("bag", "alexnet"), ("seed-0", "seed-0"), ("best", "seed-1")])
def test_a_submission_is_sent_scored_and_logged(send, kaggle, finished, name, run):
    kaggle.verdict["publicScore"] = {"bag": "0.96500", "seed-0": "0.94", "best": "0.97"}[name]
    ended = send(*documented(name), answer="y\n")
    assert ended.exit_code == 0, ended.output
    assert f"Send submissions/{name}.csv to {COMPETITION}?" in ended.output
    assert kaggle.uploaded == (finished / f"submissions/{name}.csv").read_bytes()
    assert kaggle.announced["contentLength"] == len(kaggle.uploaded)
    assert kaggle.submissions[0]["description"] == "ten seeds, majority vote"
    expected = float(kaggle.verdict["publicScore"])
    (logged,) = [score for found, score in scores(finished).items() if found.startswith(run)]
    assert logged == expected
    (row,) = pd.read_csv(finished / "submissions.csv").to_dict("records")
    assert (row["file"], row["competition"], row["submission"], row["public_score"]) == (
        name,
        COMPETITION,
        41,
        expected,
    )
    told = ended.output.encode() + b"".join((finished / name).read_bytes() for name in ("submissions.csv", "mlflow.db"))
    assert [secret for secret in SECRETS if secret.encode() in told] == []


def test_a_second_submission_is_a_second_row(send, finished):
    for name in ("bag", "seed-0"):
        assert send("--send", name, "-m", 'é, "x"', "--yes").exit_code == 0
    table = pd.read_csv(finished / "submissions.csv")
    assert list(table["file"]) == ["bag", "seed-0"]
    assert list(table["message"]) == ['é, "x"'] * 2
    assert list(table["public_score"]) == [0.965] * 2


@pytest.mark.parametrize("content", ["", "<<<<<<< HEAD\nsent,competition\n", "sent\n1,2,3\n1\n"])
def test_a_damaged_list_of_submissions_is_refused_before_another_is_made(send, kaggle, finished, content):
    (finished / "submissions.csv").write_text(content)
    ended = send("--send", "bag", "-m", "x", "--yes")
    assert ended.exit_code == 2
    assert ended.stderr.startswith("Error: submissions.csv")
    assert not kaggle.asked


def test_without_a_yes_nothing_is_sent(send, kaggle, finished):
    assert send("--send", "bag", "-m", "x", answer="n\n").output.endswith("nothing is sent\n")
    assert send("--send", "bag", "-m", "x").exit_code == 1  # nobody answers
    assert not kaggle.asked
    assert not (finished / "submissions.csv").exists()


def test_a_submission_is_never_made_twice(send, kaggle):
    kaggle.faults["CreateSubmission"] = ["lost"]
    ended = send("--send", "bag", "-m", "x", "--yes")
    assert ended.exit_code == 2
    assert "Kaggle may have taken it all the same: look at" in ended.output
    assert kaggle.count("CreateSubmission") == len(kaggle.submissions) == 1
    kaggle.faults["CreateSubmission"] = [500]
    assert send("--send", "bag", "-m", "x", "--yes").exit_code == 2
    assert kaggle.count("CreateSubmission") == 2


def test_a_busy_kaggle_is_asked_again_when_sending(send, kaggle):
    kaggle.faults |= {"StartSubmissionUpload": [429, 503], "ListSubmissions": [429, 503], "CreateSubmission": [429]}
    kaggle.faults["/upload"] = [403]  # an address that has run out
    assert send("--send", "bag", "-m", "x", "--yes").exit_code == 0
    assert kaggle.count("StartSubmissionUpload") == 4
    assert len(kaggle.submissions) == 1


def test_a_refused_submission_says_so_in_kaggles_words(send, kaggle):
    kaggle.faults["CreateSubmission"] = [(400, "You have reached your daily limit.")]
    ended = send("--send", "bag", "-m", "x", "--yes")
    assert ended.exit_code == 2
    assert ended.stderr.endswith(
        f"competitions/{COMPETITION}: Kaggle answers 400: You have reached your daily limit.\n"
    )


def test_a_submission_without_a_score_is_in_the_log_all_the_same(send, kaggle, finished, monkeypatch):
    kaggle.verdict = {"status": "ERROR", "errorDescription": "row 3\nis missing"}
    ended = send("--send", "bag", "-m", "x", "--yes")
    assert "submission 41: Kaggle cannot score it: row 3 is missing" in ended.stderr
    monkeypatch.setattr(submit, "TIMEOUT_SECONDS", 0.1)
    kaggle.looks = 99
    ended = send("--send", "bag", "-m", "x", "--yes")
    assert "submission 42 has no score yet" in ended.stderr
    table = pd.read_csv(finished / "submissions.csv")
    assert list(table["submission"]) == [41, 42]
    assert table["public_score"].isna().all()


def test_a_submission_is_in_the_log_when_the_wait_for_its_score_is_killed(send, kaggle, finished):
    kaggle.looks = 10**6
    waiting = multiprocessing.get_context("fork").Process(target=send, args=("--send", "bag", "-m", "x", "--yes"))
    waiting.start()
    end = time.monotonic() + 60
    while not kaggle.count("ListSubmissions") and waiting.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    waiting.kill()
    waiting.join()
    assert list(pd.read_csv(finished / "submissions.csv")["submission"]) == [41]


def test_what_cannot_be_sent_is_refused_before_anything_is(send, kaggle, finished, monkeypatch, empty_store):
    assert (
        "choose one of best, bag, best-adapted, bag-adapted, seed-0, seed-1"
        in send("--send", "seed-7", "-m", "x", "--yes").stderr
    )
    assert "give both" in send("--send", "bag").stderr
    assert "give both" in send("-m", "x").stderr
    (finished / "data/split.csv").write_text("other\n")
    assert "models/seed-0: not what the present parameters, data and code" in send("--send", "best", "-m", "x").stderr
    (finished / "data/split.csv").write_text("file\n")
    predictions = finished / "predictions/test.csv"
    predictions.write_text(predictions.read_text().replace("0.1,0.9", "0.1,0.2"))
    for name in ("best", "seed-1", "bag"):
        said = f"submissions/{name}.csv: not what the present predictions say; run: dvc repro submit"
        assert said in send("--send", name, "-m", "x").stderr
    predictions.write_text(predictions.read_text().replace("0.1,0.2", "0.1,0.9"))
    with monkeypatch.context() as patch:
        shutil.copy(empty_store, finished / "other.db")
        patch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
        assert "MLflow has no run of bag to log the score to; run: cxr sync" in send("--send", "bag", "-m", "x").stderr
    edit_params(finished, lambda params: params.update(profile="demo"))
    assert "params.yaml: demo.download: the data are no competition's" in send("--send", "bag", "-m", "x").stderr
    edit_params(finished, lambda params: params.update(profile="competition"))
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    assert "there are no credentials" in send("--send", "bag", "-m", "x", "--yes").stderr
    assert not kaggle.asked
