"""Source: a folder of images with one or several tables, whose columns are named by parameters."""

import bisect
import logging
import re
from collections.abc import Callable, Collection, Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.core.config import JoinParams, TableParams, normalize_value
from pipeline.core.errors import UserError
from pipeline.core.files import check_columns
from pipeline.data.demographics import UNKNOWN_PATIENTS, drop_decimals, read_age, read_patient, read_sex
from pipeline.data.file_names import match_files, quote_nearest
from pipeline.data.source_folder import SourceFolder, open_source_folder
from pipeline.data.sources import archive_writer
from pipeline.data.sources.image_paths import extract, is_image, split_path

log = logging.getLogger(__name__)

FIELD = re.compile(r"\{([^{}]+)\}")  # name of a column in a text such as {folder}/{image}.png
MISSING = {"", "na", "n/a", "nan", "null", "<na>"}  # labels, normalized; none may mean no finding
LIST_MARKS = "[]()'\" "  # around findings, as Python writes a list: ['normal', 'COPD signs']
MAX_COUNTS = 5  # values that a message counts one by one


def write_source(params: TableParams, target: Path) -> None:
    """Write the zip from the images that the tables list, and say what is left out, merged or not found.

    Images are found by `match_files`. A name in the zip has as many folders as the table writes: `a/1.png` becomes
    `a_1.png`. Rows of the same image are merged. If nothing tells the test set, `test_share` of the patients are.

    Raises:
        UserError: a table, a column or a test image is missing, no name means an image, a label is unknown, rows of an
            image disagree, or a sex or age is invalid.
    """
    folder = open_source_folder(params.path, "the folder of images")
    tables, notes = _list_tables(folder, params.labels), list[str]()
    table = _read_tables(folder, params, notes)
    rows = _name_columns(table, params, notes)
    rows["found"] = _find_images(rows["name"], folder, params, notes)
    rows = rows[_filter_rows(table, params, notes)].pipe(_label_rows, params, notes)
    unnamed = rows[rows["name"] == ""]
    if len(unnamed):
        raise UserError(
            f"{_place(folder, unnamed.index[0])}: {params.columns.file} is empty; name the image or delete the line"
        )
    rows = _list_images(_read_demographics(rows, folder, params), folder, params)
    if params.drop_missing:
        missing = rows["path"] == ""
        _note(notes, "rows without an image left out: {}", rows["name"][missing])
        rows = rows[~missing]
    if rows.empty:
        raise UserError(f"{tables}: no row is left; {'; '.join(notes) or 'list images in it'}")
    rows = _extract_from_paths(rows, params, notes)
    rows["is_test"] = _find_test_set(rows, folder, params, notes)
    _check_labels(rows, folder, params, notes)
    rows = _merge_rows(rows, folder, params, notes)
    if notes:
        log.warning("%s: %s rows; %s", tables, len(table), "; ".join(notes))
    if rows["is_test"].isna().all():
        patients = archive_writer.known_patients(rows, folder)
        rows["is_test"] = archive_writer.draw_test_set(patients, rows["name"], params.test_share)
    archive_writer.write_zip_of_files(rows, folder, target, copy_images=params.copy_images)


# Tables


def _read_tables(folder: SourceFolder, params: TableParams, notes: list[str]) -> pd.DataFrame:
    """Return the rows of all label files, with the columns of the joined tables; the index is (file, line)."""
    specs = [spec for spec in params.columns.model_dump().values() if spec is not None]
    wanted = list(dict.fromkeys([*_fields(specs), *params.keep]))
    table = _stack(folder, params.labels, _fields(params.join[0].keys) if params.join else wanted)
    for join in params.join:
        table = _join(folder, table, join, wanted, notes)
    check_columns(table, wanted, _list_tables(folder, params.labels))
    return table


def _fields(specs: Iterable[str]) -> list[str]:
    """Return the columns that values of download.columns name."""
    return [name for spec in specs for name in FIELD.findall(spec) or [spec]]


def _stack(folder: SourceFolder, files: Path | list[Path], columns: Collection[str]) -> pd.DataFrame:
    """Read tables with the given columns, one below another; the index is (file, line)."""
    parts = []
    for file in _as_list(files):
        part = archive_writer.read_source_table(folder, file.as_posix(), columns)
        part.index = pd.MultiIndex.from_arrays([[file.as_posix()] * len(part), part.index + 2])
        parts.append(part)
    return pd.concat(parts).fillna("") if len(parts) > 1 else parts[0]


def _join(
    folder: SourceFolder, table: pd.DataFrame, join: JoinParams, wanted: list[str], notes: list[str]
) -> pd.DataFrame:
    """Add the columns of a second table to the rows of the first; empty where it has no such row."""
    name, labels = _list_tables(folder, join.table), f"{folder.root}/{table.index[0][0]}"
    fields, other_fields = _fields(join.keys), _fields(join.keys.values())
    check_columns(table, fields, labels)
    other = _stack(folder, join.table, other_fields)
    both = [one for one in wanted if one in table and one in other and one not in (*fields, *other_fields)]
    if both:
        raise UserError(f"{name}: column {both[0]!r} is also in the other table; add it to download.join.by")
    added = [column for column in other if column not in table]
    keys, other_keys = _key(table, [*join.keys]), _key(other, [*join.keys.values()])
    is_repeated = other[[column for column in added if column in wanted]].assign(**{"": other_keys}).duplicated()
    other, other_keys = other[~is_repeated], other_keys[~is_repeated]
    repeated = other_keys[other_keys.duplicated()]
    if len(repeated):
        raise UserError(
            f"{_place(folder, repeated.index[0])}: the second row of {repeated.iloc[0]!r} that differs from the first; "
            "delete one, or name in download.join.by what tells them apart"
        )
    positions = pd.Series(pd.Index(other_keys).get_indexer(pd.Index(keys)), keys.index)
    if len(join.keys) == 1 and (positions < 0).any():  # names of images, which the tables may spell differently
        left, right = keys[positions < 0].drop_duplicates(), other_keys[~other_keys.isin(keys)]
        place = dict(zip(other_keys, range(len(other_keys)), strict=True))
        matches = dict(zip(left, match_files(left, right).map(place).fillna(-1).astype(int), strict=True))
        positions = positions.where(positions >= 0, keys.map(matches).fillna(-1).astype(int))
    unmatched, unused = positions < 0, ~pd.RangeIndex(len(other)).isin(positions)
    written_here, written_there = _as_written(table, [*join.keys]), _as_written(other, [*join.keys.values()])
    if unmatched.all():
        raise UserError(
            f"{name}: no row has the {','.join(join.keys)} of a row of {labels}, such as {written_there.iloc[0]!r} "
            f"here and {written_here.iloc[0]!r} there; correct download.join.by"
        )
    _note(notes, f"rows without one in {name}: {{}}", written_here[unmatched])
    _note(notes, f"rows of {name} without one here: {{}}", written_there[unused])
    values = other[added].reset_index(drop=True).reindex(positions.to_numpy()).fillna("")
    return pd.concat([table, values.set_axis(table.index)], axis="columns")


def _key(table: pd.DataFrame, columns: list[str]) -> pd.Series:
    """Return what rows are joined by: the values of the columns, in their normal form."""
    return reduce(_with_blank, (_normalize(_fill_in(table, column)) for column in columns))


def _as_written(table: pd.DataFrame, columns: list[str]) -> pd.Series:
    """Return the values of the columns, for messages."""
    return reduce(_with_blank, (_fill_in(table, column) for column in columns))


def _with_blank(left: pd.Series, right: pd.Series) -> pd.Series:
    return left + " " + right


def _filter_rows(table: pd.DataFrame, params: TableParams, notes: list[str]) -> pd.Series:
    """Return which rows download.keep keeps, bool (N,)."""
    kept = pd.Series(True, table.index)
    for column, values in params.keep.items():
        fits = _normalize(table[column]).isin({normalize_value(value) for value in values})
        left_out = table[column][kept & ~fits]
        if len(left_out):
            notes.append(f"left out by download.keep: {len(left_out)} ({column} is {_count(left_out)})")
        kept &= fits
    return kept


# Columns


def _name_columns(table: pd.DataFrame, params: TableParams, notes: list[str]) -> pd.DataFrame:
    """Return the columns by their key in download.columns, empty if there is none, and name, as the table writes it."""
    rows = {}
    for key, spec in params.columns.model_dump().items():
        values = pd.Series("", table.index, dtype="str")
        if spec is not None:
            values = _fill_in(table, spec)
            if key in params.patterns:
                values = extract(values, params.patterns[key], f"{key} in {spec}", notes)
        rows[key] = values
    rows["patient"] = _clean_patients(rows["patient"], notes)
    return pd.DataFrame(rows).rename(columns={"file": "name", "label": "cell"})


def _fill_in(table: pd.DataFrame, spec: str) -> pd.Series:
    """Return the column, or the text with the values of the columns that stand in braces."""
    parts = FIELD.split(spec)  # text, column, text, column, …, text
    if len(parts) == 1:
        return table[spec]
    filled = pd.Series(parts[0], table.index, dtype="str")
    for column, text in zip(parts[1::2], parts[2::2], strict=True):
        filled += drop_decimals(table[column]) + text
    return filled


def _extract_from_paths(rows: pd.DataFrame, params: TableParams, notes: list[str]) -> pd.DataFrame:
    """Fill the columns that have a pattern and no column from the path of the image."""
    paths = rows["path"].where(rows["path"] != "", rows["name"])
    columns = params.columns.model_dump()
    found = {
        key: extract(paths, pattern, f"{key} in the path", notes)
        for key, pattern in params.patterns.items()
        if columns[key] is None
    }
    return rows.assign(**found)


def _clean_patients(patients: pd.Series, notes: list[str]) -> pd.Series:
    """Leave out words such as nan, which would be one patient of many images, and say so."""
    is_unknown = patients.str.lower().isin(UNKNOWN_PATIENTS)
    if is_unknown.any():
        notes.append(f"rows without a known patient: {is_unknown.sum()} ({_count(patients[is_unknown])})")
    return read_patient(patients)


def _read_demographics(rows: pd.DataFrame, folder: SourceFolder, params: TableParams) -> pd.DataFrame:
    readers: dict[str, Callable[[pd.Series, str], pd.Series]] = {"sex": read_sex, "age": read_age}
    for key, read in readers.items():
        parts = []
        for file, part in rows[key].groupby(level=0, sort=False):
            values = part.rename(getattr(params.columns, key)).set_axis(part.index.get_level_values(1) - 2)
            parts.append(read(values, f"{folder.root}/{file}").set_axis(part.index))
        rows = rows.assign(**{key: pd.concat(parts)}) if parts else rows
    return rows


# Labels


def _label_rows(rows: pd.DataFrame, params: TableParams, notes: list[str]) -> pd.DataFrame:
    """Add label (1, 0 or missing) and unknown (the finding in no list, if missing); leave out rows to be ignored."""
    labels = {cell: _label_cell(cell, params) for cell in rows["cell"].unique()}
    rows = rows.assign(
        label=rows["cell"].map({cell: label for cell, (label, _) in labels.items()}).astype("Int64"),
        unknown=rows["cell"].map({cell: unknown for cell, (_, unknown) in labels.items()}),
    )
    if params.negative == "others":  # or a typing error would make its images negative
        known = {normalize_value(one) for cell in labels for one in _split_cell(cell, params)}
        for key in ("positive", "ignore"):
            unused = [value for value in getattr(params, key) if value and normalize_value(value) not in known]
            _note(notes, f"values of download.{key} that no row has: {{}}", pd.Series(unused, dtype="str"))
    ignored = (rows["label"] < 0).fillna(False).astype(bool)
    if ignored.any():
        notes.append(f"ignored: {ignored.sum()} ({params.columns.label} is {_count(rows['cell'][ignored])})")
    return rows[~ignored]


def _label_cell(cell: str, params: TableParams) -> tuple[int | None, str]:
    """Return 1 (a finding is positive), 0 (all are negative), -1 (one is ignored), or None and the unknown finding."""
    findings = _split_cell(cell, params)
    values = [normalize_value(finding) for finding in findings]
    positive, ignore, negative = (
        {normalize_value(value) for value in listed if listed != "others"}
        for listed in (params.positive, params.ignore, params.negative)
    )
    if ignore.intersection(values):
        return -1, ""
    if positive.intersection(values):
        return 1, ""
    for finding, value in zip(findings, values, strict=True):
        if value in MISSING if params.negative == "others" else value not in negative:
            return None, finding
    return 0, ""


def _split_cell(cell: str, params: TableParams) -> list[str]:
    return [part.strip(LIST_MARKS) for part in cell.split(params.separator)] if params.separator else [cell]


def _check_labels(rows: pd.DataFrame, folder: SourceFolder, params: TableParams, notes: list[str]) -> None:
    """Refuse unknown labels, except of test images, which need not be known, and tables without a class."""
    unknown = rows[rows["label"].isna() & ~rows["is_test"].fillna(False)]
    if len(unknown):
        raise UserError(
            f"{_place(folder, unknown.index[0])}: {params.columns.label} is {unknown['unknown'].iloc[0]!r}, which is "
            f"in neither download.positive nor download.negative ({len(unknown)} rows: {_count(unknown['unknown'])}); "
            "add it to one of them, or to download.ignore"
        )
    cells = rows["cell"][rows["label"].isna() & (rows["cell"] != "")]
    if len(cells):
        notes.append(f"test images whose label is in no list: {len(cells)} ({_count(cells)})")
    for label, key in ((1, "positive"), (0, "negative")):
        if not (rows["label"] == label).any():
            values = getattr(params, key)
            listed = values if values == "others" else ", ".join(map(repr, values))
            raise UserError(
                f"{_list_tables(folder, params.labels)}: no image is {key}; download.{key} is {listed}; "
                f"{params.columns.label} is {_count(rows['cell'])}"
            )


# Images


def _find_images(names: pd.Series, folder: SourceFolder, params: TableParams, notes: list[str]) -> pd.Series:
    """Return the file or, if the column names folders, the folder of each row; say what matches nothing, both ways."""
    files: Collection[str] = folder.files
    if _names_folders(params):
        files = {"/".join(parts[:depth]) for parts in map(split_path, folder.files) for depth in range(1, len(parts))}
    found = match_files(names, files)
    missing = names[(found == "") & (names != "")].drop_duplicates()
    if len(missing) and (found == "").all():
        kind = "folder" if _names_folders(params) else "file"
        raise UserError(
            f"{_place(folder, missing.index[0])}: {params.columns.file} is {quote_nearest(missing.iloc[0], files)}; "
            f"neither it nor any of {len(missing) - 1} others is a {kind} in {folder.root}; correct download.path or "
            "download.columns.file"
        )
    if len(missing):
        notes.append(f"images not found: {len(missing)}, the first is {quote_nearest(missing.iloc[0], files)}")
    used = set(found)
    if _names_folders(params):
        used = {file for one in used for file in _files_in(one, folder)}
    unlisted = [file for file in folder.files if file not in used and is_image(file)]
    _note(notes, "images without a row: {}", pd.Series(unlisted, dtype="str"))
    return found


def _names_folders(params: TableParams) -> bool:
    return params.columns.file.endswith("/") and bool(FIELD.search(params.columns.file))


def _files_in(parent: str, folder: SourceFolder) -> list[str]:
    """Return the images in a folder and in its subfolders."""
    if not parent:
        return []
    start = bisect.bisect_left(folder.files, f"{parent}/")
    end = bisect.bisect_left(folder.files, f"{parent}0")  # 0 is the character after /
    return [file for file in folder.files[start:end] if is_image(file)]


def _list_images(rows: pd.DataFrame, folder: SourceFolder, params: TableParams) -> pd.DataFrame:
    """Add path, of the image, and file, its name in the zip; a row that names a folder becomes a row per image."""
    depth = rows["name"].map({name: len(split_path(name)) for name in rows["name"].unique()})
    rows = rows.assign(path=rows["found"], depth=depth)
    if _names_folders(params):
        images = {one: _files_in(one, folder) or [""] for one in rows["found"].unique()}
        rows = rows.assign(path=rows["found"].map(images)).explode("path")
        rows["depth"] += rows["path"].str.count("/") - rows["found"].str.count("/")
    triples = zip(rows["path"], rows["name"], rows["depth"], strict=True)
    rows["file"] = ["_".join(split_path(path)[-depth:] if path else split_path(name)) for path, name, depth in triples]
    return rows


def _find_test_set(rows: pd.DataFrame, folder: SourceFolder, params: TableParams, notes: list[str]) -> pd.Series:
    """Return which images are the test set, (N,); missing if nothing tells it."""
    if params.test_list is not None:
        lines = map(str.strip, archive_writer.read_lines(folder, params.test_list.as_posix()))
        names = pd.Series([line for line in lines if line], dtype="str")
        files = match_files(names, folder.files)
        is_test = rows["path"].isin(set(files) - {""}) | rows["name"].isin(names)
        listed = files.isin(rows["path"]) & (files != "") | names.isin(rows["name"])
        _note(notes, f"names in {folder.root}/{params.test_list} that are none of these images: {{}}", names[~listed])
        return is_test.astype("boolean")
    if params.columns.set is None and "set" not in params.patterns:
        return pd.Series(pd.NA, rows.index, dtype="boolean")
    known = {normalize_value(value): False for value in params.training_sets}
    known |= {normalize_value(value): True for value in params.test_sets}
    is_test = _normalize(rows["set"]).map(known).astype("boolean")
    unknown = rows["set"][is_test.isna()]
    if len(unknown):
        allowed = " or ".join([*params.training_sets, *params.test_sets])
        raise UserError(
            f"{_place(folder, unknown.index[0])}: {params.columns.set or 'set in the path'} is {unknown.iloc[0]!r}; "
            f"it must be {allowed} ({len(unknown)} rows: {_count(unknown)}); add it to download.training_sets or to "
            "download.test_sets"
        )
    return is_test


def _merge_rows(rows: pd.DataFrame, folder: SourceFolder, params: TableParams, notes: list[str]) -> pd.DataFrame:
    """Merge the rows of an image, at the first of them: known values win over empty ones, and labels must agree."""
    image = rows["path"].where(rows["path"] != "", rows["name"])
    is_repeated = image.duplicated(keep=False).to_numpy()
    if not is_repeated.any():
        return rows
    rows = rows.assign(order=range(len(rows)))
    repeated, image = rows[is_repeated], image[is_repeated]
    groups = repeated.replace("", pd.NA).groupby(image.to_numpy(), sort=False)
    positive, known = groups["label"].sum(), groups["label"].count()
    unclear = (positive > 0) & (positive < known) & (params.repeated != "any")
    if params.repeated == "majority":
        unclear &= 2 * positive == known
    for key in ("label", "patient", "set", "source", "view", "sex", "age", "license", "manufacturer", "modality"):
        differ = unclear if key == "label" else groups[key].nunique() > 1  # noqa: PD101  # it is a groupby
        if not differ.any():
            continue
        first = differ.index[differ][0]
        values = repeated["cell" if key == "label" else key][(image == first).to_numpy()].astype("str")
        values = values[values != ""].drop_duplicates()
        places = ", ".join(f"{value!r} in line {line}" for (_, line), value in values.iloc[1:].items())
        raise UserError(
            f"{_place(folder, values.index[0])}: {key} of {first} is {values.iloc[0]!r}, but {places} ({differ.sum()} "
            f"such images); correct the table{' or set download.repeated to majority or any' if key == 'label' else ''}"
        )
    label = 2 * positive > known if params.repeated == "majority" else positive > 0
    merged = groups.first().assign(label=label.astype("Int64").where(known > 0))
    text = merged.columns.difference(["label", "age", "is_test", "order", "depth"])
    merged[text] = merged[text].fillna("").astype("str")
    notes.append(f"merged with another row of their image: {len(repeated) - len(merged)}")
    return pd.concat([rows[~is_repeated].reset_index(drop=True), merged]).sort_values("order")


# Messages


def _as_list(files: Path | list[Path]) -> list[Path]:
    return files if isinstance(files, list) else [files]


def _list_tables(folder: SourceFolder, files: Path | list[Path]) -> str:
    first, *others = [path.as_posix() for path in _as_list(files)]
    return ", ".join([f"{folder.root}/{first}", *others])


def _place(folder: SourceFolder, index: Any) -> str:
    """Name the file and the line that an index of rows stands for."""
    return f"{folder.root}/{index[0]} line {index[1]}"


def _normalize(values: pd.Series) -> pd.Series:
    return values.map({value: normalize_value(value) for value in values.unique()}).astype("str")


def _count(values: pd.Series) -> str:
    """Count the commonest values: 'L' 3000, empty 20 and 3 others."""
    counts = values.value_counts().sort_index().sort_values(ascending=False, kind="stable")
    texts = [f"{repr(value) if value else 'empty'} {count}" for value, count in counts.head(MAX_COUNTS).items()]
    return ", ".join(texts) + (f" and {len(counts) - MAX_COUNTS} others" if len(counts) > MAX_COUNTS else "")


def _note(notes: list[str], text: str, values: pd.Series) -> None:
    """Add a note with the number of the values for {}, and the first of them, if there are any."""
    if len(values):
        notes.append(f"{text.format(len(values))}, the first is {values.iloc[0]!r}")
