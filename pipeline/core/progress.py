"""Progress bars for loops."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def track_progress(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield the items, with a progress bar on stderr if that is a terminal; stdout is for results."""
    console = Console(stderr=True)
    yield from track(items, description, total, console=console, disable=not console.is_terminal)
