"""Predictions of millions of images: a list of partitions of the input, and a Parquet file for each, in one folder.

The folder is local or behind an fsspec URL. Whatever has its final name is complete, so a run that was stopped goes on
with the partitions whose Parquet file is missing.
"""

import io
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pipeline.core.errors import UnreachableError, UserError, redact_credentials
from pipeline.core.parallel import map_in_threads
from pipeline.data.remote import is_http, is_url, open_file_system, redact_url, report_errors
from pipeline.inference.archives import ImageFile, is_tar, iterate_members
from pipeline.inference.image_files import ImageFiles, expand_archive
from pipeline.inference.prediction_table import count_rows, make_schema

SETTING = "the output"  # in errors
LIST_FILE = "_partitions.jsonl"  # readers of Parquet folders skip names with `_` or `.` in front
PART_FILE = re.compile(r"part-(\d{5,})\.parquet")
COUNTS = b"counts"  # in the metadata of a Parquet file
IMAGES_PER_PARTITION = 512  # a multiple of the batch sizes; some seconds of one core


@dataclass(frozen=True)
class Partition:
    """Where a partition's images are listed: a line of the list file."""

    index: int
    offset: int  # bytes
    length: int


def split_into_partitions(files: ImageFiles) -> Iterator[list[ImageFile]]:
    """Yield lists of at most `IMAGES_PER_PARTITION` files.

    A tar, which is read from its start to its end, is a partition of its own.
    """
    partition: list[ImageFile] = []
    for unexpanded in files.unexpanded():
        if is_tar(unexpanded.path):
            yield [unexpanded]
            continue
        for file in _expand(unexpanded):
            partition.append(file)
            if len(partition) == IMAGES_PER_PARTITION:
                yield partition
                partition = []
    if partition:
        yield partition


class ListedFile(ImageFile):
    """A file of the list; that it cannot be read now, as while a disk is not mounted, must not become a final row."""

    def read(self) -> bytes:
        """Return the content.

        Raises:
            UnusableError: see `ImageFile.read`.
            UnreachableError: it cannot be read.
        """
        try:
            return super().read()
        except (UserError, OSError) as error:
            raise UnreachableError(str(error)) from None


def _expand(file: ImageFile) -> Iterator[ImageFile]:
    try:
        yield from expand_archive(file)
    except UnreachableError:
        raise
    except UserError as error:  # one of thousands of archives, which another run cannot read either
        yield ImageFile(file.path, problem=str(error))


def check_names(names: Iterable[str], output: str) -> None:
    """Check that no URL has credentials, which would be written to the list, and the output is in none of the inputs.

    Raises:
        UserError: one has, or it is, and a later run would take its files for images.
    """
    for url in filter(is_url, (*names, output)):
        parts = urlsplit(url)
        if parts.password or "=" in parts.query or (is_http(url) and ("@" in parts.netloc or parts.query)):
            raise UserError(
                f"{redact_credentials(redact_url(url))}: the URL has a password or query, which would be kept in the "
                "output; leave it out, for each machine uses its own credentials"
            )
    for name in names:
        if is_url(name) or is_url(output):
            is_inside = f"{output.rstrip('/')}/".startswith(f"{name.rstrip('/')}/")
        else:
            is_inside = Path(output).resolve().is_relative_to(Path(name).resolve())
        if is_inside:
            raise UserError(f"{output}: is in the input {name}; give an output outside of it")


class PartitionFolder:
    """The folder of one run: the list of partitions, which the first call writes, and the predictions of each.

    Several runs of the same command at once are possible: the list is that of the first to complete it.
    """

    def __init__(self, name: str) -> None:
        """Open a local path or an fsspec URL, in which there may be nothing yet."""
        self.name = name.rstrip("/") or name
        self._file_system, self._path = open_file_system(self.name, SETTING)
        self._is_local = isinstance(self._file_system, LocalFileSystem)

    def check(self, settings: Mapping[str, Any]) -> str:
        """Return when the images were listed; an empty text if they are not.

        Raises:
            UserError: the folder holds a run with other settings or something else.
        """
        names = self._names()
        if LIST_FILE not in names:
            if any(not name.startswith(".") for name in names):
                raise UserError(f"{self.name}: not empty, and no output of cxr predict --ray; give a new folder")
            return ""
        with self._report_errors(), self._file_system.open(f"{self._path}/{LIST_FILE}", "rb") as stream:
            of_folder = json.loads(stream.readline())
        for key, value in settings.items():
            if of_folder.get(key) != value:
                raise UserError(
                    f"{self.name}: holds predictions with {key} {_format(of_folder.get(key))}, not {_format(value)}; "
                    "give the same again, or a new folder"
                )
        return str(of_folder["listed"])

    def start(self, settings: Mapping[str, Any], files: ImageFiles) -> None:
        """Write the list of partitions, unless it is there.

        Args:
            settings: what the predictions depend on, as JSON; the same at every start.
            files: all images.

        Raises:
            UserError: see `check`; or the folder cannot be written.
        """
        if self.check(settings):
            return
        with self._write_aside() as temporary, self._report_errors():
            if not self._is_local:  # show that it can be written, before millions of files are listed
                probe = f"{self._path}/{temporary.name}"
                self._file_system.pipe_file(probe, b"")
                self._file_system.rm_file(probe)
            _write_list(temporary, settings, files)
            with suppress(FileExistsError):  # of another driver
                if self._is_local:
                    _move_to_new(temporary, Path(self._path, LIST_FILE))
                else:
                    self._file_system.put_file(str(temporary), f"{self._path}/{LIST_FILE}", mode="create")
        self.check(settings)

    @contextmanager
    def _write_aside(self) -> Iterator[Path]:
        """Yield a path that no other process uses, on the disk of the folder if that is local."""
        with nullcontext(self._path) if self._is_local else tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, f".{uuid4().hex}.part")
            temporary.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)

    def read_partition(self, partition: Partition) -> Iterator[ImageFile]:
        """Yield the images of a partition.

        Raises:
            OSError: a tar cannot be read.
            UserError: its URL cannot be read.
        """
        end = partition.offset + partition.length
        with self._report_errors():
            line = self._file_system.cat_file(f"{self._path}/{LIST_FILE}", start=partition.offset, end=end)
        for fields in json.loads(line):
            file = ListedFile(*fields)
            if is_tar(file.path) and not file.problem:
                for member in iterate_members(file.path):
                    yield ListedFile(**vars(member))
            else:
                yield file

    def missing(self) -> Iterator[Partition]:
        """Yield the partitions whose predictions are not there."""
        finished = self._finished()
        with self._report_errors(), self._file_system.open(f"{self._path}/{LIST_FILE}", "rb") as stream:
            offset = len(stream.readline())
            for index, line in enumerate(stream):
                if index not in finished:
                    yield Partition(index, offset, len(line))
                offset += len(line)

    def _finished(self) -> set[int]:
        return {int(match[1]) for match in map(PART_FILE.fullmatch, self._names()) if match}

    def has_predictions(self, partition: Partition) -> bool:
        with self._report_errors():
            return bool(self._file_system.exists(f"{self._path}/{_part_file(partition.index)}"))

    def write_predictions(self, partition: Partition, table: pd.DataFrame, skipped: int) -> None:
        """Write the predictions of a partition, in which so many files were skipped as plainly no images."""
        stream, path = io.BytesIO(), f"{self._path}/{_part_file(partition.index)}"
        counts = count_rows(table) + Counter(skipped=skipped)
        rows = pa.Table.from_pandas(table, make_schema(table), preserve_index=False)
        pq.write_table(rows.replace_schema_metadata({COUNTS: json.dumps(counts)}), stream)
        if self._is_local:
            with self._write_aside() as temporary:
                temporary.write_bytes(stream.getvalue())
                temporary.replace(path)
        else:
            with self._report_errors():
                self._file_system.pipe_file(path, stream.getvalue())

    def count(self) -> Counter[str]:
        """Count the `files`, and of them the `positive` and `unusable`, and those `skipped`, of which are no rows."""
        return sum(map_in_threads(self._count, sorted(self._finished())), Counter[str]())

    def _count(self, index: int) -> Counter[str]:
        with self._report_errors(), self._file_system.open(f"{self._path}/{_part_file(index)}", "rb") as stream:
            return Counter(json.loads(pq.read_metadata(stream).metadata[COUNTS]))

    def _names(self) -> set[str]:
        with self._report_errors():
            self._file_system.invalidate_cache()
            if not self._file_system.exists(self._path):
                return set()
            if self._file_system.isfile(self._path):
                raise UserError(f"{self.name}: a file; give a folder for the predictions")
            return {entry.rstrip("/").rpartition("/")[2] for entry in self._file_system.ls(self._path, detail=False)}

    def _report_errors(self) -> AbstractContextManager[None]:
        return nullcontext() if self._is_local else report_errors(self.name, SETTING)


def _write_list(path: Path, settings: Mapping[str, Any], files: ImageFiles) -> None:
    listed = datetime.now().astimezone().isoformat(" ", "minutes")
    with path.open("w", encoding="ascii") as out:
        out.write(json.dumps({**settings, "listed": listed}) + "\n")
        for partition in split_into_partitions(files):
            out.write(json.dumps([list(vars(file).values()) for file in partition]) + "\n")


def _move_to_new(source: Path, target: Path) -> None:
    """Move a file; raise FileExistsError if the target exists."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # this file system has no hard links
        source.replace(target)


def _part_file(index: int) -> str:
    return f"part-{index:05}.parquet"


def _format(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return ", ".join(map(str, value[:3])) + (f" and {len(value) - 3} more" if len(value) > 3 else "")
