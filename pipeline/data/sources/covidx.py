"""COVIDx (github.com/lindawangg/COVID-Net): folders train and test, and a list of each.

A line is `patient file class source`. Patients of one source have spaces in their names, some lines say rnsa for
rsna, and some patients are in both lists, of which the data card tells.
"""

from pathlib import Path

import pandas as pd

from pipeline.core.config import CovidxParams
from pipeline.core.errors import UserError
from pipeline.data.sources import archive_writer

LABELS = {"negative": 0, "normal": 0, "pneumonia": 0, "positive": 1, "covid-19": 1}  # of two and of three classes
TYPO_FIXES = {"rnsa": "rsna"}


def write(params: CovidxParams, target: Path) -> None:
    """Write the layout's zip from the folder that holds train/, test/, train.txt and test.txt.

    The lists may also have the names they are published under, such as train_COVIDx7B.txt.

    Raises:
        UserError: a list or an image is missing, or a line is not understood.
    """
    folder = archive_writer.source_folder(params.path, "the folder of COVIDx")
    rows = pd.concat([_read(folder, subset) for subset in ("train", "test")], ignore_index=True)
    archive_writer.write_zip_of_files(rows, target)


def _read(folder: Path, subset: str) -> pd.DataFrame:
    found = sorted(folder.glob(f"{subset}*.txt"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder}: one list {subset}*.txt is needed, but there is {names}")
    try:
        lines = found[0].read_text(encoding="utf-8-sig").splitlines()  # a mark at its beginning is not the patient's
    except UnicodeDecodeError as error:
        raise UserError(f"{found[0]}: not a text in UTF-8 ({error}); save it as one") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        if len(words) < 4 or words[-2].lower() not in LABELS:
            raise UserError(
                f"{found[0]} line {number}: {line!r}; it must be patient, file, class and source, and the class one of "
                f"{', '.join(LABELS)}"
            )
        *patient, file, kind, source = words
        source = TYPO_FIXES.get(source.lower(), source.lower())
        rows.append((" ".join(patient), file, LABELS[kind.lower()], source, folder / subset / file))
    table = pd.DataFrame(rows, columns=["patient", "file", "label", "source", "path"]).astype({"label": "Int64"})
    if subset == "test":
        table["label"] = pd.NA
    return table.assign(view="")
