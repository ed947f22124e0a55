"""Combining the models: majority vote and mean probability."""

from typing import Literal

import pandas as pd

from pipeline.evaluation.metrics import THRESHOLD, called


def combine(
    members: pd.DataFrame, tie: Literal["positive", "negative", "mean"], threshold: float = THRESHOLD
) -> pd.DataFrame:
    """Combine the members' P(positive), one column each.

    Args:
        members: (N, M), in [0, 1].
        tie: who wins a vote that is even: the positives, the negatives, or the side of the mean probability.
        threshold: the operating point of the members and of their mean.

    Returns:
        `votes`, how many members call the image positive; `vote`, 0 or 1, what most of them call it; and `mean`,
        the mean probability.
    """
    votes = called(members, threshold).sum(axis="columns")
    mean = members.mean(axis="columns")
    wins_tie = called(mean, threshold) == 1 if tie == "mean" else pd.Series(tie == "positive", mean.index)
    vote = (2 * votes > members.shape[1]) | ((2 * votes == members.shape[1]) & wins_tie)
    return pd.DataFrame({"votes": votes, "vote": vote.astype(int), "mean": mean})


def labels(combined: pd.DataFrame, method: Literal["vote", "mean"], threshold: float = THRESHOLD) -> pd.Series:
    """Return the bag's labels, 0 or 1, from what `combine` gave."""
    return combined["vote"] if method == "vote" else called(combined["mean"], threshold)
