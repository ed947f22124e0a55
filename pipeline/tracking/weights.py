"""Keeps the weights of each seed once in MLflow, where its run, its version and the bag's version hold them."""

import filecmp
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from pipeline.core.config import BAG
from pipeline.core.files import atomic_path, read_json
from pipeline.models.classifier import DESCRIPTION_FILE, WEIGHTS_FILE
from pipeline.tracking import registry
from pipeline.tracking.runs import CHECKPOINT
from pipeline.tracking.store import Store


def remove_copies(store: Store, run_ids: Mapping[str, str], versions: Mapping[str, ModelVersion]) -> None:
    """Delete the weights of the seeds' runs, and link those in the bag's version to those in the seeds' versions.

    Links are possible where the artifacts are local files; elsewhere the bag's version keeps copies. So does what
    MLflow or a disk refuses, which costs space only. A repeated call changes nothing.

    Args:
        store: the store of the runs.
        run_ids: the run of every candidate by name.
        versions: the version of every candidate by name, which have the same weights.
    """
    originals: dict[str, Path] = {}  # by SHA-256
    for name, version in sorted(versions.items(), key=lambda item: item[0] == BAG):
        try:
            location = store.client.get_logged_model(registry.logged_model_id(version)).artifact_location
        except MlflowException:  # it was deleted
            continue
        if name != BAG:
            uri = str(store.client.get_run(run_ids[name]).info.artifact_uri)
            with suppress(Exception):  # every kind of artifact store has its own errors
                get_artifact_repository(uri).delete_artifacts(f"{CHECKPOINT}/{WEIGHTS_FILE}")
        if is_local_uri(location):
            candidate = Path(local_file_uri_to_path(location), "artifacts", registry.ARTIFACT)
            for description in candidate.glob(f"*/{DESCRIPTION_FILE}"):
                weights = description.with_name(WEIGHTS_FILE)
                with suppress(OSError):  # a file is missing, or the file system has no links
                    _link(originals.setdefault(read_json(description)["weights_sha256"], weights), weights)


def _link(original: Path, copy: Path) -> None:
    """Replace a copy of a file by a hard link."""
    if not original.samefile(copy) and filecmp.cmp(original, copy, shallow=False):
        with atomic_path(copy) as temporary:
            temporary.hardlink_to(original)
