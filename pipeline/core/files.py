"""Reading and writing of tables and JSON, and atomic replacement of files."""

import codecs
import csv
import difflib
import errno
import functools
import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import re
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pandas as pd

from pipeline.core.errors import UserError, first_line

log = logging.getLogger(__name__)

# Never count at the ends of a user's text: white space of Unicode, zero-width characters and a byte order mark.
BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u200c\u200d\u2060\ufeff"
SEPARATORS = ",;\t|"  # of a table's fields
BEFORE_HEADER = re.compile(r'(?:[^\S\n]*\n)*(?:"?sep=[^\n]{0,9}\n)?')  # blank lines, and the line that Excel writes
EXCEL_TEXT = re.compile(r'^="(.*)"$', re.DOTALL)  # how Excel is told to keep the zeros of ="001"
NAMES = ("file", "source", "slice", "stratum")  # columns with names from a user's data
MAX_QUOTED = 80  # characters of a line in a message
MAX_LINKS = 40  # as Linux follows
DESCRIPTORS = re.compile(r"/dev/fd|/proc/.+/fd")  # folders of open files, to which /dev/stdout is a link


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


def resolve_target(path: Path) -> Path:
    """Return the path that is written to, behind symbolic links, of which the last may lead to nothing yet.

    Raises:
        UserError: they lead in a circle.
    """
    target = path
    for _ in range(MAX_LINKS):
        if _is_descriptor(target) or not target.is_symlink():
            return target
        target = target.parent / target.readlink()
    raise UserError(f"{path}: symbolic links that lead in a circle; give another name")


def is_regular(path: Path) -> bool:
    """Return whether a path leads to a file, or to nothing yet: to no folder, pipe or device, and not to /dev/stdout.

    Raises:
        UserError: see `resolve_target`.
    """
    target = resolve_target(path)
    return not _is_descriptor(target) and (target.is_file() or not target.exists())


def _is_descriptor(path: Path) -> bool:
    return DESCRIPTORS.fullmatch(os.path.realpath(path.parent)) is not None


@contextmanager
def make_folder(folder: Path) -> Iterator[None]:
    """Create a folder with its parents, for files of the block; those that are new and empty at its end are removed.

    Raises:
        UserError: no file can be created there, as in /proc.
        OSError: the folder cannot be written to.
    """
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except FileNotFoundError:
            raise UserError(f"{folder}: no file can be created there; give another name") from None
        yield
    finally:
        with suppress(OSError):  # not empty
            for one in new:
                one.rmdir()


def check_disk_space(folder: Path, needed: int) -> None:
    """Check that a copy of this many bytes, also of a download, fits.

    Raises:
        UserError: it does not.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {needed / 1e9:.2f} GB do not fit, the disk has {free / 1e9:.2f} GB free; free disk space and "
            "run again"
        )


def write_json(path: Path, content: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def escape_undecodable(name: str) -> str:
    r"""Escape the bytes of a file name that are no UTF-8, which no text file can hold: one byte becomes `\xfc`."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def unescape_undecodable(name: str) -> str:
    """Return the file name that `escape_undecodable` was given."""
    return re.sub(r"\\x([89a-f][0-9a-f])", lambda match: chr(0xDC00 + int(match[1], 16)), name)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write the table without its index; floats with nine significant digits, which distinguish any two float32."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n")


def read_csv(path: Path) -> pd.DataFrame:
    """Read a table: the columns `NAMES` are text, also for names such as 0001 and NA; only empty fields are missing."""
    return pd.read_csv(path, dtype=dict.fromkeys(NAMES, str), keep_default_na=False, na_values=[""])


def read_text_table(
    source: Path | IO[bytes], name: str, columns: Collection[str], optional: Collection[str] = ()
) -> pd.DataFrame:
    """Read a user's table: every field as unconverted text without blanks at its ends.

    Fields are separated by `,`, `;`, a tab or `|`, as the header tells. The encoding is UTF-8, UTF-16 with a byte order
    mark, or else, with a warning, Windows-1252. A file may be compressed by gzip. Lines of blanks, a first line such as
    `sep=;`, and the quotes of `="001"`, with which Excel is told how to read a table, are left out.

    Args:
        source: path or stream of the table.
        name: of the table in error messages.
        columns: that the table must have; one may differ in upper and lower case, and is then renamed to this spelling.
        optional: further columns that are renamed to this spelling.

    Returns:
        All columns. Row i is on line i + 2 of the file, unless a field has several lines.

    Raises:
        UserError: the file is not such a table, has a column twice, or lacks one of the columns.
    """
    data = source.read_bytes() if isinstance(source, Path) else source.read()
    text = _decode_table(decompress(data, name) if isinstance(source, Path) else data, name)
    start = BEFORE_HEADER.match(text).end()  # type: ignore[union-attr]  # it may match nothing
    text, skipped = text[start:], text.count("\n", 0, start)
    separator, header = _read_header(text, columns)
    repeated = [column for column, count in Counter(filter(None, header)).items() if count > 1]
    if repeated:
        raise UserError(
            f"{name}: column {repeated[0]!r} occurs {header.count(repeated[0])} times; rename or delete one"
        )
    try:
        table = pd.read_csv(
            io.StringIO(text, newline=""), sep=separator, dtype=str, keep_default_na=False, skip_blank_lines=False,
            skipinitialspace=True,
        )  # fmt: skip
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{name} is not a CSV table: {' '.join(str(error).split())}; save it as CSV in UTF-8") from None
    if not isinstance(table.index, pd.RangeIndex):
        raise UserError(
            f"{name}: the lines have more fields than the header; name every column or delete the trailing commas"
        )
    table.index += skipped
    if len(header) == len(table.columns):
        table.columns = pd.Index([name or default for name, default in zip(header, table.columns, strict=True)])
    table = table.rename(columns=_match_columns(list(table.columns), [*columns, *optional]))
    check_columns(table, columns, name)
    table = pd.DataFrame({column: _clean_text(values) for column, values in table.items()})
    return table[(table != "").any(axis="columns")]


def _clean_text(values: pd.Series) -> pd.Series:
    text = values.fillna("").str.strip(BLANKS)
    if text.str.startswith('="').any():
        text = text.str.replace(EXCEL_TEXT, r"\1", regex=True).str.strip(BLANKS)
    return text


def check_columns(table: pd.DataFrame, columns: Collection[str], name: str) -> None:
    """Check that a table has these columns.

    Raises:
        UserError: it lacks one.
    """
    for column in columns:
        if column not in table:
            by_case = {str(own).casefold(): own for own in table.columns}
            others = [key for key, own in by_case.items() if own not in columns]  # rarely one that has its use
            near = [
                key for keys in (others, by_case) for key in difflib.get_close_matches(column.casefold(), keys, n=1)
            ]
            hint = f" (did you mean {by_case[near[0]]!r}?)" if near else ""
            raise UserError(
                f"{name}: no column {column!r}{hint}; its header is {','.join(map(str, table.columns))} and must have "
                f"{','.join(columns)}"
            )


def decompress(data: bytes, name: str) -> bytes:
    """Return the content of a file that may be compressed by gzip.

    Raises:
        UserError: it is damaged.
    """
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{name} is damaged ({first_line(error)}); download or copy it again") from None


def _decode_table(data: bytes, name: str) -> str:
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"{name} line {line}: not encoded in UTF-8"
        try:
            text = data.decode("cp1252") if encoding == "utf-8-sig" else "\0"
        except UnicodeDecodeError:
            text = "\0"
        if "\0" not in text:
            excerpt = text.splitlines()[line - 1].strip()[:MAX_QUOTED]
            log.warning("%s; read as Windows-1252: %r; if that is wrong, save it as CSV in UTF-8", problem, excerpt)
    else:
        problem = f"{name} has characters of value 0"
    if "\0" in text:
        raise UserError(f"{problem}, so it is not a CSV table; save it as CSV in UTF-8")
    return text


def _read_header(text: str, columns: Collection[str]) -> tuple[str, list[str]]:
    """Return the separator that gives most of the columns, then most fields, and the header without blanks at ends."""
    wanted = set(map(str.casefold, columns))

    def split(separator: str) -> list[str]:
        try:
            fields = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True), [])
        except csv.Error:
            return []
        return [field.strip(BLANKS) for field in fields]

    headers = {separator: split(separator) for separator in SEPARATORS}
    best = max(
        SEPARATORS, key=lambda key: (len(wanted & set(map(str.casefold, headers[key]))), len(headers[key]))
    )  # the first of equal ones
    return best, headers[best]


def _match_columns(header: list[str], wanted: Collection[str]) -> dict[str, str]:
    """Return the names of columns that equal exactly one wanted one but for upper and lower case."""
    by_case: dict[str, list[str]] = {}
    for name in header:
        by_case.setdefault(name.casefold(), []).append(name)
    spellings = {column: by_case.get(column.casefold(), []) for column in wanted if column not in header}
    return {found[0]: column for column, found in spellings.items() if len(found) == 1}


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
