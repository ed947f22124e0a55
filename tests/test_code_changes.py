"""What a change of code costs: nothing that cannot change a number trains, downloads or registers again."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    commit_all,
    copy_project,
    edit_params,
    invoke,
    mlflow_client,
    output_of,
    run,
    seed_runs,
    stage_server,
    use_project,
)
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config import load_config
from pipeline.tracking.fingerprint import code_hash, training_fingerprint

MODULES = sorted(path for folder in ("pipeline", "stages") for path in (ROOT / folder).rglob("*.py"))
CODE = '''
"""The docstring of the module."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from somewhere import Kind
else:
    Kind = 1

SIZE: int = 3  # a comment


class Box:
    """The docstring of a class."""

    width: float

    def area(self, factor: float = 2.0) -> float:
        """The docstring of a method."""
        text: str = "kept"
        count: int
        return self.width * factor if text else SIZE
'''


def hash_of(folder: Path, code: str) -> str:
    (folder / "module.py").write_text(code)
    return code_hash(folder / "module.py")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # a comment", ""),
        ("SIZE: int = 3", "SIZE = 3"),
        ("        count: int\n", ""),
        ("    width: float", "    width: int"),
        ("The docstring of a class.", "Another one."),
        ('        """The docstring of a method."""\n', ""),
        ("factor: float = 2.0) -> float", "factor=2.0)"),
        ('"kept"', "'kept'"),
        ('"kept"', '("ke"\n            "pt")'),
        ("from somewhere import Kind", "from elsewhere import Other"),
        ("\n\n\n", "\n\n\n\n# more room\n\n"),
    ],
)
def test_comments_docstrings_type_hints_and_formatting_change_no_hash(tmp_path, old, new):
    assert old in CODE
    assert hash_of(tmp_path, CODE.replace(old, new)) == hash_of(tmp_path, CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("= 3", "= 4"),
        ("2.0", "2.5"),
        ('"kept"', '"changed"'),
        ("self.width * factor", "factor * self.width"),
        ("else SIZE", "else None"),
        ("    width: float", "    height: float"),
        ("    width: float", "    width: float = 1"),
        ("Kind = 1", "Kind = 2"),
        ("class Box", "class Crate"),
        ("from typing import TYPE_CHECKING", "from typing import TYPE_CHECKING, Any"),
    ],
)
def test_whatever_may_change_what_the_code_does_changes_the_hash(tmp_path, old, new):
    assert old in CODE
    assert hash_of(tmp_path, CODE.replace(old, new)) != hash_of(tmp_path, CODE)


@given(st.sampled_from(MODULES), st.text(st.characters(codec="utf-8", exclude_categories=["C"])))
def test_no_comment_changes_the_hash_of_any_module(tmp_path_factory, module, text):
    changed = tmp_path_factory.mktemp("module") / "module.py"
    changed.write_text(f"# {text}\n{module.read_text()}\n# {text}\n")
    assert code_hash(changed) == code_hash(module)


def test_the_number_of_loader_threads_changes_no_fingerprint():
    config = load_config(ROOT / "params.yaml")

    def fingerprint(**changes) -> str:
        section = config.active.model_copy(update={"train": config.active.train.model_copy(update=changes)})
        profiles = config.profiles | {config.profile: section}
        return training_fingerprint(config.model_copy(update={"profiles": profiles}), ROOT)

    assert fingerprint(loader_threads=7) == fingerprint(loader_threads=2) != fingerprint(lr=0.5)


def test_a_reformatted_module_keeps_its_hash(tmp_path):
    changed = {module: tmp_path / module.relative_to(ROOT) for module in MODULES}
    for module, copied in changed.items():
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(module.read_bytes())
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", "--line-length", "60", tmp_path], check=True)
    for module, copied in changed.items():
        assert code_hash(copied) == code_hash(module), module
    assert any(copied.read_bytes() != module.read_bytes() for module, copied in changed.items())


def run_ids(project: Path) -> set[str]:
    client = mlflow_client(project)
    experiment = client.get_experiment_by_name("covid-xray-demo")
    return {run_info.info.run_id for run_info in client.search_runs([experiment.experiment_id])}


def versions(project: Path) -> int:
    return len(mlflow_client(project).search_model_versions("name = 'covid-xray-demo'"))


def tracked(project: Path) -> tuple[set[str], int, list[int]]:
    """Return what a training or registration would change in MLflow."""
    return run_ids(project), versions(project), [run_info.info.end_time for run_info in seed_runs(project)]


@pytest.fixture
def editable_project(demo_project, tmp_path) -> Path:
    """A copy of the finished demo, whose code the test may change."""
    return copy_project(demo_project, tmp_path / "project")


@pytest.mark.slow
def test_a_change_that_can_change_no_number_causes_no_training(editable_project):
    for name in ("pipeline/core/files.py", "pipeline/core/errors.py", "pipeline/tracking/runs.py", "stages/common.py"):
        path = editable_project / name
        path.write_text(f"{path.read_text()}\n# a comment\n")
    status = run(editable_project, "dvc", "status").stdout
    assert not [stage for stage in ("train", "download", "prepare") if stage in status], status


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "is_error"),
    [
        ('"""Train until the last epoch', '"""Train to the last epoch', False),
        ("CHECKPOINT_SECONDS = 300", "CHECKPOINT_SECONDS = 301", True),
    ],
    ids=["docstring", "code"],
)
def test_after_dvc_commit_changed_code_keeps_models_runs_and_versions(
    editable_project, old, new, is_error, monkeypatch
):
    use_project(editable_project, monkeypatch)
    before = tracked(editable_project)
    loop = editable_project / "pipeline/training/loop.py"
    assert old in loop.read_text()
    loop.write_text(loop.read_text().replace(old, new))
    assert "train@0" in run(editable_project, "dvc", "status").stdout
    synced = invoke("cxr sync")
    assert synced.exit_code == (2 if is_error else 0), synced.output
    assert ("trained with other parameters, data or code; run: dvc repro" in synced.stderr) == is_error
    assert run(editable_project, "dvc", "commit", "-f", "train").returncode == 0
    output_of("cxr sync")
    completed = run(editable_project, "dvc", "repro")
    assert completed.returncode == 0, completed.stderr
    assert "Running stage 'train" not in completed.stdout
    assert tracked(editable_project) == before


@pytest.mark.long
@pytest.mark.slow
def test_a_demo_run_from_nothing_has_the_hashes_of_dvc_lock(editable_project):
    commit_all(editable_project)
    compared = run(editable_project, "bash", ".ci/compare-demo", **stage_server())
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert compared.stdout.endswith("demo: run from nothing, it has the hashes of dvc.lock\n")
    edit_params(editable_project, lambda params: params["demo"]["evaluate"].update(resamples=100))
    commit_all(editable_project)
    compared = run(editable_project, "bash", ".ci/compare-demo", **stage_server())
    assert compared.returncode == 0
    assert "hashes not compared, dvc.lock is of earlier code or parameters (bag report promote)" in compared.stdout
