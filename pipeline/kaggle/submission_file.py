"""Submission files, `File,Label`, that match the competition's sample."""

from pathlib import Path

import pandas as pd

from pipeline.core.errors import UserError
from pipeline.core.files import read_text_table, write_csv


def write_submission(path: Path, labels: pd.Series, sample: pd.DataFrame) -> None:
    """Write the labels of the sample's files, in the sample's order.

    Args:
        path: where to write.
        labels: 0 or 1, indexed by file.
        sample: the competition's sample submission, with a column File.

    Raises:
        UserError: the files are not the sample's, or a label is not 0 or 1.
    """
    if set(labels.index) != set(sample["File"]) or len(labels) != len(sample):
        odd = sorted(set(labels.index) ^ set(sample["File"])) or sorted(labels.index[labels.index.duplicated()])
        raise UserError(
            f"{path}: the predictions and sample_submission.csv differ in {odd[0]}; run: dvc repro evaluate"
        )
    if not labels.isin([0, 1]).all():
        raise UserError(f"{path}: labels other than 0 and 1; run: dvc repro evaluate")
    write_csv(path, pd.DataFrame({"File": sample["File"], "Label": labels.loc[sample["File"]].to_numpy()}))


def read_submission(path: Path) -> pd.Series:
    """Read the labels of a submission file back, texts by file.

    Raises:
        UserError: it is no table of `File,Label`.
    """
    return read_text_table(path, str(path), ["File", "Label"]).set_index("File")["Label"]
