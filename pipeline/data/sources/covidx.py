"""Source: COVIDx (github.com/lindawangg/COVID-Net and Kaggle), folders of images with a list of each.

Its versions have two, three or four classes. A line is `patient file class source`, in earlier versions without the
source. In one source, names of patients contain spaces; some lines misspell rsna as rnsa; version 1 lists 2961 images
twice; some patients are in both lists, which the data card reports.
"""

import logging
import re
from pathlib import Path

import pandas as pd

from pipeline.core.config import CovidxParams
from pipeline.core.errors import UserError
from pipeline.data.file_names import match_files
from pipeline.data.source_folder import SourceFolder, open_source_folder
from pipeline.data.sources import archive_writer

log = logging.getLogger(__name__)

LABELS = {  # of all versions
    "negative": 0, "normal": 0, "pneumonia": 0, "bacteria": 0, "viral": 0, "positive": 1, "covid-19": 1
}  # fmt: skip
TYPO_FIXES = {"rnsa": "rsna"}
# Such as train.txt, test_split_v3.txt and train_COVIDx9B.txt; the groups are the set and the version.
LIST = re.compile(r"(?:.*/)?(train|val|test)(?:_split)?(?:_covidx)?_?([^/]*)\.txt", re.IGNORECASE)


def write_source(params: CovidxParams, target: Path) -> None:
    """Write the zip from the folder that contains train/, test/, train.txt and test.txt.

    The lists may also have their published names, such as train_COVIDx7B.txt. The images of a list val.txt count as
    training, since `split` makes the validation set.

    Raises:
        UserError: a list or a test image is missing, there are several versions of a list, or a line is malformed.
    """
    folder = open_source_folder(params.path, "the folder of COVIDx")
    lists = {subset: _find_list(folder, subset, params.version) for subset in ("train", "val", "test")}
    tables = [_read_list(folder, file, subset) for subset, file in lists.items() if file]
    rows = pd.concat(tables, ignore_index=True)
    rows["path"] = match_files(rows["path"], folder.files)
    archive_writer.write_zip_of_files(rows, folder, target, copy_images=params.copy_images)


def _find_list(folder: SourceFolder, subset: str, version: str | None) -> str:
    """Return the list of a set; empty if there is none of the validation set, which most versions do not have."""
    matches = {file: match for file in folder.files if (match := LIST.fullmatch(file))}
    lists = [file for file, match in matches.items() if match[1].lower() == subset]
    if version is not None and len(lists) > 1:
        lists = [file for file in lists if matches[file][2].lower() == version.lower()]
    if not lists and subset == "val":
        return ""
    if len(lists) != 1:
        found = ", ".join(lists) or "none"
        advice = "write in download.version which, such as 9B" if lists else "add it (docs/data/covidx.md)"
        raise UserError(f"{folder.root}: expected one list {subset}*.txt, found {found}; {advice}")
    return lists[0]


def _read_list(folder: SourceFolder, file: str, subset: str) -> pd.DataFrame:
    path, rows = f"{folder.root}/{file}", []
    for number, line in enumerate(archive_writer.read_lines(folder, file), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) > 2 and fields[-1].lower() in LABELS:
            fields.append("")  # no source
        if len(fields) < 4 or fields[-2].lower() not in LABELS:
            raise UserError(
                f"{path} line {number}: {line!r}; it must be patient, file, class and source, with class one of "
                f"{', '.join(LABELS)} (the source may be missing)"
            )
        *patient, name, class_name, source = fields
        source = TYPO_FIXES.get(source.lower(), source.lower())
        rows.append((" ".join(patient), name, LABELS[class_name.lower()], source, f"{subset}/{name}"))
    table = pd.DataFrame(rows, columns=["patient", "file", "label", "source", "path"]).astype({"label": "Int64"})
    if unknown := (table["source"] == "").sum():
        log.warning("%s: %s of %s lines name no source", path, unknown, len(table))
    return _merge_repeated(table, path).assign(view="", is_test=subset == "test")


def _merge_repeated(table: pd.DataFrame, path: str) -> pd.DataFrame:
    """Keep one line of each image, if all say the same class."""
    for column, values in (("label", "classes"), ("patient", "patients")):
        files = table.drop_duplicates(["file", column])["file"]
        several = files[files.duplicated()].unique()
        if len(several):
            message = f"{path}: {len(several)} images have two {values}, the first is {several[0]}"
            if column == "label":
                raise UserError(f"{message}; keep the right line of each")
            log.warning("%s; its first line counts", message)
    unique = table.drop_duplicates("file")
    if len(unique) < len(table):
        first = table["file"][table["file"].duplicated()].iloc[0]
        log.warning(
            "%s: %s lines repeat an image, the first %s; each counts once", path, len(table) - len(unique), first
        )
    return unique
