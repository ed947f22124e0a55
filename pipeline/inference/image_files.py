"""Image files as users name them: files, folders, patterns, zips and tars, here or behind URLs."""

import glob
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError
from pipeline.core.files import escape_undecodable
from pipeline.data import remote
from pipeline.inference import archives
from pipeline.inference.archives import SETTING, ImageFile

PATTERN = re.compile(r"[*?\[]")


class ImageFiles:
    """Files, folders, patterns such as `x/*.png`, zips and tars, here or behind URLs, expanded when iterated over.

    Folders are read recursively, and the archives in them are too, if their ending is that of one. Of a single name,
    only the names in one folder or zip at a time are in memory, so there may be millions of files.
    """

    def __init__(self, names: Sequence[str], excluded: Collection[Path] = ()) -> None:
        """Check the names; `excluded` are files and folders inside the folders that are none of the images.

        Raises:
            UserError: a name matches no file or is that of an excluded folder, or a URL cannot be read.
        """
        self.names, self.excluded = names, excluded
        for name in names:
            folder = Path(*_root(name))
            if any(path.is_dir() and folder.is_dir() and path.samefile(folder) for path in excluded):
                raise UserError(f"{name}: results go to this folder; give another folder for them")
            if next(chain.from_iterable(map(expand_archive, self._expand(name))), None) is None:
                raise UserError(
                    f"{escape_undecodable(name) or repr(name)}: no files found; give radiographs, folders, patterns, "
                    "zips or tars"
                )

    def __iter__(self) -> Iterator[ImageFile]:
        """Yield every file once, those of a folder in the order of their paths, with the members of archives."""
        return chain.from_iterable(map(expand_archive, self.unexpanded()))

    def unexpanded(self) -> Iterator[ImageFile]:
        """Yield every file and archive once, for `expand_archive`."""
        # Only if they may overlap do the names of all files have to be remembered.
        roots = sorted(map(_root, self.names))
        files = chain.from_iterable(map(self._expand, self.names))
        if not any(second[: len(first)] == first for first, second in pairwise(roots)):
            yield from files
            return
        named, seen = set(self.names), set[str]()
        for file in files:
            if file.path not in seen:
                yield replace(file, is_named=file.is_named or file.path in named)
            seen.add(file.path)

    def count(self) -> int | None:
        """Return the number of files; None if counting would take as long as reading, as of a tar or behind a URL."""
        if any(map(remote.is_url, self.names)):
            return None
        count = 0
        for file in self.unexpanded():
            if archives.is_tar(file.path):
                return None
            count += sum(1 for _ in expand_archive(file))
        return count

    def _expand(self, name: str) -> Iterator[ImageFile]:
        if remote.is_url(name):
            yield from _expand_url(name)
            return
        path = Path(name)
        if path.is_dir() and name:
            yield from self._walk(name)
        elif path.exists() and name:
            yield ImageFile(str(path), is_named=True)
        else:
            matches = sorted(map(Path, glob.iglob(name, recursive=True)))  # noqa: PTH207  # it takes absolute patterns
            for match in matches:
                below_root = match.parents[: len(match.parts) - len(_root(name)) - 1]
                is_excluded = any(map(self._is_excluded, (match, *below_root)))
                if match.is_file() and not match.name.startswith(".") and not is_excluded:
                    yield ImageFile(str(match))

    def _walk(self, folder: str) -> Iterator[ImageFile]:
        waiting: list[Path | os.DirEntry[str]] = [Path(folder)]  # no recursion: Python allows a thousand levels
        while waiting:
            entry = waiting.pop()
            path = str(Path(entry))  # without ./
            try:
                if isinstance(entry, Path) or entry.is_dir(follow_symlinks=False):
                    with os.scandir(path) as entries:
                        children = sorted(entries, key=lambda child: child.name, reverse=True)
                    waiting += (child for child in children if not self._is_excluded(child))
                elif entry.is_file() and not entry.name.startswith("."):
                    yield ImageFile(path)
            except OSError as error:
                yield ImageFile(path, problem=f"cannot be read: {error.strerror}")

    def _is_excluded(self, file: Path | os.DirEntry[str]) -> bool:
        same_name = [path for path in self.excluded if path.name == file.name and path.exists()]
        return any(Path(file).exists() and path.samefile(file) for path in same_name)


def expand_archive(file: ImageFile) -> Iterator[ImageFile]:
    """Yield the members of a zip or tar that `ImageFiles.unexpanded` yields, or any other file as it is.

    Those of a tar that is compressed or behind a URL have their content, so it is read once, from start to end.

    Raises:
        UserError: the URL cannot be read.
    """
    if file.member or not archives.is_archive(file.path):
        yield file
        return
    try:
        yield from archives.iterate_members(file.path)
    except OSError as error:
        yield ImageFile(file.path, problem=str(error))


def _root(name: str) -> tuple[str, ...]:
    """Return the parts of the folder that contains all that a name may match, or of the file itself."""
    start, *rest = PATTERN.split(name, maxsplit=1)
    return Path(f"{start}*").parent.parts if rest else Path(name).parts


def _expand_url(url: str) -> Iterator[ImageFile]:
    if "::" in url:
        raise UserError(
            f"{remote.redact_url(url)}: a chain of URLs; give the URL of the zip, tar, folder or file itself"
        )
    file_system, path = remote.open_file_system(url, SETTING)
    with remote.report_errors(url, SETTING):
        is_http = remote.is_http(url)  # which lists no files
        if not is_http and file_system.isdir(path):
            yield from _walk_url(file_system, path)
        elif is_http or file_system.exists(path):
            yield ImageFile(url, is_named=True, size=file_system.info(path).get("size"))
        elif PATTERN.search(path):
            for info in sorted(file_system.glob(path, detail=True).values(), key=lambda info: str(info["name"])):
                yield from _found(file_system, info)


def _walk_url(file_system: Any, folder: str) -> Iterator[ImageFile]:
    entries = {entry["name"].rstrip("/"): entry for entry in file_system.ls(folder, detail=True)}
    for name, entry in sorted(entries.items()):
        if entry["type"] == "directory" and name != folder.rstrip("/"):
            yield from _walk_url(file_system, name)
        else:
            yield from _found(file_system, entry)


def _found(file_system: Any, info: dict[str, Any]) -> Iterator[ImageFile]:
    name = str(info["name"])
    if info["type"] == "file" and not name.endswith("/") and not name.rpartition("/")[2].startswith("."):
        yield ImageFile(file_system.unstrip_protocol(name), size=info.get("size"))
