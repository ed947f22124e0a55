"""What the registry holds: one classifier, or several and the rule by which they answer as one."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pipeline import ensemble
from pipeline.config import Config
from pipeline.ensemble import Rule
from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from pipeline.models import classifier
from pipeline.models.classifier import Architecture, Classifier

BAG = "bag"
BATCH = 32  # images that all members see at once
FILES = ["model.safetensors", "model.json"]  # of a member


class Candidate:
    """Classifiers that judge together, by a rule."""

    def __init__(self, members: Mapping[str, Classifier], rule: Rule) -> None:
        self.members, self.rule = members, rule
        architectures = [network.architecture for network in members.values()]
        ((self.packed_size, self.resize),) = {(one.packed_size, one.resize) for one in architectures}

    def judge(self, pixels: Tensor) -> pd.DataFrame:
        """Judge grey images (N, packed_size, packed_size), uint8.

        Returns:
            A row per image: `probability` of COVID-19 (of several members the combined one), and `label`, 0 or 1.
        """
        device = next(iter(self.members.values())).scale.device
        parts = [
            torch.stack([network.probabilities(part.to(device)) for network in self.members.values()], dim=1).cpu()
            for part in pixels.split(BATCH)
        ]
        found = pd.DataFrame(torch.cat(parts).numpy(), columns=list(self.members))
        return ensemble.judge(found, self.rule)


def members(config: Config) -> dict[str, dict[str, Path]]:
    """Return, for every candidate by name, its members and their folders: a seed is its own, the bag has several."""
    models = {name: Path("models", name) for name in config.models}
    seeds = {name: {name: folder} for name, folder in models.items()}
    return {**seeds, BAG: {name: models[name] for name in config.bagged}}


def assemble(folder: Path, models: Mapping[str, Path], rule: Rule) -> None:
    """Write a folder that `load` takes, from the folders of the members, in the order of the rule."""
    for name, model in models.items():
        (folder / name).mkdir(parents=True)
        for file in FILES:
            shutil.copyfile(model / file, folder / name / file)
    write_json(folder / "candidate.json", {"members": list(models), **asdict(rule)})


def identity(folder: Path) -> str:
    """Return what tells a candidate from any other, 64 hexadecimal digits: a hash of its models and its rule."""
    facts = read_json(folder / "candidate.json")
    descriptions = [read_json(folder / name / "model.json") for name in facts.pop("members")]
    models = [{key: one[key] for key in (*Architecture.__dataclass_fields__, "weights_sha256")} for one in descriptions]
    models.sort(key=lambda model: str(model["weights_sha256"]))
    return hashlib.sha256(json.dumps([models, facts], sort_keys=True).encode()).hexdigest()


def load(folder: Path, device: torch.device) -> Candidate:
    """Load a candidate, ready to judge; nothing in the files is executed.

    Raises:
        UserError: it is not one that this pipeline made, a file is missing, or weights are not those described.
    """
    try:
        facts: dict[str, Any] = read_json(folder / "candidate.json")
        members = {
            name: classifier.load(folder / name / FILES[0], folder / name / FILES[1], device)
            for name in facts.pop("members")
        }
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not found; this is no whole model of this pipeline") from None
    return Candidate(members, Rule(**facts))
