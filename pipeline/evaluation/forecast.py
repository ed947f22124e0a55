"""What the models will do on the test images, without their labels: tests of distribution shift, and the accuracy."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.core.config import Config
from pipeline.evaluation import dataset_shift
from pipeline.evaluation.calibration import log_odds
from pipeline.evaluation.expected_accuracy import ExpectedAccuracy, choose_strata, estimate_accuracy


def forecast_test_set(
    config: Config,
    predictions: Mapping[str, pd.DataFrame],
    combined: Mapping[str, pd.DataFrame],
    predicted: np.ndarray,
    metadata: pd.DataFrame,
    test_groups: np.ndarray | None,
    folder: Path,
) -> tuple[pd.DataFrame, ExpectedAccuracy]:
    """Test whether the test images are distributed like the labeled ones, and estimate the accuracy of the bag on them.

    Args:
        config: names the expected prevalence.
        predictions: `validation` and `test`, with the columns file and, for validation, label.
        combined: the same images, with the score and label that the bag gives them, from `ensemble.predict`.
        predicted: (N,), labels of the bag for the validation images, not fitted on the same images.
        metadata: a row per image of the pack, from `manifest.read_split`, indexed by file.
        test_groups: (M,), the name of each test image's group; None if unknown.
        folder: with `acquisition.csv`, `thumbnails.npy` and `embeddings.npy`, from the evaluate stage.

    Returns:
        A row per set of features, from `dataset_shift.shift_table`; and the accuracy.
    """
    validation, test = predictions["validation"], predictions["test"]
    labels = validation["label"].to_numpy(int)
    groups = metadata.loc[validation["file"], "group"].to_numpy()
    logits = (log_odds(combined[subset]["score"].to_numpy())[:, None] for subset in ("validation", "test"))
    is_labeled, is_test = (metadata["subset"].isin(names).to_numpy() for names in (["train", "validation"], ["test"]))
    is_embedded = metadata["fold"].eq(0).to_numpy(bool, na_value=False)
    embedded = np.load(folder / "embeddings.npy")
    from_test = is_test[is_embedded | is_test]
    feature_sets = {"score": tuple(logits), "embedding": (embedded[~from_test], embedded[from_test])}
    rows = {"embedding": is_embedded}
    acquisition = pd.read_csv(folder / "acquisition.csv").drop(columns=["file", "cluster"]).to_numpy(float)
    thumbnails = np.load(folder / "thumbnails.npy").reshape(len(metadata), -1)
    for name, features in {"acquisition features": acquisition, "thumbnail": thumbnails}.items():
        feature_sets[name], rows[name] = (features[is_labeled], features[is_test]), is_labeled
    shift = dataset_shift.shift_table(
        feature_sets,
        {"score": labels} | {name: metadata.loc[mask, "label"].to_numpy(int) for name, mask in rows.items()},
        {"score": groups} | {name: metadata.loc[mask, "group"].to_numpy() for name, mask in rows.items()},
        test_groups,
    )
    strata = choose_strata(labels, groups, metadata.loc[validation["file"]], metadata.loc[test["file"]])
    accuracy = estimate_accuracy(
        labels, predicted, groups, combined["test"]["label"].to_numpy(), strata,
        config.active.evaluate.expected_prevalence, dataset_shift.describe_shift(shift), test_groups,
    )  # fmt: skip
    return shift, accuracy
