"""A run's identity: a hash of all that its result depends on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.config import Config
from pipeline.core.errors import UserError
from pipeline.core.files import read_json, sha256_of_file

# The manifest holds the hash of every image in the pack, and is quicker to read.
HASH_PROXIES = {"data/images.npy": "data/manifest.csv"}


def training_fingerprint(config: Config, root: Path = Path(), **own: Any) -> str:
    """Hash the parameters of training and every file that dvc.yaml names as its dependency.

    Args:
        config: whose active profile is trained.
        root: of the repository.
        own: what else tells one run from its siblings, such as its seed and the environment it runs in.

    Returns:
        64 hexadecimal digits.
    """
    return _digest(_given(config, root) | own)


def model_fingerprints(config: Config) -> dict[str, str]:
    """Return the fingerprints of the trainings that left the models, on this machine or another, by the model's name.

    Raises:
        UserError: the present parameters, data and code would train other ones.
    """
    given, marks = _given(config, Path()), {}
    for seed, name in zip(config.seeds, config.model_names, strict=True):
        folder = Path("models", name)
        facts = read_json(folder / "model.json")
        marks[name] = _digest(given | {"seed": seed, "environment": facts["environment"]})
        if facts["fingerprint"] != marks[name]:
            raise UserError(f"{folder}: not what the present parameters, data and code would train; run: dvc repro")
    return marks


def parent_run_name(config: Config, mark: str) -> str:
    return f"{config.active.train.backbone.removeprefix('timm/')} · {mark[:4]}"


def seed_run_name(config: Config, seed: int, mark: str) -> str:
    return f"seed-{seed} · {parent_run_name(config, mark)}"


def _given(config: Config, root: Path) -> dict[str, Any]:
    """Gather what all seeds share; hashing a large backbone's weights takes a moment."""
    deps = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["train"]["deps"]
    files = {HASH_PROXIES.get(dep, dep) for dep in deps}
    return {
        "params": config.active.train.model_dump(),
        "cross_validate": config.active.split.cross_validate,
        "files": {str(path.relative_to(root)): sha256_of_file(path) for name in files for path in _files(root / name)},
    }


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
