"""Fingerprints: hashes of everything that the result of a training depends on; runs are found by them."""

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.core.config import BAG, Config, SplitParams, TrainParams
from pipeline.core.errors import UserError
from pipeline.core.files import md5_of_file, read_json, sha256_of_file

# The manifest holds the hash of every image in the pack, and is quicker to read.
HASHED_INSTEAD = {"data/images.npy": "data/manifest.csv"}
TYPE_HINTS = {"annotation", "returns", "type_comment", "type_params"}  # fields of nodes of a syntax tree
NO_EFFECT = {"loader_threads"}  # parameters of training that change no result


def training_fingerprint(config: Config, root: Path = Path()) -> str:
    """Hash what the trainings of all seeds share: parameters, and every file that dvc.yaml names as a dependency.

    Parameters at their defaults are left out, so that a new parameter changes no fingerprint. Python files are hashed
    by what they do, see `code_hash`.

    Args:
        config: its active profile is trained.
        root: of the repository.

    Returns:
        The fingerprint of the parent run, 64 hexadecimal digits.
    """
    deps = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["train"]["deps"]
    paths = {HASHED_INSTEAD.get(dep, dep) for dep in deps}
    return _digest(
        {
            "params": config.active.train.model_dump(exclude_defaults=True, exclude=NO_EFFECT),
            "cross_validate": config.active.split.cross_validate,
            "files": {str(file.relative_to(root)): _file_hash(file) for path in paths for file in _files(root / path)},
        }
    )


def seed_fingerprint(parent_fingerprint: str, seed: int, environment: Mapping[str, Any]) -> str:
    """Return the fingerprint of one seed's run: what tells it from its siblings is its seed and its environment."""
    return _digest({"parent": parent_fingerprint, "seed": seed, "environment": dict(environment)})


def candidate_fingerprints(config: Config) -> dict[str, str]:
    """Return the fingerprints of the runs of all candidates by name; the bag's run is the parent.

    They are those under which the models were trained, on this machine or another. Models of earlier code count as
    up to date if dvc.lock says so, which `dvc commit -f train` achieves.

    Raises:
        UserError: a model is not up to date with parameters, data and code.
    """
    current = training_fingerprint(config)
    committed = cache(lambda: _committed_seeds(config))
    parents, fingerprints = [], {}
    for seed, name in zip(config.seeds, config.model_names, strict=True):
        path = Path("models", name, "model.json")
        description = read_json(path)
        if "parent_fingerprint" not in description:
            raise UserError(f"{path}: written by an earlier release; run: dvc repro -f train")
        expected = seed_fingerprint(current, seed, description["environment"])
        if description["fingerprint"] != expected and seed not in committed():
            raise UserError(f"{path.parent}: trained with other parameters, data or code; run: dvc repro")
        parents.append(description["parent_fingerprint"])
        fingerprints[name] = description["fingerprint"]
    return {BAG: current if current in parents else parents[0], **fingerprints}


def parent_run_name(config: Config, fingerprint: str) -> str:
    return _run_name(config, BAG, fingerprint)


def seed_run_name(config: Config, seed: int, fingerprint: str) -> str:
    return _run_name(config, f"seed-{seed}", fingerprint)


def _run_name(config: Config, candidate: str, fingerprint: str) -> str:
    return f"{candidate} · {config.active.train.backbone.removeprefix('timm/')} · {fingerprint[:4]}"


def code_hash(path: Path) -> str:
    """Hash what a Python file does: comments, docstrings, type hints and formatting do not count."""
    return _digest(_canonical(ast.parse(path.read_bytes())))


def _file_hash(path: Path) -> str:
    return code_hash(path) if path.suffix == ".py" else sha256_of_file(path)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def _canonical(node: Any, *, in_class: bool = False) -> Any:
    """Turn a syntax tree into lists and texts that are the same in every version of Python."""
    if isinstance(node, list):
        return [_canonical(child, in_class=in_class) for child in _effective(node, in_class=in_class)]
    if isinstance(node, ast.AnnAssign) and node.value and not in_class:
        node = ast.Assign([node.target], node.value)
    if isinstance(node, ast.AST):
        is_class = isinstance(node, ast.ClassDef)
        # Newer versions add fields, which are empty where nothing new is used.
        fields = {
            name: _canonical(value, in_class=is_class)
            for name, value in ast.iter_fields(node)
            if name not in TYPE_HINTS and value not in (None, [])
        }
        return [type(node).__name__, fields]
    return repr(node)


def _effective(nodes: list[Any], *, in_class: bool) -> list[Any]:
    """Leave out docstrings, blocks for type checkers, and, outside classes, where they are fields, declarations."""
    nodes = [child for node in nodes for child in (node.orelse if _is_type_checking(node) else [node])]
    if nodes and isinstance(nodes[0], ast.Expr) and _is_text(nodes[0].value):
        nodes = nodes[1:]
    return [node for node in nodes if in_class or not isinstance(node, ast.AnnAssign) or node.value]


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_type_checking(node: Any) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _committed_seeds(config: Config) -> set[int]:
    """Return the seeds whose training dvc.lock holds with the present parameters, files and model."""
    lock, stages = (
        yaml.safe_load(Path(name).read_text(encoding="utf-8"))["stages"] for name in ("dvc.lock", "dvc.yaml")
    )
    dvc_hash, seeds = cache(_dvc_hash), set()
    for seed in config.seeds:
        entry = lock.get(f"train@{seed}")
        if entry is None or {dep["path"] for dep in entry["deps"]} != set(stages["train"]["deps"]):
            continue
        if not _has_params(config, entry["params"]["params.yaml"]):
            continue
        files = [item for item in (*entry["deps"], *entry["outs"]) if item["path"] not in HASHED_INSTEAD]
        if all(dvc_hash(Path(item["path"])) == item["md5"] for item in files):
            seeds.add(seed)
    return seeds


def _has_params(config: Config, params: dict[str, Any]) -> bool:
    """Tell whether parameters in dvc.lock are those of the active profile."""
    try:
        train = TrainParams.model_validate(params[f"{config.profile}.train"])
        split = SplitParams.model_validate(params[f"{config.profile}.split"])
    except (KeyError, ValidationError):  # of another profile, or of an earlier release
        return False
    return train == config.active.train and split == config.active.split


def _dvc_hash(path: Path) -> str:
    """Return the hash that dvc.lock holds for a file or a folder."""
    if path.is_file():
        return md5_of_file(path)
    entries = [{"md5": md5_of_file(file), "relpath": file.relative_to(path).as_posix()} for file in _files(path)]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
