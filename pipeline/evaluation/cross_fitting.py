"""Cross-fitting: what is fitted on some folds is evaluated on the remaining one, so no image evaluates its own fit."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from pipeline.evaluation.metrics import count_groups, has_single_class

FOLD_COUNT = 5
Fitted = TypeVar("Fitted")


def grouped_folds(labels: np.ndarray, groups: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split images into stratified folds that keep every group together.

    Args:
        labels: (N,), 0 or 1.
        groups: (N,), the name of each image's group.

    Returns:
        For each fold, the row numbers for fitting and those for evaluation. Empty if a class has fewer groups than
        there are folds, or if a fold would fit on a single class.
    """
    labels = np.asarray(labels)
    if min(count_groups(labels, groups)) < FOLD_COUNT:
        return []
    with warnings.catch_warnings():
        # Groups with images of both classes can leave a fold without one of the classes.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        folds = list(StratifiedGroupKFold(FOLD_COUNT, shuffle=True, random_state=0).split(labels, labels, groups))
    return folds if not any(has_single_class(labels[fit_rows]) for fit_rows, _ in folds) else []


def cross_fit(
    folds: list[tuple[np.ndarray, np.ndarray]],
    fit: Callable[[np.ndarray], Fitted],
    predict: Callable[[Fitted, np.ndarray], np.ndarray],
) -> np.ndarray | None:
    """Predict each fold with what was fitted on the other folds.

    Args:
        folds: from `grouped_folds`.
        fit: takes row numbers and returns what it fitted on those rows.
        predict: takes the fitted object and row numbers, and returns one or several values per row.

    Returns:
        (N, …), in the order of the rows, or None without folds.
    """
    if not folds:
        return None
    values = np.concatenate([predict(fit(fit_rows), evaluation_rows) for fit_rows, evaluation_rows in folds])
    order: np.ndarray = np.argsort(np.concatenate([evaluation_rows for _, evaluation_rows in folds]))
    return np.asarray(values[order])
