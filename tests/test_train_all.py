"""`cxr train-all` on one machine, with a `dvc` that only pretends to train."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.training.progress import TrainingProgress, progress_path, read_progress
from stages import train_all
from stages.train_all import SeedProcess

PROGRESS = '{"seed": 3, "epoch": 2, "epochs": 8, "f1": 0.75, "loss": 0.5, "images_per_second": 120.4, "state": "%s"}'
WRITE_PROGRESS = f"echo '{PROGRESS}' > logs/part; mv logs/part logs/seed-3.json"


@pytest.fixture
def fake_dvc(tmp_path, monkeypatch):
    """Make a shell script the `dvc` of a folder with logs/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "logs").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def write(script: str) -> SeedProcess:
        path = tmp_path / "bin/dvc"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return SeedProcess(3, Path("logs/seed-3.log"))

    return write


def finish(process: SeedProcess) -> None:
    process.start("")
    process.process.wait(30)


def render(process: SeedProcess) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(train_all._progress_table([process]))
    return capture.get()


def test_a_seed_that_has_not_started_is_waiting(fake_dvc):
    process = fake_dvc("")
    progress_path(3).write_text(PROGRESS % "finished")  # of an earlier training
    assert process.status() == "waiting"
    assert not process.is_running
    assert not process.has_failed
    assert process.progress() is None


def test_a_seed_whose_training_wrote_progress_is_done(fake_dvc):
    process = fake_dvc(WRITE_PROGRESS % "finished")
    finish(process)
    assert process.status() == "done"
    assert process.progress() == TrainingProgress(3, 2, 8, 0.75, 0.5, 120.4, "finished")
    assert all(text in render(process) for text in ("done", "2/8", "0.750", "120"))


def test_in_cross_validation_the_epoch_is_that_of_a_fold(fake_dvc):
    process = fake_dvc(WRITE_PROGRESS.replace('"epoch"', '"fold": 3, "epoch"') % "finished")
    finish(process)
    assert "fold 3: 2/8" in render(process)


def test_a_seed_that_dvc_skips_is_up_to_date_regardless_of_earlier_progress_and_of_the_log(fake_dvc):
    process = fake_dvc("echo 'seed 3  epoch 2/8  loss 0.5  F1 0.75  120 images/s'")
    progress_path(3).write_text(PROGRESS % "finished")
    finish(process)
    assert process.status() == "up to date"
    assert "2/8" not in render(process)
    assert read_progress(3) is None


def test_a_running_seed_is_training_and_shows_its_progress(fake_dvc):
    process = fake_dvc(f"{WRITE_PROGRESS % 'training'}; exec sleep 30")
    process.start("")
    assert process.is_running
    assert process.status() == "training"
    while not progress_path(3).exists():
        time.sleep(0.01)
    assert "2/8" in render(process)
    process.stop()
    process.process.wait(30)
    assert process.has_failed
    assert process.status() == "failed"  # a killed process writes no state
    process.stop()  # does nothing


def test_an_interrupted_training_is_not_reported_as_failed(fake_dvc):
    process = fake_dvc(f"{WRITE_PROGRESS % 'interrupted'}; exit 1")
    finish(process)
    assert process.has_failed
    assert process.status() == "interrupted"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo training; echo 'Error: seed 3: no space'; echo 'ERROR: failed to reproduce'; exit 255",
            "seed 3: no space",
        ),
        ("echo 'ERROR: failed to reproduce'; exit 255", "failed to reproduce"),
        ("printf '\\377 training'; exit 1", "no error message"),
    ],
)
def test_the_reason_of_a_failure_is_the_first_error_line_of_the_log(fake_dvc, script, reason):
    process = fake_dvc(script)
    finish(process)
    assert process.has_failed
    assert process.status() == "failed"
    assert process.failure_reason() == reason


def test_all_seeds_train_on_the_devices_in_turn_and_failures_are_returned_with_their_log(fake_dvc, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    fake_dvc('echo "$CUDA_VISIBLE_DEVICES $@"; [ "$4" = train@1 ] && echo "Error: no" && exit 1; exit 0')
    assert train_all._train_locally([0, 1, 2], jobs=2) == {1: "no (see logs/seed-1.log)"}
    lines = [Path(f"logs/seed-{seed}.log").read_text().splitlines()[0].split() for seed in range(3)]
    assert [line[1:] for line in lines] == [["--wait-for-lock", "repro", "-s", f"train@{seed}"] for seed in range(3)]
    assert [line[0] for line in lines[:2]] == ["4", "6"]
    assert lines[2][0] in ("4", "6")


def test_a_progress_file_is_what_its_reader_expects(fake_dvc):
    fake_dvc("")
    assert read_progress(3) is None
    progress_path(3).write_text(PROGRESS % "training")
    assert read_progress(3) == TrainingProgress(**json.loads(PROGRESS % "training"))


def test_stop_interrupts_the_whole_process_group(fake_dvc):
    process = fake_dvc("trap 'touch interrupted; exit 130' INT; touch started; while true; do sleep 0.05; done")
    process.start("")
    while not Path("started").exists():
        time.sleep(0.01)
    process.stop()
    assert process.process.wait(30) in (130, -signal.SIGINT)
    assert Path("interrupted").exists()
