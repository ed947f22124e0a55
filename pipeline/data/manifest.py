"""Reading of the manifest, which describes each image of the pack, and of the split."""

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from pipeline.core.errors import UserError


def read_manifest(data: Path) -> pd.DataFrame:
    """Read `manifest.csv` from the folder `data`; unknown texts are empty, and test images have no label."""
    metadata = ["patient", "source", "view", "sex", "license", "manufacturer", "modality"]
    text = dict.fromkeys(["file", "set", *metadata, "xxh128", "phash"], "str")
    numeric = {**dict.fromkeys(["width", "height", "bytes"], "int64"), "age": "float64", "jpeg_quantization": "float64"}
    types, missing = {**text, **numeric, "label": "Int64"}, {"age": [""], "label": [""]}
    return pd.read_csv(data / "manifest.csv", dtype=types, keep_default_na=False, na_values=missing)


def read_split(data: Path, validation_folds: Collection[int] = (0,)) -> pd.DataFrame:
    """Join `manifest.csv` and `split.csv`; row i describes image i of the pack.

    Args:
        data: folder of the two files.
        validation_folds: the folds that form the validation set. For a training it is one; a cross-validated model is
            evaluated on all of them, each predicted by the network that was not trained on it.

    Returns:
        The manifest with the columns group, fold (missing for images that no fold has) and subset: train, validation,
        test, or external for the labeled images of `split.held_out_source`.

    Raises:
        UserError: the two files list different images.
    """
    rows = read_manifest(data)
    types = {**dict.fromkeys(["file", "group", "subset"], "str"), "fold": "Int64"}
    split = pd.read_csv(data / "split.csv", dtype=types, keep_default_na=False, na_values={"fold": [""]})
    if list(rows["file"]) != list(split["file"]):
        raise UserError(f"{data}: manifest.csv and split.csv list different images; run: dvc repro split")
    labeled_subset = split["fold"].isin(validation_folds).map({True: "validation", False: "train"})
    subset = labeled_subset.where(split["fold"].notna(), split["subset"])
    return rows.assign(group=split["group"], fold=split["fold"], subset=subset)
