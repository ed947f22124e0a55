"""Choose which labelled images validate, and say what the data are."""

from pathlib import Path

import click

from stages.common import stage


@stage
def split() -> None:
    """Write data/split.csv, data/data_card.md and data/data_card.json from what prepare left."""
    import numpy as np
    import pandas as pd

    from pipeline.core.config import load
    from pipeline.core.files import write_csv
    from pipeline.data import duplicates, manifest, splitting
    from pipeline.report import data_card

    data = Path("data")
    rows = manifest.read(data)
    same = duplicates.find(rows, np.load(data / "images.npy", mmap_mode="r"))
    table = splitting.split(rows, same, load().active.split)
    splitting.check(rows, same, table)
    described = data_card.describe(rows, pd.read_csv(data / "quarantine.csv"), table, same)
    write_csv(data / "split.csv", table)
    data_card.write(data, described)
    for line in data_card.warnings(described):
        click.echo(f"Warning: {line}; data/data_card.md lists them", err=True)


if __name__ == "__main__":
    split()
