"""Guessing of the section `download` of params.yaml that a folder or archive needs."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from pipeline.core.config import DownloadParams, Profile
from pipeline.core.errors import UserError
from pipeline.data.file_names import match_files
from pipeline.data.sources import archive, covid_chestxray
from pipeline.data.sources.archive_writer import read_source_table
from pipeline.data.sources.folders import DESCRIPTIONS
from pipeline.data.sources.source_folder import SourceFolder, open_source_folder

TABLE = re.compile(r"\.(csv|tsv)(\.gz)?$", re.IGNORECASE)
MAX_TABLES = 20  # that are read
SAMPLE_SIZE = 1000  # rows of a table that are matched with files
MIN_MATCHED = 0.5  # share of the sample that are images, for a column of file names
MAX_VALUES = 6  # of the column of labels that are shown
# Files of public data sets, by the page of docs/data that has their section
PUBLIC_SETS = {
    "bimcv-covid-19": r"labels_covid_posi\.tsv",
    "chexpert": r"CheXpert-v1\.0",
    "kermany": r"chest_xray/(train|test|val)/(NORMAL|PNEUMONIA)/",
    "mimic-cxr-jpg": r"mimic-cxr-2\.",
    "nih-chestxray14": r"Data_Entry_2017",
    "padchest": r"PADCHEST_chest_x_ray",
    "radiography-database": r"(COVID|Lung_Opacity|Viral Pneumonia)\.metadata",
    "rsna-pneumonia": r"stage_2_train_labels\.csv",
    "siim-covid-19": r"train_(study|image)_level\.csv",
    "vindr-cxr": r"image_labels_train\.csv",
}
# What the columns of tables are called, by the key of `download.columns`
COLUMN_NAMES = {
    "label": r"label|finding|diagnos|target|class|covid",
    "patient": r"patient|subject|^pid$|case",
    "source": r"source|site|hospital|dataset|institution",
    "view": r"view|projection",
    "sex": r"sex|gender",
    "age": r"^age|patient.?age",
    "license": r"licen[cs]e",
    "set": r"^(set|split|subset)$",
}

Guess = tuple[dict[str, Any], str]  # a section, and what must be completed in it


def guess_section(path: str) -> tuple[dict[str, Any], str]:
    """Guess the section `download` from the names of the files and the headers of the tables.

    Args:
        path: of a folder, an archive or a table, or a URL.

    Returns:
        The section, and what must be completed in it, or an empty text.

    Raises:
        UserError: there is no such folder or archive.
    """
    if TABLE.search(path) and Path(path).is_file():
        folder = open_source_folder(Path(path).parent, "the data")
        guess = _guess_by_tables(folder, [Path(path).name]) or ({"source": "table", "labels": Path(path).name}, "")
        return {"source": "table", "path": folder.root, **guess[0]}, guess[1] or f"no column of {path} names images"
    if not is_folder(path):
        return {"source": "archive", "path": path}, ""
    folder = open_source_folder(path, "the data")
    section, remark = _guess_by_names(folder) or _guess_by_tables(folder, folder.files) or ({"source": "folders"}, "")
    return {"source": section["source"], "path": path, **section}, remark


def _guess_by_names(folder: SourceFolder) -> Guess | None:
    if any(file.rpartition("/")[2].lower() == "train_labels.csv" for file in folder.files):
        return {"source": "archive"}, ""
    if all(any(re.fullmatch(rf"{subset}[^/]*\.txt", file) for file in folder.files) for subset in ("train", "test")):
        return {"source": "covidx"}, ""
    for page, pattern in PUBLIC_SETS.items():
        if any(re.search(pattern, f"{folder.root}/{file}") for file in folder.files):
            source = "folders" if page in ("kermany", "radiography-database") else "table"
            remark = f"copy the rest of the section from docs/data/{page}.md, which describes this data set"
            return {"source": source}, remark
    return None


def _guess_by_tables(folder: SourceFolder, files: list[str]) -> Guess | None:
    """Guess from the table with the column that names the most images, if it does in most of its rows."""
    best: tuple[float, Guess | None] = MIN_MATCHED, None
    tables = sorted((file for file in files if TABLE.search(file)), key=lambda file: file.count("/"))
    images = list_images(folder)
    for file in tables[:MAX_TABLES]:
        try:
            table = read_source_table(folder, file, [])
        except UserError:
            continue
        if set(covid_chestxray.COLUMNS) <= set(table):
            return {"source": "covid_chestxray"}, ""
        share, guess = _guess_columns(file, table, images)
        if share > best[0]:
            best = share, guess
    return best[1]


def _guess_columns(file: str, table: pd.DataFrame, images: list[str]) -> tuple[float, Guess]:
    sample = table.iloc[:: max(len(table) // SAMPLE_SIZE, 1)]
    names = list(map(str, table))
    shares = {name: float(match_files(sample[name], images).ne("").mean()) for name in names}
    columns = {"file": max(names, key=lambda name: shares[name], default="")}
    for key, pattern in COLUMN_NAMES.items():
        found = [name for name in names if re.search(pattern, name, re.IGNORECASE) and name != columns["file"]]
        columns |= {key: found[0]} if found else {}
    section = {"source": "table", "labels": file, "columns": columns, "positive": [], "negative": []}
    share = shares.get(columns["file"], 0.0)
    if "label" not in columns:
        return share, (section, f"which of {', '.join(names)} is columns.label?")
    values = table[columns["label"]].value_counts()
    shown = ", ".join(f"{value!r} ({count})" for value, count in values.head(MAX_VALUES).items())
    more = f" and {len(values) - MAX_VALUES} more values" if len(values) > MAX_VALUES else ""
    return share, (section, f"list these values of {columns['label']} in positive or negative: {shown}{more}")


def is_folder(path: str) -> bool:
    """Return whether it is a folder, here or in a bucket, and not an archive."""
    return archive.is_folder(path)


def list_images(folder: SourceFolder) -> list[str]:
    """List the files that may be images: all but those whose names are of tables and texts."""
    return [file for file in folder.files if not DESCRIPTIONS.fullmatch(file.rpartition("/")[2].lower())]


def parse_section(section: dict[str, Any]) -> DownloadParams:
    """Return the parameters; what must be completed has its default."""
    return Profile.model_validate({"download": {key: value for key, value in section.items() if value != []}}).download


def format_section(section: dict[str, Any]) -> str:
    """Return the section as it stands in params.yaml."""
    return yaml.safe_dump({"download": section}, sort_keys=False, allow_unicode=True)
