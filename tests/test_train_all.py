"""`cxr train-all` on one machine, with a `dvc` that only pretends to train."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import error_line_of, error_message
from rich.console import Console

from pipeline.core.errors import Interrupted
from pipeline.training import determinism, mps
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
    process.start({})
    process.process.wait(30)


def use_gpus(monkeypatch: pytest.MonkeyPatch, names: str, count: int = 2) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


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
    process.start({})
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
    use_gpus(monkeypatch, "4,6")
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
    process.start({})
    while not Path("started").exists():
        time.sleep(0.01)
    process.stop()
    assert process.process.wait(30) in (130, -signal.SIGINT)
    assert Path("interrupted").exists()


MPS_CONTROL = """#!/bin/sh
pid_file=${CUDA_MPS_PIPE_DIRECTORY:-$DEFAULT}/nvidia-cuda-mps-control.pid
if [ "$1" = -d ]; then
    [ -n "$REFUSED" ] && echo "Cannot start: $REFUSED" && exit 1
    sleep 300 &
    echo $! > "$pid_file"
    echo "start $CUDA_VISIBLE_DEVICES" >> "$EVENTS"
else
    read -r command
    [ -e "$pid_file" ] || { echo "Cannot find MPS control daemon process"; exit 1; }
    if [ "$command" = quit ]; then kill "$(cat "$pid_file")" || exit 1; rm "$pid_file"; fi
    echo "$command $CUDA_VISIBLE_DEVICES" >> "$EVENTS"
fi
"""  # the daemon, here `sleep`, inherits the output


@pytest.fixture
def mps_events(fake_dvc, tmp_path, monkeypatch):
    """Install a stand-in for MPS's control program; returns a function that reads what it and trainings recorded."""
    (tmp_path / "bin" / mps.CONTROL).write_text(MPS_CONTROL)
    (tmp_path / "bin" / mps.CONTROL).chmod(0o755)
    monkeypatch.setenv("EVENTS", str(tmp_path / "events"))
    monkeypatch.setenv("DEFAULT", str(tmp_path))
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    return lambda: [line.split() for line in (tmp_path / "events").read_text().splitlines()]


TRAIN = 'echo "train $CUDA_VISIBLE_DEVICES $CUDA_MPS_PIPE_DIRECTORY" >> "$EVENTS"; '


def check_mps_is_stopped(events: list[list[str]], devices: list[str]) -> None:
    assert events[: len(devices)] == [["start", device] for device in devices]
    assert events[-len(devices) :] == [["quit", device] for device in reversed(devices)]
    assert not any(Path(event[2]).exists() for event in events if event[0] == "train")


def test_seeds_that_share_a_gpu_run_under_mps_which_ends_also_if_one_fails(fake_dvc, mps_events, monkeypatch):
    use_gpus(monkeypatch, "4,GPU-1a")
    fake_dvc(TRAIN + '[ "$4" = train@1 ] && echo "Error: no" && exit 1; exit 0')
    assert train_all._train_locally([0, 1, 2], jobs=3) == {1: "no (see logs/seed-1.log)"}
    events = mps_events()
    check_mps_is_stopped(events, ["4", "GPU-1a"])
    trainings = events[2:5]
    assert sorted(event[1] for event in trainings) == ["0", "0", "GPU-1a"]  # the daemon of GPU 4 sees no other
    assert len({event[2] for event in trainings}) == 2


INTERRUPT = "[ $4 = train@1 ] && kill -INT $PPID; "


@pytest.mark.parametrize("again", ["", INTERRUPT])
def test_mps_ends_after_the_trainings_when_they_are_interrupted_once_or_twice(fake_dvc, mps_events, monkeypatch, again):
    use_gpus(monkeypatch, "0", 1)
    fake_dvc(
        f"trap '{again} echo stop >> \"$EVENTS\"; exit 130' INT; {TRAIN}"
        'while [ "$(grep -c train "$EVENTS")" -lt 2 ]; do sleep 0.05; done; '
        f"{INTERRUPT} while true; do sleep 0.05; done"
    )
    with pytest.raises(KeyboardInterrupt if again else Interrupted):
        train_all._train_locally([0, 1], jobs=2)
    events = mps_events()
    if again:  # this process leaves at once, and the trainings soon after it
        events = [event for event in events if event[0] != "stop"]
    else:
        assert events.count(["stop"]) == 2
    check_mps_is_stopped(events, ["0"])


@pytest.mark.parametrize(
    ("seeds", "own", "refused", "message"),
    [
        ([0], "", "", ""),
        ([0, 1], "CUDA_MPS_PIPE_DIRECTORY", "", ""),
        ([0, 1], "DEFAULT", "", ""),
        ([0, 1], "", "no permission", "NVIDIA MPS does not start for GPU 3: Cannot start: no permission; trainings on"),
        ([0, 1], "", "not installed", "is not installed; trainings on the same GPU take turns"),
    ],
)
def test_mps_is_not_started(fake_dvc, mps_events, monkeypatch, tmp_path, capsys, seeds, own, refused, message):
    use_gpus(monkeypatch, "3", 1)
    fake_dvc(TRAIN)
    monkeypatch.setenv("REFUSED", refused)
    if own:
        monkeypatch.setenv(own, str(tmp_path))
        (tmp_path / "nvidia-cuda-mps-control.pid").touch()
    if refused == "not installed":
        (tmp_path / "bin" / mps.CONTROL).unlink()
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    assert train_all._train_locally(seeds, jobs=2) == {}
    trainings = [event for event in mps_events() if event[0] != "get_server_list"]
    assert trainings == [["train", "3", *([str(tmp_path)] if own == "CUDA_MPS_PIPE_DIRECTORY" else [])]] * len(seeds)
    printed = capsys.readouterr().out
    assert message in printed
    assert ("MPS" in printed) == bool(message)


def test_a_gpu_that_mps_refuses_is_not_replaced_by_the_cpu(monkeypatch):
    use_gpus(monkeypatch, "0", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    assert determinism.select_device() == torch.device("cpu")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp/mps")
    assert error_message(determinism.select_device).startswith("NVIDIA MPS does not give access to the GPU; ")


@pytest.mark.parametrize(("jobs", "remedy"), [(1, ""), (2, ", or lower --jobs")])
def test_out_of_memory_with_several_seeds_at_once_suggests_fewer(fake_dvc, jobs, remedy):
    fake_dvc("echo 'Error: out of memory with a; lower a'; exit 1")
    reasons = train_all._train_locally([0, 1], jobs)
    assert reasons[1] == f"out of memory with a; lower a{remedy} (see logs/seed-1.log)"


@pytest.mark.parametrize(
    ("names", "count", "devices"),
    [
        (None, 0, [""]),
        (None, 2, ["0", "1"]),
        ("", 0, [""]),
        ("-1", 0, [""]),
        ("4,6", 2, ["4", "6"]),
        ("GPU-8f6a,GPU-1b2c", 2, ["GPU-8f6a", "GPU-1b2c"]),
        ("MIG-5c9d,MIG-7e0f", 1, ["MIG-5c9d", "MIG-7e0f"]),
    ],
)
def test_devices_keep_the_names_of_cuda_visible_devices(monkeypatch, names, count, devices):
    use_gpus(monkeypatch, names or "", count)
    if names is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert train_all._devices() == devices
    monkeypatch.setattr("joblib.cpu_count", lambda: 7)
    assert train_all._default_jobs(2) == (len(devices) if count else 3)
    assert train_all._default_jobs(8) == (len(devices) if count else 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--jobs 2 --ray auto", "give --jobs N or --ray ADDRESS, not both"),
        ("--jobs 2 --gpus-per-seed 0.5", "--gpus-per-seed needs --ray ADDRESS"),
        ("--ray auto --gpus-per-seed 2", "2.0 is not in the range 0<x<=1"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    assert message in error_line_of(f"cxr train-all {options}")
