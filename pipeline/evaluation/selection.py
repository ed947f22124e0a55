"""Bias of a metric on the images that chose the best epoch of every seed, the best seed and the operating point.

The best of many is partly best by chance (Cawley and Talbot 2010), so its apparent metric is too high. The correction
repeats the whole selection in bootstrap resamples of the patients and evaluates what was selected on the patients that
are not in the resample: bootstrap bias corrected cross-validation (BBC; Tsamardinos, Greasidou and Borboudakis 2018).

BBC itself reports the mean metric on the images left out. With few positive patients that is too low: a selection on a
resample is worse than one on all images, and F1 of a handful of positives is biased. Here sensitivity and specificity
are corrected: from the apparent rate, `OPTIMISM_FRACTION` times its optimism is subtracted, the rate on the resamples
less that on the images left out, as in the .632 bootstrap (Efron 1983). Both are of all resamples together. The other
metrics of the confusion matrix, and their intervals, are those of the corrected rates. `bench/selection.py` shows that
this has the least bias, and how often the intervals cover.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from pipeline.core.config import BAG, Keep
from pipeline.evaluation.intervals import QUANTILES, draw_rates, metrics_of_rates
from pipeline.evaluation.metrics import DEFAULT_THRESHOLD, THRESHOLD_METRICS, log_losses, metrics_of_counts

CORRECTED_RATES = ["recall", "specificity", "auroc"]
OPTIMISM_FRACTION = 0.632
BEST = "best"
CHUNK_SIZE = 128  # resamples per chunk, to save memory

# Takes P(positive) of the members, (R, N, M), and the weights of the images, (R, N), and returns the scores, (R, N).
ScoreBag = Callable[[np.ndarray, np.ndarray], np.ndarray]
# Takes scores, (R, N), and the weights of the images, (R, N), and returns a threshold for each resample, (R,).
ChooseThreshold = Callable[[np.ndarray, np.ndarray], np.ndarray]


def choose_epochs(
    labels: np.ndarray, folds: np.ndarray, probabilities: np.ndarray, keep: Keep, weights: np.ndarray
) -> np.ndarray:
    """Choose the epoch of every seed and fold in every resample, as training does; see `metrics.kept_epoch`.

    Args:
        labels: (N,), 0 or 1.
        folds: (N,), the fold that validates each image.
        probabilities: (S, E, N), P(positive) by seed and epoch; NaN after the last epoch of a seed in a fold.
        keep: `best_f1`, `best_loss` or `last`; a later epoch wins a tie.
        weights: (R, N), how often each resample contains each image.

    Returns:
        (R, S, K), the index of an epoch, for the folds in ascending order.
    """
    seeds, epochs, _ = probabilities.shape
    chosen = []
    for fold in np.unique(folds):
        rows = np.flatnonzero(folds == fold)
        of_fold = probabilities[:, :, rows].reshape(seeds * epochs, len(rows)).astype(float)
        weight, positive = weights[:, rows].astype(float), labels[rows] == 1
        if keep == "best_f1":
            predicted = (of_fold >= DEFAULT_THRESHOLD).astype(float)
            tp, predicted_positive = weight @ (predicted * positive).T, weight @ predicted.T
            objective = 2 * tp / np.maximum(predicted_positive + (weight @ positive)[:, None], 1)
        elif keep == "best_loss":
            # Rounded, because the last digits of a matrix product depend on the processor.
            losses = np.nan_to_num(log_losses(positive, of_fold))
            objective = -np.round(weight @ losses.T / np.maximum(weight.sum(axis=1), 1)[:, None], 12)
        else:
            objective = np.zeros((len(weights), seeds * epochs))
        objective[:, np.isnan(of_fold).any(axis=1)] = -np.inf
        reversed_epochs = objective.reshape(-1, seeds, epochs)[:, :, ::-1]
        chosen.append(epochs - 1 - reversed_epochs.argmax(axis=2))
    return np.stack(chosen, axis=2)


def estimate_selection_bias(
    labels: np.ndarray,
    folds: np.ndarray,
    probabilities: np.ndarray,
    keep: Keep,
    weights: np.ndarray,
    members: Sequence[int],
    score_bag: ScoreBag,
    choose_threshold: ChooseThreshold,
) -> pd.DataFrame:
    """Estimate by how much selection on the validation images flatters every seed, the best of them, and the bag.

    In each resample the epoch of every seed is chosen, then the operating points, then the seed with the highest F1
    (ties: the lowest loss, then the first).

    Args:
        labels: (N,), 0 or 1.
        folds: (N,), the fold that validates each image.
        probabilities: (S, E, N), P(positive) by seed and epoch; NaN after the last epoch of a seed in a fold.
        keep: the rule that chooses an epoch.
        weights: (R, N), from `intervals.bootstrap_weights` without its first row.
        members: the indices of the seeds in the bag.
        score_bag: combines them.
        choose_threshold: chooses the operating points.

    Returns:
        A row per seed, by index, then `best` and `bag`; a column for each of `CORRECTED_RATES` with its bias: what to
        subtract from the apparent metric. NaN where no resample defines the metric.
    """
    chosen = choose_epochs(labels, folds, probabilities, keep, weights)
    fold_index = np.unique(folds, return_inverse=True)[1]
    cells, aurocs = [], []
    for start in range(0, len(weights), CHUNK_SIZE):
        inside, epochs = weights[start : start + CHUNK_SIZE].astype(float), chosen[start : start + CHUNK_SIZE]
        both = np.stack([inside, inside == 0])
        kept = np.stack(
            [
                probabilities[seed][epochs[:, seed][:, fold_index], np.arange(len(labels))]
                for seed in range(len(probabilities))
            ],
            axis=2,
        )
        scores = [*np.moveaxis(kept, 2, 0), score_bag(kept[:, :, list(members)], inside)]
        predicted = [values >= choose_threshold(values, inside)[:, None] for values in scores]
        chunk_cells = np.stack([confusion_cells(labels, values, both) for values in predicted], axis=2)
        chunk_aurocs = np.stack([weighted_auroc(labels, values, both) for values in scores], axis=2)
        losses = np.stack([(log_losses(labels == 1, values) * inside).sum(axis=1) for values in scores[:-1]], axis=1)
        f1 = np.nan_to_num(_metrics(chunk_cells[0, :, :-1])[..., THRESHOLD_METRICS.index("f1")])
        best = np.lexsort((losses, -f1), axis=1)[:, :1]
        cells.append(np.insert(chunk_cells, -1, np.take_along_axis(chunk_cells, best[None, :, :, None], 2)[:, :, 0], 2))
        aurocs.append(np.insert(chunk_aurocs, -1, np.take_along_axis(chunk_aurocs, best[None], 2)[:, :, 0], 2))
    index = pd.Index([*range(len(probabilities)), BEST, BAG], name="candidate")
    if not len(weights):
        return pd.DataFrame(np.nan, index, CORRECTED_RATES)
    inside_metrics, outside_metrics = _metrics(np.concatenate(cells, axis=1).sum(axis=1))
    optimism = pd.DataFrame(inside_metrics - outside_metrics, index, THRESHOLD_METRICS)
    inside_auroc, outside_auroc = np.concatenate(aurocs, axis=1)
    optimism["auroc"] = pd.DataFrame(inside_auroc - outside_auroc, columns=index).mean()
    return OPTIMISM_FRACTION * optimism[CORRECTED_RATES]


def correct_rates(
    labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray, bias: pd.Series
) -> tuple[np.ndarray, np.ndarray]:
    """Correct sensitivity and specificity for their bias.

    Args:
        labels: (N,), 0 or 1.
        predicted: (N,), the predicted labels of the selected model, 0 or 1.
        groups: (N,), the name of each image's group.
        bias: a row of `estimate_selection_bias`.

    Returns:
        Sensitivity and specificity, (1 + D,): first the corrected rate, then draws from its confidence distribution,
        by `intervals.draw_rates`. NaN where a class is missing; its draws are NaN where it has one group only.
    """
    labels, hits = np.asarray(labels), np.asarray(predicted) == labels
    observed = [hits[labels == label].mean() if (labels == label).any() else np.nan for label in (1, 0)]
    amount = (float(bias["recall"]), float(bias["specificity"]))
    corrected = np.clip(np.array(observed) - amount, 0, 1)
    sensitivity, specificity = draw_rates(labels, predicted, groups, amount)
    return np.append(corrected[0], sensitivity), np.append(corrected[1], specificity)


def corrected_metrics(labels: np.ndarray, sensitivity: np.ndarray, specificity: np.ndarray) -> pd.DataFrame:
    """Compute the metrics of the confusion matrix from corrected rates.

    Args:
        labels: (N,), 0 or 1.
        sensitivity: (1 + D,), from `correct_rates`.
        specificity: (1 + D,), likewise.

    Returns:
        A row for each of `THRESHOLD_METRICS`: `value`, and `low` and `high`, the ends of its 95 % interval; NaN where
        they are undefined.
    """
    positives, negatives = ((np.asarray(labels) == label).sum() for label in (1, 0))
    values = metrics_of_rates(positives, negatives, sensitivity, specificity)
    table = pd.DataFrame({"value": values[0], "low": np.nan, "high": np.nan}, THRESHOLD_METRICS)
    defined = ~np.isnan(values).all(axis=0) & ~np.isnan(values[0]) & ~np.isnan(values[1:]).all(axis=0)
    if defined.any():
        table.loc[defined, ["low", "high"]] = np.nanquantile(values[1:, defined], QUANTILES, axis=0).T
    return table


def rank_probabilities(samples: pd.DataFrame) -> pd.Series:
    """Return how often each candidate wins a resample (Wiesenfarth et al. 2021); a tie is shared.

    Args:
        samples: a row per resample and a column per candidate, with a metric of which a higher value is better; rows
            with a missing value do not count.

    Returns:
        Shares that add up to 1, by candidate; NaN if no row counts.
    """
    values = samples.dropna()
    wins = values.eq(values.max(axis="columns"), axis="index")
    return wins.div(wins.sum(axis="columns"), axis="index").mean()


def confusion_cells(labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Count true positives, false positives, false negatives and true negatives.

    Args:
        labels: (N,), 0 or 1.
        predicted: (R, N), in each resample.
        weights: (…, R, N).

    Returns:
        (…, R, 4).
    """
    positive = labels == 1
    cells = [predicted & positive, predicted & ~positive, ~predicted & positive, ~predicted & ~positive]
    return np.stack([(weights * cell).sum(axis=-1) for cell in cells], axis=-1)


def weighted_auroc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute the AUROC in every resample; a tied pair counts one half.

    Args:
        labels: (N,), 0 or 1.
        scores: (R, N), in each resample.
        weights: (…, R, N).

    Returns:
        (…, R); NaN where a resample lacks a class.
    """
    order = np.argsort(scores, axis=1, kind="stable")
    ordered = np.take_along_axis(scores, order, 1)
    differs = np.diff(ordered, axis=1) != 0
    edge = np.ones((len(scores), 1), bool)
    sorted_weights = np.take_along_axis(weights, np.broadcast_to(order, weights.shape), -1)
    positives = sorted_weights * (labels == 1)[order]
    negatives = sorted_weights - positives
    up_to = np.cumsum(negatives, axis=-1)
    # Negatives below the first, and up to the last, of the images with the same score.
    below = np.maximum.accumulate(np.where(np.hstack([edge, differs]), up_to - negatives, 0), axis=-1)
    ends = np.where(np.hstack([differs, edge]), up_to, np.inf)
    up_to_ties = np.minimum.accumulate(ends[..., ::-1], axis=-1)[..., ::-1]
    pairs = positives.sum(axis=-1) * up_to[..., -1]
    wins = (positives * (below + up_to_ties) / 2).sum(axis=-1)
    return np.asarray(np.divide(wins, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0))


def _metrics(cells: np.ndarray) -> np.ndarray:
    """Compute `THRESHOLD_METRICS`, (…, metrics), from cells (…, 4)."""
    return metrics_of_counts(*cells.reshape(-1, 4).T).reshape(*cells.shape[:-1], -1)
