"""Opens the MLflow tracking store; safe when many processes do so at the same time."""

import logging
import os
from dataclasses import dataclass
from importlib import metadata

from filelock import FileLock
from mlflow import MlflowClient, set_tracking_uri
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.core.errors import UserError, first_line, redact_credentials
from pipeline.core.files import atomic_path
from pipeline.tracking.tracking_uri import (
    SQLITE,
    check_reachable,
    sqlite_path,
    sqlite_uri,
    tracking_uri,
    unreachable_error,
    workspace_root,
)

# MLflow's UI shows training runs for this kind of experiment, not prompts and traces.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


@dataclass(frozen=True)
class Store:
    client: MlflowClient
    experiment_id: str
    lock: FileLock  # held between looking something up and creating it


def connect(experiment_name: str) -> Store:
    """Open the tracking store and the experiment; create both if they do not exist.

    Raises:
        UnreachableError: the store does not answer.
        UserError: the credentials are wrong, or the experiment was deleted.
    """
    uri = tracking_uri()
    # MLflow logs every migration of a new store, a missing GPU, and every retry.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    for name in ("mlflow.store.db.utils", "mlflow.system_metrics", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    check_reachable()
    set_tracking_uri(uri)
    # Two processes that open a new sqlite store at once corrupt it; of two that create an experiment, one fails.
    lock = FileLock(workspace_root() / "mlflow.db.lock")
    try:
        with lock:
            _create_sqlite(uri)
            client = MlflowClient(uri)
            experiment = client.get_experiment_by_name(experiment_name)
            if experiment is None:
                artifacts = None if uri.startswith("http") else (workspace_root() / "mlartifacts").as_uri()
                return Store(client, client.create_experiment(experiment_name, artifacts, EXPERIMENT_TAGS), lock)
    except (MlflowException, SQLAlchemyError, ImportError) as error:  # ImportError: a database driver is missing
        if isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403):
            raise UserError(
                f"MLflow at {redact_credentials(uri)} cannot be used: wrong username or password; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            ) from None
        raise unreachable_error(first_line(error)) from error
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow experiment {experiment_name} is deleted; run: mlflow experiments restore -x "
            f"{experiment.experiment_id}"
        )
    return Store(client, experiment.experiment_id, lock)


def software_version_tag() -> dict[str, str]:
    """Return the tag that records the installed version of this package."""
    return {"covid-xray.version": metadata.version("covid-xray")}


def _create_sqlite(uri: str) -> None:
    """Create a new sqlite store under a temporary name: creating its tables takes seconds, and may be interrupted."""
    path = sqlite_path(uri)
    if uri.startswith(SQLITE) and not path.exists():
        with atomic_path(path) as temporary:
            MlflowClient(sqlite_uri(temporary)).search_experiments(max_results=1)
