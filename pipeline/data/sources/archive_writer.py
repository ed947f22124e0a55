"""The zip in the competition's layout that every source ends in: the same rows and images give the same bytes."""

import hashlib
import logging
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path

import pandas as pd

from pipeline.core.errors import UserError
from pipeline.core.files import read_text_table
from pipeline.core.progress import track_progress
from pipeline.data.layout import LICENSE, METADATA

log = logging.getLogger(__name__)

ZIP_TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # the oldest time a zip can hold


def write_zip(rows: pd.DataFrame, images: Iterable[bytes | None], target: Path) -> None:
    """Write images, labels, sample submission and metadata.

    Args:
        rows: one per image, with columns file (its name), label (0 or 1, missing for the test set), patient, source,
            view and, if any is known, license.
        images: the encoded images, in the order of the rows; none where a label has no image.
        target: the zip.
    """
    named, labeled = rows.rename(columns={"file": "File", "label": "Label"}), rows["label"].notna()
    known = [LICENSE] if LICENSE in rows and (rows[LICENSE] != "").any() else []
    tables = {
        "train_labels.csv": named.loc[labeled, ["File", "Label"]],
        "sample_submission.csv": named.loc[~labeled, ["File"]].assign(Label=0),
        "metadata.csv": named[["File", *METADATA, *known]],
    }
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, table in tables.items():
            archive.writestr(_entry(name), table.to_csv(index=False, lineterminator="\n"))
        for file, trained, image in zip(rows["file"], labeled, images, strict=True):
            folder = "train/train" if trained else "test/test"
            if image is not None:
                archive.writestr(_entry(f"{folder}/{file}"), image)


def write_zip_of_files(rows: pd.DataFrame, target: Path) -> None:
    """Write what `write` does, of images on disk, whose names are in the column path.

    A label whose image is not there is kept: `prepare` puts it into quarantine.

    Raises:
        UserError: a test image is not there, two have one name, or there is nothing to train on or to test.
    """
    there = rows["path"].map(Path.is_file)
    absent = rows["path"][~there & rows["label"].isna()]
    if len(absent):
        raise UserError(
            f"{absent.iloc[0]}: not found ({len(absent)} missing in all); a submission needs every test image, so "
            "fetch them again"
        )
    if not there.all():
        first = rows["path"][~there].iloc[0]
        log.warning("%s: not found (%s labeled images in all); once mended: dvc repro -f download", first, sum(~there))
    twice = rows["file"][rows["file"].duplicated()]
    if len(twice):
        raise UserError(f"{twice.iloc[0]}: {len(twice) + 1} images of this name are listed; give each its own")
    if rows["label"].isna().all() or rows["label"].notna().all():
        raise UserError(f"of {len(rows)} images, all would be on one side of training and test; add some")
    images = (path.read_bytes() if found else None for path, found in zip(rows["path"], there, strict=True))
    write_zip(rows, track_progress(images, "packing", len(rows)), target)


def draw_test_set(patient: pd.Series, file: pd.Series, share: float) -> pd.Series:
    """Choose test images where a source has no test set: a patient's hash decides, or the file's if it is not known.

    So a patient stays on his side when images are added.

    Returns:
        bool (N,).
    """
    decides = patient.where(patient != "", file)
    return decides.map(lambda name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < share * 2**32).astype(bool)


def source_folder(path: Path | None, what: str) -> Path:
    """Return the folder that `download.path` names.

    Raises:
        UserError: it names none.
    """
    if path is None:
        raise UserError(f"params.yaml: download.path: no folder is named; put the path of {what} there")
    path = path.expanduser()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; put the path of {what} at download.path in params.yaml")
    return path


def read_source_table(path: Path, columns: Collection[str]) -> pd.DataFrame:
    """Read a table of texts that has these columns.

    Raises:
        UserError: it is not there, or no such table.
    """
    try:
        return read_text_table(path, str(path), columns)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; it says what the images are") from None


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, ZIP_TIMESTAMP)
    entry.external_attr = 0o644 << 16
    entry.create_system = 3  # Unix, whatever system writes it
    return entry
