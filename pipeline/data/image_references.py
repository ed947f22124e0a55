"""References to images outside of the zip: a table in it says where each image is, its size and its CRC-32."""

import csv
import io
import zipfile
from typing import NamedTuple

from pipeline.core.files import DamagedFileError, detect_damage

IMAGE_REFERENCES = "image_references.csv"
UNKNOWN_CHECKSUM = 0, -1  # size and CRC-32 of a file that was not read
COLUMNS = ["member", "path", "bytes", "crc32"]


class ImageReference(NamedTuple):
    """An image that is not in the zip.

    Attributes:
        member: the name that it would have in the zip.
        path: relative to the folder or folders that `download.path` names.
        size: of the file, bytes.
        crc32: of its content.
    """

    member: str
    path: str
    size: int
    crc32: int


def format_references(references: list[ImageReference]) -> bytes:
    """Return the table as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((*names, size, f"{crc:08x}") for *names, size, crc in references)
    return out.getvalue().encode()


def read_references(archive: zipfile.ZipFile) -> dict[str, ImageReference]:
    """Return the references of a zip by member; none if it has its images itself.

    Raises:
        DamagedFileError: the table is damaged.
    """
    if IMAGE_REFERENCES not in archive.NameToInfo:
        return {}
    with detect_damage():
        text = archive.read(IMAGE_REFERENCES).decode()
        header, *lines = csv.reader(io.StringIO(text))
        if header != COLUMNS:
            raise DamagedFileError(f"its header is not {','.join(COLUMNS)}")
        return {member: ImageReference(member, path, int(size), int(crc, 16)) for member, path, size, crc in lines}


def list_members(archive: zipfile.ZipFile) -> list[str]:
    """List the members of a zip, and the images that it refers to as if they were members."""
    return [*(name for name in archive.namelist() if name != IMAGE_REFERENCES), *read_references(archive)]
