"""Ensembles of models: majority vote, mean probability, mean logit, and greedy selection.

The bag is the ensemble of the seeds; despite its name, every member is trained on the same images, not on resamples.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
from scipy.special import expit

from pipeline.core.config import BAG, Config, EvaluateParams, FindingParams, Method, Tie
from pipeline.core.errors import UserError
from pipeline.core.files import read_csv, read_json
from pipeline.evaluation import operating_point
from pipeline.evaluation.calibration import PROBABILITY_EPS, Recalibrator, fit_recalibrator, log_odds
from pipeline.evaluation.metrics import DEFAULT_THRESHOLD, apply_threshold, best_model

METHODS: tuple[Method, ...] = get_args(Method)
CANDIDATES = Path("metrics/candidates.json")
WEIGHTS = "weights_sha256"  # in that file, and in model.json of each model
MAX_SELECTIONS = 50  # steps of the greedy selection
MAX_SUBSETS = 100  # ensembles per size in `metric_by_ensemble_size`


@dataclass(frozen=True)
class EnsembleConfig:
    """How the members' probabilities are combined into a score, a probability and a label.

    The label is positive where the score is at least `threshold`. The probability is the recalibrated score: its logit
    divided by `temperature`, plus `bias`; it is calibrated for a share of positives of `prevalence`, or, if that is
    None, not calibrated. `weights` are the members' weights in the greedy selection, equal for other methods.
    """

    members: list[str]
    method: Method
    tie: Tie
    weights: list[float]
    threshold: float
    temperature: float = 1.0
    bias: float = 0.0
    prevalence: float | None = None

    @property
    def recalibrate(self) -> Recalibrator:
        """The map from scores to probabilities."""
        return Recalibrator(self.temperature, self.bias)

    @property
    def threshold_probability(self) -> float:
        """The recalibrated threshold: the label is positive where the probability is at least this."""
        return float(self.recalibrate(np.array([self.threshold]))[0])


def fit_ensemble(
    labels: np.ndarray, members: pd.DataFrame, groups: np.ndarray, method: Method, tie: Tie, params: EvaluateParams
) -> EnsembleConfig:
    """Fit the weights of the greedy selection, the threshold and the recalibration on these images.

    Args:
        labels: (N,), 0 or 1.
        members: (N, M), P(positive), a named column per member; a single member ignores `method` and `tie`.
        groups: (N,), the name of each image's group.
        method: combines the members.
        tie: decides an even vote.
        params: contains the rule that chooses the threshold, and the method of recalibration.
    """
    names = members.columns.tolist()
    weights = [1 / len(names)] * len(names)
    if len(names) == 1:
        method, tie = "mean", "mean"
    elif method == "greedy":
        weights = select_greedily(labels, members.to_numpy())
    draft = EnsembleConfig(names, method, tie, weights, DEFAULT_THRESHOLD)
    scores = combine(members, draft)[method].to_numpy()
    recalibrator = fit_recalibrator(labels, scores, params.recalibration)
    return replace(
        draft,
        threshold=operating_point.choose_threshold(labels, scores, groups, params),
        temperature=recalibrator.temperature,
        bias=recalibrator.bias,
        prevalence=None if recalibrator.reason else float(np.mean(labels)),
    )


def combine(predictions: pd.DataFrame, config: EnsembleConfig) -> pd.DataFrame:
    """Combine the members' P(positive) by every method.

    A majority vote is a score too: a median of the members' probabilities is at least a threshold if and only if a
    majority of them is. With an even number of members, the upper median breaks a tie in favor of positive and the
    lower median in favor of negative, and the mean, limited to the range between the two, as the mean decides.

    Args:
        predictions: a row per image, with a column per member, in [0, 1].
        config: its `tie` decides an even vote: positive, negative, or as the mean probability predicts.

    Returns:
        `votes`, the number of members whose probability is at least the threshold, and the scores, in [0, 1]: `vote`,
        `mean`, `logits` (of the mean logit) and `greedy` (the weighted mean).
    """
    values = predictions[config.members].to_numpy(dtype=float)
    mean, ordered = values.mean(axis=1), np.sort(values, axis=1)
    lower_median, upper_median = ordered[:, (values.shape[1] - 1) // 2], ordered[:, values.shape[1] // 2]
    vote = {"positive": upper_median, "negative": lower_median, "mean": np.clip(mean, lower_median, upper_median)}
    columns = {
        "votes": (values >= config.threshold).sum(axis=1),
        "vote": vote[config.tie],
        "mean": mean,
        "logits": expit(log_odds(values).mean(axis=1)),
        "greedy": values @ np.array(config.weights),
    }
    return pd.DataFrame(columns, predictions.index)


def predict(predictions: pd.DataFrame, config: EnsembleConfig) -> pd.DataFrame:
    """Return the ensemble's `score`, `probability` (the recalibrated score) and `label`, 0 or 1; see `combine`."""
    score = combine(predictions, config)[config.method]
    label = apply_threshold(score, config.threshold)
    return pd.DataFrame({"score": score, "probability": config.recalibrate(score.to_numpy()), "label": label})


def describe_output(config: EnsembleConfig, finding: FindingParams) -> str:
    """Say what the probability is of, where the label is 1, and for which share of positives it is calibrated."""
    threshold = config.threshold_probability
    calibration = (
        "probabilities are not calibrated"
        if config.prevalence is None
        else f"probabilities are calibrated for {config.prevalence:.1%} positives, as in the validation set"
    )
    label = f"label 1 ({finding.class_names[1]}) means a probability of at least {threshold:.3f}"
    return f"probability of {finding.name}; {label}; {calibration}"


def load_candidate_configs(config: Config) -> dict[str, EnsembleConfig]:
    """Return the `EnsembleConfig` of every candidate by name, as the bag stage wrote it.

    Raises:
        UserError: it was written by an earlier release, or for other seeds or members than those in params.yaml.
    """
    candidates = read_json(CANDIDATES)
    candidates.pop(WEIGHTS, None)
    try:
        candidates = {name: EnsembleConfig(**fields) for name, fields in candidates.items()}
    except TypeError:
        raise UserError(f"{CANDIDATES}: written by an earlier release; run: dvc repro bag") from None
    if set(candidates) != {*config.model_names, BAG} or candidates[BAG].members != config.bag_members:
        raise UserError(f"params.yaml: seeds or bag.members differ from those in {CANDIDATES}; run: dvc repro bag")
    return candidates


def read_weights_hashes(names: Iterable[str]) -> dict[str, str]:
    """Return the hash of the weights of models in `models/`, by name."""
    return {name: read_json(Path("models", name, "model.json"))[WEIGHTS] for name in names}


def check_weights(names: Iterable[str]) -> None:
    """Check that these models in `models/` are those that the candidates were fitted to.

    Raises:
        UserError: one was trained again since.
    """
    fitted = read_json(CANDIDATES).get(WEIGHTS, {})
    for name, digest in read_weights_hashes(names).items():
        if fitted.get(name) != digest:
            raise UserError(f"models/{name}: not the model that {CANDIDATES} was fitted to; run: dvc repro")


def predict_submission_labels(config: Config) -> dict[str, pd.Series]:
    """Return the predicted labels of the test images, indexed by file, by the name of the submission.

    The adapted submissions are missing where the predictions could not be adapted to the test set's prevalence.
    """
    test, adapted = (read_csv(Path(f"predictions/{name}.csv")).set_index("file") for name in ("test", "adapted"))
    labels = {name: predict(test, candidate)["label"] for name, candidate in load_candidate_configs(config).items()}
    labels["best"] = labels[best_model(read_json(Path("metrics/evaluate.json")))]
    for role in adapted.dropna(axis="columns"):
        labels[f"{role}-adapted"] = apply_threshold(adapted[role])
    return labels


def select_greedily(labels: np.ndarray, members: np.ndarray) -> list[float]:
    """Select members with replacement, at each step the one that most improves the mean (Caruana et al. 2004).

    Args:
        labels: (N,), 0 or 1.
        members: (N, M), P(positive).

    Returns:
        The weight of each member, its share of the selection, after the step with the lowest log loss among the first
        `MAX_SELECTIONS`.
    """
    of_label = np.where(np.asarray(labels)[:, None] == 1, members, 1 - members).astype(float)
    total, counts = np.zeros(len(of_label)), np.zeros(of_label.shape[1])
    best_loss, weights = np.inf, counts
    for step in range(1, MAX_SELECTIONS + 1):
        losses = -np.log(np.clip((total[:, None] + of_label) / step, PROBABILITY_EPS, 1)).mean(axis=0)
        selected = int(losses.argmin())
        total, counts[selected] = total + of_label[:, selected], counts[selected] + 1
        if losses[selected] < best_loss - 1e-12:
            best_loss, weights = losses[selected], counts / step
    return [float(weight) for weight in weights]


def metric_by_ensemble_size(labels: np.ndarray, predictions: pd.DataFrame, config: EnsembleConfig) -> pd.DataFrame:
    """Score ensembles of 1 to M members: all subsets of each size, or `MAX_SUBSETS` random ones if there are more.

    Args:
        labels: (N,), 0 or 1.
        predictions: (N, …), with a column of P(positive) per member.
        config: smaller ensembles vote if its method is `vote`; otherwise they take the mean probability.

    Returns:
        A row per size: `members`, `subsets`, the mean `f1` and its `lowest` and `highest` value.
    """
    values, count = predictions[config.members].to_numpy(dtype=float), len(config.members)
    votes = values >= config.threshold
    positive = np.asarray(labels, dtype=bool)[:, None]
    rng, rows = np.random.default_rng(0), []
    for size in range(1, count + 1):
        subsets = _subset_indicators(count, size, rng)
        predicted_by_mean = values @ subsets / size >= config.threshold
        predicted = predicted_by_mean
        if config.method == "vote":
            doubled_votes = 2 * (votes @ subsets)
            wins_tie = predicted_by_mean if config.tie == "mean" else config.tie == "positive"
            predicted = (doubled_votes > size) | ((doubled_votes == size) & wins_tie)
        f1 = 2 * (predicted & positive).sum(axis=0) / np.maximum(predicted.sum(axis=0) + positive.sum(), 1)
        rows.append([size, subsets.shape[1], f1.mean(), f1.min(), f1.max()])
    return pd.DataFrame(rows, columns=["members", "subsets", "f1", "lowest", "highest"])


def pairwise_disagreement(members: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return, for every pair of members, the share of images with different labels: `model`, `other`, `share`."""
    labels = members >= threshold
    rows = [[one, two, (labels[one] != labels[two]).mean()] for one, two in combinations(members, 2)]
    return pd.DataFrame(rows, columns=["model", "other", "share"])


def images_with_disagreement(predictions: pd.DataFrame, combined: pd.DataFrame, member_count: int) -> pd.DataFrame:
    """Return the images on which the members disagree, the closest votes first.

    Args:
        predictions: a row per image, with `file` and, if known, `label`.
        combined: from `combine`.
        member_count: the number of members.
    """
    is_split = combined["votes"].between(1, member_count - 1)
    table = pd.concat([predictions.filter(["file", "label"]), combined[["votes", "mean"]]], axis="columns")[is_split]
    margin = (2 * table["votes"] - member_count).abs()
    return table.assign(margin=margin).sort_values(["margin", "file"]).drop(columns="margin")


def soup_unavailable_reason(weights_source: str, head_hidden: list[int], member_count: int) -> str:
    """Return why the weights of the members cannot be averaged, or an empty string.

    Every seed initializes its own head. Averaging still works if the head is a single layer on a backbone that starts
    from the same weights for all members; hidden units with different initial weights do not correspond.

    Args:
        weights_source: initial weights of the backbone, as in `weights.source`.
        head_hidden: widths of the head's hidden layers.
        member_count: the number of members.
    """
    if member_count < 2:
        return "one member only"
    if weights_source == "none":
        return "the members' backbones start from different random weights"
    return "the members' hidden layers start from different random weights" if head_hidden else ""


def _subset_indicators(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return subsets as columns of 0 and 1, (count, subsets)."""
    if comb(count, size) <= MAX_SUBSETS:
        subsets = list(combinations(range(count), size))
    else:
        subsets = [tuple(rng.choice(count, size, replace=False)) for _ in range(MAX_SUBSETS)]
    indicators = np.zeros((count, len(subsets)))
    for column, subset in enumerate(subsets):
        indicators[list(subset), column] = 1
    return indicators
