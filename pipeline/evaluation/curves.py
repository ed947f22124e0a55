"""Plots and tables of curves: ROC, precision–recall, confusion matrix, learning curves."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    PrecisionRecallDisplay,
    RocCurveDisplay,
    precision_recall_curve,
    roc_curve,
)

from pipeline.core.files import atomic_path
from pipeline.evaluation.metrics import has_single_class


def roc_points(labels: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """Return the points of the ROC curve, `fpr` and `tpr`; no rows for a single class."""
    if has_single_class(labels):
        return pd.DataFrame(columns=["fpr", "tpr"])
    fpr, tpr, _ = roc_curve(labels, probabilities)
    return pd.DataFrame({"fpr": fpr, "tpr": tpr})


def precision_recall_points(labels: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """Return the points of the curve, `recall` and `precision`; no rows for a single class."""
    if has_single_class(labels):
        return pd.DataFrame(columns=["recall", "precision"])
    precision, recall, _ = precision_recall_curve(labels, probabilities)
    return pd.DataFrame({"recall": recall, "precision": precision})


def draw_roc(path: Path, labels: np.ndarray, models: pd.DataFrame) -> None:
    """Draw an ROC curve per column of P(positive); an empty plot for a single class."""
    axes = _axes()
    for name in models if not has_single_class(labels) else []:
        RocCurveDisplay.from_predictions(labels, models[name], name=name, ax=axes)
    axes.set(title="ROC on the validation set", xlabel="1 − specificity", ylabel="sensitivity")
    _save(path, axes)


def draw_precision_recall(path: Path, labels: np.ndarray, models: pd.DataFrame) -> None:
    """Draw a precision–recall curve per column of P(positive); an empty plot for a single class."""
    axes = _axes()
    for name in models if not has_single_class(labels) else []:
        PrecisionRecallDisplay.from_predictions(labels, models[name], name=name, ax=axes)
    axes.set(
        title="Precision and recall on the validation set", xlabel="recall (sensitivity)", ylabel="precision (PPV)"
    )
    _save(path, axes)


def draw_confusion_matrix(path: Path, labels: np.ndarray, predicted: np.ndarray, title: str) -> None:
    """Draw the confusion matrix of predicted labels, 0 or 1."""
    axes = _axes()
    names = ["negative", "positive"]
    ConfusionMatrixDisplay.from_predictions(
        labels, predicted, labels=[0, 1], display_labels=names, cmap="Blues", colorbar=False, ax=axes
    )
    axes.set_title(title)
    _save(path, axes)


def draw_learning_curves(path: Path, histories: Mapping[str, pd.DataFrame]) -> None:
    """Draw validation F1, validation loss and training loss by epoch, one line per model and fold."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = {"f1": "validation F1", "loss": "validation loss", "train_loss": "training loss"}
    for axes, (column, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for number, (name, history) in enumerate(histories.items()):
            for index, (_, of_fold) in enumerate(history.groupby("fold")):
                label = name if index == 0 else None
                axes.plot(of_fold["epoch"], of_fold[column], marker=".", color=f"C{number}", label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[-1].legend(fontsize="x-small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _axes() -> Axes:
    # A Figure made without pyplot needs no display and is freed without closing it.
    return Figure(figsize=(6.5, 6), layout="constrained").add_subplot()


def _save(path: Path, axes: Axes) -> None:
    if axes.get_legend():
        axes.legend(fontsize="x-small")
    with atomic_path(path) as temporary:
        axes.get_figure().savefig(temporary, format="png", dpi=110)  # type: ignore[union-attr]
