"""A zip or a folder that somebody already has, in the competition's layout."""

import shutil
import zipfile
from pathlib import Path

from pipeline.core.config import ArchiveParams
from pipeline.core.errors import UserError
from pipeline.data.sources.archive_writer import ZIP_TIMESTAMP


def write(params: ArchiveParams, target: Path) -> None:
    """Copy the zip as it is, or zip the folder in the order of its names.

    Raises:
        UserError: no path is given, there is neither a zip nor a folder, or the folder has a link that leaves it, or
            the target in it.
    """
    if params.path is None:
        raise UserError(
            "params.yaml: download.path: no archive is named; download the competition's zip "
            "(https://www.kaggle.com/c/stat946winter2021/data) and put its path there"
        )
    path = params.path.expanduser()
    if path.is_dir():
        _zip(path, target)
    elif zipfile.is_zipfile(path):
        shutil.copyfile(path, target)
    elif path.exists():
        raise UserError(f"{path}: not a zip; name a zip or a folder at download.path")
    else:
        raise UserError(f"{path}: not found; put a zip or a folder there, or change download.path in params.yaml")


def _zip(folder: Path, target: Path) -> None:
    if target.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: {target.parent}, where the zip is made, is in it; name the radiographs' own folder")
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path}: a symbolic link that leaves {folder}; put the file itself there")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            member = zipfile.ZipInfo(file.relative_to(folder).as_posix(), ZIP_TIMESTAMP)
            with file.open("rb") as source, archive.open(member, "w", force_zip64=True) as out:
                shutil.copyfileobj(source, out)
