"""The registered model of a profile: its versions, its aliases, and the history of its champions.

MLflow keeps no history of an alias. Every change of champion is therefore a tag of the registered model, and the alias
`champion` is set to the last entry of that history.
"""

import base64
import io
import json
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.entities import LoggedModel, Metric, Run, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from mlflow.types.schema import AnyType
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS
from PIL import Image
from requests import RequestException

import pipeline
from pipeline.core.config import BAG, FindingParams
from pipeline.core.errors import UserError, first_line
from pipeline.core.files import read_json
from pipeline.core.markdown import escape_markdown
from pipeline.core.memory import is_out_of_memory
from pipeline.inference import candidate
from pipeline.tracking import version_card
from pipeline.tracking.runs import next_timestamp
from pipeline.tracking.store import (
    CONFLICT_DELAYS,
    NOT_FOUND,
    Store,
    ignore_existing,
    retry_conflicts,
    software_version_tag,
)
from pipeline.tracking.version_card import RULE

log = logging.getLogger(__name__)

CONTENT_HASH_TAG = "content_hash"
CHAMPION, CHALLENGER = "champion", "challenger"
GATE = "gate"  # decides, unless a person does
COMPARISON_TAG = "comparison."  # prefix of tags on the registered model: comparison.<split>.<challenger>.<champion>
CHAMPION_TAG = "champion."  # prefix of the history's tags on the registered model: champion.0001.<random>, ...
RUN_COLOR_TAG = "mlflow.runColor"  # of a run's marks in MLflow's charts
CHAMPION_COLOR, BAG_COLOR, SEED_COLOR = "#d4a017", "#222222", "#6b9bd1"
F1_TAG = "f1"  # of a version: F1 with its 95 % interval
DECISION_TAG = "decision."  # prefix of the tags of a version with the decisions about it: decision.0001.<random>, ...
VALIDATION = "validation"  # MLflow's name of the data set that metrics of models are on
LABELED_IMAGES = "labeled_images.csv"  # in that folder, see `ValidationPredictions.labeled_images`
ARTIFACT = "candidate"  # name of the candidate's folder among the model's artifacts
OLD_CONTENT_HASH_TAG = "identity"  # release 0.1
OLD_RECORD_FIELDS = {"why": "reason", "over": "overruled_up_to"}  # release 0.1
# Packages that no prediction needs.
NOT_SERVED = ["kaggle", "report", "serving", "sources", "tracking", "training", "__pycache__"]
REQUIREMENTS = [
    "imagecodecs", "mlflow", "numpy", "pandas", "pillow", "pydicom", "safetensors", "scikit-learn", "simplejpeg",
    "timm", "torch", "torchvision",
]  # fmt: skip
INTRODUCTION = """Classifies chest radiographs as {positive} or {negative}. For research and teaching only.

The alias `champion` is the version to use, `challenger` the best candidate of the last run. `cxr history` shows all
champions and why each was promoted (stored in the tags `champion.0001.…`); `cxr rollback` restores the previous one."""
MAX_INTRODUCTION = 700  # characters; an earlier release wrote more there
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(AnyType(), "image")]),
    outputs=Schema(
        [
            ColSpec("double", "probability"),
            ColSpec("long", "label"),
            ColSpec("double", "prevalence", required=False),  # for which the probability is calibrated, if it is
            ColSpec("string", "version"),
        ]
    ),
)


@dataclass(frozen=True)
class ChampionRecord:
    """An entry of the champion history: `version` is champion from `since` (ISO 8601, UTC) until the next entry.

    `overruled_up_to` is the newest version that existed when a person chose this champion, and 0 if the gate chose it.
    `candidate`, `f1` with its 95 % interval, and `decided_by`, `gate` or a person, are None in records of release 0.1.
    """

    version: str
    since: str
    reason: str
    rollback: bool = False
    overruled_up_to: int = 0
    candidate: str | None = None
    f1: str | None = None
    decided_by: str | None = None


class MissingFilesError(UserError):
    """The store has no file of a version, as where a disk is not mounted."""


def register_candidate(
    store: Store, name: str, run_id: str, folder: Path, example: np.ndarray, tags: Mapping[str, str]
) -> ModelVersion:
    """Return the version of a registered model that holds this candidate; create the version if it does not exist.

    Args:
        store: the store that has the run.
        name: the registered model.
        run_id: the run that the candidate belongs to.
        folder: the candidate, as written by `candidate.assemble_candidate`.
        example: a radiograph for the input example, uint8 (S, S).
        tags: tags of a new version; `candidate` is the name of its logged model too.
    """
    content_hash = candidate.content_hash(folder)
    with store.lock:
        try:
            store.client.get_registered_model(name)
        except MlflowException as error:
            _raise_unless_not_found(error)
            with ignore_existing():
                store.client.create_registered_model(name)
        existing = _find_version(store, name, content_hash)
        if existing:
            return existing
        model_id = _log_model(store, run_id, folder, example, tags["candidate"])
        tags = {CONTENT_HASH_TAG: content_hash, **software_version_tag(), **tags}
        created = store.client.create_model_version(name, f"models:/{model_id}", run_id, tags, model_id=model_id)
        version = _find_version(store, name, content_hash) or created  # the lock does not hold on other machines
        if version.version != created.version:
            with suppress(MlflowException):  # not every user of a server may delete
                store.client.delete_model_version(name, str(created.version))
                store.client.delete_logged_model(model_id)
        return version


def _find_version(store: Store, name: str, content_hash: str) -> ModelVersion | None:
    """Return the oldest version with this content."""
    found = store.client.search_model_versions(f"name = '{name}' AND tags.{CONTENT_HASH_TAG} = '{content_hash}'")
    return min(found, key=lambda version: int(version.version), default=None)


def complete_logged_models(
    store: Store, name: str, metrics: Mapping[str, Mapping[str, Any]], dataset_digest: str
) -> None:
    """Tie the logged models of all versions to their versions, and log metrics to models and runs that lack them.

    A run with several versions, such as bags of the same seeds, gets the tags `candidate` and `version` of the one
    whose metrics it has.

    Args:
        store: the store of the registered model.
        name: the registered model.
        metrics: by number of the version, its metrics on the validation set by name; undefined ones are None.
        dataset_digest: tells this validation set from others, at most 36 characters.
    """
    found = mlflow.search_logged_models(experiment_ids=[store.experiment_id], output_format="list")
    models = {model.model_id: model for model in found}
    for version in list_versions(store, name):
        number, run_id, model = str(version.version), str(version.run_id), models.get(logged_model_id(version))
        if model is None:  # deleted, or of another experiment
            continue
        _link_model(store, version, model)
        if number not in metrics:
            continue
        run = store.client.get_run(run_id).data
        tags = {"candidate": version.tags["candidate"], "version": number}
        changed_tags = [RunTag(key, value) for key, value in tags.items() if run.tags.get(key) != value]
        logged = sorted(model.metrics or [], key=lambda metric: metric.timestamp)
        of_model = {metric.key: metric.value for metric in logged if metric.dataset_digest == dataset_digest}
        changed = {
            key: value
            for key, value in metrics[number].items()
            if value is not None and not value == of_model.get(key) == run.metrics.get(key)
        }
        if changed or changed_tags:  # MLflow logs a model's metrics to its run too
            time_ms, of = round(next_timestamp(store.client, run_id) * 1000), (VALIDATION, dataset_digest)
            batch = [Metric(key, value, time_ms, 0, model.model_id, *of) for key, value in changed.items()]
            store.client.log_batch(run_id, metrics=batch, tags=changed_tags)


def logged_model_id(version: ModelVersion) -> str:
    """Return the id of a version's logged model; the field `model_id` is empty in a database without a server."""
    return str(version.source).removeprefix("models:/")


def _link_model(store: Store, version: ModelVersion, model: LoggedModel) -> None:
    """Name the version in the model's tag by which MLflow's pages find it, as `mlflow.register_model` does."""
    known = json.loads(model.tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    number = str(version.version)
    if not any((one["name"], str(one["version"])) == (version.name, number) for one in known):
        value = json.dumps([*known, {"name": version.name, "version": int(number)}])
        store.client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: value})


@retry_conflicts
def mark_champion(store: Store, name: str) -> None:
    """Say on MLflow's pages which version is champion: on those of runs, of versions and of the registered model.

    Runs of versions get the tag `mlflow.runColor`, and the champion's run `champion`, with its number if the run has
    the metrics of another version. Of machines that promote at the same time, the one that writes last has read the
    last entry of the history.
    """
    while True:
        history, last = champion_history(store, name), _last_record(store, name)
        champion, versions = last.version if last else None, list_versions(store, name)
        champion_runs = [version.run_id for version in versions if str(version.version) == champion]
        for run in store.client.search_runs([store.experiment_id], max_results=50_000):
            shown = run.data.tags.get("version")
            if run.info.run_id in champion_runs:
                _mark_run(store, run, CHAMPION if shown == champion else f"version {champion}")
            elif shown:
                _mark_run(store, run, "")
        model = store.client.get_registered_model(name)
        description = (model.description or "").partition(RULE)[0][:MAX_INTRODUCTION]
        for version in versions:
            if "candidate" not in version.tags:
                continue
            number = str(version.version)
            state = version_card.describe_state(
                version,
                history,
                decisions_about(version),
                is_champion=number == champion,
                is_challenger=number == str(model.aliases.get(CHALLENGER)),
            )
            _, rule, rest = (version.description or "").partition(RULE)
            card = f"{state}{rule}{rest}"
            _describe_version(store, version, card)
            if number == champion:
                description += f"{RULE}{card}"
        _describe_model(store, name, description)
        if champion_history(store, name) == history:
            return


def _mark_run(store: Store, run: Run, champion: str) -> None:
    color = BAG_COLOR if run.data.tags.get("candidate") == BAG else SEED_COLOR
    tags = {RUN_COLOR_TAG: CHAMPION_COLOR, CHAMPION: champion} if champion else {RUN_COLOR_TAG: color}
    changed = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
    if changed:
        store.client.log_batch(run.info.run_id, tags=changed)
    if CHAMPION in run.data.tags and not champion:
        try:
            store.client.delete_tag(run.info.run_id, CHAMPION)
        except MlflowException as error:  # another machine deleted it
            _raise_unless_not_found(error)


def set_introduction(store: Store, name: str, finding: FindingParams) -> None:
    """Describe the registered model by what it classifies; `mark_champion` adds the card of the champion."""
    negative, positive = map(escape_markdown, finding.class_names)
    _, rule, card = (store.client.get_registered_model(name).description or "").partition(RULE)
    _describe_model(store, name, f"{INTRODUCTION.format(negative=negative, positive=positive)}{rule}{card}")


def set_card(store: Store, version: ModelVersion, card: str, f1: str) -> None:
    """Set what `version_card` says of a candidate, its description and its F1, which `cxr history` shows."""
    state, rule, _ = (version.description or "").partition(RULE)
    _describe_version(store, version, f"{state if rule else ''}{RULE}{card}")
    if version.tags.get(F1_TAG) != f1:
        store.client.set_model_version_tag(version.name, version.version, F1_TAG, f1)


def _describe_version(store: Store, version: ModelVersion, description: str) -> None:
    if version.description != description:
        store.client.update_model_version(version.name, version.version, description)


def _describe_model(store: Store, name: str, description: str) -> None:
    if store.client.get_registered_model(name).description != description:
        store.client.update_registered_model(name, description)


def get_version(store: Store, name: str, alias_or_number: str) -> ModelVersion:
    """Return the version with this alias or number.

    Raises:
        UserError: no such version exists.
    """
    try:
        # MLflow's databases hold no larger number.
        if alias_or_number.isascii() and alias_or_number.isdecimal() and len(alias_or_number) < 10:
            return store.client.get_model_version(name, alias_or_number)
        return store.client.get_model_version_by_alias(name, alias_or_number)
    except MlflowException as error:
        _raise_unless_not_found(error)
        numbers = [str(version.version) for version in list_versions(store, name)]
        available = f"versions {', '.join(numbers)}" if numbers else "nothing is registered yet"
        raise UserError(
            f"{name} has no version or alias {alias_or_number!r} ({available}); choose another, or run: "
            "dvc repro promote"
        ) from None


def list_versions(store: Store, name: str) -> list[ModelVersion]:
    """Return all versions, oldest first."""
    return sorted(store.client.search_model_versions(f"name = '{name}'"), key=lambda version: int(version.version))


def get_champion(store: Store, name: str) -> ModelVersion | None:
    try:
        return store.client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        _raise_unless_not_found(error)
        return None


def champion_history(store: Store, name: str) -> list[ChampionRecord]:
    """Return all champions, oldest first.

    Raises:
        UserError: a tag of the history cannot be read.
    """
    try:
        tags = store.client.get_registered_model(name).tags
    except MlflowException as error:
        _raise_unless_not_found(error)
        return []
    return [_parse_record(name, key, tags[key]) for key in sorted(tags) if key.startswith(CHAMPION_TAG)]


def _parse_record(name: str, tag: str, value: str) -> ChampionRecord:
    try:
        fields = {OLD_RECORD_FIELDS.get(key, key): field for key, field in json.loads(value).items()}
        return ChampionRecord(**{key: fields[key] for key in fields if key in ChampionRecord.__dataclass_fields__})
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{name}: tag {tag} of the registered model cannot be read; delete it in MLflow") from None


def set_champion(
    store: Store, name: str, version: ModelVersion, reason: str, *, person: str | None = None, rollback: bool = False
) -> None:
    """Make a version champion; whoever calls this has checked its files with `load_version`.

    Args:
        store: the store of the registered model.
        name: the registered model.
        version: the new champion.
        reason: why, shown by `cxr history`.
        person: who chose it, if it was not the gate.
        rollback: whether this restores the previous champion.
    """
    with store.lock:
        newest = max(int(other.version) for other in list_versions(store, name)) if person else 0
        known = version.tags.get("candidate"), version.tags.get(F1_TAG), person or GATE
        record = ChampionRecord(str(version.version), _now(), reason, rollback, newest, *known)
        key = _next_key(CHAMPION_TAG, store.client.get_registered_model(name).tags)
        store.client.set_registered_model_tag(name, key, json.dumps(asdict(record), ensure_ascii=False))
        _set_alias(store, name)


def record_decision(store: Store, version: ModelVersion, decision: Mapping[str, Any]) -> None:
    """Append a decision about a version to its tags, with the present time, unless it repeats that it stays challenger.

    Args:
        store: the store of the version.
        version: as it is in the store.
        decision: `promoted`, `reason` and further fields.
    """
    decisions = decisions_about(version)
    if not decision["promoted"] and decisions and {**decisions[-1], "time": None} == {**decision, "time": None}:
        return
    value = json.dumps({"time": _now(), **decision}, ensure_ascii=False)
    store.client.set_model_version_tag(version.name, version.version, _next_key(DECISION_TAG, version.tags), value)


def decisions_about(version: ModelVersion) -> list[dict[str, Any]]:
    """Return the decisions about a version, oldest first; release 0.1 kept only the last one, in other tags."""
    return [json.loads(version.tags[key]) for key in sorted(version.tags) if key.startswith(DECISION_TAG)]


def _next_key(prefix: str, tags: Iterable[str]) -> str:
    last = max((int(key.split(".")[1]) for key in tags if key.startswith(prefix)), default=0)
    # Another machine may take the same number at the same time; the random suffix keeps both entries.
    return f"{prefix}{last + 1:04}.{uuid4().hex[:8]}"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def reconcile_alias(store: Store, name: str) -> None:
    """Set the alias to the last entry of the history, with a warning if it was set to another version by hand."""
    champion, last = get_champion(store, name), _last_record(store, name)
    if champion and last and str(champion.version) != last.version:
        log.warning(
            "the alias champion was at version %s, but the history is at %s, to which it is set back; to change that: "
            "cxr promote --model %s --reason TEXT",
            champion.version,
            last.version,
            champion.version,
        )
    _set_alias(store, name)


def _set_alias(store: Store, name: str) -> None:
    """Set the alias to the last entry of the history; retry while another machine changes it."""
    for delay in (*CONFLICT_DELAYS, None):
        last = _last_record(store, name)
        try:
            if last:
                store.client.set_registered_model_alias(name, CHAMPION, last.version)
            if _last_record(store, name) == last:
                return
        except MlflowException:
            if delay is None:
                raise
        time.sleep(delay or 0)


def _last_record(store: Store, name: str) -> ChampionRecord | None:
    """Return the last entry of the history whose version still exists."""
    existing = _version_numbers(store, name)
    return next((record for record in reversed(champion_history(store, name)) if record.version in existing), None)


def _version_numbers(store: Store, name: str) -> set[str]:
    return {str(version.version) for version in list_versions(store, name)}


def rollback_target(store: Store, name: str) -> ChampionRecord:
    """Return the entry that a rollback restores; repeated rollbacks go back one champion each.

    Raises:
        UserError: there is no previous champion.
    """
    existing, stack = _version_numbers(store, name), list[ChampionRecord]()
    for record in champion_history(store, name):
        if record.version not in existing:
            continue
        while record.rollback and stack and stack[-1].version != record.version:
            stack.pop()
        if not stack or stack[-1].version != record.version:
            stack.append(record)
    if len(stack) < 2:
        raise UserError(f"{name} has no previous champion to roll back to; see: cxr history")
    return stack[-2]


def overruled_up_to(store: Store, name: str) -> int:
    """Return the newest version that existed when a person chose the champion, or 0 if the gate chose it."""
    last = _last_record(store, name)
    return last.overruled_up_to if last else 0


def comparison_number(store: Store, name: str, split_md5: str, challenger: str, champion: str) -> int:
    """Return the number of the comparison of two versions among all on one validation set, counted from 1.

    A comparison that was recorded keeps its number. The tags that count are those of the registered model, which stay
    when versions are deleted.
    """
    tags, prefix = store.client.get_registered_model(name).tags, f"{COMPARISON_TAG}{split_md5}."
    numbers = {key: int(value) for key, value in tags.items() if key.startswith(prefix)}
    return numbers.get(f"{prefix}{challenger}.{champion}", max(numbers.values(), default=0) + 1)


def record_comparison(store: Store, name: str, split_md5: str, challenger: str, champion: str, number: int) -> None:
    """Record the number of a comparison, see `comparison_number`."""
    key = f"{COMPARISON_TAG}{split_md5}.{challenger}.{champion}"
    store.client.set_registered_model_tag(name, key, str(number))


def load_version(version: ModelVersion) -> candidate.Candidate:
    """Load a version after checking that its files match the checksums recorded when it was registered.

    Raises:
        UserError: files are missing or changed.
    """
    return load_with_images(version)[0]


def load_with_images(version: ModelVersion) -> tuple[candidate.Candidate, pd.DataFrame | None]:
    """Load a version as `load_version` does, and its table of labeled images; None if an earlier release registered it.

    Raises:
        UserError: files are missing or changed.
    """
    with download_version(version) as folder:
        try:
            model = candidate.load_candidate(folder, torch.device("cpu"))  # compares weights with their checksums
            images = folder / LABELED_IMAGES
            return model, pd.read_csv(images, dtype={"checksum": str}) if images.exists() else None
        except Exception as error:
            if isinstance(error, OSError) or is_out_of_memory(error):
                raise
            raise _damaged_error(version, first_line(error)) from error


@contextmanager
def download_version(version: ModelVersion) -> Iterator[Path]:
    """Download a version's candidate into a temporary folder and yield the folder.

    Raises:
        MissingFilesError: the store has none of its files.
        UserError: they are changed, or it was registered by an earlier release or other code.
    """
    if OLD_CONTENT_HASH_TAG in version.tags and CONTENT_HASH_TAG not in version.tags:
        raise _earlier_release_error(version)
    if CONTENT_HASH_TAG not in version.tags:
        raise UserError(f"{version.name} version {version.version} is not a model of this pipeline; choose another")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}", dst_path=scratch)
        except (MlflowException, OSError) as error:
            if not _is_missing(error):
                raise
            raise _damaged_error(version, f"its files are missing: {first_line(error)}") from None
        folder = Path(path, "artifacts", ARTIFACT)
        if not folder.is_dir():  # MLflow takes a folder that is missing for an empty one
            location = mlflow.MlflowClient().get_model_version_download_uri(version.name, str(version.version))
            raise MissingFilesError(
                f"{version.name} version {version.version}: its files are missing at "
                f"{location.removeprefix('file://')}; bring them back, or use another version"
            )
        try:
            content_hash = candidate.content_hash(folder)
        except (OSError, ValueError, KeyError) as error:
            raise _damaged_error(version, first_line(error)) from None
        if content_hash != version.tags[CONTENT_HASH_TAG]:
            raise _damaged_error(version, f"its files do not match its tag {CONTENT_HASH_TAG}")
        if candidate.is_of_earlier_release(read_json(folder / "candidate.json")):
            raise _earlier_release_error(version)
        yield folder


def _earlier_release_error(version: ModelVersion) -> UserError:
    return UserError(
        f"{version.name} version {version.version} was registered by an earlier release and cannot be loaded by this "
        "one; train and register new versions with: dvc repro"
    )


def _damaged_error(version: ModelVersion, reason: str) -> UserError:
    return UserError(
        f"{version.name} version {version.version} is damaged: {reason}; use another version, or delete it in MLflow "
        "and run: cxr sync"
    )


def _is_missing(error: Exception) -> bool:
    """Tell whether artifacts are missing: a store that fails must not look like one without files."""
    if isinstance(error, MlflowException):
        return str(error.error_code) == "RESOURCE_DOES_NOT_EXIST"
    if isinstance(error, RequestException):
        return error.response is not None and error.response.status_code == HTTPStatus.NOT_FOUND
    return isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno is None)  # MLflow's own


def _raise_unless_not_found(error: MlflowException) -> None:
    """Raise any error but "not found": a failing server must not look like an empty one."""
    if error.error_code not in NOT_FOUND:
        raise error


def _log_model(store: Store, run_id: str, folder: Path, example: np.ndarray, name: str) -> str:
    """Log the model to its run under this name, and return its id."""
    stream = io.BytesIO()
    Image.fromarray(example).save(stream, "PNG")
    run = store.client.get_run(run_id)
    finding = candidate.read_finding(read_json(folder / "candidate.json"))
    with (
        mlflow.start_run(run_id=run_id, log_system_metrics=False),
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory() as scratch,
    ):
        code = Path(scratch, "pipeline")
        shutil.copytree(Path(pipeline.__file__).parent, code, ignore=shutil.ignore_patterns(*NOT_SERVED))
        # MLflow advises type hints, which cannot express "bytes or path", and warns that integers cannot be missing.
        warnings.simplefilter("ignore", UserWarning)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        info = mlflow.pyfunc.log_model(
            name=name,
            step=-1,  # MLflow copies the metrics of the run at this step to the model; no metric has this one
            python_model=str(Path(candidate.__file__).with_name("pyfunc_model.py")),
            artifacts={ARTIFACT: str(folder)},
            code_paths=[str(code)],
            signature=SIGNATURE,
            metadata={"finding": finding.name, "classes": list(finding.class_names)},
            input_example={"image": [base64.b64encode(stream.getvalue()).decode()]},
            # Without the build, such as +cpu, which the package index does not have.
            pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS],
        )
    # Keep the run's own end time, but not its status, which another machine may have changed in the same way.
    store.client.set_terminated(run_id, "FINISHED", run.info.end_time)
    return str(info.model_id)
