"""Referral: the images whose predictions are least certain go to a reader, and the other predictions are kept."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation.calibration import log_odds
from pipeline.evaluation.metric_tables import Predictions, ValidationSet
from pipeline.evaluation.slices import COUNTS, count_patients, evaluate_subset

SHARES = np.arange(11) / 20  # of the images, referred
METRICS = ["accuracy", "f1", "recall"]
INTERVAL_COLUMNS = {"": "value", "_low": "low", "_high": "high"}  # of `interval_table`, by the suffix of the metric


def threshold_uncertainty(probabilities: np.ndarray, threshold: float | np.ndarray) -> np.ndarray:
    """Return how near each probability is to the threshold: minus the distance of their log odds.

    Temperature and Platt scaling do not change the order of images by it. In the demo, the members' disagreement
    (mutual information) finds errors no better.

    Args:
        probabilities: (N,), P(positive).
        threshold: on the same scale, for all images, or (N,) if it was chosen on other folds than the image's own.

    Returns:
        (N,), at most 0; the highest is the least certain.
    """
    return np.asarray(-np.abs(log_odds(probabilities) - log_odds(np.asarray(threshold))))


def referral_table(
    validation: ValidationSet,
    predictions: Predictions,
    uncertainty: np.ndarray,
    shares: np.ndarray = SHARES,
) -> pd.DataFrame:
    """Compute metrics of the predictions that are kept, by the share of images that is referred.

    Ties in uncertainty are broken at random, so that an uninformative uncertainty refers a random share.

    Args:
        validation: the set.
        predictions: cross-fitted where their threshold was fitted.
        uncertainty: (N,), the highest are referred first.
        shares: of the images, rounded down to whole images.

    Returns:
        A row per share: `share`, `uncertainty` (the lowest that is referred; missing where none is), the counts of
        the images kept, then `accuracy`, `f1` and `recall` with the ends of their 95 % intervals, and the first
        `reason` for a missing value. No rows if the predictions are unavailable.
    """
    columns = ["share", "uncertainty", *COUNTS]
    columns += [f"{metric}{suffix}" for metric in METRICS for suffix in INTERVAL_COLUMNS]
    kept_predictions = {"": replace(predictions, probabilities=None, scores=None)}  # metrics of the labels suffice
    rows: list[dict[str, Any]] = []
    count = len(uncertainty)
    order = np.lexsort([np.random.default_rng(0).permutation(count), uncertainty])  # the most certain first
    for share in shares if not predictions.reason else []:
        kept = count - int(share * count + 1e-9)
        row: dict[str, Any] = {"share": share, "uncertainty": uncertainty[order[kept]] if kept < count else np.nan}
        row |= count_patients(validation, np.sort(order[:kept]))
        table = evaluate_subset(validation, kept_predictions, np.sort(order[:kept])).set_index("metric")
        for metric in METRICS:
            row |= {f"{metric}{suffix}": table.loc[metric, key] for suffix, key in INTERVAL_COLUMNS.items()}
        reasons = table.loc[METRICS, "reason"]
        rows.append(row | {"reason": next((reason for reason in reasons if reason), "")})
    return pd.DataFrame(rows, columns=[*columns, "reason"])
