"""Any folder of images with a CSV that says what they are; its columns are named by parameters."""

from pathlib import Path, PurePosixPath

import pandas as pd

from pipeline.core.config import TableParams
from pipeline.core.errors import UserError
from pipeline.data.sources import archive_writer


def write(params: TableParams, target: Path) -> None:
    """Write the layout's zip from the images that the CSV lists.

    An image in a subfolder gets the folder in its name: `a/1.png` becomes `a_1.png`. Where no column says which images
    are the test set, `test_share` of the patients are.

    Raises:
        UserError: the CSV, a column or an image is missing, or an image has no label.
    """
    folder = archive_writer.source_folder(params.path, "the folder of images")
    path, names = folder / params.labels, params.columns
    given = {key: column for key, column in names.model_dump().items() if column is not None}
    table = archive_writer.read_source_table(path, given.values())
    known = pd.DataFrame({key: table[given[key]] if key in given else "" for key in names.model_dump()})
    if names.set is not None:
        wrong = known[~known["set"].isin(["train", "test"])]
        if len(wrong):
            raise UserError(
                f"{path} line {wrong.index[0] + 2}: {names.set} is {wrong['set'].iloc[0]!r}, not train or test"
            )
        test = known["set"] == "test"
    else:
        test = archive_writer.draw_test_set(known["patient"], known["file"], params.test_share)
    unnamed = known[known["file"] == ""]
    if len(unnamed):
        raise UserError(f"{path} line {unnamed.index[0] + 2}: {names.file} is empty; name the image or delete the line")
    unlabeled = known[~test & ~known["label"].isin([*params.positive, *params.negative])]
    if len(unlabeled):
        raise UserError(
            f"{path} line {unlabeled.index[0] + 2}: {names.label} is {unlabeled['label'].iloc[0]!r}, which is in "
            "neither download.positive nor download.negative; add it to one of them"
        )
    rows = known.assign(
        label=known["label"].isin(params.positive).astype("Int64").mask(test),
        path=[folder / file for file in known["file"]],
        file=[str(PurePosixPath(file)).replace("/", "_") for file in known["file"]],
    )
    archive_writer.write_zip_of_files(rows, target)
