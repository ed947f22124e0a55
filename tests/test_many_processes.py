"""Several processes: all seeds at once, and one seed in several processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import yaml
from conftest import (
    ROOT,
    clean_environment,
    commit_all,
    edit_params,
    error_line_of,
    error_message,
    run,
    run_in_background,
    seed_runs,
    stage_server,
)
from test_interruptions import read_outs, start_training

from pipeline.training.distributed import init_distributed

pytestmark = pytest.mark.slow

AGAINST_SHORTCUTS = {
    "sampling": "group_balanced", "group_dro": 0.1, "domain_adversarial": 0.5, "swa_epochs": 2, "frozen_epochs": 1,
}  # fmt: skip
SEEDS = range(int(os.environ.get("CXR_SEEDS", "2")))  # on the Ray cluster; ten seeds take minutes


def run_line(project: Path, command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return run(project, *command.split(), **changes)


def use_gpus(processes: int) -> dict[str, str]:
    """Return the variable with which the processes train on CPUs, if there are fewer GPUs than processes."""
    import torch

    return {} if torch.cuda.device_count() >= processes else {"CUDA_VISIBLE_DEVICES": ""}


def remove_trainings_from_dvc(project: Path) -> None:
    """Remove the trainings from DVC's lock and run cache, so that they are not restored."""
    shutil.rmtree(project / ".dvc/cache/runs")
    lock = yaml.safe_load((project / "dvc.lock").read_text())
    lock["stages"] = {name: stage for name, stage in lock["stages"].items() if not name.startswith("train@")}
    (project / "dvc.lock").write_text(yaml.safe_dump(lock))


def train_lock(project: Path) -> list[dict]:
    stages = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    return [stages[f"train@{seed}"]["outs"] for seed in (0, 1)]


@pytest.mark.parametrize(
    ("train", "accumulation_steps"),
    [
        ({"backbone": "alexnet", "image_size": 64, "mixup_alpha": 0.4, "head_hidden": [16, 8], **AGAINST_SHORTCUTS}, 2),
        ({"frozen_epochs": 2, "sampling": "shuffle"}, 1),
    ],
    ids=["gradient accumulation", "frozen backbone"],
)
def test_two_processes_train_one_seed_like_one_process(make_prepared_project, train, accumulation_steps):
    results = {}
    for count in (1, 2):
        project = make_prepared_project(gradient_accumulation_steps=accumulation_steps if count == 2 else 1, **train)
        (project / "data/weights/origin.json").write_text('{"source": "none"}')
        with_torchrun = "torchrun --standalone --nproc-per-node 2 -m stages.train --seed 0"
        command = with_torchrun if count == 2 else "python -m stages.train --seed 0"
        result = run(project, *command.split(), **use_gpus(2), **stage_server())
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("epoch 1/") == 1
        assert json.loads(read_outs(project)["model.json"])["environment"]["processes"] == count
        (seed_run,) = seed_runs(project)
        assert seed_run.info.status == "FINISHED"
        results[count] = pd.read_csv(project / "models/seed-0/history.csv")
    assert run_line(project, "dvc commit -f train@0").returncode == 0
    assert "didn't change" in run(project, "dvc", "repro", "-s", "train@0").stdout
    pd.testing.assert_frame_equal(results[1], results[2], rtol=1e-3, atol=1e-4)


BATCH_NORM_SCRIPT = """
import copy, os, sys, torch, torch._dynamo  # which data parallelism imports
from torch import distributed, nn
from pipeline.training.distributed import init_distributed

def check():
    torch.manual_seed(0)
    images, factors = torch.randn(2, 8, 5, 3, 3) * 3 + 1
    reference = nn.BatchNorm2d(5)
    nn.init.uniform_(reference.weight)
    network = nn.Sequential(copy.deepcopy(reference))
    images.requires_grad_()
    expected = reference(images)
    (expected * factors).sin().sum().backward()
    with init_distributed() as group:
        group.data_parallel(network)
        local = group.local_slice(8)
        local_images = images.detach()[local].requires_grad_()
        outputs = network(local_images)
        (outputs * factors[local]).sin().sum().backward()
        for actual, expected_value in [
            (outputs, expected[local]), (local_images.grad, images.grad[local]),
            (group.all_reduce_sum(network[0].weight.grad), reference.weight.grad),
            (network[0].running_mean, reference.running_mean), (network[0].running_var, reference.running_var),
        ]:
            torch.testing.assert_close(actual, expected_value, rtol=1e-4, atol=1e-5)

for rank in "012":
    if not os.fork():
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
        check()
        sys.exit()
sys.exit(any([os.wait()[1] for _ in "012"]))
"""


def test_batch_norm_uses_the_statistics_of_the_whole_batch(port):
    # Tested alone, because in a whole network with small images batch norm amplifies rounding errors too much; forked
    # from one process, which imports torch once.
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    result = run(ROOT, "python", "-c", BATCH_NORM_SCRIPT, **master, **use_gpus(3))
    assert result.returncode == 0, result.stderr


def test_more_processes_than_gpus_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    line = error_line_of("cxr train --seed 0")
    assert line.startswith("Error: 2 processes, but visible GPUs for only 1; run: torchrun --nproc-per-node 1, or set ")


def test_processes_that_do_not_connect_say_why(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "variable MASTER_ADDR expected, but not set" in error_message(init_distributed().__enter__)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(busy.getsockname()[1]))
        assert "address already in use" in error_message(init_distributed().__enter__)


def test_train_all_gives_the_same_bytes_as_training_one_seed_after_another(demo_project, make_prepared_project):
    project = make_prepared_project()
    remove_trainings_from_dvc(project)
    result = run_line(project, "cxr train-all --jobs 2", CXR_FORK_SERVER="")  # as its users run it
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 seeds are trained; next: dvc repro" in result.stdout
    for seed in (0, 1):
        assert "epoch 2/2" in (project / f"logs/seed-{seed}.log").read_text()
        progress = json.loads((project / f"logs/seed-{seed}.json").read_text())
        assert (progress["epoch"], progress["state"]) == (2, "finished")
    assert train_lock(project) == train_lock(demo_project)
    assert all(read_outs(project, seed) == read_outs(demo_project, seed) for seed in (0, 1))
    assert len(seed_runs(project)) == 2
    repro = run_line(project, "dvc repro")
    assert repro.returncode == 0, repro.stdout + repro.stderr
    assert "Running stage 'train" not in repro.stdout
    assert "Data and pipelines are up to date." in repro.stdout


def test_the_error_names_a_failed_seed_and_its_log_and_other_seeds_finish(demo_project, make_prepared_project):
    project = make_prepared_project()
    (project / "models").mkdir()
    (project / "models/seed-0").write_text("not a folder")
    result = run(project, "cxr", "train-all", "--jobs", "1")
    assert result.returncode == 2
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("Error: 1 of 2 seeds failed: seed 0: ")
    assert last_line.endswith("(see logs/seed-0.log)")
    assert read_outs(project, 1) == read_outs(demo_project, 1)


def test_ctrl_c_stops_all_seeds_with_a_checkpoint(make_prepared_project):
    project = make_prepared_project(epochs=15)
    training = start_training(project, "cxr", "train-all", "--jobs", "2", log="logs/seed-0.log", **stage_server())
    training.send_signal(signal.SIGINT)
    assert training.wait(180) == 130
    assert all(seed_run.info.status == "KILLED" for seed_run in seed_runs(project))
    assert list((project / "checkpoints").glob("*.pt"))
    assert json.loads((project / "logs/seed-0.json").read_text())["state"] == "interrupted"
    time.sleep(0.1)
    assert run(project, "dvc", "status").returncode == 0  # DVC is not locked


def test_training_on_ray_names_what_is_missing(make_prepared_project, monkeypatch):
    project = make_prepared_project()
    monkeypatch.chdir(project)
    for message, remedy in {
        "no default DVC remote; run: dvc remote add": f"dvc remote add -d shared {project.parent / 'remote'}",
        "config is not committed": "git commit -qam shared",
        "no Ray cluster": f"git remote add origin {project}/.git",
        "the current commit is on no git remote, so other machines cannot get it; run: git push": "git fetch -q origin",
        "no Ray cluster at 127.0.0.1:1: ": "true",
    }.items():
        assert message in error_line_of("cxr train-all --ray 127.0.0.1:1")
        assert run_line(project, remedy).returncode == 0


def training_worker() -> psutil.Process | None:
    """Return a Ray worker whose task is training a seed."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "stages.train" in process.cmdline():
                workers = [parent for parent in process.parents() if "ray::" in " ".join(parent.cmdline())]
                if workers:
                    return workers[0]
    return None


def ray_node(project: Path, *options: str, **changes: str) -> AbstractContextManager[None]:
    command = ["ray", "start", "--block", "--num-cpus=1", "--disable-usage-stats", *options]
    variable = "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper"
    assert f"`{variable}=true`" in (ROOT / "docs/scale.md").read_text()
    changes |= {variable: "true", "stop_signal": "KILL"}  # otherwise it takes half a minute
    return run_in_background(project, *command, is_ready=lambda output: "Ray runtime started" in output, **changes)


def test_seeds_share_a_gpu_of_a_ray_cluster_only_if_told_to(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    import ray

    from stages import ray_backend

    def use_task(count: int) -> None:
        """Let training a seed mean: record when it starts, wait until `count` seeds have started, record the end."""
        folder = tmp_path / f"{count} at once"
        folder.mkdir()

        def train(seed: int, *_: object) -> None:
            (folder / f"start-{seed}").write_text(f"{time.time()} {os.environ['CUDA_VISIBLE_DEVICES']}")
            deadline = time.monotonic() + 60
            while len(list(folder.glob("start-*"))) < count and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.5)
            (folder / f"end-{seed}").write_text(f"{time.time()}")

        monkeypatch.setattr(ray_backend, "_train", train)

    def times(count: int, event: str) -> list[float]:
        return sorted(float(path.read_text().split()[0]) for path in tmp_path.glob(f"{count} at once/{event}-*"))

    monkeypatch.setattr(ray_backend, "_output", lambda *command: "shared" * (command[0] == "dvc"))
    monkeypatch.setattr(ray_backend, "_run", lambda *_: None)
    train_params = SimpleNamespace(cpu_threads=1)
    config = SimpleNamespace(seeds=[0, 1, 2], model_name="", active=SimpleNamespace(train=train_params))
    with (
        tempfile.TemporaryDirectory(prefix="ray-") as ray_tmpdir,
        ray.init("local", num_cpus=3, num_gpus=1, include_dashboard=False, _temp_dir=ray_tmpdir),
        monkeypatch.context() as patch,
    ):
        patch.setattr(ray, "init", lambda *_, **__: None)
        patch.setattr(ray, "shutdown", lambda: None)
        use_task(3)
        assert ray_backend.train("auto", config, gpus_per_seed=1 / 3) == {}
        assert times(3, "start")[2] < times(3, "end")[0]
        assert all(path.read_text().split()[1] == "0" for path in tmp_path.glob("3 at once/start-*"))
        use_task(1)
        assert ray_backend.train("auto", config) == {}
        assert all(start > end for start, end in zip(times(1, "start")[1:], times(1, "end"), strict=False))
        patch.setattr(ray, "cluster_resources", dict)
        assert error_message(ray_backend.train, "auto", config, 0.5).startswith("no node of auto has a GPU; ")


@pytest.mark.long
def test_a_ray_cluster_trains_all_seeds_although_a_worker_is_killed(demo_project, make_prepared_project, port):
    project = make_prepared_project()
    edit_params(project, lambda params: params.update(seeds=list(SEEDS)))
    serial = demo_project
    if len(SEEDS) > 2:
        serial = make_prepared_project()
        shutil.copy(project / "params.yaml", serial)
        assert run_line(serial, "dvc repro " + " ".join(f"train@{seed}" for seed in SEEDS)).returncode == 0
    remove_trainings_from_dvc(project)
    run(project, "dvc", "remote", "add", "-d", "shared", str(project.parent / "remote"))
    commit_all(project)
    forked = stage_server()
    with (
        tempfile.TemporaryDirectory(prefix="ray-") as ray_tmpdir,  # separates it from other clusters on this machine
        ray_node(project, "--head", f"--port={port}", "--include-dashboard=false", RAY_TMPDIR=ray_tmpdir, **forked),
        ray_node(project, f"--address=127.0.0.1:{port}", RAY_TMPDIR=ray_tmpdir, **forked),
        (project / "train.log").open("w") as out,
    ):
        command, variables = "cxr train-all --ray auto", clean_environment(RAY_TMPDIR=ray_tmpdir)
        training = subprocess.Popen(command.split(), cwd=project, env=variables, stdout=out, stderr=out)
        while not (worker := training_worker()):
            assert training.poll() is None, (project / "train.log").read_text()
            time.sleep(0.2)
        children = worker.children(recursive=True)
        worker.kill()
        assert not psutil.wait_procs(children, timeout=60)[1]  # they end with the worker
        assert training.wait(900) == 0, (project / "train.log").read_text()
    repro = run_line(project, "dvc repro --pull")
    assert repro.returncode == 0, repro.stdout + repro.stderr
    assert "epoch" not in repro.stdout
    assert all(read_outs(project, seed) == read_outs(serial, seed) for seed in SEEDS)
