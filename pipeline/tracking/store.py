"""The tracking store, opened so that any number of processes may do it at once."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from mlflow import MlflowClient, set_tracking_uri
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.core.errors import UserError, first_line, redact_credentials
from pipeline.core.files import atomic_path
from pipeline.tracking.tracking_uri import SQLITE, check_reachable, tracking_uri, unreachable_error, workspace_root

EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development"
}  # MLflow's UI shows training, not prompts and traces


@dataclass(frozen=True)
class Store:
    client: MlflowClient
    experiment_id: str
    lock: FileLock  # held while something is looked up and made where it was missing


def connect(experiment: str) -> Store:
    """Open the tracking store and the experiment; make both where they are missing.

    Raises:
        UnreachableError: the store does not answer.
        UserError: it wants another password, or the experiment was deleted.
    """
    uri = tracking_uri()
    # MLflow announces every migration of a new store, that there is no GPU to watch, and each of its many tries.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    for name in ("mlflow.store.db.utils", "mlflow.system_metrics", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    check_reachable()
    set_tracking_uri(uri)
    # A new sqlite store opened by two processes at once is corrupted, and an experiment made by two is lost to one.
    lock = FileLock(workspace_root() / "mlflow.db.lock")
    try:
        with lock:
            _make_whole(uri)
            client = MlflowClient(uri)
            found = client.get_experiment_by_name(experiment)
            if found is None:
                artifacts = None if uri.startswith("http") else (workspace_root() / "mlartifacts").as_uri()
                return Store(client, client.create_experiment(experiment, artifacts, EXPERIMENT_TAGS), lock)
    except (MlflowException, SQLAlchemyError, ImportError) as error:  # a database may want a driver
        if isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403):
            raise UserError(
                f"MLflow at {redact_credentials(uri)} cannot be used: it wants another name and password; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            ) from None
        raise unreachable_error(first_line(error)) from error
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow experiment {experiment} is deleted; run: mlflow experiments restore -x {found.experiment_id}"
        )
    return Store(client, found.experiment_id, lock)


def _make_whole(uri: str) -> None:
    """Make a new sqlite store beside its place: making its tables takes seconds, in which the process may be killed."""
    path = Path(uri.removeprefix(SQLITE))
    if uri.startswith(SQLITE) and not path.exists():
        with atomic_path(path) as aside:
            MlflowClient(f"{SQLITE}{aside}").search_experiments(max_results=1)
