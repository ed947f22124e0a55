"""What the registry holds: one classifier, or several and the rule by which they answer as one."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from pipeline import ensemble
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.evaluation.metrics import THRESHOLD
from pipeline.files import read_json, write_json
from pipeline.models import classifier
from pipeline.models.classifier import Classifier

BAG = "bag"
BATCH = 32  # images that all members see at once
FILES = ["model.safetensors", "model.json"]  # of a member
Tie = Literal["positive", "negative", "mean"]


class Candidate:
    """Classifiers that judge together; a single one is its own majority."""

    def __init__(
        self, members: Mapping[str, Classifier], method: Literal["vote", "mean"], tie: Tie, threshold: float
    ) -> None:
        self.members, self.threshold = members, threshold
        self._method: Literal["vote", "mean"] = method
        self._tie: Tie = tie
        architectures = [network.architecture for network in members.values()]
        ((self.packed_size, self.resize),) = {(one.packed_size, one.resize) for one in architectures}

    def judge(self, pixels: Tensor) -> pd.DataFrame:
        """Judge grey images (N, packed_size, packed_size), uint8.

        Returns:
            A row per image: `probability` of COVID-19 (of several members the mean), and `label`, 0 or 1.
        """
        device = next(iter(self.members.values())).scale.device
        parts = [
            torch.stack([network.probabilities(part.to(device)) for network in self.members.values()], dim=1).cpu()
            for part in pixels.split(BATCH)
        ]
        found = pd.DataFrame(torch.cat(parts).numpy(), columns=list(self.members))
        combined = ensemble.combine(found, self._tie, self.threshold)
        labels = ensemble.labels(combined, self._method, self.threshold)
        return pd.DataFrame({"probability": combined["mean"].astype(float), "label": labels})


def members(config: Config) -> dict[str, dict[str, Path]]:
    """Return, for every candidate by name, its members and their folders: a seed is its own, the bag has several."""
    models = {f"seed-{seed}": Path("models", f"seed-{seed}") for seed in config.seeds}
    seeds = {name: {name: folder} for name, folder in models.items()}
    return {**seeds, BAG: {name: models[name] for name in (f"seed-{seed}" for seed in config.members)}}


def assemble(folder: Path, models: Mapping[str, Path], method: Literal["vote", "mean"], tie: Tie) -> None:
    """Write a folder that `load` takes, from the folders of the members."""
    for name, model in models.items():
        (folder / name).mkdir(parents=True)
        for file in FILES:
            shutil.copyfile(model / file, folder / name / file)
    rule = {"method": method, "tie": tie} if len(models) > 1 else {"method": "mean", "tie": "mean"}
    write_json(folder / "candidate.json", {"members": list(models), "threshold": THRESHOLD, **rule})


def identity(folder: Path) -> str:
    """Return what tells a candidate from any other, 64 hexadecimal digits: a hash of its weights and its rule."""
    facts = read_json(folder / "candidate.json")
    weights = [read_json(folder / name / "model.json")["weights_sha256"] for name in facts.pop("members")]
    return hashlib.sha256(json.dumps([sorted(weights), facts], sort_keys=True).encode()).hexdigest()


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
    return Candidate(members, **facts)
