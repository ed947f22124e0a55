"""Progress bars for loops."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO, TypeVar

from rich.console import Console
from rich.progress import track, wrap_file

Item = TypeVar("Item")


def track_progress(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield the items, with a progress bar on stderr if that is a terminal; stdout is for results."""
    console = Console(stderr=True)
    yield from track(items, description, total, console=console, disable=not console.is_terminal)


def track_reading(stream: BinaryIO, total: int, description: str) -> AbstractContextManager[BinaryIO]:
    """Wrap a stream of `total` bytes to show how much of it is read, as `track_progress` does."""
    console = Console(stderr=True)
    return wrap_file(stream, total, description=description, console=console, disable=not console.is_terminal)
