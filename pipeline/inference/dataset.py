"""Predictions of every model for the validation and test images, in one pass over the pack."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pipeline.core.config import Config
from pipeline.core.errors import UserError
from pipeline.core.files import write_csv
from pipeline.core.progress import track_progress
from pipeline.data.dataset import PackedImages
from pipeline.evaluation import ensemble
from pipeline.models import classifier, soup
from pipeline.models.classifier import Classifier

SOUP = "soup"  # the model with the average of the members' weights


def predict_dataset(config: Config, table: pd.DataFrame, device: torch.device) -> pd.DataFrame:
    """Write `predictions/validation.csv`, `test.csv` and `soup.csv`.

    Args:
        config: names the models.
        table: a row per image of the pack, from `manifest.read_split`.
        device: on which the models run.

    Returns:
        The table in `validation.csv`, unrounded: `file`, `label` and P(positive), with a column per seed.

    Raises:
        UserError: the seeds have different validation sets.
    """
    if config.active.split.cross_validate:
        raise UserError(
            f"{config.profile}.split.cross_validate: every seed has its own validation set, so the seeds cannot be "
            "compared or combined; see their scores with dvc metrics show, or set it to false"
        )
    networks = {name: classifier.load_classifier(Path("models", name), device) for name in config.model_names}
    members = config.bag_members
    unavailable_reason = ensemble.soup_unavailable_reason(
        config.active.weights.source, config.active.train.head_hidden, len(members)
    )
    if not unavailable_reason:
        networks[SOUP] = soup.average_weights([networks[name] for name in members])
    table = table[table["subset"].isin(["validation", "test"])]
    pack = PackedImages(Path("data/images.npy"), device)
    batch_size = config.active.evaluate.batch_size
    probabilities = probability_table(networks, pack, list(table.index), batch_size).set_index(table.index)

    soup_probabilities = np.nan if unavailable_reason else probabilities.pop(SOUP)
    write_csv(Path("predictions/soup.csv"), table[["subset", "file", "label"]].assign(**{SOUP: soup_probabilities}))
    is_validation = table["subset"] == "validation"
    validation = pd.concat([table[["file", "label"]], probabilities], axis="columns")[is_validation]
    write_csv(Path("predictions/validation.csv"), validation)
    test = pd.concat([table[["file"]], probabilities], axis="columns")[~is_validation]
    write_csv(Path("predictions/test.csv"), test)
    return validation


def probability_table(
    networks: Mapping[str, Classifier], pack: PackedImages, rows: list[int], batch_size: int
) -> pd.DataFrame:
    """Return P(positive), with a column per network and a row per image, in the order of `rows`."""
    batches = torch.tensor(rows).split(batch_size)
    probabilities = [
        torch.stack([network.predict_proba(pixels) for network in networks.values()], dim=1).cpu()
        for _, pixels in track_progress(pack.batches(batches), "predicting", len(batches))
    ]
    return pd.DataFrame(torch.cat(probabilities).numpy(), columns=list(networks))
