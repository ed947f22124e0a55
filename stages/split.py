"""Split the labeled images into training and validation, and describe the data."""

from pathlib import Path

import click

from stages.common import stage


@stage
def split() -> None:
    """Write data/split.csv and the data card, data/card.md and data/card.json."""
    import numpy as np
    import pandas as pd

    from pipeline.core.config import load_config
    from pipeline.core.files import write_csv
    from pipeline.data import duplicates, manifest, splitting
    from pipeline.report import data_card

    data = Path("data")
    images = manifest.read_manifest(data)
    duplicate_groups = duplicates.find_duplicates(images, np.load(data / "images.npy", mmap_mode="r"))
    table = splitting.split_dataset(images, duplicate_groups, load_config().active.split)
    splitting.check_split(images, duplicate_groups, table)
    card = data_card.describe_data(images, pd.read_csv(data / "quarantine.csv"), table, duplicate_groups)
    write_csv(data / "split.csv", table)
    data_card.write_data_card(data, card)
    for warning in data_card.data_warnings(card):
        click.echo(f"Warning: {warning}; data/card.md lists them", err=True)


if __name__ == "__main__":
    split()
