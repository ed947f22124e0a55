"""The comparison in front of the champion alias: how often an interchangeable model would look as good."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pipeline.core.config import EvaluateParams
from pipeline.evaluation import operating_point
from pipeline.evaluation.cross_fitting import cross_fit
from pipeline.evaluation.metric_tables import ValidationSet
from pipeline.evaluation.metrics import apply_threshold

MIN_GROUPS = 10  # per class, to compare models on a part of the validation set
MAX_GAP = 2  # standard errors


def comparison_level(false_promotion_rate: float, number: int) -> float:
    """Return the level of the `number`-th comparison on one validation set, counted from 1.

    Dividing the rate by the number bounds the probability of any false promotion in `n` comparisons by the rate times
    1 + 1/2 + … + 1/n (Bonferroni's inequality), for a rate of 0.05 by 0.18 in 20.
    """
    return false_promotion_rate / number


def randomization_p_value(
    labels: np.ndarray,
    groups: np.ndarray,
    challenger: np.ndarray,
    champion: np.ndarray,
    candidates: Sequence[np.ndarray],
    resamples: int,
    margin: float = 0,
    folds: np.ndarray | None = None,
) -> float:
    """Test whether the F1 of the challenger, the best of several candidates, exceeds that of the champion by chance.

    If two models are interchangeable, it does not matter which of them predicted which patient. So every resample
    exchanges the predictions of the champion and the candidates in a random half of the groups (an approximate
    randomization test, Noreen 1989; for F1, Yeh 2000), and the challenger's advantage is compared with the largest
    advantage of any candidate in that resample (Westfall and Young 1993), because it was chosen as the best. Where the
    epoch was chosen too, that is the largest advantage of any epoch, but for those whose F1 is lower than that of the
    candidate's best epoch by more than `MAX_GAP` standard errors: they could not have been chosen (Hansen 2005).

    Models of equal F1 at other operating points are not interchangeable: in simulations at a level of 5 %, 1 to 9 % of
    them were promoted (`bench/gate.py`).

    Args:
        labels: (N,), 0 or 1.
        groups: (N,), the name of each image's group.
        challenger: (N,), predicted labels, 0 or 1.
        champion: (N,), predicted labels.
        candidates: one (N, E) per candidate that the challenger was chosen from: predicted labels after each of the
            epochs that the kept one was chosen from, or a single column if none was chosen on these images.
        resamples: number of exchanges; the smallest possible p-value is 1 / (1 + resamples).
        margin: advantage to be exceeded.
        folds: (N,), the fold of each image, if every fold chose its own epoch; no group is divided.

    Returns:
        The p-value, in (0, 1].
    """
    names, index = np.unique(groups, return_inverse=True)
    exchanged = np.random.default_rng(0).integers(2, size=(resamples, len(names))).astype(np.float32)
    fold_masks = [np.ones(len(labels), bool)] if folds is None else [folds == fold for fold in np.unique(folds)]
    positives = [float(np.sum(labels[mask])) for mask in fold_masks]

    def counts(predicted: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Count true positives and predicted positives per group and column of predicted labels: (2, G, E)."""
        table = np.zeros((2, len(names), predicted.shape[1]), np.float32)
        for row, values in zip(table, (predicted * labels[:, None], predicted), strict=True):
            np.add.at(row, index[mask], values[mask])
        return table

    largest = np.full(resamples, -np.inf)
    for epochs in candidates:
        own_total, other_total = np.zeros((2, resamples)), np.zeros((2, resamples))
        for mask, positive in zip(fold_masks, positives, strict=True):
            ours, theirs = counts(np.asarray(epochs), mask), counts(np.asarray(champion)[:, None], mask)
            ours = ours[:, :, _could_be_best(ours, np.bincount(index[mask], labels[mask], len(names)))]
            # Sums of whole numbers are exact, so they do not depend on the number of threads.
            moved = exchanged @ (ours - theirs)
            own, other = ours.sum(axis=1)[:, None] - moved, theirs.sum(axis=1)[:, None] + moved
            advantage = f1_score(own, positive) - f1_score(other, positive)
            chosen = (slice(None), np.arange(resamples), advantage.argmax(axis=1))
            own_total, other_total = own_total + own[chosen], other_total + other[chosen]
        largest = np.maximum(largest, f1_score(own_total, sum(positives)) - f1_score(other_total, sum(positives)))

    totals = [np.array([np.sum(predicted * labels), np.sum(predicted)]) for predicted in (challenger, champion)]
    observed = float(np.subtract(*(f1_score(total, sum(positives)) for total in totals))) - margin
    return float((1 + np.count_nonzero(largest >= observed - 1e-9)) / (1 + resamples))


def f1_score(counts: np.ndarray, positives: float) -> np.ndarray:
    """Return F1 from the numbers of true and of predicted positives, (2, …), and of positives; 0 where undefined."""
    true_positives, predicted_positives = counts
    score: np.ndarray = 2 * true_positives / np.maximum(predicted_positives + positives, 1)
    return score


def _could_be_best(counts: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Tell which epochs have an F1 that is at most `MAX_GAP` standard errors below the best.

    Args:
        counts: (2, G, E), true positives and predicted positives per group after every epoch.
        positives: (G,), positives per group.

    Returns:
        (E,), whether it is so. The standard error of the difference is that of the linearized F1 over groups.
    """
    totals = counts.sum(axis=1)
    f1 = f1_score(totals, positives.sum())
    influence = (2 * counts[0] - f1 * (counts[1] + positives[:, None])) / np.maximum(totals[1] + positives.sum(), 1)
    standard_errors = np.sqrt(((influence - influence[:, [f1.argmax()]]) ** 2).sum(axis=0))
    is_close: np.ndarray = f1.max() - f1 <= MAX_GAP * standard_errors
    return is_close


def predict_by_epoch(validation: ValidationSet, scores: np.ndarray, params: EvaluateParams) -> np.ndarray:
    """Return the labels predicted after every epoch, at thresholds that are cross-fitted if they are chosen.

    Args:
        validation: the set.
        scores: (N, E), P(positive) after every epoch; NaN where training had stopped, which counts as negative.
        params: contains the rule that chooses thresholds.

    Returns:
        (N, E), 0 or 1.
    """

    def predict(column: np.ndarray) -> np.ndarray:
        def choose(rows: np.ndarray) -> float:
            return operating_point.choose_threshold(
                validation.labels[rows], column[rows], validation.groups[rows], params
            )

        folds = validation.folds if params.operating_point != "half" else []
        predicted = cross_fit(folds, choose, lambda threshold, rows: apply_threshold(column[rows], threshold))
        return apply_threshold(column, choose(np.arange(len(column)))) if predicted is None else predicted

    return np.column_stack([predict(column) for column in np.nan_to_num(scores).T])


def find_comparable_images(checksums: pd.Series, groups: np.ndarray, known: pd.DataFrame) -> pd.Series:
    """Find the images on which a model of another split can be compared: those that it was not trained on.

    An image is left out if the model was trained on an image of its group, or if it is new to the model while its group
    is not.

    Args:
        checksums: (N,), of the file of each image of the validation set.
        groups: (N,), the name of each image's group.
        known: `checksum` and `label` of the labeled images when the model was trained: the label that it predicts, or
            missing if it was trained on the image.

    Returns:
        The model's predicted labels by row number of the images that remain; NaN where it must still predict.
    """
    predicted = known.drop_duplicates("checksum").set_index("checksum")["label"].astype(float)
    rows = pd.DataFrame({"group": groups, "label": predicted.reindex(checksums).to_numpy()})
    rows["known"] = checksums.isin(predicted.index).to_numpy()
    rows["trained_on"] = rows["known"] & rows["label"].isna()
    in_group = rows.groupby("group")[["known", "trained_on"]].transform("any")
    remaining: pd.Series = rows.loc[~in_group["trained_on"] & (rows["known"] | ~in_group["known"]), "label"]
    return remaining
