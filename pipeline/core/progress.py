"""Progress bars for loops."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO, TypeVar

from rich.console import Console
from rich.progress import Progress, wrap_file

Item = TypeVar("Item")


def track_progress(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    """Yield the items, with a progress bar on stderr if that is a terminal; stdout is for results.

    Without a total, which is None if it is not known, the bar only shows that something happens.
    """
    console = Console(stderr=True)
    # rich would send what is printed meanwhile to stderr, wrapped to the width of the terminal.
    with Progress(console=console, redirect_stdout=False, disable=not console.is_terminal) as progress:
        yield from progress.track(items, total, description=description)


def track_reading(stream: BinaryIO, total: int, description: str) -> AbstractContextManager[BinaryIO]:
    """Wrap a stream of `total` bytes to show how much of it is read, as `track_progress` does."""
    console = Console(stderr=True)
    return wrap_file(stream, total, description=description, console=console, disable=not console.is_terminal)
