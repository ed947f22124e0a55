"""The share of a training that goes into telling MLflow about it, in a clone whose data are ready.

python bench/tracking.py [PROJECT]

Logging has a thread of its own. What it costs is the processor time that this thread takes from the training.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT
from seeds import clone_ready

WATCHED = """
import atexit, runpy, sys, time
from pipeline.tracking.outbox import Outbox
from pipeline.training.loop import Training
spent = {"_insist": 0, "run": 0}
def timed(owner, name, clock):
    real = getattr(owner, name)
    def run(*arguments):
        begun = clock()
        try:
            return real(*arguments)
        finally:
            spent[name] += clock() - begun
    setattr(owner, name, run)
timed(Outbox, "_insist", time.thread_time)
timed(Training, "run", time.perf_counter)
atexit.register(lambda: print(spent["_insist"], spent["run"]))
sys.argv = ["train", "--seed", "0"]
runpy.run_module("stages.train", run_name="__main__")
"""


def main(project: str = str(ROOT)) -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone_ready(Path(project), Path(folder))
        command = [sys.executable, "-c", WATCHED]
        printed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    logging, training = map(float, printed.split()[-2:])
    figures = {"logging_seconds": round(logging, 2), "training_seconds": round(training, 1)}
    print(json.dumps(figures | {"share": round(logging / training, 4)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
