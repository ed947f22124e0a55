"""Seconds from `python -m stages.train` to the end of the first training step, in a project with prepared data.

python bench/startup.py [PROJECT] [ROUNDS]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from common import ROOT

STOP_AT_FIRST_STEP = """
import os, runpy, sys, time
from torch.optim import AdamW
AdamW.step = lambda *_: (print(time.time(), flush=True), os._exit(0))
sys.argv = ["train", "--seed", "0"]
runpy.run_module("stages.train", run_name="__main__")
"""


def main(project: str = str(ROOT), rounds: str = "5") -> None:
    with tempfile.TemporaryDirectory() as folder:
        # The first start creates the MLflow store and compiles modules to bytecode; it is reported separately.
        first, *later = [time_to_first_step(project, f"sqlite:///{folder}/mlflow.db") for _ in range(1 + int(rounds))]
    print(json.dumps({"seconds": round(statistics.median(later), 2), "first_seconds": round(first, 2)}))


def time_to_first_step(project: str, store: str) -> float:
    start = time.time()
    command, environment = [sys.executable, "-c", STOP_AT_FIRST_STEP], {**os.environ, "MLFLOW_TRACKING_URI": store}
    output = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1]) - start


if __name__ == "__main__":
    main(*sys.argv[1:])
