"""Reading and writing of tables and JSON, and atomic replacement of files."""

import errno
import functools
import hashlib
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pandas as pd

from pipeline.core.errors import UserError, first_line


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` only if the block raises no exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")  # a fixed name: the next run overwrites what a killed run left
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write the table without its index; floats with nine significant digits, which distinguish any two float32."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n")


def read_csv(path: Path) -> pd.DataFrame:
    """Read a table: the column `file` is text, also for names such as 0001 and NA; only empty fields are missing."""
    return pd.read_csv(path, dtype={"file": str}, keep_default_na=False, na_values=[""])


def read_text_table(source: Path | IO[bytes], name: str, columns: Collection[str]) -> pd.DataFrame:
    """Read a user's CSV: every field as unconverted text, one row per line, blank lines included.

    Args:
        source: path or stream of the CSV.
        name: of the table in error messages.
        columns: that the table must have.

    Raises:
        UserError: the file is not a CSV table in UTF-8, or lacks one of the columns.
    """
    try:
        table = pd.read_csv(source, dtype=str, keep_default_na=False, skip_blank_lines=False, compression=None)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{name} is not a CSV table: {' '.join(str(error).split())}; save it as CSV in UTF-8") from None
    if not isinstance(table.index, pd.RangeIndex):
        raise UserError(
            f"{name}: the lines have more fields than the header; name every column or delete the trailing commas"
        )
    for column in columns:
        if column not in table:
            header = ",".join(map(str, table.columns))
            raise UserError(f"{name}: no column {column!r}; its header is {header} and must have {','.join(columns)}")
    return table


DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, ValueError, OverflowError,
)  # fmt: skip


class DamagedFileError(Exception):
    """The content of a file breaks its format, and reading it again would not help; the message is one line."""


@contextmanager
def detect_damage() -> Iterator[None]:
    """Raise `DamagedFileError` for what zipfile and torch raise on a damaged file; let errors of the disk through."""
    try:
        yield
    except OSError as error:
        if _is_of_disk(error):
            raise
        reason = "an offset points outside of the file" if error.errno else first_line(error)
        raise DamagedFileError(reason) from error
    except DAMAGE as error:
        # zipfile reports every OSError at the end of the file as BadZipFile.
        if isinstance(error.__context__, OSError) and _is_of_disk(error.__context__):
            raise error.__context__ from None
        raise DamagedFileError("unexpected end of file" if type(error) is EOFError else first_line(error)) from error


def _is_of_disk(error: OSError) -> bool:
    """Tell errors of the disk from those of a decompressor (no number) and of a seek to a damaged offset (no name)."""
    return error.errno is not None and (error.errno != errno.EINVAL or error.filename is not None)


def check_zip(path: Path) -> None:
    """Read the whole zip and compare the checksum of every member.

    Raises:
        DamagedFileError: it is not a zip, or a member is damaged.
        OSError: the file cannot be read.
    """
    with detect_damage(), zipfile.ZipFile(path) as archive:
        if member := archive.testzip():
            raise DamagedFileError(f"{member} is damaged")


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def md5_of_file(path: Path) -> str:
    """Return the MD5 of the file, as dvc.lock records it."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, functools.partial(hashlib.md5, usedforsecurity=False)).hexdigest()
