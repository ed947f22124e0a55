"""Reading of the manifest, which describes each image of the pack, and of the split."""

from pathlib import Path

import pandas as pd

from pipeline.core.config import SplitParams
from pipeline.core.errors import UserError


def read_manifest(data: Path) -> pd.DataFrame:
    """Read `manifest.csv` from the folder `data`; unknown texts are empty strings, and test images have no label."""
    text = dict.fromkeys(["file", "set", "patient", "source", "view", "license", "xxh128", "phash"], "str")
    numeric = {**dict.fromkeys(["width", "height", "bytes"], "int64"), "jpeg_quantization": "float64"}
    types = {**text, **numeric, "label": "Int64"}
    return pd.read_csv(data / "manifest.csv", dtype=types, keep_default_na=False, na_values={"label": [""]})


def validation_fold(params: SplitParams, seed: int) -> int:
    """Return the fold on which a training seed validates."""
    return seed % params.folds if params.cross_validate else 0


def read_split(data: Path, fold: int = 0) -> pd.DataFrame:
    """Join `manifest.csv` and `split.csv`; row i describes image i of the pack.

    Args:
        data: folder of the two files.
        fold: of the labeled images that form the validation set.

    Returns:
        The manifest with the columns group and subset (train, validation or test).

    Raises:
        UserError: the two files list different images.
    """
    rows = read_manifest(data)
    split = pd.read_csv(data / "split.csv", dtype=str, keep_default_na=False)
    if list(rows["file"]) != list(split["file"]):
        raise UserError(f"{data}: manifest.csv and split.csv list different images; run: dvc repro split")
    labeled_subset = split["fold"].eq(str(fold)).map({True: "validation", False: "train"})
    return rows.assign(group=split["group"], subset=labeled_subset.where(rows["set"] == "train", "test"))
