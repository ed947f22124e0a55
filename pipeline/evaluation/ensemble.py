"""Combining the models: majority vote, mean probability, mean logit, and a greedy selection."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
from scipy.special import expit

from pipeline.core.config import Config, EvaluateParams, Method, Tie
from pipeline.core.errors import UserError
from pipeline.core.files import read_json
from pipeline.evaluation import operating_point
from pipeline.evaluation.calibration import PROBABILITY_EPS, log_odds
from pipeline.evaluation.metrics import DEFAULT_THRESHOLD, apply_threshold

METHODS: tuple[Method, ...] = get_args(Method)
BAG = "bag"
CANDIDATES = Path("metrics/candidates.json")
MAX_SELECTIONS = 50  # of the greedy selection
MAX_SUBSETS = 100  # of each size, at most, that are tried when the bag grows


@dataclass(frozen=True)
class EnsembleConfig:
    """How members answer as one.

    `thresholds` are the operating points of the members, in their order, by which they vote, and `threshold` that of
    their combined probability. `weights` are the members' shares in the greedy selection, equal where there is none.
    """

    members: list[str]
    method: Method
    tie: Tie
    threshold: float
    thresholds: list[float]
    weights: list[float]


def fit_ensemble(
    labels: np.ndarray, members: pd.DataFrame, method: Method, tie: Tie, params: EvaluateParams
) -> EnsembleConfig:
    """Choose, on these images, all operating points and the greedy selection.

    Args:
        labels: (N,), 0 or 1.
        members: (N, M), P(positive), a named column each; a single member is its own majority.
        method: by which they answer.
        tie: who wins an even vote.
        params: with the rule that chooses thresholds.
    """
    thresholds, names = operating_point.choose_thresholds(labels, members, params), members.columns.tolist()
    if len(names) == 1:
        return EnsembleConfig(names, "mean", "mean", thresholds.iloc[0], list(thresholds), [1.0])
    weights = select_greedily(labels, members.to_numpy()) if method == "greedy" else [1 / len(names)] * len(names)
    draft = EnsembleConfig(names, method, tie, DEFAULT_THRESHOLD, list(thresholds), weights)
    probability = predict(members, draft)["probability"]
    return replace(draft, threshold=operating_point.choose_threshold(labels, probability.to_numpy(), params))


def combine(predictions: pd.DataFrame, rule: EnsembleConfig) -> pd.DataFrame:
    """Combine the members' P(positive) in every way there is.

    Args:
        predictions: a row per image, with a column per member, in [0, 1].
        rule: its tie says who wins an even vote: the positives, the negatives, or the side of the mean probability.

    Returns:
        `votes`, how many members call the image positive; `vote`, 0 or 1, what most of them call it; and the
        probabilities `mean`, `logits` (of the mean logit) and `greedy` (the weighted mean).
    """
    values = predictions[rule.members].to_numpy(dtype=float)
    votes = (values >= np.array(rule.thresholds)).sum(axis=1)
    mean = values.mean(axis=1)
    wins_tie = mean >= rule.threshold if rule.tie == "mean" else rule.tie == "positive"
    vote = (2 * votes > values.shape[1]) | ((2 * votes == values.shape[1]) & wins_tie)
    columns = {
        "votes": votes,
        "vote": vote.astype(int),
        "mean": mean,
        "logits": expit(log_odds(values).mean(axis=1)),
        "greedy": values @ np.array(rule.weights),
    }
    return pd.DataFrame(columns, predictions.index)


def predict(predictions: pd.DataFrame, rule: EnsembleConfig) -> pd.DataFrame:
    """Return the `probability` (of a vote, the mean) and `label`, 0 or 1, of the members as one; see `combine`."""
    combined = combine(predictions, rule)
    probability = combined["mean" if rule.method == "vote" else rule.method]
    label = combined["vote"] if rule.method == "vote" else apply_threshold(probability, rule.threshold)
    return pd.DataFrame({"probability": probability, "label": label})


def load_candidate_configs(config: Config) -> dict[str, EnsembleConfig]:
    """Return the rule of every candidate by name, as the bag stage chose it.

    Raises:
        UserError: it chose for other seeds or members than those that are configured now.
    """
    rules = {name: EnsembleConfig(**rule) for name, rule in read_json(CANDIDATES).items()}
    if set(rules) != {*config.model_names, BAG} or rules[BAG].members != config.bag_members:
        raise UserError("params.yaml: seeds or bag.members are not those of the present bag; run: dvc repro bag")
    return rules


def select_greedily(labels: np.ndarray, members: np.ndarray) -> list[float]:
    """Select members with replacement, each time the one that helps the mean most (Caruana et al. 2004).

    Args:
        labels: (N,), 0 or 1.
        members: (N, M), P(positive).

    Returns:
        The share of each member in the selection with the lowest log loss among those of 1 to `PICKS` members.
    """
    of_label = np.where(np.asarray(labels)[:, None] == 1, members, 1 - members).astype(float)
    total, counts = np.zeros(len(of_label)), np.zeros(of_label.shape[1])
    best, shares = np.inf, counts
    for picked in range(1, MAX_SELECTIONS + 1):
        losses = -np.log(np.clip((total[:, None] + of_label) / picked, PROBABILITY_EPS, 1)).mean(axis=0)
        chosen = int(losses.argmin())
        total, counts[chosen] = total + of_label[:, chosen], counts[chosen] + 1
        if losses[chosen] < best - 1e-12:
            best, shares = losses[chosen], counts / picked
    return [float(share) for share in shares]


def metric_by_ensemble_size(labels: np.ndarray, predictions: pd.DataFrame, rule: EnsembleConfig) -> pd.DataFrame:
    """Score bags of 1 to M members: all subsets of each size, or `SUBSETS` of them where there are more.

    Args:
        labels: (N,), 0 or 1.
        predictions: (N, …), with a column per member, P(positive).
        rule: a smaller bag votes where it votes, and else takes the mean probability.

    Returns:
        A row per size: `members`, `subsets`, the mean `f1` and its `lowest` and `highest` value.
    """
    values, count = predictions[rule.members].to_numpy(dtype=float), len(rule.members)
    votes = values >= np.array(rule.thresholds)
    positive = np.asarray(labels, dtype=bool)[:, None]
    rng, rows = np.random.default_rng(0), []
    for size in range(1, count + 1):
        inside = _indicators(count, size, rng)
        of_mean = values @ inside / size >= rule.threshold
        label = of_mean
        if rule.method == "vote":
            twice = 2 * (votes @ inside)
            wins_tie = of_mean if rule.tie == "mean" else rule.tie == "positive"
            label = (twice > size) | ((twice == size) & wins_tie)
        f1 = 2 * (label & positive).sum(axis=0) / np.maximum(label.sum(axis=0) + positive.sum(), 1)
        rows.append([size, inside.shape[1], f1.mean(), f1.min(), f1.max()])
    return pd.DataFrame(rows, columns=["members", "subsets", "f1", "lowest", "highest"])


def pairwise_disagreement(members: pd.DataFrame, thresholds: Sequence[float]) -> pd.DataFrame:
    """Return, for every two members, the share of images that they call differently: `model`, `other`, `share`."""
    labels = members >= np.array(thresholds)
    rows = [[one, two, (labels[one] != labels[two]).mean()] for one, two in combinations(members, 2)]
    return pd.DataFrame(rows, columns=["model", "other", "share"])


def disagreements(predictions: pd.DataFrame, combined: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return the images that some of the `count` members call positive and some negative, the most disputed first."""
    split = combined["votes"].between(1, count - 1)
    table = pd.concat([predictions.filter(["file", "label"]), combined[["votes", "mean"]]], axis="columns")[split]
    margin = (2 * table["votes"] - count).abs()
    return table.assign(margin=margin).sort_values(["margin", "file"]).drop(columns="margin")


def soup_unavailable_reason(source: str, hidden: list[int], count: int) -> str:
    """Say why the weights of members cannot be averaged; nothing where they can.

    Every seed draws the first weights of its head. That does no harm where the head is one layer on a backbone that
    all of them got from the same place; hidden units of different origin, in heads or backbones, do not correspond.

    Args:
        source: of the backbone's first weights, as in `weights.source`.
        hidden: widths of the head's hidden layers.
        count: of the members.
    """
    if count < 2:
        return "one member only"
    if source == "none":
        return "the members' backbones start from different random weights"
    return "the members' hidden layers start from different random weights" if hidden else ""


def _indicators(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return subsets as columns of 0 and 1, (count, subsets)."""
    if comb(count, size) <= MAX_SUBSETS:
        chosen = list(combinations(range(count), size))
    else:
        chosen = [tuple(rng.choice(count, size, replace=False)) for _ in range(MAX_SUBSETS)]
    inside = np.zeros((count, len(chosen)))
    for column, subset in enumerate(chosen):
        inside[list(subset), column] = 1
    return inside
