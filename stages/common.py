"""What every command shares: errors in one line, and `--debug` to see where they come from."""

import errno
import functools
import gc
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline.core.errors import Interrupted, UserError, first_line


class CommandError(click.ClickException):
    exit_code = 2


def stage(function: Callable[..., None]) -> click.Command:
    """Make a click command that ends in one line and exit code 2 when its user can mend what is wrong.

    Stopped by a signal, it ends as a shell expects it: with 128 and the signal's number.
    """

    @functools.wraps(function)
    def run(debug: bool, **options: Any) -> None:
        prepend_environment_path()
        gc.set_threshold(50_000)  # a tenth of a start went to looking for garbage in what imports make to stay
        try:
            function(**options)
        except Interrupted as error:
            click.echo(f"{error}; dvc repro goes on from there", err=True)
            sys.exit(128 + error.signal)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except Exception as error:
            line = _line(error)
            if debug or not line:
                raise
            raise CommandError(line) from None

    return click.command()(click.option("--debug", is_flag=True, help="Show where an error comes from.")(run))


def prepend_environment_path() -> None:
    """Let `dvc` and `python` be those beside this Python, whether its environment was activated or not."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def _line(error: Exception) -> str:
    """Say what is wrong and what to do; nothing for what no user can mend."""
    line = ""
    if type(error).__name__ == "MlflowException":  # known by its name, for importing MLflow takes seconds
        line = f"MLflow cannot do it: {first_line(error)}; look at the server that MLFLOW_TRACKING_URI names"
    match error:
        case UserError():
            line = str(error)
        case FileNotFoundError():
            line = f"{error.filename or error}: not found; run: dvc repro"
        case PermissionError():
            line = f"{error.filename or error}: permission denied; change its rights or its owner"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            line = f"the disk is full ({error.filename or 'while writing'}); free some space and run again"
        case OSError(filename=str() | Path() as path, strerror=str() as reason):
            line = f"{path}: {reason}; correct that path, or look what is there"
    return line
