"""User errors end in one line and exit code 2, and leave no incomplete files."""

import shutil
from pathlib import Path

import pytest
from conftest import archive_members, edit_params, run, seed_runs, write_zip


def stage_error(project: Path, stage: str, *arguments: str, **changes: str) -> str:
    """Run a stage that must fail, and return its error, which is one line."""
    before = {path for path in project.rglob("*") if ".git" not in path.parts}
    completed = run(project, "python", "-m", f"stages.{stage}", *arguments, **changes)
    created = {path for path in project.rglob("*") if ".git" not in path.parts} - before
    assert completed.returncode == 2, completed.stdout + completed.stderr
    assert not [path for path in created if path.is_file() and not path.name.endswith((".pyc", ".lock"))]
    lines = completed.stderr.strip().splitlines()
    assert len(lines) == 1, completed.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


def use_archive(project: Path, path: Path | str | None) -> None:
    def edit(params: dict) -> None:
        params["demo"]["download"] = {"source": "archive", "path": path and str(path)}

    edit_params(project, edit)


def test_a_misspelled_parameter_is_named(project):
    edit_params(project, lambda params: params["demo"]["train"].update(learning_rate=1))
    assert "params.yaml: demo.train.learning_rate: unknown key" in stage_error(project, "download")


def test_a_missing_archive_is_named(project):
    use_archive(project, "nowhere.zip")
    assert "nowhere.zip: not found; correct download.path in params.yaml" in stage_error(project, "download")


def test_a_folder_that_contains_the_output_zip_is_rejected(project):
    use_archive(project, ".")
    assert ".: contains data, the output folder; set download.path to a folder with only the images" in stage_error(
        project, "download"
    )
    assert not (project / "data/raw.zip").exists()


def test_without_a_path_the_error_says_what_to_set(project):
    use_archive(project, None)
    assert "set it to a zip, tar or folder in the competition's layout" in stage_error(project, "download")


def test_a_zip_without_labels_is_rejected(project, tmp_path):
    members = archive_members()
    del members["train_labels.csv"]
    use_archive(project, write_zip(tmp_path / "raw.zip", members))
    assert "has no train_labels.csv; add it" in stage_error(project, "download")


def test_a_label_that_is_neither_0_nor_1_is_named_with_its_line(project, tmp_path):
    members = archive_members()
    members["train_labels.csv"] = members["train_labels.csv"].replace(b"a001.jpg,0", b"a001.jpg,maybe")
    use_archive(project, write_zip(tmp_path / "raw.zip", members))
    assert "line 3: the label of a001.jpg is 'maybe'; it must be 0 (negative) or 1" in stage_error(project, "download")


def test_a_missing_test_image_is_named(project, tmp_path):
    members = archive_members()
    del members["test/test/t001.jpg"]
    use_archive(project, write_zip(tmp_path / "raw.zip", members))
    assert "image 't001.jpg' is not in test/ (1 missing in total)" in stage_error(project, "download")


def test_an_archive_with_a_path_outside_of_it_is_rejected(project, tmp_path):
    use_archive(project, write_zip(tmp_path / "raw.zip", archive_members() | {"../../passwd": b"x"}))
    assert "'../../passwd' has a path outside of the zip; create the zip again without it" in stage_error(
        project, "download"
    )


def test_a_damaged_zip_is_rejected(project, tmp_path):
    whole = write_zip(tmp_path / "raw.zip", archive_members()).read_bytes()
    (tmp_path / "half.zip").write_bytes(whole[: len(whole) // 2])
    use_archive(project, tmp_path / "half.zip")
    assert "half.zip: neither a zip nor a tar, or damaged" in stage_error(project, "download")


def test_weights_that_cannot_be_downloaded_name_the_file_and_its_setting(project):
    def edit(params: dict) -> None:
        params["demo"]["train"]["backbone"] = "alexnet"
        params["demo"]["weights"]["source"] = "http://127.0.0.1:9/alexnet-owt-7be5be79.pth"

    edit_params(project, edit)
    error = stage_error(project, "weights")
    assert "set weights.source in params.yaml to the path of the file alexnet-owt-7be5be79.pth" in error


def test_an_unknown_backbone_gets_suggestions(project):
    edit_params(project, lambda params: params["demo"]["train"].update(backbone="alexnett"))
    assert "unknown backbone 'alexnett'; similar names: alexnet" in stage_error(project, "weights")


def test_training_without_its_inputs_or_its_server_fails_in_one_line(make_prepared_project):
    prepared = make_prepared_project()
    error = stage_error(prepared, "train", "--seed", "0", MLFLOW_TRACKING_URI="http://user:secret@127.0.0.1:9")
    assert "MLflow at http://127.0.0.1:9 cannot be used" in error
    assert "secret" not in error
    error = stage_error(prepared, "train", "--seed", "0", MLFLOW_TRACKING_URI="sqlite:////nowhere/mlflow.db")
    assert "the folder /nowhere does not exist" in error
    shutil.rmtree(prepared / "data/weights")
    completed = run(prepared, "python", "-m", "stages.train", "--seed", "0")
    assert completed.returncode == 2
    assert "not found; run: dvc repro" in completed.stderr
    assert not (prepared / "models").exists()


@pytest.mark.parametrize(
    ("stage", "folder"), [("prepare", "data"), ("weights", "data/weights"), ("train --seed 0", "models")]
)
def test_a_full_disk_is_a_one_line_error_and_leaves_no_incomplete_file(make_prepared_project, stage, folder):
    prepared = make_prepared_project()
    edit_params(prepared, lambda params: params["demo"]["prepare"].update(image_size=512))
    script = (
        f"mkdir -p {folder}; cp data/raw.zip raw; "
        f"mount -t tmpfs -o size=6m tmpfs {folder} && echo mounted >&2 || exit 99; "
        f"[ {folder} != data ] || mv raw {folder}/raw.zip; "
        f"python -m stages.{stage}; code=$?; find {folder} -type f >&2; exit $code"
    )
    completed = run(prepared, "unshare", "-rm", "sh", "-c", script)
    if not completed.stderr.startswith("mounted"):
        pytest.skip(f"this machine does not allow mounting a small disk: {completed.stderr}")
    assert completed.returncode == 2, completed.stderr
    _, error, *files = completed.stderr.strip().splitlines()
    assert error.startswith("Error: the disk is full")
    assert files == (["data/raw.zip"] if folder == "data" else [])


def test_debug_shows_the_traceback(project):
    use_archive(project, None)
    completed = run(project, "python", "-m", "stages.download", "--debug")
    assert "Traceback" in completed.stderr


def test_a_diverging_training_leaves_a_failed_run_and_no_outs(make_prepared_project):
    project = make_prepared_project(lr=1e30, optimizer="sgd", frozen_epochs=0)
    completed = run(project, "python", "-m", "stages.train", "--seed", "0")
    assert completed.returncode == 2
    line = completed.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: seed 0, epoch 1")
    assert "lower train.lr = 1e+30" in line
    assert not list((project / "models").glob("**/*.*"))
    (seed_run,) = seed_runs(project)
    assert seed_run.info.status == "FAILED"


def test_out_of_memory_names_the_batch_size(make_prepared_project):
    project = make_prepared_project(image_size=1024, batch_size=64, frozen_epochs=0)
    completed = run(project, "bash", "-c", "ulimit -v 9000000; python -m stages.train --seed 0")
    assert completed.returncode == 2, completed.stderr
    assert completed.stderr.strip().splitlines()[-1] == (
        "Error: out of memory with train.batch_size = 64 at train.image_size = 1024; raise "
        "train.gradient_accumulation_steps = 1 (the same batch in smaller parts), or lower one of the two"
    )


def test_an_unreachable_tracking_uri_is_reported_before_training_starts(make_prepared_project, port):
    project = make_prepared_project()
    uri = f"http://127.0.0.1:{port}"
    completed = run(project, "python", "-m", "stages.train", "--seed", "0", MLFLOW_TRACKING_URI=uri)
    assert completed.returncode == 2
    assert completed.stderr.startswith(f"Error: MLflow at {uri} cannot be used: ")
    assert "epoch" not in completed.stdout
