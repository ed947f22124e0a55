"""Choose which labelled images validate, and say what the data are."""

from pathlib import Path

import click

from stages.common import stage


@stage
def split() -> None:
    """Write data/split.csv, data/card.md and data/card.json from what prepare left."""
    import numpy as np
    import pandas as pd

    from pipeline import card, duplicates, manifest, splitting
    from pipeline.config import load
    from pipeline.files import write_csv

    data = Path("data")
    rows = manifest.read(data)
    same = duplicates.find(rows, np.load(data / "images.npy", mmap_mode="r"))
    table = splitting.split(rows, same, load().active.split)
    splitting.check(rows, same, table)
    described = card.describe(rows, pd.read_csv(data / "quarantine.csv"), table, same)
    write_csv(data / "split.csv", table)
    card.write(data, described)
    for line in card.warnings(described):
        click.echo(f"Warning: {line}; data/card.md lists them", err=True)


if __name__ == "__main__":
    split()
