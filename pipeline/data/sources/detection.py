"""Guessing of the section of params.yaml that a folder or archive needs."""

import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from pipeline.core.config import DownloadParams, Profile
from pipeline.core.errors import UserError
from pipeline.data import remote
from pipeline.data.file_names import match_files
from pipeline.data.layout import TRAIN_LABELS
from pipeline.data.source_folder import SourceFolder, open_source_folder
from pipeline.data.sources import archive, covid_chestxray
from pipeline.data.sources.archive_writer import read_source_table
from pipeline.data.sources.image_paths import is_image

log = logging.getLogger(__name__)

TABLE = re.compile(r"\.(csv|tsv)(\.gz)?$", re.IGNORECASE)
ARCHIVE = re.compile(r"\.(zip|tar|tgz|tar\.(gz|bz2|xz)|7z|rar)$", re.IGNORECASE)
SPREADSHEET = re.compile(r"\.(xlsx?|ods)$", re.IGNORECASE)
MAX_TABLES = 20  # that are read
SAMPLE_SIZE = 1000  # rows of a table that are matched with files
MIN_MATCHED = 0.5  # share of the sample that are images, for a column of file names
MAX_VALUES = 6  # of the column of labels that are shown
PAGES = Path(__file__).parents[3] / "docs/data"  # whose first section of YAML is that of the data set
# Files of public data sets, by their page
PUBLIC_SETS = {
    "bimcv-covid-19": r"labels_covid(19)?_posi\.tsv",
    "chexpert": r"/(train|valid)/patient\d{5}/study\d+/view\d_(frontal|lateral)\.jpg",
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
    "patient": r"(patient|subject|case|^p)[ _-]?(id|identifier|no|nr|number|name|key|code)?$",  # and not patient_age
    "source": r"source|site|hospital|dataset|institution",
    "view": r"(?<!re)view|projection",
    "sex": r"sex|gender",
    "age": r"^(patient.?)?age(.?in)?(.?years)?$",
    "license": r"licen[cs]e",
    "set": r"^(set|split|subset)$",
}

Section = dict[str, Any]
Guess = tuple[Section, str]  # a section `download`, and what must be completed in it


def guess_section(path: str) -> tuple[Section, str]:
    """Guess the sections `download` and `finding` from the names of the files and the headers of the tables.

    Those of a public data set are those of its page in docs/data.

    Args:
        path: of a folder, an archive or a table, or a URL.

    Returns:
        The sections, and what must be completed in them, or an empty text.

    Raises:
        UserError: there is no such folder or archive, it is a spreadsheet, or the table cannot be read.
    """
    if TABLE.search(path) and Path(path).is_file():
        folder = open_source_folder(Path(path).parent, "the data")
        name, problem = Path(path).name, f"no column of {path} names images or folders"
        section, remark = _guess_by_tables(folder, [name]) or ({"source": "table", "labels": name}, problem)
        return {"download": {"source": "table", "path": folder.root, **section}}, remark
    if not remote.is_url(path) and not Path(path).expanduser().exists():
        raise UserError(f"{path}: not found; correct the path")
    if SPREADSHEET.search(path):
        raise UserError(f"{path}: a spreadsheet; save it as CSV in UTF-8 and check that")
    if not can_list(path):
        return {"download": {"source": "archive", "path": path}}, ""
    folder = open_source_folder(path, "the data")
    for page, pattern in PUBLIC_SETS.items():
        if any(re.search(pattern, f"{folder.root}/{file}") for file in folder.files):
            log.warning("%s: the data set of docs/data/%s.md, whose first section follows", path, page)
            return _read_page(page, folder, path), ""
    section, remark = _guess_by_names(folder) or _guess_by_tables(folder, folder.files) or _guess_folders(folder)
    return {"download": {"source": section["source"], "path": path, **section}}, remark


def can_list(path: str) -> bool:
    """Return whether it is a folder, here or in a bucket, or a zip on a disk, whose files can be listed and read."""
    return archive.is_folder(path) or zipfile.is_zipfile(Path(path).expanduser())


def _read_page(page: str, folder: SourceFolder, path: str) -> Section:
    """Return the section of a page with this path and the names that its tables have here."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    sections: Section = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    download = sections["download"]

    def find(name: str) -> str:
        stem = re.split(TABLE, name)[0].rpartition("/")[2]  # .csv or .csv.gz, and perhaps a version
        similar = [file for file in folder.files if TABLE.search(file) and file.rpartition("/")[2].startswith(stem)]
        return match_files(pd.Series([name]), folder.files)[0] or next(iter(similar), name)

    if "labels" in download:
        labels = download["labels"]
        download["labels"] = list(map(find, labels)) if isinstance(labels, list) else find(labels)
    for join in download.get("join", []):
        join["table"] = find(join["table"])
    return {"download": download | {"path": path}} | {key: sections[key] for key in sections if key != "download"}


def _guess_by_names(folder: SourceFolder) -> Guess | None:
    if any(file.rpartition("/")[2].lower() == TRAIN_LABELS for file in folder.files):
        return {"source": "archive"}, ""
    if all(any(re.fullmatch(rf"{subset}[^/]*\.txt", file) for file in folder.files) for subset in ("train", "test")):
        return {"source": "covidx"}, ""
    return None


def _guess_folders(folder: SourceFolder) -> Guess:
    tables = [file for file in folder.files if TABLE.search(file)]
    if tables:
        log.warning(
            "%s: no column of its %s tables, the first is %s, names images or folders; folders are taken for classes",
            folder.root,
            len(tables),
            tables[0],
        )
    elif sheets := [file for file in folder.files if SPREADSHEET.search(file)]:
        log.warning("%s/%s: a spreadsheet, which is not read; save it as CSV in UTF-8", folder.root, sheets[0])
    if list_images(folder):
        return {"source": "folders"}, ""
    archives = [file for file in folder.files if ARCHIVE.search(file)]
    remark = f"no images, but {len(archives)} archives, the first is {archives[0]}; unpack them" if archives else ""
    return {"source": "archive"}, remark


def _guess_by_tables(folder: SourceFolder, files: list[str]) -> Guess | None:
    """Guess from the table with the column that names the most images, if it does in most of its rows."""
    best: tuple[float, Guess | None] = MIN_MATCHED, None
    tables = sorted((file for file in files if TABLE.search(file)), key=lambda file: file.count("/"))
    images = list_images(folder)
    parents = {image.rsplit("/", depth)[0] for image in images for depth in range(1, image.count("/") + 1)}
    for file in tables[:MAX_TABLES]:
        try:
            table = read_source_table(folder, file, [])
        except UserError as error:
            if len(files) == 1:  # nothing else to guess from
                raise
            log.warning("%s", error)
            continue
        if set(covid_chestxray.COLUMNS) <= set(table):
            return {"source": "covid_chestxray"}, ""
        share, guess = _guess_columns(file, table, images, parents)
        if share > best[0]:
            best = share, guess
    return best[1]


def _guess_columns(file: str, table: pd.DataFrame, images: list[str], parents: set[str]) -> tuple[float, Guess]:
    sample = table.iloc[:: max(len(table) // SAMPLE_SIZE, 1)]
    names = list(map(str, table))
    # Of folders, each must have a row of its own, or a column such as the set would be one of folders.
    shares = {name: (float(match_files(sample[name], images).ne("").mean()), name) for name in names}
    if max(shares.values(), default=(0.0, ""))[0] <= MIN_MATCHED:
        found = {name: match_files(sample[name], parents).replace("", pd.NA).nunique() for name in names}
        shares = {name: (count / max(len(sample), 1), f"{{{name}}}/") for name, count in found.items()}
    file_column = max(names, key=lambda name: shares[name][0], default="")
    share, spec = shares.get(file_column, (0.0, ""))
    columns = {"file": spec}
    for key, pattern in COLUMN_NAMES.items():
        for name in names:
            is_constant = key == "label" and table[name].nunique() < 2
            if name != file_column and not is_constant and re.search(pattern, name, re.IGNORECASE):
                columns.setdefault(key, name)
    section: Section = {"source": "table", "labels": file, "columns": columns, "positive": [], "negative": []}
    if "label" not in columns:
        return share, (section, f"which of {', '.join(names)} is columns.label?")
    values = table[columns["label"]]
    if values.str.contains("|", regex=False).any():
        section["separator"] = "|"
        values = values.str.split("|").explode()
    counts = values.value_counts()
    listed = ", ".join(f"{value!r} ({count})" for value, count in counts.head(MAX_VALUES).items())
    more = f" and {len(counts) - MAX_VALUES} more values" if len(counts) > MAX_VALUES else ""
    return share, (section, f"list these values of {columns['label']} in positive, negative or ignore: {listed}{more}")


def list_images(folder: SourceFolder) -> list[str]:
    """List the files that may be images: all but those whose names are of tables and texts."""
    return [file for file in folder.files if is_image(file)]


def parse_section(sections: Section) -> DownloadParams:
    """Return the parameters of `download`; what must be completed has its default."""
    download = {key: value for key, value in sections["download"].items() if value != []}
    return Profile.model_validate({**sections, "download": download}).download


def format_section(sections: Section) -> str:
    """Return the sections as they stand in params.yaml."""
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
