"""The share of a training that goes into telling MLflow about it, in a clone whose data are ready.

python bench/tracking.py [PROJECT]

Logging has a thread of its own. What it costs is the processor time that this thread takes from the training. Opening
the run, once, is mostly the import of MLflow, and is reported apart.
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
spent = {"_open_run": 0, "_deliver": 0, "run": 0}
def timed(owner, name, clock):
    real = getattr(owner, name)
    def run(*arguments):
        begun = clock()
        try:
            return real(*arguments)
        finally:
            spent[name] += clock() - begun
    setattr(owner, name, run)
begin = Outbox.__init__
def watched(self, open_run):
    begin(self, open_run)
    timed(self, "_open_run", time.thread_time)
Outbox.__init__ = watched
timed(Outbox, "_deliver", time.thread_time)
timed(Training, "run", time.perf_counter)
atexit.register(lambda: print(*spent.values()))
sys.argv = ["train", "--seed", "0"]
runpy.run_module("stages.train", run_name="__main__")
"""


def main(project: str = str(ROOT)) -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone_ready(Path(project), Path(folder))
        command = [sys.executable, "-c", WATCHED]
        printed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    opening, thread, training = map(float, printed.split()[-3:])
    logging = thread - opening
    figures = {"opening": opening, "logging": logging, "training": training, "share": logging / training}
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
