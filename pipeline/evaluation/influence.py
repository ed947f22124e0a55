"""Influence functions of metrics, and the covariance over patients that follows from them.

The influence of an image is the derivative of a metric with respect to the image's weight (Hampel 1974). Summed over
the images of each patient, influences give the variance of the metric for dependent images without resampling; for the
AUROC of independent images it is that of DeLong, DeLong and Clarke-Pearson (1988), for clustered ones about that of
Obuchowski (1997). The numbers of positive and negative images are taken as fixed, as a stratified split fixes them.
"""

import numpy as np

from pipeline.evaluation.metrics import confusion_cells, log_losses, metrics_of_counts

GRADIENT_STEP = 1e-4  # of numerical derivatives, as a share of the number of images


def center_by_class(influence: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Subtract the mean of each class from influences (N, K), so that the class sizes count as fixed."""
    centered = np.array(influence, dtype=float)
    for label in np.unique(labels):
        centered[labels == label] -= centered[labels == label].mean(axis=0)
    return centered


def threshold_gradient(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the derivatives of `THRESHOLD_METRICS` with respect to the counts of the confusion matrix, (4, metrics).

    Args:
        labels: (N,), 0 or 1.
        predicted: (N,), the predicted labels, 0 or 1.
    """
    counts, step = confusion_cells(labels, predicted).sum(axis=0), GRADIENT_STEP * len(labels)
    # A cell without images has a one-sided derivative, because counts are not negative.
    lower, upper = np.maximum(counts - step * np.eye(4), 0), counts + step * np.eye(4)
    differences = metrics_of_counts(*upper.T) - metrics_of_counts(*lower.T)
    return np.asarray(differences / np.diag(upper - lower)[:, None])


def threshold_influence(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the influence of every image on `THRESHOLD_METRICS`, (N, metrics)."""
    return center_by_class(confusion_cells(labels, predicted) @ threshold_gradient(labels, predicted), labels)


def auroc_influence(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the influence of every image on the AUROC, (N,): its placement among the other class; both must occur."""
    from scipy.stats import rankdata

    is_positive, ranks = labels == 1, rankdata(scores)
    influence = np.empty(len(labels))
    for of_class, sign in ((is_positive, 1), (~is_positive, -1)):
        others = len(labels) - of_class.sum()
        influence[of_class] = sign * (ranks[of_class] - rankdata(scores[of_class])) / others / of_class.sum()
    return center_by_class(influence, labels)


def average_precision_influence(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the influence of every image on the average precision, (N,); there must be a positive image."""
    distinct, index = np.unique(-scores, return_inverse=True)  # from the highest score down
    new_positives = np.bincount(index, labels, len(distinct))
    tp, predicted_positive = np.cumsum(new_positives), np.cumsum(np.bincount(index))
    precision, positives = tp / predicted_positive, labels.sum()
    average_precision = (new_positives * precision).sum() / positives
    # A higher image is among the predicted positives at the threshold of every lower positive.
    as_positive, as_predicted = (
        np.cumsum((new_positives * gain)[::-1])[::-1]
        for gain in (1 / predicted_positive, precision / predicted_positive)
    )
    influence = labels * (precision - average_precision + as_positive)[index] - as_predicted[index]
    return center_by_class(influence / positives, labels)


def image_losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the log loss and the squared error of every image, (N, 2), whose means are `loss` and `brier`."""
    of_label = np.where(labels == 1, probabilities, 1 - probabilities)
    return np.column_stack([log_losses(labels == 1, probabilities), (1 - of_label) ** 2])


def clustered_covariance(influence: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Estimate the covariance of K metrics by the jackknife over groups, stratified by class where there are enough.

    Removing a group also changes the means of its class; dividing by 1 − leverage accounts for it (the estimate CR3 of
    Bell and McCaffrey 2002).

    Args:
        influence: (N, K), with mean 0 in each class.
        labels: (N,), 0 or 1.
        groups: (N,), the name of each image's group.

    Returns:
        (K, K).
    """
    _, index = np.unique(groups, return_inverse=True)
    sums, sizes = np.zeros((index.max() + 1, influence.shape[1])), np.zeros((2, index.max() + 1))
    for label in (0, 1):
        rows = labels == label
        sizes[label] = np.bincount(index[rows], minlength=len(sums))
        leverage = sizes[label][index[rows]] / max(rows.sum(), 1)
        np.add.at(sums, index[rows], influence[rows] / np.maximum(1 - leverage, 1 / len(labels))[:, None])
    has_positive, covariance = sizes[1] > 0, np.zeros((influence.shape[1], influence.shape[1]))
    is_stratified = min(has_positive.sum(), (~has_positive).sum()) > 1
    for stratum in (has_positive, ~has_positive) if is_stratified else (np.full(len(sums), True),):
        count = stratum.sum()
        deviations = sums[stratum] - sums[stratum].mean(axis=0)
        covariance += (count - 1) / count * deviations.T @ deviations
    return covariance
