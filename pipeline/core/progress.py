"""How far a loop is, shown where somebody looks."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def track_progress(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Hand the items on, with a bar on stderr if that is a terminal: stdout is for what was asked for."""
    console = Console(stderr=True)
    yield from track(items, what, total, console=console, disable=not console.is_terminal)
