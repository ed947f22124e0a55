"""What tells the label without radiology: the source, the files' traits, a thumbnail, the border without the lungs.

A network can learn such a shortcut instead of the disease (Zech et al. 2018, doi:10.1371/journal.pmed.1002683;
DeGrave, Janizek and Lee 2021, doi:10.1038/s42256-021-00338-7), so a model is worth what it adds to them.
"""

from typing import TypedDict

import numpy as np
import pandas as pd
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier

from pipeline.evaluation.metrics import has_single_class

THUMBNAIL_SIZE = 16  # edge of the thumbnails
BORDER_WIDTH = 2  # width of the border, of these 16
CHUNK_SIZE = 256  # images that are read at once


class BaselineInfo(TypedDict):
    features: int
    threshold: float | None  # the share of positives among the training images
    reason: str  # why there is none


def fit_baselines(table: pd.DataFrame, images: np.ndarray) -> tuple[pd.DataFrame, dict[str, BaselineInfo]]:
    """Fit every shortcut to the training images, and let it judge the validation images.

    Args:
        table: a row per image of the pack, as `manifest.read_split` gives it.
        images: the pack, uint8 (N, S, S).

    Returns:
        P(positive), a row per validation image and a column per shortcut, NaN where there is none; and what each is.
    """
    rows = {subset: np.flatnonzero(table["subset"] == subset) for subset in ("train", "validation")}
    used = np.concatenate(list(rows.values()))
    table, labels = table.iloc[used], table["label"].iloc[rows["train"]].to_numpy(dtype=int)
    pictures = make_thumbnails(images, used)
    frame = np.ones((THUMBNAIL_SIZE, THUMBNAIL_SIZE), dtype=bool)
    frame[BORDER_WIDTH:-BORDER_WIDTH, BORDER_WIDTH:-BORDER_WIDTH] = False
    # Numbers of the manifest but the label are traits of the files.
    traits = table.select_dtypes("number").drop(columns="label")
    pixels = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    fits: dict[str, tuple[np.ndarray, ClassifierMixin]] = {
        "source": (
            table[["source"]].to_numpy(),
            make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression()),
        ),
        "file_metadata": (
            traits.to_numpy(float),
            DecisionTreeClassifier(max_leaf_nodes=16, min_samples_leaf=5, random_state=0),
        ),
        "thumbnail": (pictures.reshape(len(used), -1), pixels),
        "border": (pictures[:, frame], pixels),
    }
    found, facts = {}, dict[str, BaselineInfo]()
    for name, (features, model) in fits.items():
        learned, judged = np.split(features, [len(labels)])
        reason = _refused(name, learned, judged, labels)
        threshold = None if reason else float(labels.mean())
        facts[name] = {"features": features.shape[1], "threshold": threshold, "reason": reason}
        found[name] = np.full(len(judged), np.nan) if reason else model.fit(learned, labels).predict_proba(judged)[:, 1]
    return pd.DataFrame(found, index=table.index[len(labels) :]), facts


def make_thumbnails(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Average images (N, S, S) over a grid: (rows, GRID, GRID), float32."""
    edges = np.arange(THUMBNAIL_SIZE) * images.shape[-1] // THUMBNAIL_SIZE
    widths = np.diff(np.append(edges, images.shape[-1]))
    parts = []
    for start in range(0, len(rows), CHUNK_SIZE):
        sums = np.add.reduceat(images[rows[start : start + CHUNK_SIZE]], edges, axis=1, dtype=np.uint32)
        parts.append(np.add.reduceat(sums, edges, axis=2) / np.outer(widths, widths))
    return np.concatenate(parts).astype(np.float32)


def _refused(name: str, learned: np.ndarray, judged: np.ndarray, labels: np.ndarray) -> str:
    if has_single_class(labels):
        return "training images of one class only"
    for subset, features in {"training": learned, "validation": judged}.items():
        if (features == features[0]).all():
            known = {"source": "no source is known of the {} images, or one only"}
            return known.get(name, "all {} images are the same there").format(subset)
    return ""
