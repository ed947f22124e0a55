"""Reading of image files, whether they are in data/raw.zip or it refers to files of the user."""

import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Self

from pipeline.core.config import DownloadParams, KaggleParams, PhantomParams
from pipeline.core.errors import UserError
from pipeline.data import layout
from pipeline.data.image_references import UNKNOWN_CHECKSUM, read_references
from pipeline.data.source_folder import SourceFolder, open_source_folder

ADVICE = "run: dvc repro -f download"


class RawImages:
    """The files of images, by the members that `layout.read_layout` names; for one process and its threads."""

    def __init__(self, raw: Path, params: DownloadParams | None) -> None:
        """Open a zip that `download` wrote; the `path` of `params` is where the images are that it refers to."""
        self._raw, self._params = raw, params
        self._archive = zipfile.ZipFile(raw)
        self._references = read_references(self._archive)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def read(self, member: str) -> bytes:
        """Return the content of a file.

        Raises:
            DamagedFileError: it is damaged inside its zip.
            UserError: the file that is referred to is missing, or is not that of `download` any more; or
                `download.path` is not set or missing.
        """
        if not self._references:
            return layout.read_member(self._archive, member)
        reference = self._references[member]
        name = f"{self._folder.root}: {reference.path}"
        try:
            content = self._folder.read_bytes(reference.path)
        except FileNotFoundError:
            raise UserError(f"{name} is missing since download; restore it, or {ADVICE}") from None
        checksum = reference.size, reference.crc32
        if checksum not in ((len(content), zlib.crc32(content)), UNKNOWN_CHECKSUM):
            raise UserError(f"{name} changed since download; {ADVICE}")
        return content

    @cached_property
    def _folder(self) -> SourceFolder:
        if self._params is None or isinstance(self._params, KaggleParams | PhantomParams):
            raise UserError(f"{self._raw}: its images are in another folder; {ADVICE}")
        return open_source_folder(self._params.path, f"where the images of {self._raw} are")

    def checksum(self, member: str) -> str:
        """Return the CRC-32 and the size of a file, without reading it: 16 hexadecimal digits."""
        if not self._references:
            entry = self._archive.getinfo(member)
            return f"{entry.CRC:08x}{entry.file_size:08x}"
        reference = self._references[member]
        return f"{reference.crc32:08x}{reference.size:08x}"
