"""Opens the MLflow tracking store; safe when many processes do so at the same time."""

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ParamSpec, TypeVar, cast
from urllib.parse import urlsplit

import mlflow
from filelock import FileLock
from mlflow import MlflowClient, set_tracking_uri
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import read_mlflow_creds
from requests import RequestException
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from pipeline.core.errors import UserError, first_line, redact_credentials
from pipeline.core.files import atomic_path
from pipeline.tracking.tracking_uri import (
    SQLITE,
    check_reachable,
    shell_uri,
    sqlite_path,
    sqlite_uri,
    tracking_uri,
    unreachable_error,
    workspace_root,
)

# MLflow's UI shows training runs for this kind of experiment, not prompts and traces.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

CONFLICT_DELAYS = (0.1, 0.2, 0.4, 0.8)  # seconds
NOT_FOUND = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's error codes for what is not there
ADVISORY_LOCK = 5_208_346  # any number that other programs do not use for a lock in the same database

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Store:
    client: MlflowClient
    experiment_id: str
    lock: FileLock  # held between looking something up and creating it


def connect(experiment_name: str) -> Store:
    """Open the tracking store and the experiment; create both if they do not exist.

    Raises:
        UnreachableError: the store does not answer.
        UserError: the credentials are wrong or not sufficient, the experiment was deleted, or another release of MLflow
            created the store.
    """
    uri = tracking_uri()
    # MLflow logs every migration of a new store, a missing GPU, and every retry.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    for name in ("mlflow.store.db.utils", "mlflow.system_metrics", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.artifact.artifact_repo").setLevel(logging.WARNING)  # INFO: no files
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    check_reachable()
    set_tracking_uri(uri)
    # Two processes that open a new sqlite store at once corrupt it.
    lock = FileLock(f"{sqlite_path(uri)}.lock" if uri.startswith(SQLITE) else workspace_root() / "mlflow.db.lock")
    try:
        with lock:
            _create_sqlite(uri)
            if not uri.startswith("http"):
                _prepare_database(uri)
            experiment = _find_or_create_experiment(client := MlflowClient(uri), experiment_name)
    except (MlflowException, SQLAlchemyError, ImportError) as error:  # ImportError: a database driver is missing
        raise refusal(error) or unreachable_error(first_line(error)) from error
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow experiment {experiment_name} is deleted; run: mlflow experiments restore -x "
            f"{experiment.experiment_id}"
        )
    return Store(client, experiment.experiment_id, lock)


def refusal(error: Exception) -> UserError | None:
    """Return the error for the user if MLflow's server refused the credentials, None if `error` is another one."""
    status, uri = None, tracking_uri()
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, RequestException) and error.response is not None:  # of an upload or download
        status = error.response.status_code
    user, token = login()
    if status == 403:
        who = "the owner of MLFLOW_TRACKING_TOKEN" if token else user or "an anonymous user"
        reason = (
            f"{who} may not do this; ask the server's administrator for the permission EDIT, or MANAGE to delete, on "
            "the experiment and the registered model"
        )
    elif status == 401 and token:
        reason = "wrong or expired token; correct MLFLOW_TRACKING_TOKEN"
    elif status == 401:
        reason = "wrong username or password" if user else "it needs a username and a password, or a token"
        reason += "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        reason += ", which count before MLFLOW_TRACKING_TOKEN" if user else ", or MLFLOW_TRACKING_TOKEN"
    else:
        return None
    return UserError(f"MLflow at {redact_credentials(uri)} cannot be used: {reason}")


def login() -> tuple[str | None, str | None]:
    """Return the user's name at MLflow's server and the token there; MLflow uses a token only without a name."""
    credentials = read_mlflow_creds()  # environment variables or ~/.mlflow/credentials
    user = urlsplit(tracking_uri()).username or (credentials.username if credentials.password else None)
    return user, None if user else os.environ.get("MLFLOW_TRACKING_TOKEN")


def retry_conflicts(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function call itself again, as often as CONFLICT_DELAYS says, when another machine writes meanwhile.

    MLflow looks up whether a parameter or tag exists and then inserts it, so that a database refuses one of two inserts
    at the same time; and what the function has read may be deleted, such as a version that two machines registered. The
    function must change nothing when it is repeated.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for delay in CONFLICT_DELAYS:
            try:
                return function(*args, **kwargs)
            except MlflowException as error:
                if error.error_code not in ("BAD_REQUEST", *NOT_FOUND):
                    raise
            time.sleep(delay)
        return function(*args, **kwargs)

    return call


@contextmanager
def ignore_existing() -> Iterator[None]:
    """Ignore that another machine has just created what the block creates."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def software_version_tag() -> dict[str, str]:
    """Return the tag that records the installed version of this package."""
    return {"covid-xray.version": metadata.version("covid-xray")}


def _create_sqlite(uri: str) -> None:
    """Create a new sqlite store under a temporary name: creating its tables takes seconds, and may be interrupted."""
    path = sqlite_path(uri)
    if uri.startswith(SQLITE) and not path.exists():
        with atomic_path(path) as temporary:
            MlflowClient(sqlite_uri(temporary)).search_experiments(max_results=1)


def _prepare_database(uri: str) -> None:
    """Create MLflow's tables in a new database; check that another has those of the installed MLflow.

    MLflow would change older ones without asking.

    Raises:
        UserError: they are of another release.
    """
    from alembic.migration import MigrationContext  # slow, and not needed for a server
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    engine = create_engine(uri)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # of two machines that create the tables at once, one would fail
            connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
        found = MigrationContext.configure(connection).get_current_revision()
        if found is None:
            MlflowClient(uri).search_experiments(max_results=1)
    engine.dispose()
    migrations = ScriptDirectory(Path(mlflow.__file__).parent / "store/db_migrations")
    if found in (None, migrations.get_current_head()):
        return
    try:
        migrations.get_revision(found)
        release, advice = "an older", f"make a backup, then run: mlflow db upgrade {shell_uri()}"
    except CommandError:
        release, advice = "a newer", "install that release, or use a backup or another store (MLFLOW_TRACKING_URI)"
    raise UserError(
        f"MLflow at {redact_credentials(uri)} cannot be used: its tables are of {release} MLflow than the installed "
        f"{mlflow.__version__}; {advice}"
    )


def _find_or_create_experiment(client: MlflowClient, name: str) -> Experiment:
    experiment = client.get_experiment_by_name(name)
    if experiment:
        return experiment
    artifacts = None if tracking_uri().startswith("http") else (workspace_root() / "mlartifacts").as_uri()
    with ignore_existing():
        client.create_experiment(name, artifacts, EXPERIMENT_TAGS)
    return cast("Experiment", client.get_experiment_by_name(name))
