"""The tracking store, opened so that any number of processes may do it at once."""

import logging
import os
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

from filelock import FileLock
from mlflow import MlflowClient, set_tracking_uri
from mlflow.exceptions import MlflowException

from pipeline.errors import UserError
from pipeline.files import replacing

KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's UI shows training, not prompts and traces


@dataclass(frozen=True)
class Store:
    client: MlflowClient
    experiment_id: str
    lock: FileLock  # held while something is looked up and made where it was missing


def root() -> Path:
    """Return the root of the main workspace, also where DVC runs an experiment in a copy of it."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def tracking_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root() / 'mlflow.db'}"


def connect(experiment: str) -> Store:
    """Open the tracking store and the experiment; make both where they are missing.

    Raises:
        UserError: the store does not answer, or the experiment was deleted.
    """
    uri = tracking_uri()
    # MLflow announces every migration of a new store, and that there is no GPU to watch; urllib3 every second try.
    for name in ("mlflow.store.db.utils", "mlflow.system_metrics", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    _check_reachable()
    set_tracking_uri(uri)
    # A new sqlite store opened by two processes at once is corrupted, and an experiment made by two is lost to one.
    lock = FileLock(root() / "mlflow.db.lock")
    try:
        with lock:
            _make_whole(uri)
            client = MlflowClient(uri)
            found = client.get_experiment_by_name(experiment)
            if found is None:
                artifacts = None if uri.startswith("http") else (root() / "mlartifacts").as_uri()
                return Store(client, client.create_experiment(experiment, artifacts, KIND), lock)
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        if error.get_http_status_code() in (401, 403):
            reason = "it wants another name and password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        raise _unusable(reason) from error
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow experiment {experiment} is deleted; run: mlflow experiments restore -x {found.experiment_id}"
        )
    return Store(client, found.experiment_id, lock)


def _make_whole(uri: str) -> None:
    """Make a new sqlite store beside its place: making its tables takes seconds, in which the process may be killed."""
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not path.exists():
        with replacing(path) as aside:
            MlflowClient(f"sqlite:///{aside}").search_experiments(max_results=1)


def _check_reachable() -> None:
    """Ask the server, or look for the folder, that the tracking URI names; MLflow itself would retry for minutes.

    Raises:
        UserError: nobody is there.
    """
    uri = tracking_uri()
    if uri.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(f"{_shown(uri).rstrip('/')}/health", timeout=10):  # noqa: S310
                pass
        except HTTPError:
            pass  # whoever answers is there; a server that wants a password is asked with it later
        except (OSError, ValueError, HTTPException) as error:
            raise _unusable(str(getattr(error, "reason", error))) from None
    elif uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).parent
        if not os.access(folder, os.W_OK):
            raise _unusable(f"the folder {folder} is not there or not writable")


def _unusable(reason: str) -> UserError:
    """Return the error that says so of the tracking URI."""
    return UserError(
        f"MLflow at {_shown(tracking_uri())} cannot be used: {reason}; start the server or correct "
        "MLFLOW_TRACKING_URI (unset it to use mlflow.db in the repository's root)"
    )


def _shown(uri: str) -> str:
    """Return the URI without the name and password it may hold."""
    return urlsplit(uri)._replace(netloc=urlsplit(uri).netloc.rpartition("@")[2]).geturl()
