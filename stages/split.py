"""Split the labeled images into training and validation, and describe the data."""

from pathlib import Path

import click

from stages.common import stage


@stage
def split() -> None:
    """Write data/split.csv, the data card, data/card.md and data/card.json, and the outliers with a contact sheet."""
    import numpy as np
    import pandas as pd

    from pipeline.core.config import load_config
    from pipeline.core.files import write_csv
    from pipeline.data import duplicates, manifest, outliers, splitting
    from pipeline.report import data_card

    data = Path("data")
    images = manifest.read_manifest(data)
    pixels = np.load(data / "images.npy", mmap_mode="r")
    duplicate_groups = duplicates.find_duplicates(images, pixels)
    params = load_config().active
    table = splitting.split_dataset(images, duplicate_groups, params.split)
    splitting.check_split(images, duplicate_groups, table)
    quarantine, class_names = pd.read_csv(data / "quarantine.csv"), params.finding.class_names
    write_csv(data / "split.csv", table)
    ranking = outliers.write_outliers(data, images, pixels)
    card = data_card.describe_data(images, quarantine, table, duplicate_groups, class_names, ranking)
    data_card.write_data_card(data, card)
    for warning in data_card.data_warnings(card):
        click.echo(f"Warning: {warning}; see data/card.md", err=True)
    click.echo("data/contact_sheet.jpg shows the most unusual images: look at them")


if __name__ == "__main__":
    split()
