"""Metrics on slices of the validation set: the images of one source, view, size, sex, age group or acquisition."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation.metric_tables import (
    COLUMNS,
    Predictions,
    ValidationSet,
    interval_table,
    unavailable_predictions,
)
from pipeline.evaluation.metrics import count_groups

MIN_PER_CLASS = 10  # positive and negative patients; with fewer, a slice has counts but no metrics
SIZE_BINS = {"below 512": 0, "512 to 1023": 512, "1024 to 2047": 1024, "2048 and more": 2048}  # shorter edge, pixels
AGE_BINS = {"below 18": 0, "18 to 39": 18, "40 to 64": 40, "65 and more": 65}  # years
COUNTS = ["images", "positives", "patients", "positive_patients", "negative_patients"]


def slice_table(validation: ValidationSet, table: pd.DataFrame, predictions: Mapping[str, Predictions]) -> pd.DataFrame:
    """Evaluate models on slices of the validation set.

    Args:
        validation: the set; its groups count as patients.
        table: a row per image, with `source`, `view`, `width` and `height`, and optionally `sex`, `age` (years) and
            `acquisition`; unknown texts are empty, unknown ages are NaN.
        predictions: by model.

    Returns:
        A row per slice, model and metric: `by` (one of these columns, or `size`), `slice`, `COUNTS` and the columns of
        `interval_table`. With fewer than `MIN_PER_CLASS` patients of a class, there is a `reason` instead of values.
        Images of which `by` is not known are one row with an empty `slice`, and are only counted.
    """
    tables = []
    for by, column in _slice_columns(table).items():
        codes, known_values = column.codes, [str(value) for value in column.categories]
        for code, value in enumerate(known_values):
            metrics = _evaluate_slice(validation, predictions, np.flatnonzero(codes == code))
            tables.append(metrics.assign(by=by, slice=value))
        if (codes == -1).any():
            reason = f"{by} not known" if known_values else f"no {by} is known"
            counts = count_patients(validation, np.flatnonzero(codes == -1))
            tables.append(pd.DataFrame([{"by": by, "slice": "", "reason": reason, **counts}]))
    return pd.concat(tables).reindex(columns=["by", "slice", *COUNTS, *COLUMNS])


def evaluate_subset(
    validation: ValidationSet, predictions: Mapping[str, Predictions], rows: np.ndarray
) -> pd.DataFrame:
    """Return `interval_table` for some of the images.

    Args:
        validation: the set, N images.
        predictions: by model, for all N images.
        rows: (M,), row numbers, at least one.
    """
    subset = validation.subset(rows)
    models = {name: model if model.reason else model.subset(rows) for name, model in predictions.items()}
    return interval_table(subset, models, refitted={})


def count_patients(validation: ValidationSet, rows: np.ndarray | None = None) -> dict[str, int]:
    """Count `COUNTS` in the rows (M,), by default in all; a patient with images of both classes counts in both."""
    images = validation if rows is None else validation.subset(rows)
    labels, groups = images.labels, images.groups
    counts = [len(labels), int(labels.sum()), len(np.unique(groups)), *count_groups(labels, groups)]
    return dict(zip(COUNTS, counts, strict=True))


def all_patients_known(images: pd.DataFrame) -> bool:
    """Tell whether the patient of every image is known; else the groups of these rows of the split are too small."""
    return bool(images["patient"].ne("").all())


def too_few_patients(counts: Mapping[str, int]) -> str:
    """Return why metrics of so few patients would not support a finding, or an empty text."""
    for kind in ("positive", "negative"):
        count = counts[f"{kind}_patients"]
        if count < MIN_PER_CLASS:
            return f"{count} {kind} patient{'' if count == 1 else 's'}, fewer than {MIN_PER_CLASS}"
    return ""


def _slice_columns(table: pd.DataFrame) -> dict[str, Any]:
    """Return, by kind of slice, a `pandas.Categorical` of the slice of every image, missing where it is not known."""
    columns = {by: table[by] for by in ("source", "view", "sex", "acquisition") if by in table}
    categories = {by: pd.Categorical(column.where(column != "")) for by, column in columns.items()}
    bins = {"size": (table[["width", "height"]].min(axis="columns"), SIZE_BINS)}
    bins |= {"age": (table["age"], AGE_BINS)} if "age" in table else {}
    for by, (values, edges) in bins.items():
        binned = pd.cut(values.to_numpy(float), [*edges.values(), np.inf], right=False, labels=list(edges))
        categories[by] = binned.remove_unused_categories()
    return categories


def _evaluate_slice(
    validation: ValidationSet, predictions: Mapping[str, Predictions], rows: np.ndarray
) -> pd.DataFrame:
    counts = count_patients(validation, rows)
    if reason := too_few_patients(counts):
        predictions = {name: unavailable_predictions(model.reason or reason) for name, model in predictions.items()}
    return evaluate_subset(validation, predictions, rows).assign(**counts)
