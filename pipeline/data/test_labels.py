"""Reading of the labels of the test images, for `cxr score` alone: no stage of the pipeline may use this module."""

import io
import zipfile
from pathlib import Path

import pandas as pd

from pipeline.core.errors import UserError
from pipeline.core.files import DamagedFileError, detect_damage, read_text_table

TEST_LABELS = "test_labels.csv"  # optional table of the zip in the competition's layout


def read_archived_labels(raw: Path) -> pd.Series:
    """Read the table of the zip; see `read_test_labels`.

    Raises:
        UserError: the zip has none, or see `read_test_labels`.
    """
    name = f"{raw}: {TEST_LABELS}"
    try:
        with detect_damage(), zipfile.ZipFile(raw) as archive:
            content = archive.read(TEST_LABELS)
    except KeyError:
        raise UserError(f"{raw}: has no {TEST_LABELS}; give the file with the labels: cxr score FILE") from None
    except DamagedFileError as error:
        raise UserError(f"{name} is damaged ({error}); run: dvc repro -f download") from None
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


def _parse_labels(table: pd.DataFrame, name: str) -> pd.Series:
    invalid = table[~table["Label"].isin(["0", "1", ""])]
    if len(invalid):
        raise UserError(
            f"{name} line {invalid.index[0] + 2}: the label of {invalid['File'].iloc[0]} is "
            f"{invalid['Label'].iloc[0]!r}; it must be 0 (negative) or 1 (COVID-19), or empty if it is not known"
        )
    repeated = table["File"][table["File"].duplicated()]
    if len(repeated):
        raise UserError(f"{name} line {repeated.index[0] + 2}: {repeated.iloc[0]} is listed twice; keep one line")
    return table[table["Label"] != ""].set_index("File")["Label"].astype(int)
