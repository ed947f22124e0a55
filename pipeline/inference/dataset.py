"""Predictions of every model for the validation, test and external images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pipeline.core.config import Config
from pipeline.core.errors import UserError
from pipeline.core.files import atomic_path, write_csv
from pipeline.core.progress import track_progress
from pipeline.data.dataset import PackedImages
from pipeline.evaluation import ensemble, shortcuts
from pipeline.inference.apply_networks import BATCH_SIZES, apply_networks, predict_members
from pipeline.models import classifier, soup
from pipeline.models.classifier import Classifier
from pipeline.models.members import share_backbones

SOUP = "soup"  # the model with the average of the members' weights
EMBEDDING_SIZE = 64


def predict_dataset(config: Config, table: pd.DataFrame, device: torch.device) -> pd.DataFrame:
    """Write `predictions/validation.csv`, `test.csv`, `external.csv`, `soup.csv`, `embeddings.npy` and `features.npy`.

    A validation image is predicted by the network of its fold, which was not trained on it. On test and external
    images, a cross-validated model is the mean of its networks. Embeddings and features are of the first member's
    network of the first fold: embeddings of its validation images and the test images, features of the images of the
    source probe.

    Args:
        config: names the models.
        table: a row per image of the pack, from `manifest.read_split`.
        device: on which the models run.

    Returns:
        The table in `validation.csv`, unrounded: `file`, `label` and P(positive), with a column per seed.

    Raises:
        UserError: a model has other folds than those that validate.
    """
    folds = config.active.split.validation_folds
    networks = {name: classifier.load_networks(Path("models", name), device) for name in config.model_names}
    for name, of_folds in networks.items():
        if len(of_folds) != len(folds):
            raise UserError(f"models/{name}: {len(of_folds)} networks for {len(folds)} folds; run: dvc repro")
    members = config.bag_members
    unavailable_reason = ensemble.soup_unavailable_reason(
        config.active.weights.source, config.active.train.head_hidden, len(members)
    )
    if not unavailable_reason:
        by_fold = zip(*(networks[name] for name in members), strict=True)
        networks[SOUP] = [soup.average_weights(of_fold) for of_fold in by_fold]
    share_backbones(networks.values())
    pack = PackedImages(Path("data/images.npy"), device)
    is_validation = table["subset"] == "validation"
    predictions = []
    for index, fold in enumerate(folds):
        of_fold = {name: [of_folds[index]] for name, of_folds in networks.items()}
        rows = list(table.index[is_validation & (table["fold"] == fold)])
        predictions.append(probability_table(of_fold, pack, rows))
    rows = list(table.index[table["subset"].isin(["test", "external"])])
    predictions.append(probability_table(networks, pack, rows))

    probabilities = pd.concat(predictions).sort_index()
    probed = table.index[shortcuts.choose_probed(table, folds[0])]
    table = table.loc[probabilities.index]
    soup_probabilities = np.nan if unavailable_reason else probabilities.pop(SOUP)
    soup_table = table[["subset", "file", "label"]].assign(**{SOUP: soup_probabilities})
    write_csv(Path("predictions/soup.csv"), soup_table[table["subset"] != "external"])
    labeled = pd.concat([table[["file", "label"]], probabilities], axis="columns")
    validation = labeled[table["subset"] == "validation"]
    write_csv(Path("predictions/validation.csv"), validation)
    write_csv(Path("predictions/test.csv"), labeled[table["subset"] == "test"].drop(columns="label"))
    write_csv(Path("predictions/external.csv"), labeled[table["subset"] == "external"])
    is_projected = (table["fold"].eq(folds[0]).fillna(False) | (table["subset"] == "test")).astype(bool)
    embedded = table.index[is_projected | table.index.isin(probed)]
    network, is_probed = networks[members[0]][0], embedded.isin(probed)
    projections, features = embed_images(network, pack, embedded.to_numpy(), is_probed)
    arrays = {"embeddings": projections[is_projected[embedded].to_numpy()], "features": features}
    for name, array in arrays.items():
        with atomic_path(Path(f"predictions/{name}.npy")) as temporary, temporary.open("wb") as out:
            np.save(out, array)
    return validation


def embed_images(
    network: Classifier, pack: PackedImages, rows: np.ndarray, is_kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute random projections of the backbone's features, and the features themselves.

    The projections keep distances about as they are (Johnson and Lindenstrauss 1984) and, unlike principal components,
    do not depend on the images. A linear classifier finds less in them than in the features.

    Args:
        network: on the device of the pack.
        pack: of the images.
        rows: (N,), of the pack.
        is_kept: (N,), whether the features of an image are returned.

    Returns:
        Projections (N, EMBEDDING_SIZE) and features (K, D) of the K images that are kept, float32.
    """
    size = BATCH_SIZES[pack.device.type]
    batches, kept = (torch.tensor(values).split(size) for values in (rows, is_kept))
    projections, features = list[torch.Tensor](), list[torch.Tensor]()
    pixels = track_progress(pack.batches(batches), "embedding", len(batches))
    for (outputs,), of_batch in zip(apply_networks([network.embed], pixels, pack.device), kept, strict=True):
        shape = (outputs.shape[1], EMBEDDING_SIZE)
        projection = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        projections.append(outputs @ torch.from_numpy(projection))
        features.append(outputs[of_batch])
    return torch.cat(projections).numpy(), torch.cat(features).numpy()


def probability_table(models: Mapping[str, Sequence[Classifier]], pack: PackedImages, rows: list[int]) -> pd.DataFrame:
    """Return P(positive), with a column per model, for the images at `rows` of the pack, which are the index."""
    batches = torch.tensor(rows, dtype=torch.int64).split(BATCH_SIZES[pack.device.type]) if rows else ()
    pixels = track_progress(pack.batches(batches), "predicting", len(batches))
    probabilities = list(predict_members(models.values(), pixels, pack.device))
    values = torch.cat(probabilities).numpy() if probabilities else np.empty((0, len(models)), np.float32)
    return pd.DataFrame(values, index=rows, columns=list(models))
