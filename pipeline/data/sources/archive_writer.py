"""Writing of the zip in the competition's layout; equal rows and images give equal bytes."""

import hashlib
import logging
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path

import pandas as pd

from pipeline.core.errors import UserError
from pipeline.core.files import read_text_table
from pipeline.core.progress import track_progress
from pipeline.data.layout import METADATA, OPTIONAL_METADATA
from pipeline.data.test_labels import TEST_LABELS

log = logging.getLogger(__name__)

ZIP_TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can store


def write_zip(rows: pd.DataFrame, images: Iterable[bytes | None], target: Path) -> None:
    """Write images, labels, sample submission and metadata.

    Args:
        rows: one per image, with the columns file (name), label (0 or 1, missing for the test set), patient, source,
            view, optionally sex, age and license, and optionally test_label (0 or 1, missing if unknown), which
            `cxr score` alone reads.
        images: content of the image files in the order of the rows; None if the image of a label is missing.
        target: the zip.
    """
    table, labeled = rows.rename(columns={"file": "File", "label": "Label"}), rows["label"].notna()
    optional = [name for name in OPTIONAL_METADATA if name in rows and rows[name].replace("", pd.NA).notna().any()]
    tables = {
        "train_labels.csv": table.loc[labeled, ["File", "Label"]],
        "sample_submission.csv": table.loc[~labeled, ["File"]].assign(Label=0),
        "metadata.csv": table[["File", *METADATA, *optional]],
    }
    if "test_label" in rows and rows["test_label"].notna().any():
        tables[TEST_LABELS] = table[["File", "test_label"]].dropna().rename(columns={"test_label": "Label"})
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, content in tables.items():
            archive.writestr(_zip_info(name), content.to_csv(index=False, float_format="%.9g", lineterminator="\n"))
        for file, is_labeled, image in zip(rows["file"], labeled, images, strict=True):
            folder = "train/train" if is_labeled else "test/test"
            if image is not None:
                archive.writestr(_zip_info(f"{folder}/{file}"), image)


def write_zip_of_files(rows: pd.DataFrame, target: Path) -> None:
    """Write the zip as `write_zip` does, with the images read from the paths in the column path.

    A label whose image is missing is kept; `prepare` lists it in quarantine.csv.

    Raises:
        UserError: a test image is missing, two images have the same name, or the training or test set is empty.
    """
    exists = rows["path"].map(Path.is_file)
    missing_test = rows["path"][~exists & rows["label"].isna()]
    if len(missing_test):
        raise UserError(
            f"{missing_test.iloc[0]}: not found ({len(missing_test)} missing in total); add it: a submission needs "
            "every test image"
        )
    if not exists.all():
        first = rows["path"][~exists].iloc[0]
        log.warning(
            "%s: not found (%s labeled images in total); when it is added, run: dvc repro -f download",
            first,
            sum(~exists),
        )
    repeated = rows["file"][rows["file"].duplicated()]
    if len(repeated):
        raise UserError(f"{repeated.iloc[0]}: {len(repeated) + 1} images have this name; give each a unique name")
    if rows["label"].isna().all() or rows["label"].notna().all():
        subset = "test" if rows["label"].isna().all() else "training"
        raise UserError(f"all {len(rows)} images are in the {subset} set; add images or patients to the other set")
    images = (path.read_bytes() if is_file else None for path, is_file in zip(rows["path"], exists, strict=True))
    write_zip(rows, track_progress(images, "packing", len(rows)), target)


def draw_test_set(patient: pd.Series, file: pd.Series, share: float) -> pd.Series:
    """Choose the test images of a source without a test set, by a hash of the patient, or of the file if unknown.

    Whether a patient is in the test set therefore does not change when images are added.

    Args:
        patient: names, empty if unknown, (N,).
        file: names, (N,).
        share: expected share of the patients in the test set, 0 to 1.

    Returns:
        bool (N,): whether the image is in the test set.
    """
    keys = patient.where(patient != "", file)
    return keys.map(lambda name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < share * 2**32).astype(bool)


def source_folder(path: Path | None, content: str) -> Path:
    """Return `download.path` with ~ expanded; `content` describes the folder in error messages.

    Raises:
        UserError: it is not set, or not a folder.
    """
    if path is None:
        raise UserError(f"params.yaml: download.path: not set; set it to {content}")
    path = path.expanduser()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; set download.path in params.yaml to {content}")
    return path


def read_source_table(path: Path, columns: Collection[str]) -> pd.DataFrame:
    """Read a CSV with the given columns, all fields as text.

    Raises:
        UserError: the file is missing, is not a CSV table, or lacks a column.
    """
    try:
        return read_text_table(path, str(path), columns)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; add this table, which describes the images") from None


def _zip_info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, ZIP_TIMESTAMP)
    info.external_attr = 0o644 << 16
    info.create_system = 3  # Unix, so that every operating system writes the same bytes
    return info
