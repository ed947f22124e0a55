"""Several processes: all seeds at once, and one seed on many."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml
from conftest import ROOT, background, commit, edit_params, environment, refused, run, seed_runs
from test_interruptions import outs, start

pytestmark = pytest.mark.slow

SEEDS = range(int(os.environ.get("CXR_SEEDS", "2")))  # on the Ray cluster; ten take minutes


def do(project: Path, command: str) -> subprocess.CompletedProcess[str]:
    return run(project, *command.split())


def forget_training(project: Path) -> None:
    """Take from DVC what it knows of the trainings, so that they are not restored."""
    shutil.rmtree(project / ".dvc/cache/runs")
    lock = yaml.safe_load((project / "dvc.lock").read_text())
    lock["stages"] = {name: stage for name, stage in lock["stages"].items() if not name.startswith("train@")}
    (project / "dvc.lock").write_text(yaml.safe_dump(lock))


def train_lock(project: Path) -> list[dict]:
    stages = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    return [stages[f"train@{seed}"]["outs"] for seed in (0, 1)]


@pytest.mark.parametrize(
    ("train", "pieces"),
    [
        ({"backbone": "alexnet", "size": 64, "mixup_alpha": 0.4, "head_hidden": [16, 8]}, 2),
        ({"frozen_epochs": 2, "sampling": "shuffle"}, 1),
    ],
    ids=["batches in parts", "frozen backbone"],
)
def test_two_processes_train_one_seed_as_one_process_does(ready, train, pieces):
    results = {}
    for count in (1, 2):
        project = ready(gradient_accumulation_steps=pieces if count == 2 else 1, **train)
        (project / "data/weights/origin.json").write_text('{"source": "none"}')
        together = "torchrun --standalone --nproc-per-node 2 -m stages.train --seed 0"
        ended = do(project, together if count == 2 else "python -m stages.train --seed 0")
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("epoch 1/") == 1
        assert json.loads(outs(project)["model.json"])["environment"]["processes"] == count
        (seed_run,) = seed_runs(project)
        assert seed_run.info.status == "FINISHED"
        results[count] = pd.read_csv(project / "models/seed-0/history.csv")
    assert do(project, "dvc commit -f train@0").returncode == 0
    assert "didn't change" in run(project, "dvc", "repro", "-s", "train@0").stdout
    pd.testing.assert_frame_equal(results[1], results[2], rtol=1e-3, atol=1e-4)


SHARED_BATCH_NORM = """
import copy, torch
from torch import distributed, nn
from pipeline.training.group import joined
torch.manual_seed(0)
images, factors = torch.randn(2, 8, 5, 3, 3) * 3 + 1
alone = nn.BatchNorm2d(5)
nn.init.uniform_(alone.weight)
shared = nn.Sequential(copy.deepcopy(alone))
images.requires_grad_()
whole = alone(images)
(whole * factors).sin().sum().backward()
with joined() as group:
    group.data_parallel(shared)
    share = group.local_slice(8)
    own = images.detach()[share].requires_grad_()
    part = shared(own)
    (part * factors[share]).sin().sum().backward()
    for one, other in [
        (part, whole[share]), (own.grad, images.grad[share]), (group.all_reduce_sum(shared[0].weight.grad), alone.weight.grad),
        (shared[0].running_mean, alone.running_mean), (shared[0].running_var, alone.running_var),
    ]:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
"""


def test_batch_norm_sees_the_batch_of_all_processes(tmp_path):
    # In a whole network of small images, batch norm blows rounding up beyond comparison; so it is tried by itself.
    (tmp_path / "shared.py").write_text(SHARED_BATCH_NORM)
    ended = run(ROOT, "torchrun", "--standalone", "--nproc-per-node", "3", str(tmp_path / "shared.py"), PYTHONPATH=".")
    assert ended.returncode == 0, ended.stderr


def test_all_seeds_at_once_have_the_bytes_of_one_after_another(built, ready):
    project = ready()
    forget_training(project)
    ended = do(project, "cxr train-all --jobs 2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 seeds are trained; next: dvc repro" in ended.stdout
    assert all("epoch 2/2" in (project / f"logs/seed-{seed}.log").read_text() for seed in (0, 1))
    assert train_lock(project) == train_lock(built)
    assert all(outs(project, seed) == outs(built, seed) for seed in (0, 1))
    assert len(seed_runs(project)) == 2
    rest = do(project, "dvc repro")
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert "Running stage 'train" not in rest.stdout
    assert "Data and pipelines are up to date." in rest.stdout


def test_a_seed_that_fails_is_named_with_its_log_and_stops_no_other(built, ready):
    project = ready()
    (project / "models").mkdir()
    (project / "models/seed-0").write_text("in the way")
    ended = run(project, "cxr", "train-all", "--jobs", "1")
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: 1 of 2 seeds failed: seed 0: ")
    assert last.endswith("(see logs/seed-0.log)")
    assert outs(project, 1) == outs(built, 1)


def test_ctrl_c_stops_every_seed_at_its_checkpoint(ready):
    project = ready(epochs=15)
    training = start(project, "cxr", "train-all", "--jobs", "2", log="logs/seed-0.log")
    training.send_signal(signal.SIGINT)
    assert training.wait(180) == 130
    assert all(one.info.status == "KILLED" for one in seed_runs(project))
    assert list((project / "checkpoints").glob("*.pt"))
    time.sleep(0.1)
    assert run(project, "dvc", "status").returncode == 0  # no lock is left behind


def test_a_cluster_is_told_what_it_needs_in_one_line(ready, monkeypatch):
    project = ready()
    monkeypatch.chdir(project)
    for missing, mended in {
        "there is no default DVC remote; run: dvc remote add": f"dvc remote add -d shared {project.parent / 'remote'}",
        "config is not committed": "git commit -qam shared",
        "no Ray cluster": f"git remote add origin {project}/.git",
        "the present commit is on no remote, so no other machine can see it; run: git push": "git fetch -q origin",
        "no Ray cluster answers at 127.0.0.1:1": "true",
    }.items():
        assert missing in refused("cxr train-all --ray 127.0.0.1:1")
        assert do(project, mended).returncode == 0


def training_worker() -> psutil.Process | None:
    """Return a Ray worker in whose task a seed trains."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "stages.train" in process.cmdline():
                workers = [above for above in process.parents() if "ray::" in " ".join(above.cmdline())]
                if workers:
                    return workers[0]
    return None


def ray_node(project: Path, *place: str, **changes: str) -> AbstractContextManager[None]:
    command = ["ray", "start", "--block", "--num-cpus=1", "--disable-usage-stats", *place]
    documented = "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper"
    assert f"`{documented}=true`" in (ROOT / "docs/scale.md").read_text()
    changes[documented] = "true"
    return background(project, *command, ready=lambda printed: "Ray runtime started" in printed, **changes)


@pytest.mark.long
def test_a_ray_cluster_of_two_nodes_trains_all_seeds_though_a_worker_is_killed(built, ready, port):
    project = ready()
    edit_params(project, lambda params: params.update(seeds=list(SEEDS)))
    serial = built
    if len(SEEDS) > 2:
        serial = ready()
        shutil.copy(project / "params.yaml", serial)
        assert do(serial, "dvc repro " + " ".join(f"train@{seed}" for seed in SEEDS)).returncode == 0
    forget_training(project)
    run(project, "dvc", "remote", "add", "-d", "shared", str(project.parent / "remote"))
    commit(project)
    with (
        tempfile.TemporaryDirectory(prefix="ray-") as apart,  # from other clusters of this machine
        ray_node(project, "--head", f"--port={port}", "--include-dashboard=false", RAY_TMPDIR=apart),
        ray_node(project, f"--address=127.0.0.1:{port}", RAY_TMPDIR=apart),
        (project / "train.log").open("w") as out,
    ):
        command, own = "cxr train-all --ray auto", environment(RAY_TMPDIR=apart)
        training = subprocess.Popen(command.split(), cwd=project, env=own, stdout=out, stderr=out)
        while not (worker := training_worker()):
            assert training.poll() is None, (project / "train.log").read_text()
            time.sleep(0.2)
        begun = worker.children(recursive=True)
        worker.kill()
        assert not psutil.wait_procs(begun, timeout=60)[1]  # what it began ends with it
        assert training.wait(900) == 0, (project / "train.log").read_text()
    rest = do(project, "dvc repro --pull")
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert "epoch" not in rest.stdout
    assert all(outs(project, seed) == outs(serial, seed) for seed in SEEDS)
