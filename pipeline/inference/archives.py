"""Image files, here or behind URLs, and those in zips and tars, which are read without unpacking them."""

import functools
import os
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

from pipeline.core.errors import UserError, first_line
from pipeline.core.files import DamagedFileError, detect_damage
from pipeline.data import image_checks, layout, remote
from pipeline.data.image_checks import UnusableError, check_bytes
from pipeline.data.sources.archive import DECOMPRESSORS, ENDINGS, BoundedStream, StrictTarInfo, check_end

SETTING = "the URL"  # in errors
MAX_HEADER = 2**20  # bytes of a tar's extended header, which is read as a whole
HEADER_TYPES = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


@dataclass(frozen=True)
class ImageFile:
    """A file that may be a radiograph, here, behind a URL, or in a zip or tar.

    Attributes:
        path: the file or archive, a path or a URL.
        member: the file's name in the archive; empty outside of one.
        is_named: the user typed its name; it was not found in a folder, by a pattern or in an archive.
        size: bytes, if known.
        offset: where its content is in an uncompressed tar.
        content: of a member of a tar that can only be read from its start to its end.
        problem: why it cannot be read.
    """

    path: str
    member: str = ""
    is_named: bool = False
    size: int | None = None
    offset: int | None = None
    content: bytes | None = field(default=None, repr=False)
    problem: str = ""

    @property
    def name(self) -> str:
        """What the user calls it: its path or URL without credentials, and its name in an archive."""
        path = remote.redact_url(self.path) if remote.is_url(self.path) else self.path
        return f"{path}/{layout.clean_name(self.member)}" if self.member else path

    def read(self) -> bytes:
        """Return the content.

        Raises:
            UnusableError: it is too large, damaged in its archive, or one that has to be left there, such as a link.
            OSError: the file cannot be read.
            UserError: the URL cannot be read; UnreachableError, if it may work later.
        """
        if self.problem:
            raise UnusableError(self.problem)
        check_bytes(self.size or 0)
        if self.content is not None:
            return self.content
        if self.member and self.offset is None:
            return self._read_from_zip()
        return self._read_url() if remote.is_url(self.path) else self._read_local()

    def _read_from_zip(self) -> bytes:
        try:
            return layout.read_member(_open_zip(self.path, _modification_time(self.path)), self.member)
        except KeyError:
            raise UnusableError("no longer in the zip") from None
        except DamagedFileError as error:
            raise UnusableError(f"damaged in the zip: {error}") from None

    def _read_local(self) -> bytes:
        with Path(self.path).open("rb") as stream:
            stat = os.fstat(stream.fileno())
            if self.offset is not None:
                stream.seek(self.offset)
                return stream.read(self.size)
            check_bytes(stat.st_size)
            data = stream.read() if stat.st_size else stream.read(image_checks.MAX_BYTES + 1)  # of a pipe
        check_bytes(len(data))
        return data

    def _read_url(self) -> bytes:
        file_system, path = remote.open_file_system(self.path, SETTING)
        with remote.report_errors(self.path, SETTING):
            if self.size is not None:
                data: bytes = file_system.cat_file(path)
                return data
            content = bytearray()
            with remote.open_at(file_system, path, 0)[0] as stream:
                while part := stream.read(2**20):
                    content += part
                    check_bytes(len(content))
            return bytes(content)


def is_archive(path: str) -> bool:
    """Return whether the ending of a path is that of a zip or tar."""
    return _name(path).endswith(ENDINGS)


def is_tar(path: str) -> bool:
    """Return whether the ending of a path is that of a tar, which may be compressed."""
    return is_archive(path) and not _name(path).endswith(".zip")


def iterate_members(path: str) -> Iterator[ImageFile]:
    """Yield the files in a zip or tar in their order; a damaged archive ends with a file without a name that says so.

    Of a zip, the names of all members are in memory, of a tar nothing but the member. Those of a tar that is compressed
    or behind a URL have their content.

    Raises:
        OSError: it cannot be read.
        UserError: its URL cannot be read.
    """
    try:
        with detect_damage():
            for file in _iterate_tar(path) if is_tar(path) else _iterate_zip(path):
                if not layout.is_ignored(layout.clean_name(file.member)):
                    yield file
    except (DamagedFileError, tarfile.TarError) as error:
        yield ImageFile(path, problem=f"damaged {'tar' if is_tar(path) else 'zip'}: {first_line(error)}")


def _name(path: str) -> str:
    return (remote.redact_url(path) if remote.is_url(path) else path).lower()  # without the query of a URL


def _iterate_zip(path: str) -> Iterator[ImageFile]:
    archive: Any = _open_zip(path, _modification_time(path))
    size = archive.fp.seek(0, os.SEEK_END)
    for member in archive.infolist():
        is_last = archive.NameToInfo[member.filename] is member  # which is read by its name
        problem = layout.find_problem(member, size) if is_last else "occurs twice"
        yield ImageFile(path, member.filename, size=member.file_size, problem=problem)


def _modification_time(path: str) -> float:
    return 0.0 if remote.is_url(path) else Path(path).stat().st_mtime


@functools.lru_cache(maxsize=4)
def _open_zip(path: str, modification_time: float) -> zipfile.ZipFile:  # noqa: ARG001  # a file that changed is another
    """Open a zip, from which several threads can read."""
    return zipfile.ZipFile(_RemoteFile(path, is_sequential=False) if remote.is_url(path) else path)


def _iterate_tar(path: str) -> Iterator[ImageFile]:
    is_remote = remote.is_url(path)
    with _RemoteFile(path, is_sequential=True) if is_remote else Path(path).open("rb") as raw:
        start = raw.read(max(map(len, DECOMPRESSORS)))
        decompress = next((function for magic, function in DECOMPRESSORS.items() if start.startswith(magic)), None)
        stream: Any = raw
        is_stream = bool(decompress or is_remote)
        if is_stream:
            source: Any = _Source(start, raw)
            stream = BoundedStream(source, decompress(source) if decompress else source)
        else:
            raw.seek(0)
        mode = "r|" if is_stream else "r:"
        with tarfile.open(fileobj=stream, mode=mode, tarinfo=_BoundedTarInfo) as archive:  # type: ignore[call-overload]
            yield from _iterate_tar_members(path, archive, reads_content=is_stream)
            check_end(archive)


def _iterate_tar_members(path: str, archive: Any, *, reads_content: bool) -> Iterator[ImageFile]:
    position = -1
    while (member := archive.next()) is not None:
        if archive.offset <= position:  # a negative size
            raise DamagedFileError("invalid header")
        position = archive.offset
        archive.members.clear()  # or memory grows with their number
        if member.isdir():
            continue
        problems = {
            "is a link": member.islnk() or member.issym(),
            "is not a regular file": not member.isreg() or member.issparse(),
            f"is too large ({member.size} bytes)": member.size > image_checks.MAX_BYTES,
        }
        problem = next((text for text, is_present in problems.items() if is_present), "")
        content = archive.extractfile(member).read() if reads_content and not problem else None
        yield ImageFile(path, member.name, False, member.size, member.offset_data, content, problem)


class _RemoteFile:
    """A file behind a URL, whose errors are those that users see, so that none is taken for a damaged archive."""

    def __init__(self, url: str, *, is_sequential: bool) -> None:
        self._url, (file_system, path) = url, remote.open_file_system(url, SETTING)
        with remote.report_errors(url, SETTING):
            self._file = remote.open_at(file_system, path, 0)[0] if is_sequential else file_system.open(path, "rb")

    def read(self, size: int = -1) -> bytes:
        try:
            with remote.report_errors(self._url, SETTING):
                data: bytes = self._file.read(size)
        except ValueError:  # of fsspec: the server does not support range requests
            url = remote.redact_url(self._url)
            raise UserError(f"{url}: the server sends no parts of a file, which a zip needs; download it") from None
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _Source:
    """A stream with what was already read of it, that counts its bytes."""

    def __init__(self, start: bytes, raw: Any) -> None:
        self._start, self._raw, self._position = start, raw, 0

    def read(self, size: int) -> bytes:
        data, self._start = self._start[:size], self._start[size:]
        data = data or self._raw.read(size)
        self._position += len(data)
        return data

    def tell(self) -> int:
        return self._position


class _BoundedTarInfo(StrictTarInfo):
    """A header of a tar, whose extended headers, which tarfile reads as a whole, are not too large."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = cast(Self, super().frombuf(buf, encoding, errors))
        if header.size < 0 or (header.type in HEADER_TYPES and header.size > MAX_HEADER):
            raise DamagedFileError("invalid header")
        return header
