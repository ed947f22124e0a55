r"""The competition's layout of a zip, and the reading and validation of it.

train/train/*.jpg or train/*.jpg     labeled images
test/test/*.jpg or test/*.jpg        test images
train_labels.csv                     File,Label; Label is 0 (negative) or 1 (positive)
sample_submission.csv                File,Label; lists the test images in the order of a submission
metadata.csv                         optional: File,patient,source,view and optionally sex,age,license,manufacturer,
                                     modality

All of it may be in a folder. Names may be written with `\` or by a Mac, and in the tables without the ending.
"""

import contextlib
import io
import stat
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import pandas as pd

from pipeline.core.errors import UserError
from pipeline.core.files import DamagedFileError, detect_damage, read_text_table
from pipeline.data.demographics import read_age, read_patient, read_sex
from pipeline.data.file_names import match_files, quote_nearest
from pipeline.data.image_references import IMAGE_REFERENCES, list_members

METADATA = ["patient", "source", "view"]
# Columns that metadata.csv may lack; the license is that of the image.
OPTIONAL_METADATA = ["sex", "age", "license", "manufacturer", "modality"]
TRAIN_LABELS, SAMPLE_SUBMISSION, METADATA_TABLE = "train_labels.csv", "sample_submission.csv", "metadata.csv"
IGNORED_FILES = ("", "Thumbs.db", "desktop.ini")  # "" is a folder; file managers write the others
MAX_MEMBER_SIZE = 2**28  # bytes, uncompressed
ENCRYPTION_FLAGS = 0b1100001  # flag bits of a member: encryption, strong encryption, or patch data
MAX_COMPRESSION_RATIO = 200  # of members above MIN_BOMB_SIZE; far above that of any radiograph
MIN_BOMB_SIZE = 2**20  # bytes, uncompressed


@dataclass(frozen=True)
class Layout:
    """The content of a zip: `images` with one row per image, labeled images first, and the sample submission.

    The columns of `images` are file, set (train or test), member (name inside the zip; empty if a labeled image is
    missing), label (0, 1, or missing for the test set), and those of METADATA and OPTIONAL_METADATA: text, empty if
    unknown, such as sex (F, M or O), but age (years, NaN if unknown). A labeled image is called as in the zip, or, if
    it is missing, as in train_labels.csv; a test image as in sample_submission.csv. `warnings` are lines on names that
    match nothing.
    """

    images: pd.DataFrame
    sample: pd.DataFrame
    warnings: list[str]


def read_layout(path: Path) -> Layout:
    """Read the tables of the zip and match them with its images, without opening any image.

    Raises:
        UserError: a table or a test image is missing, a label, sex or age is invalid, no name of a table is that of an
            image, or a member of the zip is unsafe.
    """
    with open_zip(path) as archive:
        members = find_members(archive, path)
        train_members, test_members = (_find_images(members, path, folder) for folder in ("train", "test"))
        labels = _read_table(archive, members, path, TRAIN_LABELS, ["File", "Label"])
        sample = _read_table(archive, members, path, SAMPLE_SUBMISSION, ["File", "Label"])
        metadata = _read_metadata(archive, members, path) if find_table(members, METADATA_TABLE) else None
    warnings: list[str] = []
    train = _match_labels(path, labels, train_members, warnings)
    images = pd.concat([train, _match_sample(path, sample, test_members, warnings)], ignore_index=True)
    images["label"] = images["label"].astype("Int64")
    return Layout(_with_metadata(path, images, metadata, warnings), sample.reset_index(drop=True), warnings)


def read_labels(values: pd.Series) -> pd.Series:
    """Return 0 or 1 for `0`, `1`, `0.0`, `1.0`, `False` and `True`, and missing for any other text."""
    labels = {"false": 0, "true": 1, "0": 0, "1": 1}
    return values.str.lower().str.replace(r"^([01])\.0*$", r"\1", regex=True).map(labels).astype("Int64")


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip after checking that no member is unsafe.

    Raises:
        UserError: it is damaged, or a member is unsafe.
    """
    try:
        with detect_damage():
            archive = zipfile.ZipFile(path)
    except DamagedFileError as error:
        raise UserError(f"{path}: damaged zip ({error}); download or copy it again") from None
    names, size = Counter(archive.namelist()), path.stat().st_size
    for member in archive.infolist():
        problem = "occurs twice" if names[member.filename] > 1 else find_problem(member, size)
        if problem:
            raise UserError(f"{path}: {member.filename!r} {problem}; create the zip again without it")
    return archive


def find_problem(member: zipfile.ZipInfo, archive_size: int) -> str:
    """Return why the member makes an archive of `archive_size` bytes unsafe, or an empty string."""
    name, compressed, size = PureWindowsPath(member.filename), member.compress_size, member.file_size
    checks = {
        "has an absolute path": name.anchor != "",
        "has a path outside of the zip": ".." in name.parts,
        "has an offset beyond the end of the zip": not 0 <= member.header_offset < archive_size,
        "is a symbolic link": stat.S_ISLNK(member.external_attr >> 16),
        "is encrypted": member.flag_bits & ENCRYPTION_FLAGS,
        "is neither stored nor deflated": member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
        f"is too large ({size} bytes)": size > MAX_MEMBER_SIZE,
        f"is a decompression bomb ({compressed} to {size} bytes)": size
        > MIN_BOMB_SIZE + MAX_COMPRESSION_RATIO * compressed,
    }
    return next((problem for problem, is_present in checks.items() if is_present), "")


def read_member(archive: zipfile.ZipFile, member: str) -> bytes:
    """Read a member, at most as many bytes as the zip's directory states, even if it decompresses to more.

    Raises:
        DamagedFileError: the member is damaged.
    """
    with detect_damage(), archive.open(member) as stream:
        return stream.read(archive.getinfo(member).file_size)


def find_members(archive: zipfile.ZipFile, path: Path) -> dict[str, str]:
    """Return the members of the zip in `path` by their names in the layout.

    A name in the layout has `/` between folders, and lacks the folders around train_labels.csv.

    Raises:
        UserError: two members have the same name in the layout, or it is not clear which train_labels.csv is meant.
    """
    try:
        names = list_members(archive)
    except DamagedFileError as error:
        raise UserError(f"{path}: {IMAGE_REFERENCES} is damaged ({error}); run: dvc repro -f download") from None
    members: dict[str, str] = {}
    for member in names:
        name = clean_name(member)
        if is_ignored(name):
            continue
        if name in members:
            raise UserError(f"{path}: {member!r} and {members[name]!r} have the same name; keep one of them")
        members[name] = member
    tables = sorted((name for name in members if name.lower().rpartition("/")[2] == TRAIN_LABELS), key=_depth)
    if len(tables) > 1 and _depth(tables[0]) == _depth(tables[1]) and tables[0].lower() != tables[1].lower():
        raise UserError(f"{path}: has {tables[0]!r} and {tables[1]!r}; keep one of them")
    root = tables[0][: -len(TRAIN_LABELS)] if tables else ""
    return {name.removeprefix(root): member for name, member in members.items() if name.startswith(root)}


def is_ignored(name: str) -> bool:
    """Return whether a path is of a folder, is hidden, as in .git, or is of a file that file managers write."""
    *folders, file = name.split("/")
    is_hidden = file.startswith(".") or any(part.startswith(".") for part in folders if part not in (".", ".."))
    return is_hidden or file in IGNORED_FILES or "__MACOSX" in folders


def clean_name(member: str) -> str:
    """Return the name of a member with `/` between folders, also if Windows or a Mac wrote the zip."""
    name = member
    if not member.isascii():
        with contextlib.suppress(UnicodeError):  # a Mac writes UTF-8 without saying so, which zipfile takes for CP437
            name = member.encode("cp437").decode("utf-8")
    return name.replace("\\", "/").removeprefix("./")


def _depth(name: str) -> int:
    return name.count("/")


def find_table(members: Mapping[str, str], name: str) -> str:
    """Return the member that is the table, whose name may differ in upper and lower case, or an empty text."""
    return members.get(name) or next((member for key, member in members.items() if key.lower() == name), "")


def _find_images(members: Mapping[str, str], path: Path, folder: str) -> dict[str, str]:
    """Map file names to members, whether in `train` or in `train/train`."""
    found: dict[str, str] = {}
    for name, member in members.items():
        parent, _, file = name.rpartition("/")
        if parent.lower() in (folder, f"{folder}/{folder}"):
            if file in found:
                raise UserError(f"{path}: {member!r} and {found[file]!r} have the same name; keep one of them")
            found[file] = member
    return found


def _read_metadata(archive: zipfile.ZipFile, members: Mapping[str, str], path: Path) -> pd.DataFrame:
    optional = [*OPTIONAL_METADATA, "licence"]
    table = _read_table(archive, members, path, METADATA_TABLE, ["File", *METADATA], optional)
    table = table.rename(columns={} if "license" in table else {"licence": "license"})  # as older versions spelled it
    table = table.reindex(columns=["File", *METADATA, *OPTIONAL_METADATA], fill_value="")
    sex, age = (read(table[key], f"{path}: {METADATA_TABLE}") for key, read in (("sex", read_sex), ("age", read_age)))
    return table.assign(patient=read_patient(table["patient"]), sex=sex, age=age)


def _read_table(
    archive: zipfile.ZipFile,
    members: Mapping[str, str],
    path: Path,
    name: str,
    columns: list[str],
    optional: Collection[str] = (),
) -> pd.DataFrame:
    member = find_table(members, name)
    if not member:
        raise UserError(f"{path}: has no {name}; add it at the top level, or set download.source (docs/data.md)")
    try:
        content = read_member(archive, member)
    except DamagedFileError as error:
        raise UserError(f"{path}: {name} is damaged ({error}); download or copy the zip again") from None
    table = read_text_table(io.BytesIO(content), f"{path}: {name}", columns, optional)
    if (table["File"] == "").any():
        line = table.index[table["File"] == ""][0] + 2
        raise UserError(f"{path}: {name} line {line}: File is empty; name the image or delete the line")
    check_listed_once(table["File"], table["File"], f"{path}: {name}")
    return table[[*columns, *table.columns.intersection(list(optional))]]


def check_listed_once(names: pd.Series, images: pd.Series, table: str) -> None:
    """Verify that a table has one line per image.

    Args:
        names: as they stand in the table; row i is on its line i + 2.
        images: what each name means, empty if none.
        table: its name in error messages.

    Raises:
        UserError: two lines are of the same image.
    """
    repeated = images[images.duplicated() & (images != "")]
    if len(repeated):
        line = repeated.index[0]
        first = names[images.index[images == repeated[line]][0]]
        other = f" as {first!r}" if first != names[line] else ""
        raise UserError(f"{table} line {line + 2}: {names[line]} is listed twice{other}; keep one line")


def _match_labels(path: Path, labels: pd.DataFrame, members: Mapping[str, str], warnings: list[str]) -> pd.DataFrame:
    files = labels["File"]
    found = _match(path, TRAIN_LABELS, files, members, "train")
    values = read_labels(labels["Label"])
    if values.isna().any():
        line = values.index[values.isna()][0]
        raise UserError(
            f"{path}: {TRAIN_LABELS} line {line + 2}: the label of {files[line]} is {labels['Label'][line]!r}; "
            "it must be 0 (negative) or 1 (positive)"
        )
    missing = files[found == ""]
    unlabeled = _find_unlisted(members, found)
    if unlabeled:
        nearest = f" ({TRAIN_LABELS} has {quote_nearest(missing.iloc[0], unlabeled)})" if len(missing) else ""
        raise UserError(
            f"{path}: {len(unlabeled)} training images have no label, the first is {unlabeled[0]}{nearest}; "
            "add them to train_labels.csv or remove them"
        )
    if len(missing):
        warnings.append(
            f"{TRAIN_LABELS}: {len(missing)} of {len(files)} names have no image in train/, the first is "
            f"{quote_nearest(missing.iloc[0], members.keys() - set(found))}"
        )
    is_found = found != ""
    return pd.DataFrame({
        "file": found.where(is_found, files), "set": "train", "member": found.map(members).fillna(""), "label": values,
    })  # fmt: skip


def _match_sample(path: Path, sample: pd.DataFrame, members: Mapping[str, str], warnings: list[str]) -> pd.DataFrame:
    files = sample["File"]
    found = _match(path, SAMPLE_SUBMISSION, files, members, "test")
    missing = files[found == ""]
    if len(missing):
        raise UserError(
            f"{path}: {SAMPLE_SUBMISSION} line {missing.index[0] + 2}: image "
            f"{quote_nearest(missing.iloc[0], members.keys() - set(found))} is not in test/ "
            f"({len(missing)} missing in total); add it: a submission needs every test image"
        )
    unlisted = _find_unlisted(members, found)
    if unlisted:
        warnings.append(
            f"{SAMPLE_SUBMISSION}: {len(unlisted)} of {len(members)} images in test/ have no line, the first is "
            f"{unlisted[0]!r}"
        )
    return pd.DataFrame({"file": files, "set": "test", "member": found.map(members), "label": pd.NA})


def _find_unlisted(members: Mapping[str, str], found: pd.Series) -> list[str]:
    """Return images that no line of a table means; a file without an ending, such as README, counts only if listed."""
    return sorted(name for name in members.keys() - set(found) if "." in name.strip("."))


def _match(path: Path, table: str, files: pd.Series, members: Mapping[str, str], folder: str) -> pd.Series:
    if files.empty:
        raise UserError(f"{path}: {table} lists no image; it needs at least one")
    if not members:
        raise UserError(f"{path}: no images in {folder}/ beside {TRAIN_LABELS}; move the tables or the images there")
    found = match_files(files, members)
    check_listed_once(files, found, f"{path}: {table}")
    if (found == "").all():
        raise UserError(
            f"{path}: {table}: none of its {len(files)} names is an image in {folder}/; the first is "
            f"{quote_nearest(files.iloc[0], members)}, the first image is {min(members)!r}; write the names alike"
        )
    return found


def _with_metadata(
    path: Path, images: pd.DataFrame, metadata: pd.DataFrame | None, warnings: list[str]
) -> pd.DataFrame:
    names = images["member"].map(lambda member: clean_name(member).rpartition("/")[2])
    names = names.where(names != "", images["file"])
    for repeated in (names[names.duplicated()], images["file"][images["file"].duplicated()]):
        if len(repeated):
            raise UserError(f"{path}: {repeated.iloc[0]} is in train and in test; give every image a unique name")
    if metadata is None:
        metadata = pd.DataFrame(columns=["File", *METADATA, *OPTIONAL_METADATA])
    else:
        metadata = metadata.assign(name=_match_metadata(path, metadata["File"], names, warnings))
        metadata = metadata[metadata["name"] != ""].set_index("name")
    by_name = metadata.reindex(names).set_index(images.index)
    text = by_name.drop(columns="age").fillna("").astype("str")
    return images.join(text.assign(age=by_name["age"].astype(float))[[*METADATA, *OPTIONAL_METADATA]])


def _match_metadata(path: Path, files: pd.Series, names: pd.Series, warnings: list[str]) -> pd.Series:
    found = match_files(files, set(names))
    check_listed_once(files, found, f"{path}: {METADATA_TABLE}")
    unmatched, without_row = files[found == ""], names[~names.isin(found)]
    if len(unmatched) and len(unmatched) == len(files):
        raise UserError(
            f"{path}: {METADATA_TABLE}: none of its {len(files)} names is an image; the first is "
            f"{quote_nearest(unmatched.iloc[0], set(names))}, the first image is {names.iloc[0]!r}; write the names "
            "alike, or remove the table"
        )
    if len(unmatched):
        warnings.append(
            f"{METADATA_TABLE}: {len(unmatched)} of {len(files)} names are of no image, the first is "
            f"{quote_nearest(unmatched.iloc[0], set(without_row))}"
        )
    if len(without_row):
        warnings.append(
            f"{METADATA_TABLE}: {len(without_row)} of {len(names)} images have no line, the first is "
            f"{without_row.iloc[0]!r}"
        )
    return found
