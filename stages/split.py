"""Choose which labeled images validate, and say what the data are."""

from pathlib import Path

import click

from stages.common import stage


@stage
def split() -> None:
    """Write data/split.csv, data/card.md and data/card.json from what prepare left."""
    import numpy as np
    import pandas as pd

    from pipeline.core.config import load_config
    from pipeline.core.files import write_csv
    from pipeline.data import duplicates, manifest, splitting
    from pipeline.report import data_card

    data = Path("data")
    rows = manifest.read_manifest(data)
    same = duplicates.find_duplicates(rows, np.load(data / "images.npy", mmap_mode="r"))
    table = splitting.split_dataset(rows, same, load_config().active.split)
    splitting.check_split(rows, same, table)
    described = data_card.describe_data(rows, pd.read_csv(data / "quarantine.csv"), table, same)
    write_csv(data / "split.csv", table)
    data_card.write_data_card(data, described)
    for line in data_card.data_warnings(described):
        click.echo(f"Warning: {line}; data/card.md lists them", err=True)


if __name__ == "__main__":
    split()
