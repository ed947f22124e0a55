"""Tables of predictions as files that grow while files are classified: CSV, JSON Lines or Parquet."""

import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pandas as pd

from pipeline.core.errors import UserError
from pipeline.core.files import atomic_path, is_regular, make_folder, resolve_target

if TYPE_CHECKING:
    import pyarrow as pa

Write = Callable[[pd.DataFrame], None]  # adds rows to a table
STDOUT = Path("-")
REQUIRED = {  # columns of the tables of predictions, with their types
    "file": "str", "probability": "float", "label": "Int64", "reason": "str", "agreement": "float", "model": "str",
    "version": "str", "threshold": "float", "prevalence": "float",
}  # fmt: skip
COLUMNS = REQUIRED | {"heatmap": "str", "referred": "Int64"}
TERMINAL_COLUMNS = ["probability", "label", "agreement"]  # with the file
MAX_HEAD = 2**16  # bytes of the first line of a table
ROWS_PER_GROUP = 2000  # of Parquet, which are in memory until they are written


@contextmanager
def open_table(path: Path, file_format: str) -> Iterator[Write]:
    """Open a table for writing, which shows whether it can be written; what is there is kept until the first rows come.

    Rows of text, CSV and JSON Lines are written as they come: a run that is stopped leaves those so far. Parquet is
    written aside, and is there at the end or not at all. A symbolic link is followed, and a stream is never replaced.

    Args:
        path: the table; `-` is standard output.
        file_format: csv, json, parquet, or text for people.

    Raises:
        UserError: a file is there that is no table of this format, such as an image that was taken for it, or none can
            be created.
        OSError: it cannot be written.
    """
    is_file = not is_stream(path)
    target = path if path == STDOUT else resolve_target(path)
    with ExitStack() as stack:
        if is_file and target.exists():
            _check_columns(path, file_format)
        elif is_file:
            stack.enter_context(make_folder(target.parent))
        opener = _open_parquet(target) if file_format == "parquet" else _open_lines(target, LINES[file_format])
        yield stack.enter_context(opener)


def is_stream(path: Path) -> bool:
    """Return whether a table is written to something else than a file, such as `-`, a pipe or /dev/stdout."""
    return path == STDOUT or not is_regular(path)


def mark_referred(table: pd.DataFrame, share: float) -> pd.DataFrame:
    """Add the column `referred`, 1 for the files that a person should look at first: the unusable and least certain.

    Args:
        table: of `predict_files`, with all files.
        share: of the usable files, rounded up to whole files, whose probability is nearest to the threshold.
    """
    from pipeline.evaluation.referral import threshold_uncertainty  # imports scikit-learn

    usable = table[table["reason"] == ""]
    uncertainty = threshold_uncertainty(usable["probability"].to_numpy(float), usable["threshold"].to_numpy(float))
    count = math.ceil(share * len(usable) - 1e-9)
    first = usable.index[uncertainty.argsort(kind="stable")[::-1][:count]]
    return table.assign(referred=((table["reason"] != "") | table.index.isin(first)).astype("Int64"))


def count_rows(table: pd.DataFrame) -> Counter[str]:
    """Count the `files`, and of them the `positive` and the `unusable`."""
    return Counter(files=len(table), positive=int(table["label"].sum()), unusable=int(table["reason"].ne("").sum()))


def _check_columns(path: Path, file_format: str) -> None:
    if path.stat().st_size and _read_columns(path, file_format)[: len(REQUIRED)] != list(REQUIRED):
        raise UserError(
            f"{path}: no table of cxr predict in this format; delete it, or give --{file_format} another name"
        )


def _read_columns(path: Path, file_format: str) -> list[str]:
    """Return the names of the columns, or something else of another file."""
    with suppress(ValueError, TypeError, RecursionError, OSError):
        if file_format == "parquet":
            from pyarrow.parquet import read_schema

            return list(read_schema(path).names)
        with path.open("rb") as stream:
            line = stream.readline(MAX_HEAD).decode().rstrip("\n")
        return line.split(",") if file_format == "csv" else list(json.loads(line))
    return []


def _open_stream(path: Path) -> AbstractContextManager[BinaryIO]:
    """Open what is not replaced but added to."""
    return nullcontext(sys.stdout.buffer) if path == STDOUT else path.open("ab", buffering=0)


@contextmanager
def _open_lines(path: Path, format_rows: Callable[[pd.DataFrame, bool], str]) -> Iterator[Write]:
    is_file, is_first = not is_stream(path), True
    is_new = is_file and not path.exists()
    with _open_stream(path) as stream:

        def write(rows: pd.DataFrame) -> None:
            nonlocal is_first
            if is_first and is_file:
                stream.truncate(0)
            _write_rows(stream, format_rows(rows, is_first).encode(), can_truncate=is_file)
            is_first = False

        try:
            yield write
        finally:
            if is_new and is_first:
                path.unlink()


def _write_rows(stream: BinaryIO, rows: bytes, *, can_truncate: bool) -> None:
    """Write rows; if the disk becomes full, none of them is left half-written."""
    left = memoryview(rows)
    while left:
        try:
            left = left[stream.write(left) :]
        except OSError:
            if can_truncate:
                stream.truncate(stream.tell() - (len(rows) - len(left)))
            raise
    stream.flush()


def _format_csv(rows: pd.DataFrame, with_header: bool) -> str:  # as _format_json
    return rows.to_csv(index=False, header=with_header, float_format="%.9g", lineterminator="\n")


def _format_json(rows: pd.DataFrame, _: bool) -> str:  # as _format_csv
    records = rows.map(_round).astype(object).where(rows.notna(), None).to_dict("records")
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _round(value: Any) -> Any:
    return float(f"{value:.9g}") if isinstance(value, float) else value  # nine significant digits, as in CSV


def _format_text(rows: pd.DataFrame, with_header: bool) -> str:
    """Format rows for people; names, which are last, are never cut."""
    columns = [*TERMINAL_COLUMNS, "referred"] if "referred" in rows else TERMINAL_COLUMNS
    lines = ["  ".join([*columns, "file"])] if with_header else []
    for row in rows.to_dict("records"):
        cells = {"probability": "–", "label": "–", "agreement": "–", "referred": "yes" if row.get("referred") else "no"}
        if not row["reason"]:
            cells["probability"], cells["label"] = f"{row['probability']:.4f}", str(row["label"])
            cells["agreement"] = f"{row['agreement']:.0%}"
        name = "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in row["file"])
        details = filter(None, (name, row["reason"], row.get("heatmap")))
        lines.append("  ".join([*(f"{cells[column]:>{len(column)}}" for column in columns), ": ".join(details)]))
    return "".join(f"{line}\n" for line in lines)


LINES = {"csv": _format_csv, "json": _format_json, "text": _format_text}


def make_schema(table: pd.DataFrame) -> "pa.Schema":
    """Return Arrow's schema of a table of predictions."""
    import pyarrow as pa

    types = {"str": pa.string(), "float": pa.float64(), "Int64": pa.int64()}
    return pa.schema([(name, types[COLUMNS[str(name)]]) for name in table])


@contextmanager
def _open_parquet(path: Path) -> Iterator[Write]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    with ExitStack() as stack:
        target = None
        if is_stream(path):  # which gets all at the end, for a writer that is stopped completes its file
            target = stack.enter_context(_open_stream(path))
            file: Any = stack.enter_context(tempfile.TemporaryFile())
        else:
            file = stack.enter_context(stack.enter_context(atomic_path(path)).open("wb"))
        writer, waiting = None, list[pd.DataFrame]()

        def flush() -> None:
            nonlocal writer
            if waiting:
                rows = pd.concat(waiting, ignore_index=True)
                schema = make_schema(rows)
                writer = writer or ParquetWriter(file, schema)
                writer.write_table(pa.Table.from_pandas(rows, schema, preserve_index=False))
                waiting.clear()

        def write(rows: pd.DataFrame) -> None:
            waiting.append(rows)
            if sum(map(len, waiting)) >= ROWS_PER_GROUP:
                flush()

        try:
            yield write
            flush()
        finally:
            if writer:
                writer.close()
        if target:
            file.seek(0)
            while part := file.read(2**20):
                _write_rows(target, part, can_truncate=False)
