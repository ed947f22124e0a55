"""Grouped, stratified split of the labeled images into training and validation."""

import warnings

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import DisjointSet
from sklearn.model_selection import StratifiedGroupKFold

from pipeline.core.config import SplitParams
from pipeline.core.errors import UserError


def split_dataset(manifest: pd.DataFrame, duplicate_groups: np.ndarray, params: SplitParams) -> pd.DataFrame:
    """Assign every image of the manifest to train, validation or test, and every labeled image to a fold.

    A group is never divided: it has all images of a patient, and of all patients that share a radiograph. Fold 0 is
    the validation set. The folds are those of scikit-learn's StratifiedGroupKFold, which keeps the prevalence similar,
    or fold 0 is one source, held out of training.

    Args:
        manifest: N rows.
        duplicate_groups: (N,), from `duplicates.find_duplicates`.
        params: number of folds, seed, and whether all folds must have both classes; or the held-out source.

    Returns:
        Columns file, group, subset and fold (missing for the test set), in the order of the manifest.

    Raises:
        UserError: a class has too few groups for training and validation, or one of them would lack a class.
    """
    all_groups = _name_groups(manifest, duplicate_groups)
    table = pd.DataFrame({"file": manifest["file"], "group": all_groups, "subset": manifest["set"]})
    labeled = manifest["set"] == "train"
    labels, groups = manifest.loc[labeled, "label"], all_groups[labeled]
    if params.held_out_source is None:
        folds = _stratified_folds(labels, groups, params)
    else:
        folds = _hold_out_source(labels, groups, manifest.loc[labeled, "source"], params)
    table["fold"] = folds.astype("Int64").reindex(table.index)
    table.loc[table["fold"] == 0, "subset"] = "validation"
    return table


def _stratified_folds(labels: pd.Series, groups: pd.Series, params: SplitParams) -> pd.Series:
    for label in (0, 1):
        count = groups[labels == label].nunique()
        if count < 2:
            raise UserError(
                f"only {count} group(s) of images with label {label}: training and validation need one each; "
                "add images or patients"
            )
    folds = pd.Series(0, labels.index)
    usable: list[bool] = []  # whether fold k and the other folds have both classes
    if params.folds <= min(labels.value_counts().max(), groups.nunique()):  # scikit-learn's limit
        with warnings.catch_warnings():
            # A class with fewer groups than folds is missing in some folds; they are not used for validation.
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            splitter = StratifiedGroupKFold(params.folds, shuffle=True, random_state=params.seed)
            for fold, (_, rows) in enumerate(splitter.split(labels, labels, groups)):
                folds.iloc[rows] = fold
        usable = [bool(labels.groupby(folds == fold).nunique().eq(2).all()) for fold in range(params.folds)]
    if not (all(usable) if params.cross_validate and usable else any(usable)):
        quantifier = "not every" if params.cross_validate else "no"
        raise UserError(
            f"split.folds = {params.folds}: {quantifier} fold has both classes and leaves both for training; "
            "lower it in params.yaml or add images"
        )
    first = usable.index(True)
    order = sorted(range(params.folds), key=lambda fold: fold != first)
    return folds.map({fold: number for number, fold in enumerate(order)})


def _hold_out_source(labels: pd.Series, groups: pd.Series, sources: pd.Series, params: SplitParams) -> pd.Series:
    """Assign every group with an image of the source to fold 0, and all others to fold 1."""
    held_out = groups.isin(groups[sources == params.held_out_source])
    if labels[held_out].nunique() < 2 or labels[~held_out].nunique() < 2:
        validation_counts, training_counts = (
            f"{(subset == 0).sum()} negative, {(subset == 1).sum()} positive"
            for subset in (labels[held_out], labels[~held_out])
        )
        names = ", ".join(sorted(set(sources) - {""})) or "none"
        raise UserError(
            f"split.held_out_source = {params.held_out_source}: training and validation need both classes, but the "
            f"patients of this source have {validation_counts}, and all others {training_counts}; choose another of "
            f"the sources: {names}"
        )
    return pd.Series(np.where(held_out, 0, 1), labels.index)


def check_split(manifest: pd.DataFrame, duplicate_groups: np.ndarray, split: pd.DataFrame) -> None:
    """Verify that the folds share no patient, no radiograph and no group.

    Args:
        manifest: N rows.
        duplicate_groups: (N,), from `duplicates.find_duplicates`.
        split: from `split_dataset`.

    Raises:
        UserError: two folds share one.
    """
    patients = manifest["patient"].where(manifest["patient"] != "")
    radiographs = pd.Series(manifest["file"].to_numpy()[duplicate_groups])
    keys: dict[str, pd.Series] = {"patient": patients, "radiograph": radiographs, "group": split["group"]}
    for kind, key in keys.items():
        fold_counts = split["fold"].groupby(key).nunique()
        if (fold_counts > 1).any():
            raise UserError(
                f"data/split.csv: {kind} {fold_counts.idxmax()} is in {fold_counts.max()} folds, so training images "
                "leak into validation; do not use this split, run: dvc repro -f split"
            )


def _name_groups(manifest: pd.DataFrame, duplicate_groups: np.ndarray) -> pd.Series:
    """Return for each image the first patient of its group; images of unknown patients count as one patient each."""
    patients = manifest["patient"].where(manifest["patient"] != "", "image:" + manifest["file"])
    indices, names = pd.factorize(patients)
    # Groups are the connected components of the graph whose edges connect patients with their radiographs.
    components = DisjointSet(range(len(names) + len(duplicate_groups)))
    for patient, radiograph in zip(indices.tolist(), (len(names) + duplicate_groups).tolist(), strict=True):
        components.merge(patient, radiograph)
    return patients.groupby([components[patient] for patient in indices.tolist()]).transform("first")
