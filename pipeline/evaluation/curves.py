"""Points of the ROC and precision–recall curves."""

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_curve, roc_curve

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
    precision, recall, _ = precision_recall_curve(labels, probabilities, drop_intermediate=True)
    return pd.DataFrame({"recall": recall, "precision": precision})
