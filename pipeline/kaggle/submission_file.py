"""Reading and writing of submission files, `File,Label`."""

from pathlib import Path

import pandas as pd

from pipeline.core.errors import UserError
from pipeline.core.files import read_text_table, write_csv


def write_submission(path: Path, labels: pd.Series, sample: pd.DataFrame) -> None:
    """Write the labels in the order of the sample submission.

    Args:
        path: of the submission file.
        labels: 0 or 1, indexed by file.
        sample: the competition's sample submission, with a column File.

    Raises:
        UserError: the files differ from those of the sample, or a label is not 0 or 1.
    """
    if set(labels.index) != set(sample["File"]) or len(labels) != len(sample):
        differing = sorted(set(labels.index) ^ set(sample["File"])) or sorted(labels.index[labels.index.duplicated()])
        raise UserError(
            f"{path}: the predictions and sample_submission.csv differ in {differing[0]}; run: dvc repro evaluate"
        )
    if not labels.isin([0, 1]).all():
        raise UserError(f"{path}: labels must be 0 or 1; run: dvc repro evaluate")
    write_csv(path, pd.DataFrame({"File": sample["File"], "Label": labels.loc[sample["File"]].to_numpy()}))


def read_submission(path: Path) -> pd.Series:
    """Read the labels of a submission file, as text, indexed by file.

    Raises:
        UserError: the file is not a table with the columns File and Label.
    """
    return read_text_table(path, str(path), ["File", "Label"]).set_index("File")["Label"]
