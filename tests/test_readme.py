"""Every command of the README and the documentation does what they say."""

import json
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import browser
import pandas as pd
import pytest
from conftest import (
    ROOT,
    archive_members,
    copy_project,
    edit_params,
    invoke,
    output_of,
    run,
    run_server,
    use_project,
    write_zip,
)
from mlflow import MlflowClient

from pipeline.core.config import load_config
from pipeline.tracking import runs, saved_view
from pipeline.tracking.store import connect

pytestmark = pytest.mark.slow

COMMANDS = [
    line.removeprefix("$ ")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]


def copy_for_reader(demo_project: Path, project: Path) -> Path:
    """Copy the demo project, commit its results as the tutorial does, and mark its environment as set up."""
    copy_project(demo_project, project)
    (project / ".venv").mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (project / ".venv" / part).symlink_to(Path(sys.prefix, part))
    (project / ".venv/run").touch()
    run(project, "git", "add", "-A")  # dvc.lock, which the tiny demo has but its first commit has not
    run_documented(project, 'git commit -am "Demo on this machine"')
    return project


@pytest.fixture(scope="module")
def reader(demo_project, tmp_path_factory) -> Path:
    """A reader's project; tests may add to it, but must leave its results as they are."""
    return copy_for_reader(demo_project, tmp_path_factory.mktemp("reader") / "project")


def test_every_documented_command_is_run_by_a_test():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert COMMANDS
    assert [command for command in COMMANDS if command not in tests] == []


def run_documented(project: Path, command: str, archive: Path | None = None) -> str:
    """Run a documented command, with `archive` in place of the archive in the example, and return its output."""
    assert command in COMMANDS
    completed = run(project, *shlex.split(re.sub(r"/data/\S+\.zip", str(archive), command)))
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


def test_make_run_prints_the_table_of_models_and_where_the_results_are(reader):
    output = run_documented(reader, "make run")
    assert "Data and pipelines are up to date." in output
    assert (reader / "report/table.md").read_text() in output
    for file in re.findall(r"(?:report|submissions)/[\w.]+", output):
        assert (reader / file).is_file()


def test_sync_can_be_run_at_any_time(reader, monkeypatch):
    use_project(reader, monkeypatch)
    assert "cxr sync" in COMMANDS
    assert "is champion" in output_of("cxr sync")


def log_training(lr: float, image_size: int) -> None:
    """Log a training with other parameters to MLflow, with the results of the one that is there."""
    config = load_config()
    train = config.active.train.model_copy(update={"lr": lr})
    prepare = config.active.prepare.model_copy(update={"image_size": image_size})
    profile = config.active.model_copy(update={"train": train, "prepare": prepare})
    config = config.model_copy(update={"profiles": {config.profile: profile}})
    store = connect(config.model_name)
    parent = runs.parent_run(store, config, "1" * 64)
    for seed in config.seeds:
        run_ = runs.SeedRun(store, config, parent, seed, f"{seed:064}")
        epoch = {"epoch": 1, "f1": 0.123, "train_loss": 1.0, "lr": 0.1}
        run_.log_epoch(0, epoch, ended_at=time.time() + 60)  # by a clock that was corrected before the run was complete
        run_.finish(Path(f"models/seed-{seed}"))
    metrics = json.loads(Path("models/seed-0/metrics.json").read_text())
    del metrics["run"]
    runs.finish_parent(store, parent, Path("report"), metrics, pd.read_csv("metrics/seeds.csv").set_index("metric"))


def test_the_links_of_make_ui_open_on_seeds_and_bag_by_f1(reader, port, tmp_path, monkeypatch):
    assert "make ui" in COMMANDS
    use_project(reader, monkeypatch)
    log_training(lr=0.0005, image_size=40)
    client = MlflowClient(f"sqlite:///{reader / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("covid-xray-demo").experiment_id
    client.set_experiment_tag(experiment, "mlflow.note.content", "Of last week")
    uri, chromium = f"http://127.0.0.1:{port}", shutil.which("chromium")
    with run_server(reader, "make", "ui", f"PORT={port}", health_url=f"{uri}/health"):
        (log,) = reader.glob("make-*.log")
        links = re.findall(rf"{uri}/#\S+", log.read_text())
        assert len(links) == 2
        note = client.get_experiment(experiment).tags["mlflow.note.content"]
        assert all(f"]({link.removeprefix(uri + '/')})" in note for link in links)
        assert note.endswith("\n\nOf last week")
        if not chromium:
            pytest.skip("Chromium is not installed")
        texts = browser.capture_mlflow(uri, links, tmp_path, chromium)

    # The columns and their order come from the saved view alone: this fails if MLflow reads it no more.
    table = pd.DataFrame(json.loads(texts["table"]))
    f1 = table["metrics.`f1`"].astype(float)
    assert len(table) == 6
    assert list(f1) == sorted(f1, reverse=True)
    names = table["attributes.`Run Name`"].str.extract(r"(\S+) · ")[0]
    assert dict(names.value_counts()) == {"seed-0": 2, "seed-1": 2, "bag": 2}
    assert dict(table["params.`lr`"].value_counts()) == {"0.002": 3, "0.0005": 3}
    assert dict(table["params.`prepare.image_size`"].value_counts()) == {"48": 3, "40": 3}
    for seed in ("seed-0", "seed-1"):
        kept = json.loads(Path(f"models/{seed}/metrics.json").read_text())["f1"]
        assert f1[names == seed].to_list() == pytest.approx([kept, kept])
    decision = json.loads(Path("metrics/promotion.json").read_text())
    (row,) = table.index[table["tags.`champion`"] == "champion"]
    assert names[row] == decision["candidate"]
    assert table["tags.`version`"][row] == decision["version"]

    assert "by epoch" in texts["charts"].lower()
    assert int(texts["bars"]) == 6 * len(saved_view.METRICS)
    assert re.search(r"Metrics:\s+f1\s", texts["compare"])
    models = dict(re.findall(r"\n(seed-\d|bag) · .*?\n(0\.\d+|1)(?=\n)", texts["models"], re.DOTALL))
    assert models.keys() == {"seed-0", "seed-1", "bag"}
    assert float(models[decision["candidate"]]) == pytest.approx(decision["f1"])
    assert re.search(r"@\s+champion", texts["version"])
    for text in (f"({decision['candidate']}): champion since", "there was no champion", "95 % interval"):
        assert text in texts["version"]


def test_dvc_shows_metrics_and_plots(reader):
    assert "f1_mean" in run_documented(reader, "dvc metrics show")
    run_documented(reader, "dvc plots show")
    page = (reader / "dvc_plots/index.html").read_text()
    for name in ("F1 by epoch", "ROC", "Precision and recall", "Confusion matrix of the bag", "table.png"):
        assert name in page


@pytest.mark.long
def test_runs_have_the_name_of_their_dvc_experiment_and_are_pruned_after_its_removal(
    demo_project, tmp_path, monkeypatch
):
    reader = copy_for_reader(demo_project, tmp_path / "project")
    client = MlflowClient(f"sqlite:///{reader / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("covid-xray-demo").experiment_id
    run_count = len(client.search_runs([experiment]))
    results = [(reader / name).read_bytes() for name in ("dvc.lock", "report/index.html", "metrics/intervals.csv")]
    edit_params(reader, lambda params: params.update(seeds=[1]))
    run_documented(reader, "dvc exp run -S demo.train.lr=3e-4")
    assert "train.lr" in run_documented(
        reader, "dvc exp show --only-changed --drop '.*/|models|Created|State|Executor'"
    )
    use_project(reader, monkeypatch)
    assert "cxr compare HEAD ." in COMMANDS
    assert "train.lr" in output_of("cxr compare HEAD .")
    table = run(reader, "dvc", "exp", "show", "--csv").stdout
    assert "f1_mean" in table
    (name,) = run(reader, "dvc", "exp", "list", "--name-only").stdout.split()
    (seed,) = client.search_runs(
        [experiment], f"tags.`dvc.experiment` = '{name}' and params.lr = '0.0003' and params.seed = '1'"
    )
    assert name in table
    assert seed.info.run_name.startswith("seed-1 · ")

    for command in ("git checkout .", "dvc checkout", f"dvc exp remove {name}"):
        assert run(reader, *command.split()).returncode == 0
    assert results == [
        (reader / name).read_bytes() for name in ("dvc.lock", "report/index.html", "metrics/intervals.csv")
    ]
    assert invoke("cxr sync --prune").exit_code == 1  # no answer to the confirmation prompt
    assert "2 runs deleted" in output_of("cxr sync --prune --yes")
    assert len(client.search_runs([experiment])) == run_count
    assert "no runs of removed experiments" in output_of("cxr sync --prune")


@pytest.mark.long
@pytest.mark.parametrize(
    ("profile", "command"),
    [
        ("local", "dvc exp run -S profile=local -S local.download.path=/data/radiographs.zip"),
        ("competition", "dvc exp run -S profile=competition"),
    ],
)
def test_the_other_profiles_run_every_stage_also_in_a_temporary_workspace(demo_project, tmp_path, profile, command):
    reader = copy_for_reader(demo_project, tmp_path / "project")
    archive = write_zip(tmp_path / "own.zip", archive_members(train=16, test=4, nested=profile == "competition"))
    edit_params(reader, lambda params: params.update(seeds=[0]))
    if profile == "competition":  # an archive in place of Kaggle, which test_kaggle.py covers
        edit_params(reader, lambda params: params[profile].update(download={"source": "archive", "path": str(archive)}))
        completed = run(reader, *command.split(), "--temp")
        run(reader, "git", "checkout", "params.yaml")
        assert completed.returncode == 0, completed.stdout + completed.stderr
    else:
        run_documented(reader, command, archive)
        assert list(pd.read_csv(reader / "submissions/bag.csv")["File"]) == [f"t{index:03}.jpg" for index in range(4)]
    client = MlflowClient(f"sqlite:///{reader / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(f"covid-xray-{profile}").experiment_id
    (seed,) = client.search_runs([experiment], "params.seed = '0'")
    backbones = {"local": "timm/tf_efficientnet_lite0", "competition": "alexnet"}
    assert seed.data.params["backbone"] == backbones[profile]
    assert client.get_model_version_by_alias(f"covid-xray-{profile}", "champion")


def test_a_radiograph_is_classified_on_the_command_line_over_http_and_in_the_log(reader, port, monkeypatch):
    use_project(reader, monkeypatch)
    run_documented(reader, "python -m zipfile -e data/raw.zip radiographs")
    image, *others = sorted(map(str, Path("radiographs/test/test").iterdir()))

    def use_image(command: str) -> str:
        assert command in COMMANDS
        return command.replace("radiographs/test/test/cxr-00833.jpg", image).replace(":8000", f":{port}")

    assert image in output_of(use_image("cxr predict radiographs/test/test/cxr-00833.jpg"))
    assert f"{1 + len(others)} files" in output_of("cxr predict radiographs/test --csv predicted.csv")
    assert "cxr predict radiographs/test --log predictions.jsonl" in COMMANDS
    output_of("cxr predict radiographs/test --log predictions.jsonl")
    assert len(Path("predictions.jsonl").read_text().splitlines()) == 1 + len(others)

    expected = pd.read_csv("predicted.csv").set_index("file").loc[image]
    assert "cxr serve" in COMMANDS
    with run_server(reader, "cxr", "serve", "--port", str(port), health_url=f"http://127.0.0.1:{port}/ready"):
        answers = [
            json.loads(run(reader, *shlex.split(use_image(command))).stdout)
            for command in (
                "curl --data-binary @radiographs/test/test/cxr-00833.jpg 127.0.0.1:8000/v1/predict",
                "curl --data-binary @radiographs/test/test/cxr-00833.jpg '127.0.0.1:8000/v1/predict?prevalence=0.01'",
            )
        ]
        metrics = run(reader, *shlex.split(use_image("curl 127.0.0.1:8000/metrics"))).stdout
    (prediction,), (at_low_prevalence,) = (answer["predictions"] for answer in answers)
    assert prediction["probability"] == pytest.approx(expected["probability"], abs=1e-4)
    assert prediction["label"] == at_low_prevalence["label"] == expected["label"]
    assert answers[0]["version"] == str(expected["version"])
    assert [answer["prevalence"] for answer in answers] == [pytest.approx(expected["prevalence"]), 0.01]
    assert re.search(r'cxr_images_total\{outcome="classified"\} 2', metrics)
