"""The competition's layout of a zip, and the reading and validation of it.

train/train/*.jpg or train/*.jpg     labeled images
test/test/*.jpg or test/*.jpg        test images
train_labels.csv                     File,Label; Label is 0 (negative) or 1 (COVID-19)
sample_submission.csv                File,Label; lists the test images in the order of a submission
metadata.csv                         optional: File,patient,source,view and optionally sex,age,license
"""

import io
import stat
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import pandas as pd

from pipeline.core.errors import UserError
from pipeline.core.files import DamagedFileError, detect_damage, read_text_table
from pipeline.data.demographics import read_age, read_sex

METADATA = ["patient", "source", "view"]
OPTIONAL_METADATA = ["sex", "age", "license"]  # columns that metadata.csv may lack; the license is that of the image
IGNORED_FILES = ("", ".DS_Store", "Thumbs.db")  # "" is a folder; file managers write the others, and names with ._
MAX_MEMBER_SIZE = 2**28  # bytes, uncompressed
ENCRYPTION_FLAGS = 0b1100001  # flag bits of a member: encryption, strong encryption, or patch data
MAX_COMPRESSION_RATIO = 200  # of members above MIN_BOMB_SIZE; far above that of any radiograph
MIN_BOMB_SIZE = 2**20  # bytes, uncompressed


@dataclass(frozen=True)
class Layout:
    """The content of a zip: `images` with one row per image, labeled images first, and the sample submission.

    The columns of `images` are file, set (train or test), member (name inside the zip; empty if a labeled image is
    missing), label (0, 1, or missing for the test set), patient, source, view, sex (F, M or O), license (all empty if
    unknown) and age (years, NaN if unknown).
    """

    images: pd.DataFrame
    sample: pd.DataFrame


def read_layout(path: Path) -> Layout:
    """Read the tables of the zip and match them with its images, without opening any image.

    Raises:
        UserError: a table or a test image is missing, a label, sex or age is invalid, or a member of the zip is unsafe.
    """
    with _open(path) as archive:
        train_members, test_members = _members(archive, path, "train"), _members(archive, path, "test")
        labels = _read_table(archive, path, "train_labels.csv", ["File", "Label"])
        sample = _read_table(archive, path, "sample_submission.csv", ["File", "Label"])
        has_metadata = "metadata.csv" in archive.namelist()
        metadata = _read_metadata(archive, path) if has_metadata else None
    invalid = labels[~labels["Label"].isin(["0", "1"])]
    if len(invalid):
        raise UserError(
            f"{path}: train_labels.csv line {invalid.index[0] + 2}: the label of {invalid['File'].iloc[0]} is "
            f"{invalid['Label'].iloc[0]!r}; it must be 0 (negative) or 1 (COVID-19)"
        )
    train = _match(path, "train_labels.csv", labels["File"], train_members, "train")
    test = _match(path, "sample_submission.csv", sample["File"], test_members, "test")
    missing = test[test["member"] == ""]
    if len(missing):
        raise UserError(
            f"{path}: sample_submission.csv line {missing.index[0] + 2}: image {missing['file'].iloc[0]} is not in "
            f"test/ ({len(missing)} missing in total); add it: a submission needs every test image"
        )
    # A file without an extension, such as README or .gitkeep, counts as an image only if a table lists it.
    unlabeled = sorted(name for name in set(train_members) - set(labels["File"]) if "." in name.strip("."))
    if unlabeled:
        raise UserError(
            f"{path}: {len(unlabeled)} training images have no label, the first is {unlabeled[0]}; "
            "add them to train_labels.csv or remove them"
        )
    images = pd.concat([train.assign(label=labels["Label"].astype(int).to_numpy()), test], ignore_index=True)
    images["label"] = images["label"].astype("Int64")
    return Layout(_with_metadata(path, images, metadata), sample)


def _open(path: Path) -> zipfile.ZipFile:
    try:
        with detect_damage():
            archive = zipfile.ZipFile(path)
    except DamagedFileError as error:
        raise UserError(f"{path}: damaged zip ({error}); download or copy it again") from None
    names, size = Counter(archive.namelist()), path.stat().st_size
    for member in archive.infolist():
        problem = "occurs twice" if names[member.filename] > 1 else _find_problem(member, size)
        if problem:
            raise UserError(f"{path}: {member.filename!r} {problem}; create the zip again without it")
    return archive


def _find_problem(member: zipfile.ZipInfo, archive_size: int) -> str:
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


def _read_metadata(archive: zipfile.ZipFile, path: Path) -> pd.DataFrame:
    name = "metadata.csv"
    table = _read_table(archive, path, name, ["File", *METADATA], [*OPTIONAL_METADATA, "licence"])
    table = table.rename(columns={} if "license" in table else {"licence": "license"})  # as older versions spelled it
    table = table.reindex(columns=["File", *METADATA, *OPTIONAL_METADATA], fill_value="")
    sex, age = (read(table[key], f"{path}: {name}") for key, read in (("sex", read_sex), ("age", read_age)))
    return table.assign(sex=sex, age=age)


def _read_table(
    archive: zipfile.ZipFile, path: Path, name: str, columns: list[str], optional: list[str] | None = None
) -> pd.DataFrame:
    try:
        content = read_member(archive, name)
    except KeyError:
        raise UserError(f"{path}: has no {name}; add it at the top level of the zip") from None
    except DamagedFileError as error:
        raise UserError(f"{path}: {name} is damaged ({error}); download or copy the zip again") from None
    table = read_text_table(io.BytesIO(content), f"{path}: {name}", columns)
    repeated = table["File"][table["File"].duplicated()]
    if len(repeated):
        raise UserError(
            f"{path}: {name} line {repeated.index[0] + 2}: {repeated.iloc[0]} is listed twice; keep one line"
        )
    return table[[*columns, *table.columns.intersection(optional or [])]]


def _members(archive: zipfile.ZipFile, path: Path, folder: str) -> dict[str, str]:
    """Map file names to their paths in the zip, whether in `train` or in `train/train`."""
    members: dict[str, str] = {}
    for member in archive.namelist():
        parent, _, file = member.removeprefix("./").rpartition("/")
        if parent in (folder, f"{folder}/{folder}") and file not in IGNORED_FILES and not file.startswith("._"):
            if file in members:
                raise UserError(f"{path}: {member!r} and {members[file]!r} have the same name; keep one of them")
            members[file] = member
    return members


def _match(path: Path, table: str, files: pd.Series, members: dict[str, str], subset: str) -> pd.DataFrame:
    if files.empty:
        raise UserError(f"{path}: {table} lists no image; it needs at least one")
    return pd.DataFrame({"file": files, "set": subset, "member": files.map(members).fillna("")})


def _with_metadata(path: Path, images: pd.DataFrame, metadata: pd.DataFrame | None) -> pd.DataFrame:
    if images["file"].duplicated().any():
        name = images["file"][images["file"].duplicated()].iloc[0]
        raise UserError(f"{path}: {name} is in train and in test; give every image a unique name")
    if metadata is None:
        metadata = pd.DataFrame(columns=["File", *METADATA, *OPTIONAL_METADATA])
    by_file = metadata.set_index("File").reindex(images["file"])
    text = by_file.drop(columns="age").fillna("").astype("str")
    columns = text.assign(age=by_file["age"].astype(float))[[*METADATA, *OPTIONAL_METADATA]]
    return images.join(columns, on="file")
