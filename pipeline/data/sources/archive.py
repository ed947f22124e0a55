"""Source: zips, tars or a folder in the competition's layout, on a disk or behind URLs."""

import bz2
import gzip
import lzma
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from pipeline.core.config import ArchiveParams
from pipeline.core.errors import UserError, first_line, rename_in_errors
from pipeline.core.files import DamagedFileError, check_disk_space, check_zip, detect_damage, escape_undecodable
from pipeline.core.parallel import map_in_threads
from pipeline.core.progress import track_progress, track_reading
from pipeline.data import layout, remote
from pipeline.data.source_folder import SETTING, LocalFolder, SourceFolder, ZipFolder, open_source_folder
from pipeline.data.sources.archive_writer import ZIP_TIMESTAMP, find_references, write_references

CONTENT = "a zip, tar or folder in the competition's layout (docs/data.md)"
# By how the file begins.
DECOMPRESSORS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")  # of archives in buckets


def write_source(params: ArchiveParams, target: Path) -> None:
    """Copy the zip unchanged; write tars, several archives or a folder as one zip; or write references to the images.

    The members of several archives are those of one. Without a copy, everything but the tables is referenced.

    Raises:
        UserError: a path is not set, is missing, is neither archive nor folder, is damaged, or has a member that is
            unsafe or also in another archive; or a folder contains the target or a symbolic link to a file outside.
    """
    if not params.path:
        raise UserError(f"params.yaml: download.path: not set; set it to {CONTENT}")
    paths = params.path if isinstance(params.path, list) else [params.path]
    if len(paths) == 1 and is_folder(paths[0]):
        folder = open_source_folder(paths[0], CONTENT)
        if isinstance(folder, LocalFolder):
            _check_folder(Path(folder.root), target)
        _write_folder(folder, target, copy_images=params.copy_images)
    elif params.copy_images:
        downloads = {path: remote.download_file(path, SETTING, target.parent) for path in paths if remote.is_url(path)}
        with rename_in_errors({str(file): remote.redact_url(url) for url, file in downloads.items()}):
            try:
                files = [downloads.get(path) or _find_file(path) for path in paths]
                if len(files) > 1 or _is_tar(files[0]):
                    _write_archives(files, target)
                else:
                    _copy_zip(files[0], target, is_download=paths[0] in downloads)
            except UserError:
                remote.remove_downloads(target.parent)  # they may be damaged
                raise
        remote.remove_downloads(target.parent)
    else:
        if urls := [path for path in paths if remote.is_url(path)]:
            raise UserError(
                f"{remote.redact_url(urls[0])}: images inside an archive behind a URL have to be copied; remove "
                "download.copy_images: false, or unpack it"
            )
        _write_folder(ZipFolder([_find_zip(path) for path in paths]), target, copy_images=False)


def is_folder(path: str) -> bool:
    """Return whether it is a folder, here or in a bucket, and not an archive."""
    if remote.is_url(path):
        return not remote.is_http(path) and not path.lower().endswith(ENDINGS)
    return Path(path).expanduser().is_dir()


def _find_file(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.exists():
        raise UserError(f"{file}: not found; correct {SETTING}")
    if not file.is_file():
        raise UserError(f"{file}: not a file; of several paths, each must be a zip or tar")
    return file


def _find_zip(path: str) -> Path:
    file = _find_file(path)
    if _is_tar(file):
        raise UserError(
            f"{file}: images inside a tar have to be copied; remove download.copy_images: false, or unpack it"
        )
    return file


def _check_folder(folder: Path, target: Path) -> None:
    if target.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{folder}: contains {target.parent}, the output folder; set download.path to a folder with only the images"
        )
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path}: symbolic link to a file outside of {folder}; replace it with the file itself")


def _write_folder(folder: SourceFolder, target: Path, *, copy_images: bool) -> None:
    copied = [file for file in folder.files if copy_images or file.lower().endswith(".csv")]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        contents = track_progress(map_in_threads(folder.read_bytes, copied), "packing", len(copied))
        for file, content in zip(copied, contents, strict=True):
            _write_member(archive, file, content)
        if not copy_images:
            images = [file for file in folder.files if not file.lower().endswith(".csv")]
            write_references(archive, find_references(map(_encodable_name, images), folder, images))


def _copy_zip(file: Path, target: Path, *, is_download: bool) -> None:
    try:
        with detect_damage():
            zipfile.ZipFile(file).close()
        if is_download:
            check_zip(file)
    except DamagedFileError as error:
        raise UserError(
            f"{file}: neither a zip nor a tar, or damaged ({error}); set download.path to {CONTENT}"
        ) from None
    if is_download:
        file.replace(target)
    else:
        check_disk_space(target.parent, file.stat().st_size)
        shutil.copyfile(file, target)


def _write_archives(files: list[Path], target: Path) -> None:
    origins: dict[str, Path] = {}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            for name, content in _read_tar(file) if _is_tar(file) else _read_zip(file):
                if name in origins:
                    raise UserError(f"{name!r} is in {origins[name]} and in {file}; keep one of them")
                origins[name] = file
                _write_member(archive, name, content)


def _write_member(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    member = zipfile.ZipInfo(_encodable_name(name), ZIP_TIMESTAMP)
    with archive.open(member, "w", force_zip64=True) as out:
        out.write(content)


def _encodable_name(name: str) -> str:
    r"""Escape the bytes of a name that are no UTF-8 as `_xfc`, for `\xfc` would be a file in a folder."""
    return re.sub(r"\\(x[89a-f][0-9a-f])", r"_\1", escape_undecodable(name))


def _read_zip(path: Path) -> Iterator[tuple[str, bytes]]:
    folder = ZipFolder([path])
    for file in track_progress(folder.files, f"reading {path.name}", len(folder.files)):
        yield file, folder.read_bytes(file)


def _is_tar(path: Path) -> bool:
    with path.open("rb") as stream:
        head = stream.read(tarfile.BLOCKSIZE)
    if head.startswith(tuple(DECOMPRESSORS)):
        return True
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _read_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents in the order of the tar, which is read once and never unpacked.

    Raises:
        UserError: it is damaged, or a member is neither file nor folder, is too large, or decompresses to too much.
    """
    try:
        with (
            detect_damage(),
            path.open("rb") as file,
            track_reading(file, path.stat().st_size, f"reading {path.name}") as raw,
        ):
            yield from _read_members(raw, path)
    except (DamagedFileError, tarfile.TarError) as error:
        raise UserError(f"{path}: damaged tar ({first_line(error)}); download or copy it again") from None


def _read_members(raw: BinaryIO, path: Path) -> Iterator[tuple[str, bytes]]:
    head = raw.read(6)
    raw.seek(0)
    decompress = next((function for magic, function in DECOMPRESSORS.items() if head.startswith(magic)), None)
    stream = BoundedStream(raw, decompress(raw) if decompress else raw)
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictTarInfo) as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            archive.members.clear()  # or memory grows with their number
            name = member.name.removeprefix("./")
            if member.isdir() or layout.is_ignored(name):
                continue
            problems = {
                "is a link": member.islnk() or member.issym(),
                "is neither a file nor a folder": not member.isreg(),
                f"is too large ({member.size} bytes)": member.size > layout.MAX_MEMBER_SIZE,
            }
            if problem := next((text for text, is_present in problems.items() if is_present), ""):
                raise UserError(f"{path}: {name!r} {problem}; create the tar again without it")
            content = archive.extractfile(member)
            assert content is not None  # noqa: S101  # it is a file
            yield name, content.read()
        check_end(archive)


def check_end(archive: Any) -> None:
    """Raise `DamagedFileError` if anything but zeros follows the last member of a tar."""
    while rest := archive.fileobj.read(2**20):
        if rest.strip(b"\0"):
            raise DamagedFileError("it goes on after its end")


class BoundedStream:
    """What a compressed file decompresses to, until that is more than any radiograph would."""

    def __init__(self, raw: BinaryIO, stream: IO[bytes]) -> None:
        self._raw, self._stream, self._size = raw, stream, 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._size += len(data)
        if self._size > layout.MIN_BOMB_SIZE + layout.MAX_COMPRESSION_RATIO * self._raw.tell():
            raise DamagedFileError(f"a decompression bomb ({self._raw.tell()} to {self._size} bytes)")
        return data


class StrictTarInfo(tarfile.TarInfo):
    """A header of a tar; tarfile takes a damaged one, or none, for the end, and so loses what follows."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "StrictTarInfo":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise DamagedFileError(first_line(error)) from None
