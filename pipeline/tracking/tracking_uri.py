"""The MLflow tracking URI and a reachability check, without importing MLflow (which takes seconds)."""

import os
import shlex
import socket
import ssl
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit

from pipeline.core.errors import UnreachableError, UserError, redact_credentials

SQLITE = "sqlite:///"
DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def workspace_root() -> Path:
    """Return the root of the main workspace, also when DVC runs an experiment in a copy of it."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def tracking_uri() -> str:
    """Return `MLFLOW_TRACKING_URI`, by default `mlflow.db` in the root; relative sqlite paths start at the root."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    if not uri.startswith(SQLITE) or uri.startswith(f"{SQLITE}/"):
        return uri
    name, *query = uri.removeprefix(SQLITE).partition("?")
    return "".join([sqlite_uri(workspace_root() / unquote(name)), *query])


def sqlite_uri(path: Path) -> str:
    """Return the URI of a sqlite file, quoted if a character of its path would mean something in a URI.

    The slashes are quoted too, since MLflow creates the folders that the URI seems to name.
    """
    text = str(path)
    return f"{SQLITE}{quote(text, safe='') if any(character in text for character in '%?#') else text}"


def sqlite_path(uri: str) -> Path:
    """Return the file of a `sqlite:///` URI."""
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0]))


def shell_uri() -> str:
    """Return the tracking URI for a shell command that a user shall type; it shows no password."""
    uri = tracking_uri()
    return shlex.quote(uri) if uri.startswith(SQLITE) else '"$MLFLOW_TRACKING_URI"'


def check_reachable() -> None:
    """Check that the server or folder of the tracking URI can be reached; MLflow itself would retry for minutes.

    Raises:
        UnreachableError: it cannot.
        UserError: it is a folder.
    """
    uri = tracking_uri()
    try:
        url = urlsplit(uri)
        if url.scheme in ("", "file"):
            raise UserError(
                f"MLFLOW_TRACKING_URI={uri}: not the URI of a server or a database; set one, or "
                "unset it to use mlflow.db in the repository's root"
            )
        if url.scheme in ("http", "https"):
            with urllib.request.urlopen(f"{redact_credentials(uri).rstrip('/')}/health", timeout=10):  # noqa: S310
                pass
        elif url.hostname:
            port = url.port or DEFAULT_PORTS.get(url.scheme.partition("+")[0])
            socket.create_connection((url.hostname, port or 0), timeout=10).close()
    except HTTPError:
        pass  # the server answers; credentials are sent later, by MLflow
    except (OSError, ValueError, HTTPException) as error:
        if not isinstance(getattr(error, "reason", None), ssl.SSLError):  # MLflow has its own TLS settings
            raise unreachable_error(str(getattr(error, "reason", error))) from None
    folder = sqlite_path(uri).parent
    if uri.startswith(SQLITE) and not os.access(folder, os.W_OK):
        raise unreachable_error(f"the folder {folder} does not exist or is not writable")


def unreachable_error(reason: str) -> UnreachableError:
    """Return the error for a store that cannot be used, with the tracking URI and the reason."""
    return UnreachableError(
        f"MLflow at {redact_credentials(tracking_uri())} cannot be used: {redact_credentials(reason)}; start the "
        "server or correct MLFLOW_TRACKING_URI (unset it to use mlflow.db in the repository's root)"
    )
