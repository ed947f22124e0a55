"""Scores of the candidates on the test set, for `cxr score` alone: nothing is chosen by them."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from pipeline.core.config import BAG
from pipeline.core.errors import UserError
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.evaluation.external_validation import evaluate_fixed
from pipeline.evaluation.metric_tables import ValidationSet
from pipeline.evaluation.slices import COUNTS

METRICS = ["accuracy", "f1", "recall", "specificity", "auroc"]
EXPECTED_COLUMNS = [
    "expected_accuracy", "expected_accuracy_low", "expected_accuracy_high", "expected_accuracy_reason",
    "estimated_test_prevalence",
]  # fmt: skip


def score_candidates(
    predictions: pd.DataFrame,
    labels: pd.Series,
    groups: pd.Series,
    candidates: Mapping[str, EnsembleConfig],
    summary: Mapping[str, Any],
) -> pd.DataFrame:
    """Score every candidate on the test images whose label is known.

    Args:
        predictions: a row per test image, with `file` and a column of P(positive) per seed.
        labels: 0 or 1, indexed by file, of some of these images.
        groups: the group of each test image, indexed by file.
        candidates: by name.
        summary: of the evaluation, with the expected accuracy.

    Returns:
        A row per candidate and metric of `METRICS`: `model`, `metric`, `value`, `low`, `high`, `method`, `reason`, the
        counts, and, for the accuracy of the best seed and the bag, what `summary` says by the keys `EXPECTED_COLUMNS`:
        the expected accuracy, its interval or range, the reason where it is missing, and the estimated share of
        positives.

    Raises:
        UserError: a label is of no test image, there are none, or the images have no group.
    """
    unknown = labels.index[~labels.index.isin(predictions["file"])]
    if len(unknown):
        raise UserError(
            f"the labels: {unknown[0]} is not a test image ({len(unknown)} such files in total); remove these lines"
        )
    if labels.empty:
        raise UserError("the labels: no test image has a label; add the lines File,Label")
    predictions = predictions[predictions["file"].isin(labels.index)].reset_index(drop=True)
    files = predictions["file"]
    if not files.isin(groups.index).all():
        raise UserError("predictions/test.csv: not of the images in data/manifest.csv; run: dvc repro")
    test = ValidationSet(labels.loc[files].to_numpy(), groups.loc[files].to_numpy(), resamples=0)
    table = evaluate_fixed(test, predictions, candidates).query("metric in @METRICS")
    table = table.assign(**dict.fromkeys(EXPECTED_COLUMNS))
    for role in ("best", BAG):
        model = BAG if role == BAG else summary[role]["model"]
        is_estimated = (table["model"] == model) & (table["metric"] == "accuracy")
        for key in EXPECTED_COLUMNS:
            table.loc[is_estimated, key] = summary[role].get(key)
    columns = ["model", "metric", "value", "low", "high", "method", "reason", *COUNTS, *EXPECTED_COLUMNS]
    return table[columns].reset_index(drop=True)
