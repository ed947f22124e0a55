"""Fingerprints: hashes of all that the result of a training depends on, by which runs are found."""

import ast
import hashlib
import json
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


def training_fingerprint(config: Config, root: Path = Path(), **run: Any) -> str:
    """Hash the parameters of training and every file that dvc.yaml names as its dependency.

    Parameters at their defaults do not count, so that a new parameter changes no fingerprint. Of a Python file counts
    what it does: see `code_hash`.

    Args:
        config: its active profile is trained.
        root: of the repository.
        run: what tells one run from its siblings: its seed and the environment it runs in.

    Returns:
        64 hexadecimal digits; without `run`, the fingerprint of the parent run.
    """
    return _digest(_shared_inputs(config, root) | run)


def candidate_fingerprints(config: Config) -> dict[str, str]:
    """Return the fingerprints of the runs of all candidates by name; the bag's run is the parent.

    They are those under which the models were trained, on this machine or another. Models of earlier code count as
    up to date if dvc.lock says so, which `dvc commit -f train` achieves.

    Raises:
        UserError: a model is not up to date with parameters, data and code.
    """
    inputs = _shared_inputs(config, Path())
    parents, fingerprints = [], {}
    for seed, name in zip(config.seeds, config.model_names, strict=True):
        folder = Path("models", name)
        description = read_json(folder / "model.json")
        expected = _digest(inputs | {"seed": seed, "environment": description["environment"]})
        if description["fingerprint"] != expected and not _is_committed(config, seed):
            raise UserError(f"{folder}: trained with other parameters, data or code; run: dvc repro")
        parents.append(description["parent_fingerprint"])
        fingerprints[name] = description["fingerprint"]
    current = _digest(inputs)
    return {BAG: current if current in parents else parents[0], **fingerprints}


def parent_run_name(config: Config, fingerprint: str) -> str:
    return f"{config.active.train.backbone.removeprefix('timm/')} · {fingerprint[:4]}"


def seed_run_name(config: Config, seed: int, fingerprint: str) -> str:
    return f"seed-{seed} · {parent_run_name(config, fingerprint)}"


def code_hash(path: Path) -> str:
    """Hash what a Python file does: comments, docstrings, type hints and formatting do not count."""
    return _digest(_canonical(ast.parse(path.read_bytes())))


def _shared_inputs(config: Config, root: Path) -> dict[str, Any]:
    """Return what the trainings of all seeds share."""
    deps = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["train"]["deps"]
    paths = {HASHED_INSTEAD.get(dep, dep) for dep in deps}
    return {
        "params": config.active.train.model_dump(exclude_defaults=True),
        "cross_validate": config.active.split.cross_validate,
        "files": {str(file.relative_to(root)): _file_hash(file) for path in paths for file in _files(root / path)},
    }


def _file_hash(path: Path) -> str:
    return code_hash(path) if path.suffix == ".py" else sha256_of_file(path)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def _canonical(node: Any) -> Any:
    """Turn a syntax tree into lists and texts that are the same in every version of Python."""
    if isinstance(node, list):
        if node and isinstance(node[0], ast.Expr) and _is_text(node[0].value):  # a docstring
            node = node[1:]
        return [_canonical(child) for child in node if not _is_type_checking(child)]
    if isinstance(node, ast.AST):
        fields = {name: value for name, value in ast.iter_fields(node) if name not in TYPE_HINTS}
        # Newer versions add fields, which are empty where nothing new is used.
        return [
            type(node).__name__,
            {name: _canonical(value) for name, value in fields.items() if value not in (None, [])},
        ]
    return repr(node)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_type_checking(node: Any) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_committed(config: Config, seed: int) -> bool:
    """Tell whether dvc.lock holds this training with the present parameters, files and model."""
    lock, stages = (
        yaml.safe_load(Path(name).read_text(encoding="utf-8"))["stages"] for name in ("dvc.lock", "dvc.yaml")
    )
    entry = lock.get(f"train@{seed}")
    if entry is None or {dep["path"] for dep in entry["deps"]} != set(stages["train"]["deps"]):
        return False
    params = entry["params"]["params.yaml"]
    try:
        same_params = (
            TrainParams.model_validate(params[f"{config.profile}.train"]) == config.active.train
            and SplitParams.model_validate(params[f"{config.profile}.split"]) == config.active.split
        )
    except (KeyError, ValidationError):  # of another profile, or of an earlier release
        return False
    files = [item for item in (*entry["deps"], *entry["outs"]) if item["path"] not in HASHED_INSTEAD]
    return same_params and all(_dvc_hash(Path(item["path"])) == item["md5"] for item in files)


def _dvc_hash(path: Path) -> str:
    """Return the hash that dvc.lock holds for a file or a folder."""
    if path.is_file():
        return md5_of_file(path)
    entries = [{"md5": md5_of_file(file), "relpath": file.relative_to(path).as_posix()} for file in _files(path)]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
