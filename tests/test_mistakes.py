"""What a user can get wrong ends in one line, exit code 2, and nothing half-written."""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import archive_members, edit_params, run, seed_runs, write_zip


def refusal(project: Path, stage: str, *arguments: str, **changes: str) -> str:
    """Run a stage that must refuse, and return its one line."""
    before = {path for path in project.rglob("*") if ".git" not in path.parts}
    ended = run(project, "python", "-m", f"stages.{stage}", *arguments, **changes)
    left = {path for path in project.rglob("*") if ".git" not in path.parts} - before
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert not [path for path in left if path.is_file() and not path.name.endswith((".pyc", ".lock"))]
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


def use_archive(project: Path, path: Path | str | None) -> None:
    def edit(params: dict) -> None:
        params["demo"]["download"] = {"source": "archive", "path": path and str(path)}

    edit_params(project, edit)


def test_a_misspelled_parameter_is_named(project):
    edit_params(project, lambda params: params["demo"]["train"].update(learning_rate=1))
    assert "params.yaml: demo.train.learning_rate: unknown key" in refusal(project, "download")


def test_an_archive_that_is_not_there_is_named(project):
    use_archive(project, "nowhere.zip")
    assert "nowhere.zip: not found; put a zip or a folder there" in refusal(project, "download")


def test_a_folder_that_holds_what_it_is_packed_into_is_refused(project):
    use_archive(project, ".")
    assert "data, where the zip is made, is in it; name the radiographs' own folder" in refusal(project, "download")
    assert not (project / "data/raw.zip").exists()


def test_no_archive_says_where_to_get_it(project):
    use_archive(project, None)
    assert "download the competition's zip" in refusal(project, "download")


def test_a_zip_without_labels_is_refused(project, tmp_path):
    members = archive_members()
    del members["train_labels.csv"]
    use_archive(project, write_zip(tmp_path / "raw.zip", members))
    assert "has no train_labels.csv; add it" in refusal(project, "download")


def test_a_label_that_is_neither_0_nor_1_is_named_with_its_line(project, tmp_path):
    members = archive_members()
    members["train_labels.csv"] = members["train_labels.csv"].replace(b"a001.jpg,0", b"a001.jpg,maybe")
    use_archive(project, write_zip(tmp_path / "raw.zip", members))
    assert "line 3: the label of a001.jpg is 'maybe'; it must be 0 (negative) or 1" in refusal(project, "download")


def test_a_submission_without_an_image_is_named(project, tmp_path):
    members = archive_members()
    del members["test/test/t001.jpg"]
    use_archive(project, write_zip(tmp_path / "raw.zip", members))
    assert "there is no image t001.jpg in test/ (1 missing in all)" in refusal(project, "download")


def test_an_archive_that_leads_out_of_itself_is_refused(project, tmp_path):
    use_archive(project, write_zip(tmp_path / "raw.zip", archive_members() | {"../../passwd": b"x"}))
    assert "'../../passwd' leads out of the archive; make the zip anew without it" in refusal(project, "download")


def test_a_damaged_zip_is_refused(project, tmp_path):
    whole = write_zip(tmp_path / "raw.zip", archive_members()).read_bytes()
    (tmp_path / "half.zip").write_bytes(whole[: len(whole) // 2])
    use_archive(project, tmp_path / "half.zip")
    assert "half.zip: not a zip" in refusal(project, "download")


def test_weights_that_cannot_be_had_say_which_file_to_put_where(project):
    def edit(params: dict) -> None:
        params["demo"]["train"]["backbone"] = "alexnet"
        params["demo"]["weights"]["source"] = "http://127.0.0.1:9/alexnet-owt-7be5be79.pth"

    edit_params(project, edit)
    said = refusal(project, "weights")
    assert "put the path of the file alexnet-owt-7be5be79.pth" in said
    assert "at weights.source in params.yaml" in said


def test_a_backbone_that_does_not_exist_lists_near_names(project):
    edit_params(project, lambda params: params["demo"]["train"].update(backbone="alexnett"))
    assert "there is no 'alexnett'; near names: alexnet" in refusal(project, "weights")


def test_training_without_its_inputs_or_a_server_is_refused(ready):
    prepared = ready()
    said = refusal(prepared, "train", "--seed", "0", MLFLOW_TRACKING_URI="http://user:secret@127.0.0.1:9")
    assert "MLflow at http://127.0.0.1:9 cannot be used" in said
    assert "secret" not in said
    said = refusal(prepared, "train", "--seed", "0", MLFLOW_TRACKING_URI="sqlite:////nowhere/mlflow.db")
    assert "the folder /nowhere is not there" in said
    shutil.rmtree(prepared / "data/weights")
    run_failed = run(prepared, "python", "-m", "stages.train", "--seed", "0")
    assert run_failed.returncode == 2
    assert "not found; run: dvc repro" in run_failed.stderr
    assert not (prepared / "models").exists()


@pytest.mark.parametrize(
    ("stage", "folder"), [("prepare", "data"), ("weights", "data/weights"), ("train --seed 0", "models")]
)
def test_a_full_disk_is_one_line_and_leaves_no_half_file(ready, stage, folder):
    prepared = ready()
    edit_params(prepared, lambda params: params["demo"]["prepare"].update(size=512))
    script = (
        f"mkdir -p {folder}; cp data/raw.zip raw; "
        f"mount -t tmpfs -o size=6m tmpfs {folder} && echo mounted >&2 || exit 99; "
        f"[ {folder} != data ] || mv raw {folder}/raw.zip; "
        f"python -m stages.{stage}; code=$?; find {folder} -type f >&2; exit $code"
    )
    ended = run(prepared, "unshare", "-rm", "sh", "-c", script)
    if not ended.stderr.startswith("mounted"):
        pytest.skip(f"this machine lets nobody mount a small disk: {ended.stderr}")
    assert ended.returncode == 2, ended.stderr
    _, said, *left = ended.stderr.strip().splitlines()
    assert said.startswith("Error: the disk is full")
    assert left == (["data/raw.zip"] if folder == "data" else [])


def test_debug_shows_where_an_error_comes_from(project):
    use_archive(project, None)
    ended = run(project, "python", "-m", "stages.download", "--debug")
    assert "Traceback" in ended.stderr


def test_cxr_lists_every_stage_without_torch_or_mlflow(project):
    code = (
        "import sys; from stages.cli import cxr; cxr(['--help'], standalone_mode=False); "
        "print({'torch', 'mlflow'} & set(sys.modules))"
    )
    ended = run(project, sys.executable, "-c", code)
    assert "promote" in ended.stdout
    assert ended.stdout.strip().endswith("set()")


def test_a_seed_that_diverges_leaves_a_failed_run_and_no_out(ready):
    project = ready(lr=1e30, optimizer="sgd", frozen_epochs=0)
    ended = run(project, "python", "-m", "stages.train", "--seed", "0")
    assert ended.returncode == 2
    line = ended.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: seed 0, epoch 1")
    assert "lower train.lr = 1e+30" in line
    assert not list((project / "models").glob("**/*.*"))
    (seed_run,) = seed_runs(project)
    assert seed_run.info.status == "FAILED"


def test_too_little_memory_names_the_batch_size(ready):
    project = ready(size=1024, batch_size=64, frozen_epochs=0)
    ended = run(project, "bash", "-c", "ulimit -v 9000000; python -m stages.train --seed 0")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.strip().splitlines()[-1] == (
        "Error: out of memory with train.batch_size = 64 at train.size = 1024; raise train.gradient_accumulation_steps = 1 "
        "(the same batch in more parts), or lower one of the two"
    )


def test_nobody_at_the_tracking_uri_is_said_before_training_begins(ready, port):
    project = ready()
    ended = run(project, "python", "-m", "stages.train", "--seed", "0", MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"Error: MLflow at http://127.0.0.1:{port} cannot be used: ")
    assert "epoch" not in ended.stdout
