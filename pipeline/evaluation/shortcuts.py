"""Shortcut baselines: they predict the label from metadata of the image, the patient or the file, or a few pixels.

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
FILE_COLUMNS = ["width", "height", "bytes", "jpeg_quantization"]  # of the manifest
UNKNOWN_AGE = -1.0  # a tree separates it from any age
MAX_PROBED = 2000  # images of the source probe: its time, its memory and the stored features grow with them


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
    """Fit every shortcut baseline and predict the validation images, those of each fold from the other folds.

    Args:
        table: a row per image of the pack, from `manifest.read_split`.
        images: the pack, uint8 (N, S, S).

    Returns:
        P(positive), with a row per validation image and a column per baseline, NaN where it is unavailable; and
        information about each baseline.
    """
    rows = np.flatnonzero(table["subset"].isin(["train", "validation"]))
    table = table.iloc[rows]
    labels, folds = table["label"].to_numpy(dtype=int), table["fold"].to_numpy(dtype=int)
    validation = (table["subset"] == "validation").to_numpy()
    splits = [(folds != fold, folds == fold) for fold in np.unique(folds[validation])]
    thumbnails = make_thumbnails(images, rows)
    border = np.ones((THUMBNAIL_SIZE, THUMBNAIL_SIZE), dtype=bool)
    border[BORDER_WIDTH:-BORDER_WIDTH, BORDER_WIDTH:-BORDER_WIDTH] = False
    one_hot = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression())
    tree = DecisionTreeClassifier(max_leaf_nodes=16, min_samples_leaf=5, random_state=0)
    pixel_model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    baselines: dict[str, tuple[np.ndarray, ClassifierMixin]] = {
        "source": (table[["source"]].to_numpy(), one_hot),
        "view": (table[["view"]].to_numpy(), one_hot),
        "demographics": (_demographics(table), tree),
        "file_metadata": (table[FILE_COLUMNS].to_numpy(float), tree),
        "thumbnail": (thumbnails.reshape(len(rows), -1), pixel_model),
        "border": (thumbnails[:, border], pixel_model),
    }
    probabilities, info = {}, dict[str, BaselineInfo]()
    for name, (features, model) in baselines.items():
        reasons = [
            _unavailable_reason(name, features[train], features[validation], labels[train]) for train, _ in splits
        ]
        reason = next(filter(None, reasons), "")
        threshold = None if reason else float(np.mean([labels[train].mean() for train, _ in splits]))
        info[name] = {"features": features.shape[1], "threshold": threshold, "reason": reason}
        predicted = np.full(len(labels), np.nan)
        for train, fold in splits if not reason else []:
            predicted[fold] = model.fit(features[train], labels[train]).predict_proba(features[fold])[:, 1]
        probabilities[name] = predicted[validation]
    return pd.DataFrame(probabilities, index=table.index[validation]), info


def make_thumbnails(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Average images (N, S, S) over a grid: (rows, THUMBNAIL_SIZE, THUMBNAIL_SIZE), float32."""
    edges = np.arange(THUMBNAIL_SIZE) * images.shape[-1] // THUMBNAIL_SIZE
    widths = np.diff(np.append(edges, images.shape[-1]))
    chunks = []
    for start in range(0, len(rows), CHUNK_SIZE):
        sums = np.add.reduceat(images[rows[start : start + CHUNK_SIZE]], edges, axis=1, dtype=np.uint32)
        chunks.append(np.add.reduceat(sums, edges, axis=2) / np.outer(widths, widths))
    return np.concatenate(chunks).astype(np.float32)


def choose_probed(table: pd.DataFrame, fold: int) -> np.ndarray:
    """Choose the images of the source probe among those on which the network that a fold validates was not trained.

    If there are more than `MAX_PROBED`, patients are drawn at random, equally many of each label and source as far as
    there are so many, so that a small source stays.

    Args:
        table: a row per image of the pack, from `manifest.read_split`.
        fold: the one that validates.

    Returns:
        Row numbers, in order.
    """
    of_fold = table["fold"].eq(fold).to_numpy(bool, na_value=False)
    rows = np.flatnonzero(of_fold | table["subset"].eq("external").to_numpy())
    images = table.iloc[rows]
    _, patients = np.unique(images["group"].to_numpy(), return_inverse=True)
    order = pd.Series(np.random.default_rng(0).permutation(len(rows))[patients])
    ranks = order.groupby([images["label"].to_numpy(int), images["source"].to_numpy()]).rank("dense")
    return np.sort(rows[np.argsort(ranks.to_numpy(), kind="stable")[:MAX_PROBED]])


def _demographics(table: pd.DataFrame) -> np.ndarray:
    """Return sex, an indicator each for female and male, and age in years: (N, 3)."""
    columns = [table["sex"] == "F", table["sex"] == "M", table["age"].fillna(UNKNOWN_AGE)]
    return np.stack([column.to_numpy(float) for column in columns], axis=1)


def _unavailable_reason(name: str, train: np.ndarray, validation: np.ndarray, labels: np.ndarray) -> str:
    if has_single_class(labels):
        return "training images of one class only"
    for subset, features in {"training": train, "validation": validation}.items():
        if (features == features[0]).all():
            if name in ("source", "view"):
                return f"no {name} is known of the {subset} images, or one only"
            return f"all {subset} images have the same features"
    return ""
