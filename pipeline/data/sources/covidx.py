"""Source: COVIDx (github.com/lindawangg/COVID-Net), the folders train and test with a list of each.

Its variants have two or three classes. A line is `patient file class source`. In one source, names of patients contain
spaces; some lines misspell rsna as rnsa; some patients are in both lists, which the data card reports.
"""

from pathlib import Path

import pandas as pd

from pipeline.core.config import CovidxParams
from pipeline.core.errors import UserError
from pipeline.data.sources import archive_writer

LABELS = {"negative": 0, "normal": 0, "pneumonia": 0, "positive": 1, "covid-19": 1}  # of both variants
TYPO_FIXES = {"rnsa": "rsna"}


def write_source(params: CovidxParams, target: Path) -> None:
    """Write the zip from the folder that contains train/, test/, train.txt and test.txt.

    The lists may also have their published names, such as train_COVIDx7B.txt.

    Raises:
        UserError: a list or a test image is missing, or a line is malformed.
    """
    folder = archive_writer.source_folder(params.path, "the folder of COVIDx")
    rows = pd.concat([_read_list(folder, subset) for subset in ("train", "test")], ignore_index=True)
    archive_writer.write_zip_of_files(rows, target)


def _read_list(folder: Path, subset: str) -> pd.DataFrame:
    lists = sorted(folder.glob(f"{subset}*.txt"))
    if len(lists) != 1:
        names = ", ".join(path.name for path in lists) or "none"
        raise UserError(f"{folder}: expected one list {subset}*.txt, found {names}; keep exactly one")
    path = lists[0]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # utf-8-sig removes a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not encoded in UTF-8 ({error}); save it in UTF-8") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) < 4 or fields[-2].lower() not in LABELS:
            raise UserError(
                f"{path} line {number}: {line!r}; it must be patient, file, class and source, with class one of "
                f"{', '.join(LABELS)}"
            )
        *patient, file, class_name, source = fields
        source = TYPO_FIXES.get(source.lower(), source.lower())
        rows.append((" ".join(patient), file, LABELS[class_name.lower()], source, folder / subset / file))
    table = pd.DataFrame(rows, columns=["patient", "file", "label", "source", "path"]).astype({"label": "Int64"})
    if subset == "test":
        table = table.rename(columns={"label": "test_label"})
    return table.assign(view="")
