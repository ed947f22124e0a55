"""Run a script in a fork of the stage server of the tests (see conftest), which saves the imports.

python -m tests.forked SCRIPT ...
"""

import runpy
import sys
from pathlib import Path

from stages.fork_server import run_in_fork

if __name__ == "__main__":
    run_in_fork()  # returns in the fork
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
