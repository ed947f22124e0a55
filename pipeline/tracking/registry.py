"""The registered model of a profile: the best seed becomes challenger, and champion where it beats the champion."""

import base64
import io
import logging
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from mlflow.types.schema import AnyType
from PIL import Image

import pipeline
from pipeline.errors import UserError
from pipeline.evaluation.metrics import Scores
from pipeline.files import read_json
from pipeline.tracking.runs import FINGERPRINT, SeedRun
from pipeline.tracking.store import Store

WEIGHTS = "weights_sha256"
CHAMPION, CHALLENGER = "champion", "challenger"
REQUIREMENTS = ["mlflow", "numpy", "pandas", "pillow", "safetensors", "scikit-learn", "timm", "torch", "torchvision"]
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(AnyType(), "image")]),
    outputs=Schema([ColSpec("double", "probability"), ColSpec("long", "label")]),
)


def register(store: Store, name: str, run: SeedRun, model: Path, example: np.ndarray, scores: Scores) -> ModelVersion:
    """Return the version of the registered model `name` that holds this run's model; make it where it is missing.

    Args:
        store: where the run is.
        name: of the registered model.
        run: whose model it is.
        model: the folder with model.safetensors and model.json.
        example: a radiograph for the input example, uint8 (S, S).
        scores: on the validation set; kept as tags.
    """
    description = read_json(model / "model.json")
    tags = {key: description[key] for key in (FINGERPRINT, WEIGHTS)}
    with store.lock:
        try:
            store.client.get_registered_model(name)
        except MlflowException:
            store.client.create_registered_model(name)
        known = store.client.search_model_versions(f"name = '{name}' AND tags.{WEIGHTS} = '{tags[WEIGHTS]}'")
        if known:
            return known[0]
        tags |= {f"validation_{key}": str(value) for key, value in scores.items()}
        source = _log_model(run.run_id, model, example)
        return store.client.create_model_version(name, source, run.run_id, tags)


def promote(store: Store, name: str, candidate: ModelVersion) -> dict[str, Any]:
    """Give the aliases: the candidate is challenger, and champion if there is none or its validation F1 is higher.

    Returns:
        How things stand afterwards: who is challenger and champion, with their F1, and why.
    """
    with store.lock:
        aliases: Mapping[str, str] = store.client.get_registered_model(name).aliases
        store.client.set_registered_model_alias(name, CHALLENGER, candidate.version)
        champion = store.client.get_model_version(name, aliases[CHAMPION]) if CHAMPION in aliases else None
        figure = f"validation F1 {_f1(candidate):.4f}"
        if champion and champion.version == candidate.version:
            return _standing(candidate, candidate)
        if champion and _f1(champion) >= _f1(candidate):
            why = f"{figure} is not above {_f1(champion):.4f} of version {champion.version}, the champion"
            store.client.set_model_version_tag(name, candidate.version, "decision", f"not promoted: {why}")
            return _standing(candidate, champion)
        why = f"{figure}; there was no champion"
        if champion:
            why = f"{figure} is above {_f1(champion):.4f} of version {champion.version}, the champion before"
        store.client.set_model_version_tag(name, candidate.version, "decision", f"promoted: {why}")
        store.client.set_registered_model_alias(name, CHAMPION, candidate.version)
        return _standing(candidate, candidate)


def _standing(challenger: ModelVersion, champion: ModelVersion) -> dict[str, Any]:
    def entry(of: ModelVersion) -> dict[str, Any]:
        return {WEIGHTS: of.tags[WEIGHTS], "validation_f1": _f1(of)}

    return {
        "promoted": challenger.version == champion.version,
        CHALLENGER: entry(challenger),
        CHAMPION: entry(champion),
    }


def _f1(of: ModelVersion) -> float:
    try:
        return float(of.tags["validation_f1"])
    except KeyError:
        raise UserError(
            f"{of.name} version {of.version} is champion but was not registered by this pipeline; "
            "take the alias away: MlflowClient().delete_registered_model_alias(name, 'champion')"
        ) from None


def _log_model(run_id: str, model: Path, example: np.ndarray) -> str:
    """Log the model to its run, and return its URI."""
    stream = io.BytesIO()
    Image.fromarray(example).save(stream, "PNG")
    with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        # MLflow advises type hints, which cannot say "bytes or path", and warns that integers cannot be missing.
        warnings.simplefilter("ignore", UserWarning)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("served.py")),
            artifacts={"weights": str(model / "model.safetensors"), "description": str(model / "model.json")},
            code_paths=[str(Path(pipeline.__file__).parent)],
            signature=SIGNATURE,
            input_example={"image": [base64.b64encode(stream.getvalue()).decode()]},
            pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
        )
    return f"models:/{info.model_id}"
