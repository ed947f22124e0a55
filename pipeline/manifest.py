"""The table of what each row of the pack is."""

from pathlib import Path

import pandas as pd


def read(data: Path) -> pd.DataFrame:
    """Read `manifest.csv` from the folder `data`: unknown texts are empty, the label of a test image is missing."""
    text = dict.fromkeys(["file", "set", "patient", "source", "view", "licence", "xxh128", "phash"], "str")
    types = {**text, "label": "Int64", "width": "int64", "height": "int64"}
    return pd.read_csv(data / "manifest.csv", dtype=types, keep_default_na=False, na_values={"label": [""]})
