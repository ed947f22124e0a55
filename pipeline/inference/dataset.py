"""Every model over every image, in one pass over the pack."""

from collections.abc import Mapping

import pandas as pd
import torch

from pipeline.core.progress import track_progress
from pipeline.data.dataset import PackedImages
from pipeline.models.classifier import Classifier


def probability_table(
    networks: Mapping[str, Classifier], pack: PackedImages, rows: list[int], batch_size: int
) -> pd.DataFrame:
    """Return P(positive) with a column per network and a row per image, in the order of `rows`."""
    batches = torch.tensor(rows).split(batch_size)
    parts = [
        torch.stack([network.predict_proba(pixels) for network in networks.values()], dim=1).cpu()
        for _, pixels in track_progress(pack.batches(batches), "predicting", len(batches))
    ]
    return pd.DataFrame(torch.cat(parts).numpy(), columns=list(networks))
