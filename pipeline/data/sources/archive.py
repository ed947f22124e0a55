"""Source: an existing zip or folder in the competition's layout."""

import shutil
import zipfile
from pathlib import Path

from pipeline.core.config import ArchiveParams
from pipeline.core.errors import UserError
from pipeline.core.files import DamagedFileError, detect_damage
from pipeline.data.sources.archive_writer import ZIP_TIMESTAMP


def write_source(params: ArchiveParams, target: Path) -> None:
    """Copy the zip unchanged, or zip the folder with its files sorted by name.

    Raises:
        UserError: the path is not set, is neither a zip nor a folder, or is a folder that contains the target or a
            symbolic link to a file outside of it.
    """
    if params.path is None:
        raise UserError(
            "params.yaml: download.path: not set; set it to a zip or folder in the competition's layout (docs/data.md)"
        )
    path = params.path.expanduser()
    if path.is_dir():
        _zip_folder(path, target)
    elif path.exists():
        try:
            with detect_damage():
                zipfile.ZipFile(path).close()
        except DamagedFileError as error:
            raise UserError(
                f"{path}: not a zip, or damaged ({error}); set download.path to a zip or a folder"
            ) from None
        shutil.copyfile(path, target)
    else:
        raise UserError(f"{path}: not found; correct download.path in params.yaml")


def _zip_folder(folder: Path, target: Path) -> None:
    if target.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{folder}: contains {target.parent}, the output folder; set download.path to a folder with only the images"
        )
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path}: symbolic link to a file outside of {folder}; replace it with the file itself")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            member = zipfile.ZipInfo(file.relative_to(folder).as_posix(), ZIP_TIMESTAMP)
            with file.open("rb") as source, archive.open(member, "w", force_zip64=True) as out:
                shutil.copyfileobj(source, out)
