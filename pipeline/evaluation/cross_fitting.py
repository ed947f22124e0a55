"""Where the same images choose and measure: each is measured by what the others chose."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from pipeline.evaluation.metrics import has_single_class

FOLD_COUNT = 5
Chosen = TypeVar("Chosen")


def grouped_folds(labels: np.ndarray, groups: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split images into folds, all of a group into the same one, with both classes where they choose.

    Args:
        labels: (N,), 0 or 1.
        groups: (N,), the name of each image's group.

    Returns:
        Of each fold the rows that choose and those that are measured; no fold where a class has too few groups.
    """
    labels = np.asarray(labels)
    if min((len(np.unique(groups[labels == label])) for label in (0, 1)), default=0) < FOLD_COUNT:
        return []
    with warnings.catch_warnings():
        # Groups of both classes may leave a fold without one.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        found = list(StratifiedGroupKFold(FOLD_COUNT, shuffle=True, random_state=0).split(labels, labels, groups))
    return found if not any(has_single_class(labels[choose]) for choose, _ in found) else []


def cross_fit(
    parts: list[tuple[np.ndarray, np.ndarray]],
    choose: Callable[[np.ndarray], Chosen],
    apply: Callable[[Chosen, np.ndarray], np.ndarray],
) -> np.ndarray | None:
    """Measure each fold by what the others chose.

    Args:
        parts: as `folds` gives them.
        choose: takes rows and returns what they choose.
        apply: takes that and rows, and returns a value, or several, for each of these.

    Returns:
        (N, …), or None where there are no folds.
    """
    if not parts:
        return None
    values = np.concatenate([apply(choose(choosing), measured) for choosing, measured in parts])
    order: np.ndarray = np.argsort(np.concatenate([measured for _, measured in parts]))
    return np.asarray(values[order])
