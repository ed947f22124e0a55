"""Grouped, stratified split of the labeled images into training and validation."""

import warnings

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import DisjointSet
from sklearn.model_selection import StratifiedGroupKFold

from pipeline.core.config import SplitParams
from pipeline.core.errors import UserError


def split_dataset(manifest: pd.DataFrame, duplicate_groups: np.ndarray, params: SplitParams) -> pd.DataFrame:
    """Assign every image of the manifest to train, validation, test or external, and the first two to folds.

    A group is never divided: it has all images of a patient, and of all patients that share a radiograph. Fold 0 is
    the validation set. The folds are those of scikit-learn's StratifiedGroupKFold, which keeps the prevalence similar.
    Groups with a labeled image of `held_out_source` are external: they neither train nor choose anything.

    Args:
        manifest: N rows.
        duplicate_groups: (N,), from `duplicates.find_duplicates`.
        params: number of folds, seed, whether all folds must have both classes, and the held-out source.

    Returns:
        Columns file, group, subset and fold (missing for test and external images), in the order of the manifest.

    Raises:
        UserError: a class has too few groups for training and validation, or one of them would lack a class.
    """
    all_groups = _name_groups(manifest, duplicate_groups)
    table = pd.DataFrame({"file": manifest["file"], "group": all_groups, "subset": manifest["set"]})
    labeled = manifest["set"] == "train"
    if params.held_out_source is not None:
        external = _held_out(manifest[labeled], all_groups[labeled], params.held_out_source)
        table.loc[external.index[external], "subset"] = "external"
        labeled &= table["subset"] != "external"
    folds = _stratified_folds(manifest.loc[labeled, "label"], all_groups[labeled], params)
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


def _held_out(labeled: pd.DataFrame, groups: pd.Series, source: str) -> pd.Series:
    """Return whether each labeled image is in a group with an image of the source."""
    external = groups.isin(groups[labeled["source"] == source])
    if labeled.loc[external, "label"].nunique() < 2 or labeled.loc[~external, "label"].nunique() < 2:
        external_counts, other_counts = (
            f"{(labels == 0).sum()} negative, {(labels == 1).sum()} positive"
            for labels in (labeled.loc[external, "label"], labeled.loc[~external, "label"])
        )
        names = ", ".join(sorted(set(labeled["source"]) - {""})) or "none"
        raise UserError(
            f"split.held_out_source = {source}: external validation and training need both classes, but the patients "
            f"of this source have {external_counts}, and all others {other_counts}; choose another of the sources: "
            f"{names}"
        )
    return external


def check_split(manifest: pd.DataFrame, duplicate_groups: np.ndarray, split: pd.DataFrame) -> None:
    """Verify that the folds and the external images share no patient, no radiograph and no group.

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
    folds = split["fold"].mask(split["subset"] == "external", -1)
    for kind, key in keys.items():
        fold_counts = folds.groupby(key).nunique()
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
