"""The competition's layout: what a zip must hold, read and checked in one place.

train/train/*.jpg or train/*.jpg     labeled images
test/test/*.jpg or test/*.jpg        images to be judged
train_labels.csv                     File,Label with Label 0 (negative) or 1 (COVID-19)
sample_submission.csv                File,Label with the test images in the order of the submission
metadata.csv                         optional: File,patient,source,view and, where known, license
"""

import io
import stat
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import pandas as pd

from pipeline.core.errors import UserError, first_line
from pipeline.core.files import read_text_table

METADATA = ["patient", "source", "view"]
IGNORED_FILES = ("", ".DS_Store", "Thumbs.db")  # folders, and what file managers leave, as they do ._names
LICENSE = "license"  # of the image, a column that metadata.csv need not have
MAX_MEMBER_SIZE = 2**28  # bytes of a member once unpacked
DAMAGED_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    RuntimeError,
    ValueError,
)  # what zipfile raises on a broken zip
ENCRYPTION_FLAGS = 0b1100001  # flags of a member: encrypted, strongly encrypted, a patch of another file
MAX_COMPRESSION_RATIO = 200  # times what it is packed into, for what is above BOMB bytes; no radiograph comes near
MIN_BOMB_SIZE = 2**20


@dataclass(frozen=True)
class Layout:
    """`images` has one row per image, labeled ones first.

    Its columns are file, set (train or test), member (the name inside the zip, empty where a labeled image is
    missing), label (0, 1 or missing for the test set), patient, source, view and license (empty where not known).
    """

    images: pd.DataFrame
    sample: pd.DataFrame


def read_layout(path: Path) -> Layout:
    """Read the tables of the zip and match them with its images; no image is opened.

    Raises:
        UserError: a table or a test image is missing, a label is not 0 or 1, or the zip has a member that no honest
            archive of radiographs has.
    """
    with _open(path) as archive:
        labeled, judged = _members(archive, path, "train"), _members(archive, path, "test")
        labels = _table(archive, path, "train_labels.csv", ["File", "Label"])
        sample = _table(archive, path, "sample_submission.csv", ["File", "Label"])
        known = "metadata.csv" in archive.namelist()
        metadata = _table(archive, path, "metadata.csv", ["File", *METADATA], LICENSE) if known else None
    wrong = labels[~labels["Label"].isin(["0", "1"])]
    if len(wrong):
        raise UserError(
            f"{path}: train_labels.csv line {wrong.index[0] + 2}: the label of {wrong['File'].iloc[0]} is "
            f"{wrong['Label'].iloc[0]!r}; it must be 0 (negative) or 1 (COVID-19)"
        )
    train = _match(path, "train_labels.csv", labels["File"], labeled, "train")
    test = _match(path, "sample_submission.csv", sample["File"], judged, "test")
    absent = test[test["member"] == ""]
    if len(absent):
        raise UserError(
            f"{path}: sample_submission.csv line {absent.index[0] + 2}: there is no image {absent['file'].iloc[0]} in "
            f"test/ ({len(absent)} missing in all); a submission needs every test image, so add it"
        )
    # What has no ending, such as README or .gitkeep, is an image only where a table says so.
    unlabeled = sorted(name for name in set(labeled) - set(labels["File"]) if "." in name.strip("."))
    if unlabeled:
        raise UserError(
            f"{path}: {len(unlabeled)} training images have no label, the first is {unlabeled[0]}; "
            "add them to train_labels.csv or take them out"
        )
    images = pd.concat([train.assign(label=labels["Label"].astype(int).to_numpy()), test], ignore_index=True)
    images["label"] = images["label"].astype("Int64")
    return Layout(_with_metadata(path, images, metadata), sample)


def _open(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGED_ZIP_ERRORS as error:
        raise UserError(f"{path}: a damaged zip ({first_line(error)}); fetch it again") from None
    names, size = Counter(archive.namelist()), path.stat().st_size
    for member in archive.infolist():
        wrong = "is in it twice" if names[member.filename] > 1 else _wrong(member, size)
        if wrong:
            raise UserError(f"{path}: {member.filename!r} {wrong}; make the zip anew without it")
    return archive


def _wrong(member: zipfile.ZipInfo, size: int) -> str:
    """Say why an archive of `size` bytes with this member is not to be trusted; nothing where all is well."""
    name, packed, unpacked = PureWindowsPath(member.filename), member.compress_size, member.file_size
    checks = {
        "has an absolute name": name.anchor != "",
        "leads out of the archive": ".." in name.parts,
        "lies outside of it": not 0 <= member.header_offset < size,
        "is a symbolic link": stat.S_ISLNK(member.external_attr >> 16),
        "is encrypted": member.flag_bits & ENCRYPTION_FLAGS,
        "is neither stored nor deflated": member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
        f"is too large ({unpacked} bytes)": unpacked > MAX_MEMBER_SIZE,
        f"is a decompression bomb ({packed} to {unpacked} bytes)": unpacked
        > MIN_BOMB_SIZE + MAX_COMPRESSION_RATIO * packed,
    }
    return next((fault for fault, found in checks.items() if found), "")


def read_member(archive: zipfile.ZipFile, member: str) -> bytes:
    """Read a member, but no more of it than the archive says there is, whatever it inflates to.

    Raises:
        one of DAMAGE: it is not as the archive says.
    """
    with archive.open(member) as stream:
        return stream.read(archive.getinfo(member).file_size)


def _table(archive: zipfile.ZipFile, path: Path, name: str, columns: list[str], optional: str = "") -> pd.DataFrame:
    try:
        text = read_member(archive, name)
    except KeyError:
        raise UserError(f"{path}: has no {name}; add it at the top of the zip") from None
    except DAMAGED_ZIP_ERRORS as error:
        raise UserError(f"{path}: {name} is damaged in the zip ({first_line(error)}); fetch it again") from None
    table = read_text_table(io.BytesIO(text), f"{path}: {name}", columns)
    twice = table["File"][table["File"].duplicated()]
    if len(twice):
        raise UserError(f"{path}: {name} line {twice.index[0] + 2}: {twice.iloc[0]} is listed twice; keep one line")
    return table[[*columns, *table.columns.intersection([optional])]]


def _members(archive: zipfile.ZipFile, path: Path, folder: str) -> dict[str, str]:
    """Map file names to names inside the zip, for both nestings."""
    members: dict[str, str] = {}
    for member in archive.namelist():
        place, _, file = member.removeprefix("./").rpartition("/")
        if place in (folder, f"{folder}/{folder}") and file not in IGNORED_FILES and not file.startswith("._"):
            if file in members:
                raise UserError(f"{path}: {member!r} and {members[file]!r} have one name; leave one of them in it")
            members[file] = member
    return members


def _match(path: Path, table: str, files: pd.Series, members: dict[str, str], subset: str) -> pd.DataFrame:
    if files.empty:
        raise UserError(f"{path}: {table} lists no image; it needs at least one")
    return pd.DataFrame({"file": files, "set": subset, "member": files.map(members).fillna("")})


def _with_metadata(path: Path, images: pd.DataFrame, metadata: pd.DataFrame | None) -> pd.DataFrame:
    if images["file"].duplicated().any():
        name = images["file"][images["file"].duplicated()].iloc[0]
        raise UserError(f"{path}: {name} is in train and in test; give every image its own name")
    if metadata is None:
        metadata = pd.DataFrame(columns=["File"])
    known = metadata.set_index("File").reindex(index=images["file"], columns=[*METADATA, LICENSE], fill_value="")
    return images.join(known.astype("str"), on="file")
