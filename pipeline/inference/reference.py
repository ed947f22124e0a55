"""The images that a model of this workspace was trained and validated on, described as the log describes images."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pipeline.core.config import Config
from pipeline.core.errors import UserError
from pipeline.core.files import read_csv
from pipeline.data.dataset import PackedImages
from pipeline.data.manifest import read_split
from pipeline.evaluation import ensemble
from pipeline.inference.candidate import Candidate, candidate_fields, hash_candidate
from pipeline.inference.prediction_log import NORMALIZE, describe_pixels, embed, round_figure
from pipeline.models import classifier

MAX_EMBEDDED = 2000  # validation images; time grows with their number
CHUNK_SIZE = 256  # images in memory


def hash_of_candidate(config: Config, name: str) -> str:
    """Return the content hash of a candidate in `models/`."""
    fields = candidate_fields(ensemble.load_candidate_configs(config)[name], config.active.finding)
    return hash_candidate(fields, Path("models"))


def find_candidate(config: Config, content_hash: str) -> str:
    """Return the name of the candidate in `models/` with this hash.

    Raises:
        UserError: there is none, so its scores for the validation images are not known.
    """
    for name in ensemble.load_candidate_configs(config):
        if hash_of_candidate(config, name) == content_hash:
            return name
    raise UserError(
        f"model {content_hash[:12]} is none of those in models/, of which predictions/validation.csv has the scores; "
        "check out the commit of its run, which MLflow shows, in a copy of the project, run dvc pull, and compare there"
    )


def load_reference(config: Config, name: str) -> pd.DataFrame:
    """Describe the labeled images of this workspace for `monitoring.compare`.

    Args:
        config: names the models.
        name: of the candidate, from `find_candidate`.

    Returns:
        A row per training or validation image: `label`, `group`, `view`, `manufacturer`, the acquisition features, and
        of validation images `score`, `probability`, `predicted` and, of at most `MAX_EMBEDDED` of the first fold,
        `embedding`.
    """
    folds = config.active.split.validation_folds
    table = read_split(Path("data"), folds)
    table = table[table["subset"].isin(["train", "validation"])]
    ensemble_config = ensemble.load_candidate_configs(config)[name]
    validation = read_csv(Path("predictions/validation.csv"))
    predicted = ensemble.predict(validation, ensemble_config).rename(columns={"label": "predicted"})
    table = table.assign(**{name: table[name].map(normalize) for name, normalize in NORMALIZE.items()})
    table = table.join(predicted.set_index(validation["file"]), on="file")

    pack = PackedImages(Path("data/images.npy"), torch.device("cpu"))
    chunks = [table.iloc[start : start + CHUNK_SIZE] for start in range(0, len(table), CHUNK_SIZE)]
    descriptions = pd.concat([describe_pixels(pack.images[chunk.index], chunk) for chunk in chunks])
    table = pd.concat([table, descriptions.map(round_figure)], axis="columns")  # as in the log: some are constant
    # The network of the first fold was not trained on these.
    embedded = table.index[table["fold"] == folds[0]].to_numpy(copy=True)
    if len(embedded) > MAX_EMBEDDED:
        embedded = np.sort(np.random.default_rng(0).choice(embedded, MAX_EMBEDDED, replace=False))
    members = {
        member: classifier.load_networks(Path("models", member), torch.device("cpu"))
        for member in ensemble_config.members
    }
    embeddings = embed(
        Candidate(members, ensemble_config, config.active.finding), pack.read(torch.from_numpy(embedded))
    )
    table["embedding"] = pd.Series(list(embeddings), index=embedded, dtype=object)
    return table
