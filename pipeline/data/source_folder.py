"""The folder that a source reads, on a disk, in a bucket or inside zips: its files are listed once."""

import logging
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.files import escape_undecodable, unescape_undecodable
from pipeline.data import layout, remote

log = logging.getLogger(__name__)

SETTING = "download.path in params.yaml"  # in errors


class SourceFolder(ABC):
    """A folder and its files.

    Attributes:
        root: the folder, for error messages: a path or a URL, such as s3://bucket/folder.
    """

    root: str

    @cached_property
    def files(self) -> list[str]:
        """Paths relative to the folder, with `/` between folders, sorted; without what file managers write."""
        return sorted(file for file in self._list_files() if not layout.is_ignored(file))

    @abstractmethod
    def _list_files(self) -> Iterable[str]: ...

    @abstractmethod
    def read_bytes(self, file: str) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: there is no such file.
            DamagedFileError: it is damaged inside its zip.
            UserError: it is too large, or the bucket does not answer.
        """

    def read_checksum(self, file: str) -> tuple[int, int]:
        """Return the size (bytes) and the CRC-32 of a file's content, which say whether it is still the same."""
        content = self.read_bytes(file)
        return len(content), zlib.crc32(content)


class LocalFolder(SourceFolder):
    def __init__(self, root: str) -> None:
        self.root = root

    def _list_files(self) -> Iterator[str]:
        dangling: list[str] = []
        yield from map(escape_undecodable, _walk(self.root, dangling))
        lost = sorted(link for link in dangling if not layout.is_ignored(link))
        if lost:
            log.warning(
                "%s: %s symbolic links lead to nothing and are left out, the first is %s; restore their files "
                "(git-annex: git annex get)",
                self.root,
                len(lost),
                escape_undecodable(lost[0]),
            )

    def read_bytes(self, file: str) -> bytes:
        path = Path(self.root, file)
        if "\\x" in file and not path.exists():
            path = Path(self.root, unescape_undecodable(file))
        _check_size(path, path.stat().st_size)
        return path.read_bytes()


class RemoteFolder(SourceFolder):
    def __init__(self, url: str) -> None:
        self.root = remote.redact_url(url).rstrip("/")
        self._file_system, path = remote.open_file_system(url, SETTING)
        self._path = path.rstrip("/")
        self._sizes: dict[str, int] = {}

    def is_file(self) -> bool:
        with remote.report_errors(self.root, SETTING):
            return bool(self._file_system.isfile(self._path))

    def exists(self) -> bool:
        with remote.report_errors(self.root, SETTING):
            return bool(self._file_system.exists(self._path))

    def _list_files(self) -> Iterable[str]:
        with remote.report_errors(self.root, SETTING):
            found = self._file_system.find(self._path, detail=True)
        self._sizes = {path.removeprefix(self._path).lstrip("/"): info.get("size") or 0 for path, info in found.items()}
        return self._sizes

    def read_bytes(self, file: str) -> bytes:
        _check_size(f"{self.root}/{file}", self._sizes.get(file, 0))  # of a file that was listed
        with remote.report_errors(self.root, SETTING):
            try:
                content: bytes = self._file_system.cat_file(f"{self._path}/{file}")
            except FileNotFoundError as error:
                missing = error
            else:
                return content
        raise missing


class ZipFolder(SourceFolder):
    """The members of zips as if they were unpacked into one folder."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.root = ", ".join(map(str, paths))
        self._members: dict[str, tuple[zipfile.ZipFile, str]] = {}
        for path in paths:
            archive = layout.open_zip(path)
            for member in archive.namelist():
                name = layout.clean_name(member)
                if name in self._members and not name.endswith("/"):
                    other = self._members[name][0].filename
                    raise UserError(f"{name!r} is in {other} and in {path}; keep one of them")
                self._members[name] = archive, member

    def _list_files(self) -> Iterable[str]:
        return self._members

    def read_bytes(self, file: str) -> bytes:
        return layout.read_member(*self._find(file))

    def read_checksum(self, file: str) -> tuple[int, int]:
        archive, member = self._find(file)
        info = archive.getinfo(member)
        return info.file_size, info.CRC

    def _find(self, file: str) -> tuple[zipfile.ZipFile, str]:
        if file not in self._members:
            raise FileNotFoundError(file)
        return self._members[file]


def open_source_folder(path: str | Path | list[str] | None, content: str) -> SourceFolder:
    """Open `download.path`: a folder, also s3://…, or one or several zips; `content` describes it in error messages.

    Raises:
        UserError: it is not set, is missing, or is neither a folder nor a zip.
    """
    if not path:
        raise UserError(f"params.yaml: download.path: not set; set it to {content}")
    if isinstance(path, list) and len(path) == 1:
        path = path[0]
    if isinstance(path, list):
        return ZipFolder([Path(one).expanduser() for one in path])
    if remote.is_url(str(path)):
        return _open_remote_folder(str(path), content)
    local = Path(path).expanduser()
    if local.is_dir():
        return LocalFolder(str(local))
    if not local.exists():
        raise UserError(f"{local}: no such folder; set {SETTING} to {content}")
    if not zipfile.is_zipfile(local):
        raise UserError(
            f"{local}: neither a folder nor a zip; unpack it if it is an archive, and set download.path to {content}"
        )
    return ZipFolder([local])


def _open_remote_folder(url: str, content: str) -> RemoteFolder:
    if remote.is_http(url):
        raise UserError(
            f"{remote.redact_url(url)}: a web server does not list its files; download and unpack it, and set "
            "download.path to the folder"
        )
    folder = RemoteFolder(url)
    if not folder.exists():
        raise UserError(f"{folder.root}: no such folder, or empty; set {SETTING} to {content}")
    if folder.is_file():
        raise UserError(f"{folder.root}: a file, not a folder; download it first, and set download.path to it there")
    return folder


def _check_size(path: str | Path, size: int) -> None:
    if size > layout.MAX_MEMBER_SIZE:
        raise UserError(f"{path}: too large for an image ({size} bytes); move it out of the folder")


def _walk(folder: str, dangling: list[str], parent: str = "") -> Iterator[str]:
    """Yield the files below a local folder, also those that symbolic links lead to; collect links to nothing."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file():
                yield parent + entry.name
            elif entry.is_dir():
                if not _is_loop(entry):
                    yield from _walk(entry.path, dangling, f"{parent}{entry.name}/")
            elif entry.is_symlink():
                dangling.append(parent + entry.name)


def _is_loop(entry: os.DirEntry[str]) -> bool:
    folder = Path(entry.path)
    return entry.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())
