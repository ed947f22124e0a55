"""Every command of the README does what the README says."""

import re
import shlex
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import browser
import pandas as pd
import pytest
from conftest import ROOT, archive_members, copy, edit_params, enter, run, said, server, typed, write_zip
from mlflow import MlflowClient

pytestmark = pytest.mark.slow

COMMANDS = [
    line.removeprefix("$ ")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]


def as_read(built: Path, project: Path) -> Path:
    """Copy the built project as its reader has it: with results committed, and an environment that is set up."""
    copy(built, project)
    (project / ".venv").mkdir()
    (project / ".venv/bin").symlink_to(Path(sys.executable).parent)
    (project / ".venv/run").touch()
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-qm", "results")
    return project


@pytest.fixture(scope="module")
def reader(built, tmp_path_factory) -> Path:
    """A reader's project, which tests may add to but not spoil."""
    return as_read(built, tmp_path_factory.mktemp("reader") / "project")


def test_each_command_of_the_documentation_is_run_by_a_test():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert COMMANDS
    assert [command for command in COMMANDS if command not in tests] == []


def obey(project: Path, command: str, archive: Path | None = None) -> str:
    """Run a command of the README, with the reader's archive in place of the example's."""
    assert command in COMMANDS
    ended = run(project, *shlex.split(re.sub(r"/data/\S+\.zip", str(archive), command)))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_make_run_ends_by_saying_where_everything_is(reader):
    said = obey(reader, "make run")
    assert "Data and pipelines are up to date." in said
    assert (reader / "report/table.md").read_text() in said
    for file in re.findall(r"(?:report|submissions)/[\w.]+", said):
        assert (reader / file).is_file()


def test_mlflow_can_be_completed_at_any_time(reader):
    assert "is champion" in obey(reader, "cxr sync")


def test_make_ui_shows_a_browser_the_runs_their_curves_their_comparison_and_the_champion(reader, port, tmp_path):
    assert "make ui" in COMMANDS
    uri, chromium = f"http://127.0.0.1:{port}", shutil.which("chromium")
    with server(reader, "make", "ui", f"PORT={port}", answers_at=f"{uri}/health"):
        assert MlflowClient(uri).get_model_version_by_alias("covid-xray-demo", "champion")
        if not chromium:
            pytest.skip("Chromium is not installed")
        texts = browser.look(uri, tmp_path, chromium)
    for seed in ("seed-0", "seed-1"):
        assert all(f"{seed} · " in texts[page] for page in ("runs", "f1-by-epoch", "compare"))
    assert "validation/f1" in texts["f1-by-epoch"]
    assert "lr" in texts["compare"]
    for text in ("champion", "challenger", "no diagnosis", "there was no champion"):
        assert text in texts["model"]


def test_dvc_shows_metrics_and_plots(reader):
    assert "seed-1.f1" in obey(reader, "dvc metrics show")
    obey(reader, "dvc plots show")
    page = (reader / "dvc_plots/index.html").read_text()
    for name in ("history.csv", "bag_roc.csv", "bag_confusion.csv", "bag_precision_recall.csv", "roc.png", "table.png"):
        assert name in page


@pytest.mark.long
def test_an_experiment_names_its_runs_until_it_is_removed_and_they_are_pruned(built, tmp_path, monkeypatch):
    reader = as_read(built, tmp_path / "project")
    client = MlflowClient(f"sqlite:///{reader / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("covid-xray-demo").experiment_id
    before = len(client.search_runs([experiment]))
    edit_params(reader, lambda params: params.update(seeds=[1]))
    obey(reader, "dvc exp run -S demo.train.lr=3e-4")
    assert "f1" in obey(reader, "dvc exp show")
    table = run(reader, "dvc", "exp", "show", "--csv").stdout
    assert "models/seed-1/metrics.json:f1" in table
    (name,) = run(reader, "dvc", "exp", "list", "--name-only").stdout.split()
    (seed,) = client.search_runs([experiment], f"tags.`dvc.experiment` = '{name}' and params.lr = '0.0003'")
    assert seed.info.run_name in table

    for command in ("git checkout .", "dvc checkout", f"dvc exp remove {name}"):
        assert run(reader, *command.split()).returncode == 0
    enter(reader, monkeypatch)
    assert typed("cxr sync --prune").exit_code == 1  # nobody answers whether to delete
    assert "2 runs are deleted" in said("cxr sync --prune --yes")
    assert len(client.search_runs([experiment])) == before
    assert "no run belongs to a removed experiment" in said("cxr sync --prune")


@pytest.mark.long
@pytest.mark.parametrize(
    ("profile", "command"),
    [
        ("local", "dvc exp run -S profile=local -S local.download.path=/data/radiographs.zip"),
        ("competition", "dvc exp run -S profile=competition"),
    ],
)
def test_the_other_profiles_run_through_every_stage_also_in_a_copy_of_the_workspace(built, tmp_path, profile, command):
    reader = as_read(built, tmp_path / "project")
    archive = write_zip(tmp_path / "own.zip", archive_members(train=16, test=4, nested=profile == "competition"))
    edit_params(reader, lambda params: params.update(seeds=[0]))
    if profile == "competition":  # the archive stands for Kaggle, which test_kaggle.py asks
        edit_params(reader, lambda params: params[profile].update(download={"source": "archive", "path": str(archive)}))
        ended = run(reader, *command.split(), "--temp")
        run(reader, "git", "checkout", "params.yaml")
        assert ended.returncode == 0, ended.stdout + ended.stderr
    else:
        obey(reader, command, archive)
        assert list(pd.read_csv(reader / "submissions/bag.csv")["File"]) == [f"t{index:03}.jpg" for index in range(4)]
    client = MlflowClient(f"sqlite:///{reader / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(f"covid-xray-{profile}").experiment_id
    (seed,) = client.search_runs([experiment], "params.lr != ''")
    backbones = {"local": "timm/tf_efficientnet_lite0", "competition": "alexnet"}
    assert seed.data.params["backbone"] == backbones[profile]
    assert client.get_model_version_by_alias(f"covid-xray-{profile}", "champion")


def test_ray_data_judges_a_folder_as_predict_does(built, tmp_path, monkeypatch):
    reader = copy(built, tmp_path / "project")
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/registry.md").read_text(), re.DOTALL)
    with zipfile.ZipFile(reader / "data/raw.zip") as archive:
        for name in archive.namelist():
            if name.startswith("test/"):
                path = reader / "radiographs" / Path(name).name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(archive.read(name))
    (reader / "judge.py").write_text(script.replace("http://127.0.0.1:5000", f"sqlite:///{reader / 'mlflow.db'}"))
    with tempfile.TemporaryDirectory(prefix="ray-") as apart:  # from clusters that run here, or did
        ended = run(reader, "python", "judge.py", RAY_TMPDIR=apart)
    assert ended.returncode == 0, ended.stderr
    judged = pd.concat(map(pd.read_csv, (reader / "judged").iterdir()))
    judged["file"] = judged["file"].map(lambda path: Path(path).name)
    enter(reader, monkeypatch)
    said("cxr predict radiographs --csv judged.csv")
    expected = pd.read_csv(reader / "judged.csv")
    expected["file"] = expected["file"].map(lambda path: Path(path).name)
    both = judged.merge(expected, on="file", suffixes=("", "_by_predict"), validate="one_to_one")
    assert len(both) == len(expected) == 8
    assert both["probability"].to_numpy() == pytest.approx(both["probability_by_predict"].to_numpy(), abs=1e-6)
