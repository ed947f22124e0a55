"""Reading of the labels of the test images, for `cxr score` alone: no stage of the pipeline may use this module."""

import io
import zipfile
from pathlib import Path

import pandas as pd

from pipeline.core.errors import UserError
from pipeline.core.files import DamagedFileError, detect_damage, read_text_table
from pipeline.data import layout
from pipeline.data.file_names import match_files

TEST_LABELS = "test_labels.csv"  # optional table of the zip in the competition's layout


def read_archived_labels(raw: Path) -> pd.Series:
    """Read the table of the zip; see `read_test_labels`.

    Raises:
        UserError: the zip has none, or see `read_test_labels`.
    """
    name = f"{raw}: {TEST_LABELS}"
    try:
        with detect_damage(), zipfile.ZipFile(raw) as archive:
            member = layout.find_table(layout.find_members(archive, raw), TEST_LABELS)
            content = archive.read(member) if member else b""
    except DamagedFileError as error:
        raise UserError(f"{name} is damaged ({error}); run: dvc repro -f download") from None
    if not member:
        raise UserError(f"{raw}: has no {TEST_LABELS}; give the file with the labels: cxr score FILE")
    return _parse_labels(read_text_table(io.BytesIO(content), name, ["File", "Label"]), name)


def read_test_labels(path: Path) -> pd.Series:
    """Read a table with the columns File and Label, in any order; some test images may lack a label.

    Returns:
        0 or 1, indexed by file.

    Raises:
        UserError: the file is missing or not such a table, a label is neither 0 nor 1, or a file is listed twice.
    """
    try:
        return _parse_labels(read_text_table(path, str(path), ["File", "Label"]), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; give a table with the columns File,Label") from None


def match_labels(labels: pd.Series, files: pd.Series) -> pd.Series:
    """Write the names of the images as in the manifest; see `match_files`. Names that match none stay as they are.

    Args:
        labels: indexed by file.
        files: the test images.

    Raises:
        UserError: two labels are of the same image.
    """
    names = labels.index.to_series()
    found = match_files(names, set(files))
    repeated = found[found.duplicated() & (found != "")]
    if len(repeated):
        raise UserError(f"the labels: {repeated.index[0]} is listed twice; keep one line")
    return labels.set_axis(found.where(found != "", names))


def _parse_labels(table: pd.DataFrame, name: str) -> pd.Series:
    labels = layout.read_labels(table["Label"])
    invalid = table[labels.isna() & (table["Label"] != "")]
    if len(invalid):
        raise UserError(
            f"{name} line {invalid.index[0] + 2}: the label of {invalid['File'].iloc[0]} is "
            f"{invalid['Label'].iloc[0]!r}; it must be 0 (negative) or 1 (positive), or empty if it is not known"
        )
    layout.check_listed_once(table["File"], table["File"], name)
    return table.assign(Label=labels).dropna(subset="Label").set_index("File")["Label"].astype(int)
