"""The table of what each row of the pack is."""

from pathlib import Path

import pandas as pd

from pipeline.core.errors import UserError


def read_manifest(data: Path) -> pd.DataFrame:
    """Read `manifest.csv` from the folder `data`: unknown texts are empty, the label of a test image is missing."""
    text = dict.fromkeys(["file", "set", "patient", "source", "view", "license", "xxh128", "phash"], "str")
    numbers = {**dict.fromkeys(["width", "height", "bytes"], "int64"), "jpeg_quantization": "float64"}
    types = {**text, **numbers, "label": "Int64"}
    return pd.read_csv(data / "manifest.csv", dtype=types, keep_default_na=False, na_values={"label": [""]})


def read_split(data: Path, fold: int = 0) -> pd.DataFrame:
    """Join `manifest.csv` and `split.csv`: row i describes image i of the pack, and labeled ones of `fold` validate.

    Raises:
        UserError: the two do not list the same images.
    """
    rows = read_manifest(data)
    split = pd.read_csv(data / "split.csv", dtype=str, keep_default_na=False)
    if list(rows["file"]) != list(split["file"]):
        raise UserError(f"{data}: manifest.csv and split.csv list different images; run: dvc repro split")
    validates = split["fold"].eq(str(fold)).map({True: "validation", False: "train"})
    return rows.assign(group=split["group"], subset=validates.where(rows["set"] == "train", "test"))
