"""Files are written beside their place and renamed, so that a name never stands for half a file."""

import functools
import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pandas as pd

from pipeline.core.errors import UserError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; it takes the place of `path` only when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")  # what a killed process leaves, the next one takes over
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    with atomic_path(path) as aside:
        aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write without an index; floats keep the nine digits that tell any two float32 apart."""
    with atomic_path(path) as aside:
        table.to_csv(aside, index=False, float_format="%.9g", lineterminator="\n")


def read_csv(path: Path) -> pd.DataFrame:
    """Read a table, in which the names of files are texts, also 0001 and NA, and only an empty field is missing."""
    return pd.read_csv(path, dtype={"file": str}, keep_default_na=False, na_values=[""])


def read_text_table(source: Path | IO[bytes], name: str, columns: Collection[str]) -> pd.DataFrame:
    """Read a table that a person made: every field a text as it stands, and a row for every line, also a blank one.

    Raises:
        UserError: it is no table, or lacks one of the columns; `name` says in the message which.
    """
    try:
        table = pd.read_csv(source, dtype=str, keep_default_na=False, skip_blank_lines=False)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{name} is not a CSV table: {' '.join(str(error).split())}; save it as CSV in UTF-8") from None
    if not isinstance(table.index, pd.RangeIndex):
        raise UserError(
            f"{name}: the lines have more fields than the header; name every column there, or take away the commas at "
            "their ends"
        )
    for column in columns:
        if column not in table:
            header = ",".join(map(str, table.columns))
            raise UserError(f"{name}: no column {column!r}; its header is {header} and must have {','.join(columns)}")
    return table


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def md5_of_file(path: Path) -> str:
    """Return the md5 that dvc.lock holds for the file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, functools.partial(hashlib.md5, usedforsecurity=False)).hexdigest()
