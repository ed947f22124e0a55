"""Which labeled images are trained on and which validate."""

import warnings

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import DisjointSet
from sklearn.model_selection import StratifiedGroupKFold

from pipeline.core.config import SplitParams
from pipeline.core.errors import UserError


def split_dataset(manifest: pd.DataFrame, same: np.ndarray, params: SplitParams) -> pd.DataFrame:
    """Assign every image of the manifest to train, validation or test, and every labeled one to a fold.

    All images of a group go the same way: those of a patient, and those of all patients who share a radiograph. Fold 0
    validates. Both classes keep their share in the folds, which are those of scikit-learn's StratifiedGroupKFold; or
    fold 0 is a source that is left out of training.

    Args:
        manifest: N rows.
        same: (N,), what `duplicates.find` gave.
        params: how many folds, the seed, and whether every fold must be fit to validate on, or one; or which source.

    Returns:
        Columns file, group, subset and fold (missing for the test set), in the order of the manifest.

    Raises:
        UserError: a class has too few groups to be in both parts, or the source does not have both.
    """
    group = _groups(manifest, same)
    table = pd.DataFrame({"file": manifest["file"], "group": group, "subset": manifest["set"]})
    labeled = manifest["set"] == "train"
    labels, groups = manifest.loc[labeled, "label"], group[labeled]
    if params.held_out_source is None:
        folds = _folds(labels, groups, params)
    else:
        folds = _leave_out(labels, groups, manifest.loc[labeled, "source"], params)
    table["fold"] = folds.astype("Int64").reindex(table.index)
    table.loc[table["fold"] == 0, "subset"] = "validation"
    return table


def _folds(labels: pd.Series, groups: pd.Series, params: SplitParams) -> pd.Series:
    for label in (0, 1):
        count = groups[labels == label].nunique()
        if count < 2:
            raise UserError(
                f"only {count} group(s) of images with label {label}: training and validation need one each; "
                "add images or patients"
            )
    folds = pd.Series(0, labels.index)
    fit: list[bool] = []  # to validate on
    if params.folds <= min(labels.value_counts().max(), groups.nunique()):  # scikit-learn makes no more
        with warnings.catch_warnings():
            # Fewer members than folds leaves some folds without the class; one that has both is chosen.
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            folder = StratifiedGroupKFold(params.folds, shuffle=True, random_state=params.seed)
            for fold, (_, rows) in enumerate(folder.split(labels, labels, groups)):
                folds.iloc[rows] = fold
        fit = [bool(labels.groupby(folds == fold).nunique().eq(2).all()) for fold in range(params.folds)]
    if not (all(fit) if params.cross_validate and fit else any(fit)):
        which = "not every" if params.cross_validate else "no"
        raise UserError(
            f"split.folds = {params.folds}: {which} fold has both classes with both left for training; "
            "lower it in params.yaml or add images"
        )
    first = fit.index(True)
    order = sorted(range(params.folds), key=lambda fold: fold != first)
    return folds.map({fold: place for place, fold in enumerate(order)})


def _leave_out(labels: pd.Series, groups: pd.Series, sources: pd.Series, params: SplitParams) -> pd.Series:
    """Put every group that has an image of the source into fold 0, and the others into fold 1."""
    held_out = groups.isin(groups[sources == params.held_out_source])
    if labels[held_out].nunique() < 2 or labels[~held_out].nunique() < 2:
        inside, outside = (
            f"{(part == 0).sum()} negative, {(part == 1).sum()} positive"
            for part in (labels[held_out], labels[~held_out])
        )
        known = ", ".join(sorted(set(sources) - {""})) or "none"
        raise UserError(
            f"split.held_out_source = {params.held_out_source}: both parts need both classes, but it, with all of its "
            f"patients, has {inside}, and the rest {outside}; the known sources are: {known}"
        )
    return pd.Series(np.where(held_out, 0, 1), labels.index)


def check_split(manifest: pd.DataFrame, same: np.ndarray, table: pd.DataFrame) -> None:
    """Prove that what is trained on and what validates share no patient, no radiograph and no group.

    Raises:
        UserError: they do.
    """
    patients = manifest["patient"].where(manifest["patient"] != "")
    radiographs = pd.Series(manifest["file"].to_numpy()[same])
    shared: dict[str, pd.Series] = {"patient": patients, "radiograph": radiographs, "group": table["group"]}
    for kind, key in shared.items():
        folds = table["fold"].groupby(key).nunique()
        if (folds > 1).any():
            raise UserError(
                f"data/split.csv: the {kind} {folds.idxmax()} is in {folds.max()} folds, so that validation would see "
                "what was trained on; do not use this split, run: dvc repro -f split"
            )


def _groups(manifest: pd.DataFrame, same: np.ndarray) -> pd.Series:
    """Name for each image the first patient of its group; an image of no known patient is one by itself."""
    patient = manifest["patient"].where(manifest["patient"] != "", "image:" + manifest["file"])
    number, names = pd.factorize(patient)
    # Patients are tied to the radiographs that they have, and so to one another.
    tied = DisjointSet(range(len(names) + len(same)))
    for one, radiograph in zip(number.tolist(), (len(names) + same).tolist(), strict=True):
        tied.merge(one, radiograph)
    return patient.groupby([tied[one] for one in number.tolist()]).transform("first")
