"""The share of training time that logging to MLflow costs, in a clone with prepared data.

python bench/tracking.py [PROJECT]

Logging runs in its own thread, so its cost is the CPU time of that thread. Opening the run (once, mostly the import of
MLflow) is reported separately.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT
from seeds import clone_and_prepare

TIMED_TRAINING = """
import atexit, runpy, sys, time
from pipeline.tracking.outbox import Outbox
from pipeline.training.loop import Trainer
seconds = {"_open_run": 0, "_deliver": 0, "run": 0}
def time_calls(owner, name, clock):
    original = getattr(owner, name)
    def timed(*arguments):
        start = clock()
        try:
            return original(*arguments)
        finally:
            seconds[name] += clock() - start
    setattr(owner, name, timed)
original_init = Outbox.__init__
def init(self, open_run):
    original_init(self, open_run)
    time_calls(self, "_open_run", time.thread_time)
Outbox.__init__ = init
time_calls(Outbox, "_deliver", time.thread_time)
time_calls(Trainer, "run", time.perf_counter)
atexit.register(lambda: print(*seconds.values()))
sys.argv = ["train", "--seed", "0"]
runpy.run_module("stages.train", run_name="__main__")
"""


def main(project: str = str(ROOT)) -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone_and_prepare(Path(project), Path(folder))
        command = [sys.executable, "-c", TIMED_TRAINING]
        output = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    opening, thread, training = map(float, output.split()[-3:])
    logging = thread - opening
    results = {"opening": opening, "logging": logging, "training": training, "share": logging / training}
    print(json.dumps({name: round(value, 4) for name, value in results.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
