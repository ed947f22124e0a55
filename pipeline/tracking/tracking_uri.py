"""Where the tracking store is, and whether anybody is there; known without MLflow, whose import takes seconds."""

import os
import socket
import ssl
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

from pipeline.core.errors import UnreachableError, redact_credentials

SQLITE = "sqlite:///"
DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def workspace_root() -> Path:
    """Return the root of the main workspace, also where DVC runs an experiment in a copy of it."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def tracking_uri() -> str:
    """Return `MLFLOW_TRACKING_URI`, or that of `mlflow.db` in the root, from where relative paths are meant, too."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    return f"{SQLITE}{workspace_root() / uri.removeprefix(SQLITE)}" if uri.startswith(SQLITE) else uri


def check_reachable() -> None:
    """Ask the server, or look for the folder, that the tracking URI names; MLflow itself would retry for minutes.

    Raises:
        UnreachableError: nobody is there.
    """
    uri = tracking_uri()
    parts = urlsplit(uri)
    try:
        if parts.scheme in ("http", "https"):
            with urllib.request.urlopen(f"{redact_credentials(uri).rstrip('/')}/health", timeout=10):  # noqa: S310
                pass
        elif parts.hostname:
            port = parts.port or DEFAULT_PORTS.get(parts.scheme.partition("+")[0])
            socket.create_connection((parts.hostname, port or 0), timeout=10).close()
    except HTTPError:
        pass  # whoever answers is there; a server that wants a password is asked with it later
    except (OSError, ValueError, HTTPException) as error:
        if not isinstance(getattr(error, "reason", None), ssl.SSLError):  # MLflow has its own settings for that
            raise unreachable_error(str(getattr(error, "reason", error))) from None
    folder = Path(uri.removeprefix(SQLITE)).parent
    if uri.startswith(SQLITE) and not os.access(folder, os.W_OK):
        raise unreachable_error(f"the folder {folder} is not there or not writable")


def unreachable_error(reason: str) -> UnreachableError:
    """Return the error that says why the store at the tracking URI cannot be used."""
    return UnreachableError(
        f"MLflow at {redact_credentials(tracking_uri())} cannot be used: {redact_credentials(reason)}; start the server or correct "
        "MLFLOW_TRACKING_URI (unset it to use mlflow.db in the repository's root)"
    )
