"""The registered model of a profile: its versions, its champions from the first to the present one, and its aliases.

MLflow keeps no history of an alias. So each change of champion is a tag of the registered model, and the alias follows
the last of them.
"""

import base64
import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import mlflow
import numpy as np
import torch
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from mlflow.types.schema import AnyType
from PIL import Image

import pipeline
from pipeline.core.errors import UserError, first_line
from pipeline.inference import candidate
from pipeline.tracking.store import Store

CONTENT_HASH = "identity"
CHAMPION, CHALLENGER = "champion", "challenger"
CHAMPION_TAG = "champion."  # the tags of the registered model that hold its champions, champion.0001.… and so on
ARTIFACT = "candidate"  # of a version's artifacts, as it was called where it was assembled
REQUIREMENTS = [
    "mlflow", "numpy", "pandas", "pillow", "pydicom", "safetensors", "scikit-learn", "simplejpeg", "timm", "torch",
    "torchvision",
]  # fmt: skip
MAX_DESCRIPTION = 5000  # letters of a description in MLflow's database
DESCRIPTION = """Tells COVID-19 positive chest radiographs from negative ones. For research and teaching, no diagnosis.

`champion` is the version to use, `challenger` the best one of the last run. `cxr history` shows who was champion, from
the tags `champion.0001.…` and so on; `cxr rollback` goes back.
"""
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(AnyType(), "image")]),
    outputs=Schema([ColSpec("double", "probability"), ColSpec("long", "label"), ColSpec("string", "version")]),
)


@dataclass(frozen=True)
class ChampionRecord:
    """One version's time as champion, from `since` (ISO 8601, UTC) until the next reign begins.

    Of a reign that a person decided, `override_version` is the newest version that there was to decide over; else it is 0.
    """

    version: str
    since: str
    why: str
    rollback: bool = False
    override_version: int = 0


def register_candidate(
    store: Store, name: str, run_id: str, folder: Path, example: np.ndarray, tags: Mapping[str, str]
) -> ModelVersion:
    """Return the version of the registered model `name` that holds this candidate; make it where it is missing.

    Args:
        store: where the run is.
        name: of the registered model.
        run_id: of the run that the model belongs to.
        folder: as `candidate.assemble` writes it.
        example: a radiograph for the input example, uint8 (S, S).
        tags: of a new version.
    """
    mark = candidate.content_hash(folder)
    with store.lock:
        try:
            store.client.get_registered_model(name)
        except MlflowException as error:
            _expect_missing(error)
            store.client.create_registered_model(name, description=DESCRIPTION)
        known = store.client.search_model_versions(f"name = '{name}' AND tags.{CONTENT_HASH} = '{mark}'")
        if known:
            return known[0]
        model_id = _log_model(store, run_id, folder, example)
        tags = {CONTENT_HASH: mark, **tags}
        return store.client.create_model_version(name, f"models:/{model_id}", run_id, tags, model_id=model_id)


def set_model_description(store: Store, name: str, card: str) -> None:
    """Make the model card part of the description of the registered model."""
    text = f"{DESCRIPTION}\n{card}"[:MAX_DESCRIPTION]
    if store.client.get_registered_model(name).description != text:
        store.client.update_registered_model(name, text)


def get_version(store: Store, name: str, wanted: str) -> ModelVersion:
    """Return the version with this alias or number.

    Raises:
        UserError: there is none.
    """
    try:
        if wanted.isdecimal():
            return store.client.get_model_version(name, wanted)
        return store.client.get_model_version_by_alias(name, wanted)
    except MlflowException as error:
        _expect_missing(error)
        known = [str(version.version) for version in list_versions(store, name)]
        there = f"versions {', '.join(known)}" if known else "nothing is registered yet"
        raise UserError(
            f"{name} has no version or alias {wanted!r} ({there}); choose another, or run: dvc repro promote"
        ) from None


def list_versions(store: Store, name: str) -> list[ModelVersion]:
    """Return all versions, the first one first."""
    return sorted(store.client.search_model_versions(f"name = '{name}'"), key=lambda known: int(known.version))


def get_champion(store: Store, name: str) -> ModelVersion | None:
    aliases = store.client.get_registered_model(name).aliases
    return store.client.get_model_version(name, aliases[CHAMPION]) if CHAMPION in aliases else None


def champion_history(store: Store, name: str) -> list[ChampionRecord]:
    """Return the reigns so far, the first one first."""
    try:
        tags = store.client.get_registered_model(name).tags
    except MlflowException as error:
        _expect_missing(error)
        return []
    return [ChampionRecord(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(CHAMPION_TAG)]


def set_champion(
    store: Store, name: str, chosen: ModelVersion, why: str, *, by_hand: bool = False, rollback: bool = False
) -> None:
    """Make a version champion, if its files are what they were when it was registered.

    Args:
        store: where it is.
        name: of the registered model.
        chosen: the version.
        why: as `cxr history` tells it.
        by_hand: whether a person decided.
        rollback: whether that was to go back to an earlier champion.

    Raises:
        UserError: they are not, and everything stays as it was.
    """
    load_version(chosen)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    with store.lock:
        over = max(int(known.version) for known in list_versions(store, name)) if by_hand else 0
        reign = json.dumps(asdict(ChampionRecord(str(chosen.version), now, why, rollback, over)))
        number = len(champion_history(store, name)) + 1
        # Another machine may take this number at the same moment; what follows it keeps both.
        store.client.set_registered_model_tag(name, f"{CHAMPION_TAG}{number:04}.{uuid4().hex[:8]}", reign)
        reconcile_alias(store, name)


def reconcile_alias(store: Store, name: str) -> None:
    """Let the alias follow the history, until it does: another machine may be crowning at this moment."""
    for pause in (0.1, 0.2, 0.4, 0.8, None):
        last = _last(store, name)
        try:
            if last:
                store.client.set_registered_model_alias(name, CHAMPION, last.version)
            if _last(store, name) == last:
                return
        except MlflowException:
            if pause is None:
                raise
        time.sleep(pause or 0)


def _last(store: Store, name: str) -> ChampionRecord | None:
    """Return the last reign whose version was not deleted."""
    there = _there(store, name)
    return next((reign for reign in reversed(champion_history(store, name)) if reign.version in there), None)


def _there(store: Store, name: str) -> set[str]:
    return {str(version.version) for version in list_versions(store, name)}


def rollback_target(store: Store, name: str) -> ChampionRecord:
    """Return the reign that a rollback goes back to; a second one goes back further.

    Raises:
        UserError: the first champion is still in place, or there is none.
    """
    standing: list[ChampionRecord] = []
    for reign in champion_history(store, name):
        if reign.rollback:
            standing.pop()
        else:
            standing.append(reign)
    there = _there(store, name)
    standing = [reign for reign in standing if reign.version in there]
    if len(standing) < 2:
        raise UserError("there is no champion to go back to; see: cxr history")
    return standing[-2]


def get_override_version(store: Store, name: str) -> int:
    """Return the newest version that was there when a person chose the present champion; 0 where nobody did."""
    last = _last(store, name)
    return last.override_version if last else 0


def load_version(known: ModelVersion) -> candidate.Candidate:
    """Load a version, if its files are what was recorded when it was registered.

    Raises:
        UserError: they are missing, or are not those.
    """
    with download_version(known) as folder:
        try:
            return candidate.load_candidate(
                folder, torch.device("cpu")
            )  # which compares the weights with their description
        except Exception as error:
            raise _damaged(known, first_line(error)) from error


@contextmanager
def download_version(known: ModelVersion) -> Iterator[Path]:
    """Bring a version's candidate here while the block runs.

    Raises:
        UserError: its files are gone, were not logged by this pipeline, or are not those that were registered.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = mlflow.artifacts.download_artifacts(f"models:/{known.name}/{known.version}", dst_path=scratch)
        except (MlflowException, OSError) as error:
            raise _damaged(known, f"its files are missing: {first_line(error)}") from None
        folder = Path(path, "artifacts", ARTIFACT)
        if not (folder / "candidate.json").is_file():
            raise UserError(f"{known.name} version {known.version} is not a model of this pipeline; choose another")
        try:
            mark = candidate.content_hash(folder)
        except (OSError, ValueError, KeyError) as error:
            raise _damaged(known, first_line(error)) from None
        if mark != known.tags.get(CONTENT_HASH):
            raise _damaged(known, "it does not hold the model that was registered")
        yield folder


def _damaged(known: ModelVersion, reason: str) -> UserError:
    return UserError(
        f"{known.name} version {known.version} is damaged: {reason}; use another one, or delete it in MLflow and run: "
        "cxr sync"
    )


def _expect_missing(error: MlflowException) -> None:
    """Raise what does not say that something is not there: that MLflow failed must not look like that."""
    if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
        raise error


def _log_model(store: Store, run_id: str, folder: Path, example: np.ndarray) -> str:
    """Log the model to its run, and return its id."""
    stream = io.BytesIO()
    Image.fromarray(example).save(stream, "PNG")
    run = store.client.get_run(run_id)
    with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        # MLflow advises type hints, which cannot say "bytes or path", and warns that integers cannot be missing.
        warnings.simplefilter("ignore", UserWarning)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(candidate.__file__).with_name("pyfunc_model.py")),
            artifacts={ARTIFACT: str(folder)},
            code_paths=[str(Path(pipeline.__file__).parent)],
            signature=SIGNATURE,
            input_example={"image": [base64.b64encode(stream.getvalue()).decode()]},
            pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
        )
    store.client.set_terminated(run_id, run.info.status, run.info.end_time)  # the run did not take longer for that
    return str(info.model_id)
