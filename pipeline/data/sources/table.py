"""Source: any folder of images with a CSV, whose columns are named by parameters."""

from pathlib import Path, PurePosixPath

import pandas as pd

from pipeline.core.config import TableParams
from pipeline.core.errors import UserError
from pipeline.data.demographics import read_age, read_sex
from pipeline.data.sources import archive_writer


def write_source(params: TableParams, target: Path) -> None:
    """Write the zip from the images that the CSV lists.

    The name of an image in a subfolder includes the folder: `a/1.png` becomes `a_1.png`. Without a column for the set,
    `test_share` of the patients are the test set.

    Raises:
        UserError: the CSV, a column or a test image is missing, an image has no label, or a sex or age is invalid.
    """
    folder = archive_writer.source_folder(params.path, "the folder of images")
    path, columns = folder / params.labels, params.columns
    column_names = {key: column for key, column in columns.model_dump().items() if column is not None}
    table = archive_writer.read_source_table(path, column_names.values())
    rows = pd.DataFrame({key: table[column_names[key]] if key in column_names else "" for key in columns.model_dump()})
    if columns.set is not None:
        invalid = rows[~rows["set"].isin(["train", "test"])]
        if len(invalid):
            raise UserError(
                f"{path} line {invalid.index[0] + 2}: {columns.set} is {invalid['set'].iloc[0]!r}; it must be train or "
                "test"
            )
        is_test = rows["set"] == "test"
    else:
        is_test = archive_writer.draw_test_set(rows["patient"], rows["file"], params.test_share)
    unnamed = rows[rows["file"] == ""]
    if len(unnamed):
        raise UserError(
            f"{path} line {unnamed.index[0] + 2}: {columns.file} is empty; name the image or delete the line"
        )
    is_labeled = rows["label"].isin([*params.positive, *params.negative])
    unlabeled = rows[~is_test & ~is_labeled]
    if len(unlabeled):
        raise UserError(
            f"{path} line {unlabeled.index[0] + 2}: {columns.label} is {unlabeled['label'].iloc[0]!r}, which is in "
            "neither download.positive nor download.negative; add it to one of them"
        )
    positive = rows["label"].isin(params.positive).astype("Int64")
    rows = rows.assign(
        label=positive.mask(is_test),
        test_label=positive.where(is_test & is_labeled),
        sex=read_sex(rows["sex"].rename(columns.sex), str(path)),
        age=read_age(rows["age"].rename(columns.age), str(path)),
        path=[folder / file for file in rows["file"]],
        file=[str(PurePosixPath(file)).replace("/", "_") for file in rows["file"]],
    )
    archive_writer.write_zip_of_files(rows, target)
