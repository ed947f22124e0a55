"""Shared by commands: one-line errors, `--debug`, `-h`, tables on the terminal, and what several of them run."""

import errno
import functools
import gc
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.core.errors import Interrupted, UserError, first_line
from pipeline.core.threads import limit_spinning
from stages.fork_server import run_in_fork

if TYPE_CHECKING:
    from rich.table import Table

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}
PIPE_WIDTH = 100_000  # characters; wide enough to wrap nothing


class CommandError(click.ClickException):
    exit_code = 2


class NumberRange(click.FloatRange):
    """A range that not-a-number is outside of."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return self.fail(f"{value} is not a number.", param, ctx) if math.isnan(number) else number


def stage(function: Callable[..., None]) -> click.Command:
    """Make a click command that reports errors of its user in one line, with exit code 2.

    After a signal the exit code is 128 plus the number of the signal, as shells expect.
    """

    @functools.wraps(function)
    def run(debug: bool, **options: Any) -> None:
        run_in_fork()  # does not return if a fork server runs the stage
        prepend_environment_path()
        limit_spinning()
        gc.set_threshold(50_000)  # garbage collection during imports, which free little, took a tenth of the start
        try:
            function(**options)
        except Interrupted as error:
            click.echo(error, err=True)
            sys.exit(128 + error.signal)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except Exception as error:
            message = user_message(error)
            if debug or not message:
                raise
            raise CommandError(message) from None

    debug_option = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    return click.command(context_settings=CONTEXT_SETTINGS)(debug_option(run))


def renamed_option(old: str, new: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Refuse an option under the name of an earlier release with the new one."""

    def refuse(_context: click.Context, _parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            raise click.UsageError(f"{old} is called {new} now")

    return click.option(old, hidden=True, expose_value=False, callback=refuse)


def prepend_environment_path() -> None:
    """Put the folder of this Python first in PATH, so that `dvc` and `python` are found there without activation."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def check_git() -> None:
    """Check that the project is in a Git repository, which it is not if it was downloaded as a zip.

    Raises:
        UserError: it is not, and DVC would refuse to work.
    """
    folder = Path.cwd()
    if not any((parent / ".git").exists() for parent in (folder, *folder.parents)):
        raise UserError(f"{folder}: no Git repository, which DVC needs; run: git init")


def list_experiments() -> list[str]:
    """Return the names of the DVC experiments; one that runs is not yet among them.

    Raises:
        UserError: Git cannot list them.
    """
    return run_git("for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps/*/*/*").split()


def run_git(command: str, *arguments: str) -> str:
    """Return what a Git command prints.

    Raises:
        UserError: it fails.
    """
    result = subprocess.run(["git", command, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"git {command} failed: {result.stderr.strip()}; run this in a clone of the repository")
    return result.stdout


def prepare_training() -> None:
    """Run the stages before training, unless they are up to date.

    Raises:
        UserError: one failed.
    """
    if subprocess.run(["dvc", "--wait-for-lock", "repro", "weights", "split"], check=False).returncode:
        raise UserError("a stage before training failed; see the output of dvc repro above")


@contextmanager
def require_ray() -> Iterator[None]:
    """Report that Ray is not installed, if the block cannot import it.

    Raises:
        UserError: it is not.
    """
    try:
        yield
    except ModuleNotFoundError:
        raise UserError("Ray is not installed; run: pip install -c constraints.txt -e '.[ray]'") from None


def print_table(table: "Table") -> None:
    """Print a table: wrapped to the width of the terminal, or, in a pipe or file, a line per row without colors."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    console.print(table)


def user_message(error: Exception) -> str:
    """Return what is wrong and what to do, or an empty text if a user cannot correct the error."""
    message = ""
    # Compared by name, since importing MLflow takes seconds.
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    if names & {"mlflow.exceptions.MlflowException", "requests.exceptions.HTTPError"}:
        from pipeline.tracking.store import refusal

        message = f"MLflow failed: {first_line(error)}; check the server at MLFLOW_TRACKING_URI"
        error = refusal(error) or error
    match error:
        case UserError():
            message = str(error)
        case FileNotFoundError():
            message = f"{error.filename or error}: not found; run: dvc repro"
        case PermissionError():
            message = f"{error.filename or error}: permission denied; change its permissions or its owner"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            where = error.filename or f"of {Path.cwd()} or {tempfile.gettempdir()}"
            message = f"the disk is full ({where}); free some space and run again"
        case OSError(filename=str() | Path() as path, strerror=str() as reason):
            message = f"{path}: {reason}; correct the path, or check the file or folder there"
    return message
