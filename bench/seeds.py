"""All seeds by `cxr train-all --jobs JOBS`, against `dvc repro` one after another, in two clones of the project.

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
        clones = [Path(folder, side) for side in ("ours", "plain")]
        clone_ready(Path(project), clones[0])
        shutil.copytree(*clones, symlinks=True)
        ours = seconds(lambda: run(clones[0], "cxr", "train-all", "--jobs", jobs))
        theirs = seconds(lambda: run(clones[1], "dvc", "repro", *trainings))
    figures = {"seeds": len(trainings), "jobs": int(jobs), "seconds": round(ours, 1), "plain_seconds": round(theirs, 1)}
    print(json.dumps(figures | {"ratio": round(theirs / ours, 2)}))


def clone_ready(project: Path, clone: Path) -> None:
    """Clone the project and run what comes before training."""
    run(project, "git", "clone", "--quiet", ".", str(clone))
    run(clone, "dvc", "repro", "weights", "split")


def run(folder: Path, *command: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(*sys.argv[1:])
