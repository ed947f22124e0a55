"""Source probe: how well the features of a network tell the source of an image beyond what its label tells.

A network whose features tell the source can use it instead of the disease (Zech et al. 2018,
doi:10.1371/journal.pmed.1002683). A probe, a linear classifier on the features (Alain and Bengio 2016,
arXiv:1610.01644), measures it within each label. 16x16 thumbnails, probed alike, are the reference.
"""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import stdtrit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.evaluation.intervals import (
    EPS,
    NO_DIFFERENCE,
    QUANTILES,
    auroc_interval,
    auroc_variance,
    bootstrap_weights,
)
from pipeline.evaluation.shortcuts import choose_probed

NETWORK, THUMBNAIL, DIFFERENCE = "network", "thumbnail", "difference"  # in the column `features`
COLUMNS = ["features", "by", "labels", "sources", "images", "patients", "value", "low", "high", "reason"]
FOLD_COUNT = 5
# Models of different folds share training images: the variance is larger than that of images that no model was fitted
# on, by about this factor (Nadeau and Bengio 2003, doi:10.1023/A:1024068626366).
FOLD_CORRELATION = 1 + FOLD_COUNT / (FOLD_COUNT - 1)
MIN_PATIENTS = 5  # of a source within a label; with fewer, the source is left out there
RESAMPLES = 1000


def probe_dataset(metadata: pd.DataFrame, fold: int, folder: Path) -> pd.DataFrame:
    """Probe the images that `choose_probed` chooses; see `probe_sources`.

    Args:
        metadata: a row per image of the pack, from `manifest.read_split`, with its `acquisition` cluster.
        fold: the one that validates.
        folder: with `features.npy`, of these images, and `thumbnails.npy`, of all.
    """
    rows = choose_probed(metadata, fold)
    features, thumbnails = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("features", "thumbnails"))
    return probe_sources(metadata.iloc[rows], features, thumbnails[rows].reshape(len(rows), -1))


def probe_sources(images: pd.DataFrame, features: np.ndarray, thumbnails: np.ndarray) -> pd.DataFrame:
    """Estimate how well features and thumbnails tell the source, given the label.

    Within each label, a regularized logistic regression, cross-validated by patient, predicts the source. The AUROC of
    two sources is over the pairs of images in the same fold: over pairs from different folds it would be below 0.5 for
    features that tell nothing (Airola et al. 2011, doi:10.1016/j.csda.2010.11.018). Pairs of sources (Hand and Till
    2001, doi:10.1023/A:1010920819831) and labels are averaged with weights as in van Elteren (1960), a b / (a + b) for
    a and b patients.

    Args:
        images: M rows with `label`, `group` (counts as patient), and `source` and `acquisition`, empty where unknown.
        features: (M, D), of the network.
        thumbnails: (M, P).

    Returns:
        `COLUMNS`, with rows `NETWORK`, `THUMBNAIL` and `DIFFERENCE`: the AUROC (`value`), or how much higher it is for
        the network; what it is of, `by` source or, where no label allows that, acquisition cluster; and the `reason`
        why it or its interval is missing. The variance is that of a bootstrap over patients; the interval of an AUROC
        is a score interval, which an AUROC of 1 has as well, that of the difference has the quantile of t.
    """
    possible = [(by, strata) for by in ("source", "acquisition") if (strata := _strata(images, by))]
    if not possible:
        reason = f"no two sources, or acquisition clusters, have {MIN_PATIENTS} patients each of one class"
        names = [NETWORK, THUMBNAIL, DIFFERENCE]
        return pd.DataFrame({"features": names, "reason": reason}).reindex(columns=COLUMNS)
    by, strata = possible[0]
    groups, sources = images["group"].to_numpy(), images[by].to_numpy()
    weights, rows = bootstrap_weights(groups, RESAMPLES), np.concatenate(strata)
    counts = {
        "by": by, "labels": len(strata), "sources": len(np.unique(sources[rows])), "images": len(rows),
        "patients": len(np.unique(groups[rows])),
    }  # fmt: skip
    samples, results = {}, []
    for name, values in ((NETWORK, features), (THUMBNAIL, thumbnails)):
        samples[name], size = _bootstrap_auroc(values, sources, groups, strata, weights)
        auroc = float(samples[name][0])
        variance = auroc_variance(auroc, size, size) if 0 < auroc < 1 else np.inf
        inflation = max(1, np.nanvar(samples[name][1:]) / variance)
        low, high = auroc_interval(auroc, size, size, FOLD_CORRELATION * inflation)
        results.append({"features": name, **counts, "value": auroc, "low": low, "high": high, "reason": ""})
    differences = samples[NETWORK] - samples[THUMBNAIL]
    fewest = min(images.iloc[rows].groupby(by)["group"].nunique().min() for rows in strata)
    half_width = stdtrit(fewest - 1, QUANTILES[1]) * np.sqrt(FOLD_CORRELATION * np.nanvar(differences[1:]))
    row = {"features": DIFFERENCE, **counts, "value": differences[0], "reason": NO_DIFFERENCE}
    if half_width > EPS:
        row |= {"low": differences[0] - half_width, "high": differences[0] + half_width, "reason": ""}
    return pd.DataFrame([*results, row], columns=COLUMNS)


def _strata(images: pd.DataFrame, by: str) -> list[np.ndarray]:
    """Return, per label with at least two sources of `MIN_PATIENTS`, the row numbers of the images of such sources."""
    strata = []
    for label in (0, 1):
        is_known = ((images["label"] == label) & (images[by] != "")).to_numpy(bool)
        patients = images[is_known].groupby(by)["group"].nunique()
        enough = patients.index[patients >= MIN_PATIENTS]
        if len(enough) > 1:
            strata.append(np.flatnonzero(is_known & images[by].isin(enough).to_numpy()))
    return strata


def _bootstrap_auroc(
    features: np.ndarray, sources: np.ndarray, groups: np.ndarray, strata: list[np.ndarray], weights: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return the AUROC on every resample, (R,), and the patients in each of two sources that tell as much.

    Args:
        features: (M, D).
        sources: (M,).
        groups: (M,).
        strata: the rows of each label.
        weights: (R, M), how often each resample contains each image.
    """
    aurocs, sizes, size = list[np.ndarray](), list[float](), 0.0
    for rows in strata:
        names, codes = np.unique(sources[rows], return_inverse=True)
        probabilities, folds = _predict_source(features[rows], codes, groups[rows])
        counts = [len(np.unique(groups[rows][codes == code])) for code in range(len(names))]
        of_pairs = []
        for pair in combinations(range(len(names)), 2):
            first, second = (counts[code] for code in pair)
            of_pairs.append(first * second / (first + second))
            aurocs.append(_pair_auroc(probabilities, codes, folds, pair, weights[:, rows]))
        sizes += of_pairs
        # A patient is in several pairs: the pairs together do not tell more than all patients.
        size += min(2 * sum(of_pairs), sum(counts) / 2)
    # In few resamples no two images of a pair of sources are in one fold.
    averaged: np.ndarray = np.ma.filled(np.ma.average(np.ma.masked_invalid(aurocs), axis=0, weights=sizes), np.nan)
    return averaged, size


def _predict_source(features: np.ndarray, codes: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return P(source), (N, sources), of each image by a model fitted on other patients, and the image's fold, (N,)."""
    probabilities, folds = np.zeros((len(codes), codes.max() + 1)), np.zeros(len(codes), dtype=int)
    splits = StratifiedGroupKFold(FOLD_COUNT, shuffle=True, random_state=0).split(features, codes, groups)
    for fold, (fit_rows, rows) in enumerate(splits):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        model.fit(features[fit_rows], codes[fit_rows])
        probabilities[np.ix_(rows, model.classes_)] = model.predict_proba(features[rows])
        folds[rows] = fold
    return probabilities, folds


def _pair_auroc(
    probabilities: np.ndarray, codes: np.ndarray, folds: np.ndarray, pair: tuple[int, int], weights: np.ndarray
) -> np.ndarray:
    """Return the AUROC of telling two sources apart on every resample, (R,), the mean of those by either probability.

    Args:
        probabilities: (N, sources).
        codes: (N,), of the sources.
        folds: (N,).
        pair: of codes.
        weights: (R, N).
    """
    wins, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for fold in np.unique(folds):
        first, second = (np.flatnonzero((codes == code) & (folds == fold)) for code in pair)
        shares = np.zeros((len(first), len(second)))
        for code, sign in zip(pair, (1, -1), strict=True):
            margins = sign * (probabilities[first, code][:, None] - probabilities[second, code][None])
            shares += (np.sign(margins) + 1) / 4
        wins += ((weights[:, first] @ shares) * weights[:, second]).sum(axis=1)
        pairs += weights[:, first].sum(axis=1) * weights[:, second].sum(axis=1)
    return np.asarray(np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0))
