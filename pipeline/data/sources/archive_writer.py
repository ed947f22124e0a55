"""Writing of the zip in the competition's layout; equal rows and images give equal bytes."""

import hashlib
import io
import logging
import zipfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import pandas as pd

from pipeline.core.errors import UserError
from pipeline.core.files import decompress, read_text_table
from pipeline.core.parallel import map_in_threads
from pipeline.core.progress import track_progress
from pipeline.data.dicom import read_metadata
from pipeline.data.file_names import IMAGE_ENDING, quote_nearest
from pipeline.data.image_references import IMAGE_REFERENCES, UNKNOWN_CHECKSUM, ImageReference, format_references
from pipeline.data.layout import METADATA, METADATA_TABLE, OPTIONAL_METADATA, SAMPLE_SUBMISSION, TRAIN_LABELS
from pipeline.data.source_folder import SourceFolder
from pipeline.data.test_labels import TEST_LABELS

log = logging.getLogger(__name__)

_reads_images = ContextVar("reads_images", default=True)
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
ZIP_TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can store


def write_zip(
    rows: pd.DataFrame, images: Iterable[bytes | None], target: Path, references: list[ImageReference] | None = None
) -> None:
    """Write images, labels, sample submission and metadata.

    Args:
        rows: one per image, with the columns file (name), label (0 or 1, missing for the test set), those of METADATA,
            optionally of OPTIONAL_METADATA, and optionally test_label (0 or 1, missing if unknown), which `cxr score`
            alone reads.
        images: content of the image files in the order of the rows; None if the image of a label is missing.
        target: the zip.
        references: to images that are not in the zip, as `find_references` returns them.
    """
    table, labeled = rows.rename(columns={"file": "File", "label": "Label"}), rows["label"].notna()
    optional = [name for name in OPTIONAL_METADATA if name in rows and rows[name].replace("", pd.NA).notna().any()]
    tables = {
        TRAIN_LABELS: table.loc[labeled, ["File", "Label"]],
        SAMPLE_SUBMISSION: table.loc[~labeled, ["File"]].assign(Label=0),
        METADATA_TABLE: table[["File", *METADATA, *optional]],
    }
    if "test_label" in rows and rows["test_label"].notna().any():
        tables[TEST_LABELS] = table[["File", "test_label"]].dropna().rename(columns={"test_label": "Label"})
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, content in tables.items():
            archive.writestr(zip_info(name), content.to_csv(index=False, float_format="%.9g", lineterminator="\n"))
        if references is not None:
            write_references(archive, references)
        for member, image in zip(_name_members(rows), images, strict=True):
            if image is not None:
                archive.writestr(zip_info(member), image)


def find_references(members: Iterable[str], folder: SourceFolder, paths: Collection[str]) -> list[ImageReference]:
    """Describe the images of a folder that are not copied.

    Args:
        members: the name that each image would have in the zip.
        folder: of the images.
        paths: of the images, relative to the folder.
    """
    checksums: Iterable[tuple[int, int]] = [UNKNOWN_CHECKSUM] * len(paths)
    if _reads_images.get():
        checksums = track_progress(map_in_threads(folder.read_checksum, paths), "reading", len(paths))
    return [
        ImageReference(member, path, *checksum)
        for member, path, checksum in zip(members, paths, checksums, strict=True)
    ]


@contextmanager
def without_reading_images() -> Iterator[None]:
    """Write references without sizes and checksums, which need the content of all images; for a look at the data."""
    token = _reads_images.set(False)
    try:
        yield
    finally:
        _reads_images.reset(token)


def write_references(archive: zipfile.ZipFile, references: list[ImageReference]) -> None:
    archive.writestr(zip_info(IMAGE_REFERENCES), format_references(references), zipfile.ZIP_DEFLATED)


def _name_members(rows: pd.DataFrame) -> pd.Series:
    return rows["label"].isna().map({False: "train/train/", True: "test/test/"}) + rows["file"]


def write_zip_of_files(rows: pd.DataFrame, folder: SourceFolder, target: Path, *, copy_images: bool = True) -> None:
    """Write the zip as `write_zip` does, with the images that the column path names.

    A label whose image is missing is kept; `prepare` lists it in quarantine.csv.

    Args:
        rows: one per image, as for `write_zip`, but with the labels of all images in the column label, and with the
            columns is_test and path: of the image, relative to the folder; empty if it is missing.
        folder: of the images.
        target: the zip.
        copy_images: whether the images are in the zip, or references to the files of the folder.

    Raises:
        UserError: a test image is missing, two images have the same name, or the training or test set is empty.
    """
    missing, is_test = rows["path"] == "", rows["is_test"].astype(bool)
    missing_test = rows["file"][missing & is_test]
    if len(missing_test):
        name = quote_nearest(missing_test.iloc[0], folder.files)
        raise UserError(
            f"{folder.root}: {name} not found ({len(missing_test)} missing in total); add it: a submission needs every "
            "test image"
        )
    if missing.any():
        log.warning(
            "%s: %s not found (%s labeled images in total); when it is added, run: dvc repro -f download",
            folder.root,
            quote_nearest(rows["file"][missing].iloc[0], folder.files),
            missing.sum(),
        )
    repeated = rows["file"][rows["file"].duplicated()]
    if len(repeated):
        name, others = repeated.iloc[0], repeated.nunique() - 1
        more = f", and {others} other names are of several images" if others else ""
        raise UserError(f"{name}: {sum(rows['file'] == name)} images have this name{more}; give each a unique name")
    if is_test.all() or not is_test.any():
        subset = "test" if is_test.all() else "training"
        raise UserError(f"all {len(rows)} images are in the {subset} set; add images or patients to the other set")
    rows = rows.assign(label=rows["label"].mask(is_test), test_label=rows["label"].where(is_test))
    if copy_images:
        images = map_in_threads(lambda path: folder.read_bytes(path) if path else None, rows["path"])
        write_zip(rows, track_progress(images, "packing", len(rows)), target)
    else:
        references = find_references(_name_members(rows)[~missing], folder, rows["path"][~missing])
        write_zip(rows, [None] * len(rows), target, references)


def draw_test_set(patient: pd.Series, file: pd.Series, share: float) -> pd.Series:
    """Choose the test images of a source without a test set, by a hash of the patient, or of the file if unknown.

    Whether a patient is in the test set therefore does not change when images are added.

    Args:
        patient: names, empty if unknown, (N,).
        file: names, (N,).
        share: expected share of the patients in the test set, 0 to 1.

    Returns:
        bool (N,): whether the image is in the test set.

    Raises:
        UserError: no patient, or every patient, would be in the test set.
    """
    keys = patient.where(patient != "", file)
    is_test = keys.map(lambda name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < share * 2**32).astype(bool)
    if is_test.all() or not is_test.any():
        raise UserError(
            f"download.test_share: {share:g} puts {'all' if is_test.all() else 'none'} of {keys.nunique()} patients "
            "(or images, of unknown patients) into the test set; change it, or add patients"
        )
    return is_test


def known_patients(rows: pd.DataFrame, folder: SourceFolder) -> pd.Series:
    """Return the patients, (N,); where rows say none, those of DICOM files, which `prepare` will read too.

    Without them, images of a patient could be in both sets.
    """
    may_be_dicom = rows["path"].map(
        lambda path: path.lower().endswith(DICOM_ENDINGS) or not IMAGE_ENDING.search(path.lower())
    )
    is_unknown = (rows["patient"] == "") & (rows["path"] != "") & may_be_dicom.astype(bool)
    files = rows["path"][is_unknown]
    contents = track_progress(map_in_threads(folder.read_bytes, files), "reading DICOM headers", len(files))
    patients = rows["patient"].to_numpy(dtype=object, copy=True)
    patients[is_unknown] = [read_metadata(content)["patient"] for content in contents]
    return pd.Series(patients, rows.index, dtype="str")


def read_source_table(folder: SourceFolder, file: str, columns: Collection[str]) -> pd.DataFrame:
    """Read a CSV of the folder with the given columns, all fields as text; it may be compressed by gzip.

    Raises:
        UserError: the file is missing, is not a CSV table, or lacks a column.
    """
    path = f"{folder.root}/{file}"
    try:
        content = decompress(folder.read_bytes(file), path)
    except FileNotFoundError:
        nearest = quote_nearest(file, folder.files)
        hint = f"; {nearest}" if nearest != repr(file) else ""
        raise UserError(f"{path}: not found; add this table, which describes the images{hint}") from None
    return read_text_table(io.BytesIO(content), path, columns)


def read_lines(folder: SourceFolder, file: str) -> list[str]:
    """Read the lines of a text in the folder.

    Raises:
        UserError: the file is missing or is not encoded in UTF-8.
    """
    try:
        return folder.read_bytes(file).decode("utf-8-sig").splitlines()  # utf-8-sig removes a byte order mark
    except FileNotFoundError:
        nearest = quote_nearest(file, folder.files)
        raise UserError(f"{folder.root}: {nearest} not found; correct its name in params.yaml") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{folder.root}/{file}: not encoded in UTF-8 ({error}); save it in UTF-8") from None


def zip_info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, ZIP_TIMESTAMP)
    info.external_attr = 0o644 << 16
    info.create_system = 3  # Unix, so that every operating system writes the same bytes
    return info
