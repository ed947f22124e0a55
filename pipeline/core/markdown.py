"""Markdown tables, and text that is no markup."""

import re
from collections.abc import Iterable, Sequence

# An underscore between two letters or digits is no markup.
MARKUP = re.compile(r"[\\`*\[\]<>&~$|]|(?<![^\W_])_|_(?![^\W_])")


def escape_markdown(text: str) -> str:
    """Escape what Markdown would read as markup in a line of text, also in a cell of a table."""
    return MARKUP.sub(r"\\\g<0>", text)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table of plain text: the first column left-aligned, the others, numbers, right-aligned."""
    heading, *lines = ([escape_markdown(cell) for cell in line] for line in [header, *rows])
    lines = [heading, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
