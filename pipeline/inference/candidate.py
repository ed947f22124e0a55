"""What the registry holds: one classifier, or several and the rule by which they answer as one."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.core.files import read_json, write_json
from pipeline.evaluation import ensemble
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.models import classifier
from pipeline.models.classifier import DESCRIPTION_FILE, WEIGHTS_FILE, Architecture, Classifier

BATCH_SIZE = 32  # images that all members see at once


class Candidate:
    """Classifiers that judge together, by a rule."""

    def __init__(self, members: Mapping[str, Classifier], rule: EnsembleConfig) -> None:
        self.members, self.rule = members, rule
        architectures = [network.architecture for network in members.values()]
        ((self.packed_size, self.resize),) = {(one.packed_size, one.resize) for one in architectures}

    def predict(self, pixels: Tensor) -> pd.DataFrame:
        """Judge gray images (N, packed_size, packed_size), uint8.

        Returns:
            A row per image: `probability` of COVID-19 (of several members the combined one), and `label`, 0 or 1.
        """
        device = next(iter(self.members.values())).scale.device
        parts = [
            torch.stack([network.predict_proba(part.to(device)) for network in self.members.values()], dim=1).cpu()
            for part in pixels.split(BATCH_SIZE)
        ]
        found = pd.DataFrame(torch.cat(parts).numpy(), columns=list(self.members))
        return ensemble.predict(found, self.rule)


def assemble_candidate(folder: Path, models: Path, rule: EnsembleConfig) -> None:
    """Write a folder that `load` takes, from the folder that has one of each member's name."""
    for name in rule.members:
        (folder / name).mkdir(parents=True)
        for file in (WEIGHTS_FILE, DESCRIPTION_FILE):
            shutil.copyfile(models / name / file, folder / name / file)
    write_json(folder / "candidate.json", asdict(rule))


def content_hash(folder: Path) -> str:
    """Return what tells a candidate from any other, 64 hexadecimal digits: a hash of its models and its rule."""
    facts = read_json(folder / "candidate.json")
    descriptions = [read_json(folder / name / DESCRIPTION_FILE) for name in facts.pop("members")]
    models = [{key: one[key] for key in (*Architecture.__dataclass_fields__, "weights_sha256")} for one in descriptions]
    models.sort(key=lambda model: str(model["weights_sha256"]))
    return hashlib.sha256(json.dumps([models, facts], sort_keys=True).encode()).hexdigest()


def load_candidate(folder: Path, device: torch.device) -> Candidate:
    """Load a candidate, ready to judge; nothing in the files is executed.

    Raises:
        UserError: it is not one that this pipeline made, a file is missing, or weights are not those described.
    """
    try:
        rule = EnsembleConfig(**read_json(folder / "candidate.json"))
        members = {name: classifier.load_classifier(folder / name, device) for name in rule.members}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not found; this is no whole model of this pipeline") from None
    return Candidate(members, rule)
