"""Tests, without labels of the new images, of what an estimate for them rests on: label shift and nothing else.

Under label shift the images of each class are distributed as among the labeled ones, and only the class proportions
differ. Then scores and features of the new images are a mixture of those of the two classes, with some proportion.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from pipeline.evaluation.metrics import count_groups, has_single_class

RESAMPLES = 499  # with them, p is a multiple of 0.002
# Images that are compared; time and memory grow with their square.
MAX_CLASS_IMAGES = 500  # labeled images of a class
MAX_NEW_IMAGES = 2000
MIN_CLASS_GROUPS = 5  # labeled groups per class; with fewer, resampling them says little
FOLD_COUNT = 5
SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True)
class MixtureFit:
    """How well new images fit the best mixture of the two classes.

    Attributes:
        prevalence: the share of positives that makes new images and mixture most alike, see `_unbiased_share`.
        distance: the smallest energy distance between the new images and a mixture.
        p: probability of a distance at least as large if the new images were such a mixture.
        reason: why there is no test, else empty.
    """

    prevalence: float = np.nan
    distance: float = np.nan
    p: float = np.nan
    reason: str = ""


def fit_mixture(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    new_features: np.ndarray,
    new_groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
) -> MixtureFit:
    """Test whether new images are any mixture of the labeled images of the two classes.

    The statistic is the energy distance (Székely and Rizzo 2013) between the new images and the mixture, at the
    proportion that minimizes it (Kawakubo, du Plessis and Sugiyama 2016). Its distribution under the null hypothesis is
    a bootstrap: labeled images are resampled by group, new images are drawn from the mixture of them at the proportion
    of `_unbiased_share`, also by group, and the proportion is fitted again. With one feature, the score, it is the
    goodness of fit of the label-shift mixture (compare Lipton, Wang and Smola 2018; Rabanser, Günnemann and Lipton
    2019); with many it asks what adversarial validation asks, and label shift alone does not make it fail.

    Args:
        features: (N, D), of the labeled images.
        labels: (N,), 0 or 1.
        groups: (N,), the name of each image's group.
        new_features: (M, D).
        new_groups: (M,); None if unknown: then the new images are assumed to be grouped like the labeled ones.
        resamples: of the bootstrap.
    """
    labels, groups = np.asarray(labels, dtype=int), np.asarray(groups)
    if reason := _untestable_reason(labels, groups, len(new_features)):
        return MixtureFit(reason=reason)
    rows = _limit_rows(labels, groups)
    features, labels, groups = np.asarray(features, dtype=float)[rows], labels[rows], groups[rows]
    points = standardize(np.concatenate([features, new_features]))
    if not points.any():
        return MixtureFit(reason="all images have the same features")
    similarity = -cdist(points, points)
    rng = np.random.default_rng(0)
    units = {label: _unit_matrix(groups, labels == label) for label in (0, 1)}

    observed = np.zeros((3, 1, len(points)))
    for label in (0, 1):
        observed[label, 0, : len(labels)] = (labels == label) / (labels == label).sum()
    observed[2, 0, len(labels) :] = 1 / len(new_features)
    distance = float(_minimize_distance(observed, similarity)[1][0])
    prevalence = _unbiased_share(observed[:, 0], similarity, units)

    mean_size = {label: units[label].sum() / len(units[label]) for label in (0, 1)}
    unit_count = (
        _assumed_unit_count(len(new_features), prevalence, mean_size)
        if new_groups is None
        else len(np.unique(new_groups))
    )
    positives = rng.binomial(unit_count, _share_of_units(prevalence, mean_size), resamples)
    counts = {1: positives, 0: unit_count - positives}
    resampled, drawn = np.zeros((3, resamples, len(labels))), np.zeros((resamples, len(labels)))
    for label, unit in units.items():
        shares, sizes = np.full(len(unit), 1 / len(unit)), unit.sum(axis=1)
        # Fewer groups than there are, because resampled groups vary too little around their mean (Rao and Wu 1988). Two
        # fewer than the effective number, not one, keep the level with groups as few as eight.
        effective = sizes.sum() ** 2 / (sizes**2).sum()
        weights = rng.multinomial(max(round(effective) - 2, 1), shares, resamples) @ unit
        resampled[label] = weights / weights.sum(axis=1, keepdims=True)
        drawn += rng.multinomial(counts[label], shares) @ unit
    resampled[2] = drawn / drawn.sum(axis=1, keepdims=True)
    _, null_distances = _minimize_distance(resampled, similarity[: len(labels), : len(labels)])
    p = float((1 + (null_distances >= distance).sum()) / (1 + resamples))
    return MixtureFit(prevalence, distance, p)


def discrimination(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    new_features: np.ndarray,
    new_groups: np.ndarray | None,
    prevalence: float,
) -> float:
    """Return the AUROC of adversarial validation: how well new images are told from labeled ones of their prevalence.

    A regularized logistic regression is fitted on four fifths of the groups and evaluated on the others. Labeled images
    are weighted by their class so that they have the prevalence of the new ones (Lipton, Wang and Smola 2018), which
    makes the AUROC about 0.5 under label shift.

    Returns:
        The mean AUROC over the folds, weighted as well; NaN if it cannot be computed, or if `prevalence` is NaN, as
        from `fit_mixture` without a test.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    labels, groups = np.asarray(labels, dtype=int), np.asarray(groups)
    if np.isnan(prevalence) or len(new_features) < FOLD_COUNT:
        return np.nan
    rows = _limit_rows(labels, groups)
    features, labels, groups = np.asarray(features, dtype=float)[rows], labels[rows], groups[rows]
    points = standardize(np.concatenate([features, new_features]))
    is_new = np.repeat([0, 1], [len(labels), len(new_features)])
    if new_groups is None:
        new_groups = np.arange(len(new_features))
    all_groups = np.concatenate([np.char.add("labeled ", groups.astype(str)), np.asarray(new_groups).astype(str)])
    shares = np.where(labels == 1, prevalence / labels.mean(), (1 - prevalence) / (1 - labels.mean()))
    weights = np.concatenate([shares / len(labels), np.full(len(new_features), 1 / len(new_features))])
    weights *= len(points) / weights.sum()
    strata = np.concatenate([labels, np.full(len(new_features), 2)])
    aurocs = []
    folds = StratifiedGroupKFold(FOLD_COUNT, shuffle=True, random_state=0)
    for fit_rows, rows in folds.split(points, strata, all_groups):
        if has_single_class(is_new[fit_rows]) or not all(weights[rows][is_new[rows] == k].sum() for k in (0, 1)):
            return np.nan
        model = LogisticRegression(C=0.1, max_iter=200).fit(points[fit_rows], is_new[fit_rows], weights[fit_rows])
        decision = model.decision_function(points[rows])
        aurocs.append(roc_auc_score(is_new[rows], decision, sample_weight=weights[rows]))
    return float(np.mean(aurocs))


def shift_table(
    feature_sets: Mapping[str, tuple[np.ndarray, np.ndarray]],
    labels: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray],
    new_groups: np.ndarray | None,
) -> pd.DataFrame:
    """Test every set of features, on `MAX_NEW_IMAGES` of the new images; see `fit_mixture` and `discrimination`.

    Args:
        feature_sets: (N, D) of the labeled and (M, D) of the new images, by name; `score` for the model's.
        labels: (N,), by the same name, because not every set of features has the same labeled images.
        groups: (N,), likewise.
        new_groups: (M,), or None.

    Returns:
        A row per set: `features`, `labeled_images`, `positive_groups` and `negative_groups` of these, `images`,
        `prevalence`, `auroc`, `distance`, `p`, `adjusted_p` (for the number of tests, Holm 1979) and `reason`.
    """
    rows = []
    count = max(len(all_new) for _, all_new in feature_sets.values())
    chosen = np.sort(_choose_rows(np.arange(count) if new_groups is None else new_groups, MAX_NEW_IMAGES))
    groups_of_new = None if new_groups is None else new_groups[chosen]
    for name, (features, all_new) in feature_sets.items():
        new_features = all_new[chosen] if len(all_new) else all_new
        fit = fit_mixture(features, labels[name], groups[name], new_features, groups_of_new)
        auroc = discrimination(features, labels[name], groups[name], new_features, groups_of_new, fit.prevalence)
        positive, negative = count_groups(labels[name], groups[name])
        rows.append({
            "features": name, "labeled_images": len(features), "positive_groups": positive,
            "negative_groups": negative, "images": len(new_features),
            "prevalence": fit.prevalence, "auroc": auroc, "distance": fit.distance, "p": fit.p, "reason": fit.reason,
        })  # fmt: skip
    table = pd.DataFrame(rows)
    table.insert(list(table).index("p") + 1, "adjusted_p", adjust_for_multiplicity(table["p"].to_numpy()))
    return table


def adjust_for_multiplicity(p: np.ndarray) -> np.ndarray:
    """Adjust p-values for their number (Holm 1979); NaN, a test that was not made, does not count."""
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted


def describe_shift(table: pd.DataFrame) -> str:
    """Say which tests of `shift_table` fail at `SIGNIFICANCE_LEVEL`; empty if none."""
    failed = table[table["adjusted_p"] < SIGNIFICANCE_LEVEL]
    parts = []
    for row in failed.itertuples():
        by = "scores fit no mixture of the two classes" if row.features == "score" else f"differ by {row.features}"
        parts.append(f"{by} (adjusted p = {row.adjusted_p:.3f}, AUROC of telling them apart {row.auroc:.2f})")
    return f"the test images are not distributed like the labeled ones: {'; '.join(parts)}" if parts else ""


def standardize(features: np.ndarray) -> np.ndarray:
    """Standardize features (N, D): mean 0 and variance 1, or all 0 for a constant; missing values become the mean.

    There is no reduction to principal components: fitted on one of the two samples it would tell them apart.
    """
    features = np.asarray(features, dtype=float)
    known = np.isfinite(features)
    mean = np.divide(np.where(known, features, 0).sum(axis=0), known.sum(axis=0).clip(1))
    centered = np.where(known, features - mean, 0)
    scale = np.sqrt((centered**2).sum(axis=0) / max(len(centered), 1))
    varies = scale > 1e-9 * np.abs(mean)
    return np.asarray(centered * varies / np.where(varies, scale, 1))


def _minimize_distance(weights: np.ndarray, similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit the proportion of a mixture.

    Args:
        weights: (3, R, P), of the points in the samples of negatives, positives and new images; each sums to 1.
        similarity: (P, P), minus the distances between the points.

    Returns:
        The proportions of positives in [0, 1] and the energy distances, (R,).
    """
    negatives, positives, new = weights
    toward_new, toward_positives = new - negatives, positives - negatives
    projected = toward_positives @ similarity
    cross, size = (projected * toward_new).sum(axis=1), (projected * toward_positives).sum(axis=1)
    share = np.clip(np.divide(cross, size, out=np.zeros_like(cross), where=size > 0), 0, 1)
    total = ((toward_new @ similarity) * toward_new).sum(axis=1)
    return share, total - 2 * share * cross + share**2 * size


def _unbiased_share(weights: np.ndarray, similarity: np.ndarray, units: Mapping[int, np.ndarray]) -> float:
    """Fit the proportion of a mixture by similarities of images of different groups only, as in a U-statistic.

    In `_minimize_distance` each group is similar to itself, so that a class of few groups seems narrow, the more so the
    more features there are, and its proportion is fitted too small.

    Args:
        weights: (3, P), as there.
        similarity: (P, P), as there.
        units: from `_unit_matrix`, by label.

    Returns:
        The proportion of positives in [0, 1]; 0 if the classes do not differ.
    """
    negatives, positives, new = weights
    within = {}
    for label, unit in units.items():
        shares, inner = unit / unit.sum(), similarity[: unit.shape[1], : unit.shape[1]]
        total = shares.sum(axis=0)
        own = ((shares @ inner) * shares).sum()
        within[label] = (total @ inner @ total - own) / (1 - (shares.sum(axis=1) ** 2).sum())
    between = positives @ similarity @ negatives
    cross = (positives - negatives) @ similarity @ new - between + within[0]
    size = within[0] - 2 * between + within[1]
    return float(np.clip(cross / size, 0, 1)) if size > 0 else 0.0


def _unit_matrix(groups: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """Return which group each selected image belongs to: 0 or 1, (groups with a selected image, N)."""
    names = np.unique(groups[selected])
    return np.asarray((names[:, None] == groups[None]) & selected)


def _assumed_unit_count(image_count: int, prevalence: float, mean_size: Mapping[int, float]) -> int:
    """Return the number of groups of images that are grouped like the labeled ones of their class.

    The fitted prevalence is uncertain with few labeled groups, and too many groups vary too little: at least half of
    the images are taken to be of the class with the larger groups.
    """
    larger = int(mean_size[1] > mean_size[0])
    share = max(prevalence if larger else 1 - prevalence, 0.5)
    return max(round(image_count * (share / mean_size[larger] + (1 - share) / mean_size[1 - larger])), 1)


def _share_of_units(prevalence: float, mean_size: Mapping[int, float]) -> float:
    """Convert the share of positive images to that of positive groups."""
    positive, negative = prevalence / mean_size[1], (1 - prevalence) / mean_size[0]
    return positive / (positive + negative)


def _limit_rows(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Choose the rows of at most `MAX_CLASS_IMAGES` images of each class."""
    rng = np.random.default_rng(0)
    by_class = [np.flatnonzero(labels == label) for label in (0, 1)]
    return np.sort(np.concatenate([rows[_choose_rows(groups[rows], MAX_CLASS_IMAGES, rng)] for rows in by_class]))


def _choose_rows(groups: np.ndarray, limit: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Choose whole groups at random until they have `limit` images; return their rows, of all groups if they do not."""
    if len(groups) <= limit:
        return np.arange(len(groups))
    _, index = np.unique(groups, return_inverse=True)
    rank = (rng or np.random.default_rng(0)).permutation(index.max() + 1)[index]
    return np.argsort(rank, kind="stable")[:limit]


def _untestable_reason(labels: np.ndarray, groups: np.ndarray, new_count: int) -> str:
    if new_count < 2:
        return "fewer than two test images"
    for name, count in zip(("positive", "negative"), count_groups(labels, groups), strict=True):
        if count < MIN_CLASS_GROUPS:
            return f"fewer than {MIN_CLASS_GROUPS} {name} patients"
    return ""
