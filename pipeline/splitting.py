"""Which labelled images are trained on and which validate."""

import warnings

import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from pipeline.config import SplitParams
from pipeline.errors import UserError


def split(manifest: pd.DataFrame, params: SplitParams) -> pd.DataFrame:
    """Assign every image of the manifest to train, validation or test.

    All images of a group go the same way. A group is a patient, or the image itself where the patient is not known.
    Both classes keep their share: the validation set is one of the folds of scikit-learn's StratifiedGroupKFold.

    Returns:
        Columns file, group and subset, in the order of the manifest.

    Raises:
        UserError: a class has too few groups to be in both parts.
    """
    group = manifest["patient"].where(manifest["patient"] != "", "image:" + manifest["file"])
    table = pd.DataFrame({"file": manifest["file"], "group": group, "subset": manifest["set"]})
    labelled = manifest["set"] == "train"
    labels, groups = manifest.loc[labelled, "label"], group[labelled]
    for label in (0, 1):
        count = groups[labels == label].nunique()
        if count < 2:
            raise UserError(
                f"only {count} group(s) of images with label {label}: training and validation need one each; "
                "add images or patients"
            )
    validation = None
    if params.folds <= min(labels.value_counts().max(), groups.nunique()):  # scikit-learn makes no more
        with warnings.catch_warnings():
            # Fewer members than folds leaves some folds without the class; one that has both is chosen.
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            splits = StratifiedGroupKFold(params.folds, shuffle=True, random_state=params.seed).split(
                labels, labels, groups
            )
            both = (v for t, v in splits if labels.iloc[t].nunique() == labels.iloc[v].nunique() == 2)
            validation = next(both, None)
    if validation is None:
        raise UserError(
            f"split.folds = {params.folds}: no fold has both classes with both left for training; "
            "lower it in params.yaml or add images"
        )
    table.loc[labels.index[validation], "subset"] = "validation"
    return table
