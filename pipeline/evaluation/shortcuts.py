"""Shortcut baselines: they predict the label from the source, file metadata, a thumbnail or the border.

They see no lung detail. A network can learn such a shortcut instead of the disease (Zech et al. 2018,
doi:10.1371/journal.pmed.1002683; DeGrave, Janizek and Lee 2021, doi:10.1038/s42256-021-00338-7), so a model should be
compared with them.
"""

from pathlib import Path
from typing import TypedDict

import numpy as np
import pandas as pd
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier

from pipeline.core.files import write_csv, write_json
from pipeline.evaluation.metrics import has_single_class

THUMBNAIL_SIZE = 16  # edge of the thumbnails, pixels
BORDER_WIDTH = 2  # width of the border, in pixels of the thumbnail
CHUNK_SIZE = 256  # images read at once


class BaselineInfo(TypedDict):
    features: int
    threshold: float | None  # the share of positives among the training images
    reason: str  # why the baseline is unavailable, else empty


def write_baselines(table: pd.DataFrame) -> None:
    """Write `predictions/shortcuts.csv` and `metrics/shortcuts.json`; see `fit_baselines`."""
    probabilities, info = fit_baselines(table, np.load("data/images.npy", mmap_mode="r"))
    files = table.loc[probabilities.index, ["file", "label"]]
    write_csv(Path("predictions/shortcuts.csv"), pd.concat([files, probabilities], axis="columns"))
    write_json(Path("metrics/shortcuts.json"), info)


def fit_baselines(table: pd.DataFrame, images: np.ndarray) -> tuple[pd.DataFrame, dict[str, BaselineInfo]]:
    """Fit every shortcut baseline to the training images and predict the validation images.

    Args:
        table: a row per image of the pack, from `manifest.read_split`.
        images: the pack, uint8 (N, S, S).

    Returns:
        P(positive), with a row per validation image and a column per baseline, NaN where it is unavailable; and
        information about each baseline.
    """
    subsets = {subset: np.flatnonzero(table["subset"] == subset) for subset in ("train", "validation")}
    rows = np.concatenate(list(subsets.values()))
    table, labels = table.iloc[rows], table["label"].iloc[subsets["train"]].to_numpy(dtype=int)
    thumbnails = make_thumbnails(images, rows)
    border = np.ones((THUMBNAIL_SIZE, THUMBNAIL_SIZE), dtype=bool)
    border[BORDER_WIDTH:-BORDER_WIDTH, BORDER_WIDTH:-BORDER_WIDTH] = False
    # All numbers in the manifest except the label describe the file.
    file_metadata = table.select_dtypes("number").drop(columns="label")
    pixel_model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    baselines: dict[str, tuple[np.ndarray, ClassifierMixin]] = {
        "source": (
            table[["source"]].to_numpy(),
            make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression()),
        ),
        "file_metadata": (
            file_metadata.to_numpy(float),
            DecisionTreeClassifier(max_leaf_nodes=16, min_samples_leaf=5, random_state=0),
        ),
        "thumbnail": (thumbnails.reshape(len(rows), -1), pixel_model),
        "border": (thumbnails[:, border], pixel_model),
    }
    probabilities, info = {}, dict[str, BaselineInfo]()
    for name, (features, model) in baselines.items():
        train, validation = np.split(features, [len(labels)])
        reason = _unavailable_reason(name, train, validation, labels)
        threshold = None if reason else float(labels.mean())
        info[name] = {"features": features.shape[1], "threshold": threshold, "reason": reason}
        probabilities[name] = (
            np.full(len(validation), np.nan) if reason else model.fit(train, labels).predict_proba(validation)[:, 1]
        )
    return pd.DataFrame(probabilities, index=table.index[len(labels) :]), info


def make_thumbnails(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Average images (N, S, S) over a grid: (rows, THUMBNAIL_SIZE, THUMBNAIL_SIZE), float32."""
    edges = np.arange(THUMBNAIL_SIZE) * images.shape[-1] // THUMBNAIL_SIZE
    widths = np.diff(np.append(edges, images.shape[-1]))
    chunks = []
    for start in range(0, len(rows), CHUNK_SIZE):
        sums = np.add.reduceat(images[rows[start : start + CHUNK_SIZE]], edges, axis=1, dtype=np.uint32)
        chunks.append(np.add.reduceat(sums, edges, axis=2) / np.outer(widths, widths))
    return np.concatenate(chunks).astype(np.float32)


def _unavailable_reason(name: str, train: np.ndarray, validation: np.ndarray, labels: np.ndarray) -> str:
    if has_single_class(labels):
        return "training images of one class only"
    for subset, features in {"training": train, "validation": validation}.items():
        if (features == features[0]).all():
            if name == "source":
                return f"no source is known of the {subset} images, or one only"
            return f"all {subset} images have the same features"
    return ""
