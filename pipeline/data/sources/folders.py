"""Source: a folder per class, with or without folders for the sets around or inside, and single folders around it all.

Such are the Kermany pneumonia set (`chest_xray/train/NORMAL/*.jpeg`) and the COVID-19 Radiography Database
(`COVID/images/*.png` beside `COVID/masks/*.png`).
"""

import logging
import math
import posixpath
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

from pipeline.core.config import FoldersParams
from pipeline.core.errors import UserError
from pipeline.data.layout import METADATA
from pipeline.data.source_folder import SourceFolder, open_source_folder
from pipeline.data.sources import archive_writer
from pipeline.data.sources.image_paths import extract, is_image, split_path

log = logging.getLogger(__name__)

# Names of folders, in lower case.
SET = re.compile(r"(train|test|val)(?:ing|id|idation)?(?:[ _-]?(?:set|images))?")
IMAGES = re.compile(r"images?|imgs?")
MASKS = re.compile(r"(?:.*[ _-])?masks?")  # also "lung masks"


class _Folder(NamedTuple):
    """What a folder says of the images in it."""

    subset: str  # train, val, test, or empty
    class_name: str  # the folder that says the class; empty if none does
    label: int | None
    left_out: str  # why its images are; empty if they are not


def write_source(params: FoldersParams, target: Path) -> None:
    """Write the zip from the images whose folder is listed as positive or negative.

    A folder `val` counts as training, since `split` makes the validation set. Images of a folder `test` are the test
    set; without it, `test_share` of the patients are. Masks and inner copies of the same tree are left out.

    Raises:
        UserError: a folder is in no list, an image is in no folder, or a class or set is empty.
    """
    folder = open_source_folder(params.path, "the folder with a folder per class")
    notes = list[str]()
    rows = _label_images(folder, params, notes)
    for key, pattern in params.patterns.items():
        rows[key] = extract(rows["path"], pattern, f"{key} in the path", notes)
    if notes:
        log.warning("%s: %s", folder.root, "; ".join(notes))
    rows["is_test"] = rows["subset"] == "test"
    if not rows["is_test"].any():
        patients = archive_writer.known_patients(rows, folder)
        rows["is_test"] = archive_writer.draw_test_set(patients, rows["file"], params.test_share)
    archive_writer.write_zip_of_files(rows, folder, target, copy_images=params.copy_images)


def _label_images(folder: SourceFolder, params: FoldersParams, notes: list[str]) -> pd.DataFrame:
    """Return the images in the order of their paths: path, file, subset, label and empty metadata.

    What is left out is noted.
    """
    paths = pd.Series(folder.files, dtype="str")
    may_be_image = paths.map(is_image).astype(bool)
    left_out = {"other files": paths[~may_be_image]}
    rows = pd.DataFrame({"path": paths[may_be_image]})
    if rows.empty:
        raise UserError(f"{folder.root}: no images; set download.path to the folder with a folder per class")

    parents = rows["path"].str.rpartition("/")[0]
    around = _folders_around(list(parents.unique()))
    listed = {name: {_key(one) for one in getattr(params, name)} for name in ("positive", "negative", "ignore")}
    described = {parent: _describe(parent, around, listed, folder.root) for parent in parents.unique()}
    rows[list(_Folder._fields)] = [described[parent] for parent in parents]
    for reason in rows["left_out"].unique():
        left_out[reason] = rows["path"][rows["left_out"] == reason]
    rows = rows[rows["left_out"] == ""].astype({"label": "Int64"})
    _check_classes(rows, params, folder.root)

    original = _find_originals(rows, folder)
    left_out["copies, with the same content as images one folder above"] = rows["path"][original != ""]
    rows = rows[original == ""]
    around = _folders_around(list(rows["path"].str.rpartition("/")[0].unique()))
    notes += [
        f"left out {len(some)} {reason}, the first is {some.iloc[0]}"
        for reason, some in left_out.items()
        if reason and len(some)
    ]
    validation = rows["path"][rows["subset"] == "val"]
    if len(validation):
        notes.append(
            f"{len(validation)} images of the validation set count as training (the first is {validation.iloc[0]}); "
            "the stage split makes the validation set"
        )
    inner = rows["path"].str.removeprefix(f"{around}/" if around else "")
    return rows.assign(**dict.fromkeys(METADATA, ""), file=["_".join(split_path(path)) for path in inner])


def _describe(parent: str, around: str, listed: dict[str, set[str]], root: str) -> _Folder:
    """Describe a folder; `around` are the outer folders that all images share, `listed` the keys of the classes."""
    parts = parent.split("/") if parent else []
    keys, inner = [_key(part) for part in parts], len(around.split("/")) if around else 0
    # A folder around it all may be called like a set or a class.
    subsets = _find_subsets(keys[inner:]) or _find_subsets(keys)
    if "test" in subsets and len(subsets) > 1:
        raise UserError(f"{root}: {parent} is in the test set and in another; rename one of these folders")
    subset = min(subsets, default="")
    if any(MASKS.fullmatch(key) and not any(key in some for some in listed.values()) for key in keys):
        return _Folder(subset, "", None, "masks")
    if ignored := next((part for part, key in zip(parts, keys, strict=True) if key in listed["ignore"]), None):
        return _Folder(subset, ignored, None, f"images of the ignored folder {ignored}")
    for some in (keys[inner:], keys):
        positive, negative = (sorted(listed[name].intersection(some)) for name in ("positive", "negative"))
        if positive and negative:
            raise UserError(
                f"{root}: {parent} has the positive folder {positive[0]!r} and the negative {negative[0]!r}; rename "
                "one of them, or add one to download.ignore"
            )
        if positive or negative:
            name = next(part for part in reversed(parts) if _key(part) in (*positive, *negative))
            return _Folder(subset, name, int(bool(positive)), "")
    return _Folder(subset, _guess_class_folder(parts[inner:]), None, "")


def _find_subsets(keys: list[str]) -> set[str]:
    return {match[1] for key in keys if (match := SET.fullmatch(key))}


def _guess_class_folder(parts: list[str]) -> str:
    """Return the folder that seems to say the class: inside of the set, around the images, or the outermost."""
    keys = [_key(part) for part in parts]
    inside = [index for index, key in enumerate(keys) if SET.fullmatch(key)]
    around = [index for index, key in enumerate(keys) if IMAGES.fullmatch(key)]
    names = [part for index, part in enumerate(parts) if index not in (*inside, *around)]
    if not names:
        return ""
    if inside and (later := [part for part in parts[inside[-1] + 1 :] if part in names]):
        return later[0]
    earlier = [part for part in parts[: (inside or around or [0])[-1]] if part in names]
    return earlier[-1] if earlier else names[0]


def _check_classes(rows: pd.DataFrame, params: FoldersParams, root: str) -> None:
    unlabeled = rows[rows["label"].isna()]
    names = unlabeled["class_name"][unlabeled["class_name"] != ""]
    counts = names.groupby(names.map(_key)).agg(["first", "count"]).set_index("first")["count"]
    if len(counts):
        found = ", ".join(f"{name!r} ({count} images)" for name, count in counts.head(20).items())
        found += f" and {len(counts) - 20} more" if len(counts) > 20 else ""
        advice = "list each in download.positive, download.negative or download.ignore"
        if not (params.positive or params.negative) and len(counts) == 2:
            first, second = (_format_list(name) for name in counts.index)
            advice = (
                f"write in params.yaml, under download, positive: {first} and negative: {second}, or positive: "
                f"{second} and negative: {first}"
            )
        raise UserError(f"{root}: in no list of classes: {found}; {advice}")
    lost = unlabeled[unlabeled["subset"] != "test"]  # test images may have no label
    if len(lost):
        raise UserError(
            f"{root}: {lost['path'].iloc[0]} is in no folder of a class ({len(lost)} in total); move it into one"
        )
    for name, label in (("positive", 1), ("negative", 0)):
        if not (rows["label"] == label).any():
            listed = ", ".join(map(repr, getattr(params, name))) or "no folder"
            raise UserError(f"{root}: no image is {name}; download.{name} lists {listed}")


def _find_originals(rows: pd.DataFrame, folder: SourceFolder) -> pd.Series:
    """Find copies of a tree inside itself, as the Kermany set on Kaggle has one.

    Returns:
        (N,): the path, without one of the folders, of an image of the same class, set and content; or an empty text.
    """
    kinds = zip(rows["label"].fillna(-1), rows["subset"] == "test", strict=True)
    kind = dict(zip(rows["path"], kinds, strict=True))

    def find_original(path: str) -> str:
        parts = path.split("/")
        shorter = ("/".join(parts[:index] + parts[index + 1 :]) for index in range(len(parts) - 1))
        candidates = (one for one in shorter if kind.get(one) == kind[path])
        return next((one for one in candidates if folder.read_bytes(one) == folder.read_bytes(path)), "")

    return rows["path"].map(find_original).astype("str")


def _folders_around(parents: Sequence[str]) -> str:
    """Return the outer folders that all images share; of a single folder, those around it."""
    return posixpath.commonpath(parents) if len(parents) > 1 else posixpath.dirname(parents[0])


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().casefold()


def _format_list(name: str) -> str:
    """Return a list of this name in YAML, with quotes where it needs them, as `yes` does."""
    return yaml.safe_dump([name], default_flow_style=True, allow_unicode=True, width=math.inf).rstrip()
