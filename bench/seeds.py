"""Time to train all seeds by `cxr train-all --jobs JOBS`, compared with sequential `dvc repro`, in two clones.

python bench/seeds.py [JOBS] [PROJECT]
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, seconds

from pipeline.core import config


def main(jobs: str = "2", project: str = str(ROOT)) -> None:
    trainings = [f"train@{seed}" for seed in config.load_config(Path(project, "params.yaml")).seeds]
    with tempfile.TemporaryDirectory() as folder:
        clones = [Path(folder, name) for name in ("ours", "plain")]
        clone_and_prepare(Path(project), clones[0])
        shutil.copytree(*clones, symlinks=True)
        our_time = seconds(lambda: run(clones[0], "cxr", "train-all", "--jobs", jobs))
        plain_time = seconds(lambda: run(clones[1], "dvc", "repro", *trainings))
    times = {"seconds": round(our_time, 1), "plain_seconds": round(plain_time, 1)}
    print(json.dumps({"seeds": len(trainings), "jobs": int(jobs), **times, "ratio": round(plain_time / our_time, 2)}))


def clone_and_prepare(project: Path, clone: Path) -> None:
    """Clone the project and run the stages before training."""
    run(project, "git", "clone", "--quiet", ".", str(clone))
    run(clone, "dvc", "repro", "weights", "split")


def run(folder: Path, *command: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(*sys.argv[1:])
