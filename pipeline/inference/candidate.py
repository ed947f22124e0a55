"""A candidate for the registry: one or more classifiers, and the configuration that combines their predictions."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pipeline.core.config import FindingParams
from pipeline.core.errors import UserError
from pipeline.core.files import read_json, write_json
from pipeline.evaluation import ensemble
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference.apply_networks import BATCH_SIZES, Precision, predict_members
from pipeline.models import classifier
from pipeline.models.classifier import DESCRIPTION_FILE, WEIGHTS_FILE, Architecture, Classifier
from pipeline.models.members import share_backbones


class Candidate:
    """Models that predict together the probability of a finding, as an `EnsembleConfig` combines them.

    Args:
        members: the networks of each model, by its name: one, or one per fold.
        config: how the models are combined.
        finding: what the labels mean.
        precision: of the arithmetic.
    """

    def __init__(
        self,
        members: Mapping[str, Sequence[Classifier]],
        config: EnsembleConfig,
        finding: FindingParams,
        precision: Precision = "float32",
    ) -> None:
        self.members, self.config, self.finding, self.precision = members, config, finding, precision
        first = [networks[0] for networks in members.values()]
        ((self.packed_size, self.resize),) = {(one.architecture.packed_size, one.architecture.resize) for one in first}
        self.device = first[0].scale.device
        self.batch_size = BATCH_SIZES[self.device.type]

    def predict(self, pixels: Tensor) -> pd.DataFrame:
        """Classify gray images (N, packed_size, packed_size), uint8.

        Returns:
            A row per image: `score`, `probability` of the finding and `label`, 0 or 1, of all members combined, see
            `ensemble.predict`; and P(positive) of each member, by its name.
        """
        return pd.concat(self.predict_batches(pixels.split(self.batch_size)), ignore_index=True)

    def predict_batches(self, batches: Iterable[Tensor]) -> Iterator[pd.DataFrame]:
        """Classify batches of `batch_size` images as `predict` does; some batches are read ahead."""
        for probabilities in predict_members(self.members.values(), batches, self.device, self.precision):
            members = pd.DataFrame(probabilities.numpy(), columns=list(self.members))
            yield pd.concat([ensemble.predict(members, self.config), members], axis="columns")


def agreement(predictions: pd.DataFrame, config: EnsembleConfig) -> pd.Series:
    """Return the share of the members whose own label is that of all combined, (N,), from `Candidate.predict`."""
    own_labels = predictions[config.members] >= config.threshold
    return own_labels.eq(predictions["label"] == 1, axis="index").mean(axis="columns")


def assemble_candidate(
    folder: Path, models: Path, config: EnsembleConfig, finding: FindingParams | None = None
) -> None:
    """Write a folder for `load_candidate`, from the folder `models` with a folder per member.

    Of the finding, only what is not the default is written: so the hash of a model of an earlier release stays.
    """
    for name in config.members:
        (folder / name).mkdir(parents=True)
        for file in (WEIGHTS_FILE, DESCRIPTION_FILE):
            shutil.copyfile(models / name / file, folder / name / file)
    write_json(folder / "candidate.json", candidate_fields(config, finding))


def candidate_fields(config: EnsembleConfig, finding: FindingParams | None = None) -> dict[str, Any]:
    """Return the content of candidate.json."""
    words = finding.model_dump(exclude_defaults=True, exclude={"model_name"}) if finding else {}
    return asdict(config) | ({"finding": words} if words else {})


def content_hash(folder: Path) -> str:
    """Return the SHA-256 of a candidate's models and configuration, as 64 hexadecimal digits."""
    return hash_candidate(read_json(folder / "candidate.json"), folder)


def hash_candidate(fields: Mapping[str, Any], models: Path) -> str:
    """Return the `content_hash` of the candidate with this candidate.json and the members in the folder `models`."""
    descriptions = [read_json(models / name / DESCRIPTION_FILE) for name in fields["members"]]
    members = [
        {key: one[key] for key in (*Architecture.__dataclass_fields__, "weights_sha256") if key in one}
        for one in descriptions  # older ones lack the last fields of the architecture
    ]
    members.sort(key=lambda member: str(member["weights_sha256"]))
    config = {key: value for key, value in fields.items() if key != "members"}
    return hashlib.sha256(json.dumps([members, config], sort_keys=True).encode()).hexdigest()


def is_of_earlier_release(fields: Mapping[str, object]) -> bool:
    """Return whether a candidate.json has a threshold for each member, as before votes were scores."""
    return "thresholds" in fields


def read_finding(fields: Mapping[str, Any]) -> FindingParams:
    """Return what the labels mean from a candidate.json; one of an earlier release does not say it: the default."""
    return FindingParams(**fields.get("finding", {}))


def load_candidate(folder: Path, device: torch.device, precision: Precision = "float32") -> Candidate:
    """Load a candidate for prediction; no code in its files is executed.

    Raises:
        UserError: it is not a candidate of this release, a file is missing, or weights do not match their hash.
    """
    try:
        fields = read_json(folder / "candidate.json")
        if is_of_earlier_release(fields):
            raise UserError(f"{folder / 'candidate.json'}: written by an earlier release; train again with: dvc repro")
        finding = read_finding(fields)
        config = EnsembleConfig(**{key: value for key, value in fields.items() if key != "finding"})
        members = {name: classifier.load_networks(folder / name, device) for name in config.members}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not found; this is not a complete model of this pipeline") from None
    share_backbones(members.values())
    return Candidate(members, config, finding, precision)
