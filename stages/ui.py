"""Serve MLflow's UI on this machine."""

import os
import socket
from contextlib import suppress

import click

from stages.common import stage


@stage
@click.option("--port", type=click.IntRange(1, 65535), default=5000, help="Port on this machine.")
def ui(port: int) -> None:
    """Serve MLflow's UI until Ctrl-C, and print the links to seeds and bag by F1.

    If MLFLOW_TRACKING_URI is a server, which has its own UI, only its links are printed.
    """
    from mlflow.exceptions import MlflowException

    from pipeline.core.config import load_config
    from pipeline.core.errors import UserError
    from pipeline.tracking import saved_view
    from pipeline.tracking.store import connect
    from pipeline.tracking.tracking_uri import tracking_uri

    config, uri = load_config(), tracking_uri()
    if not uri.startswith("http"):
        try:  # MLflow would say it after the links, which would lead to another server
            socket.create_server(("127.0.0.1", port)).close()
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise UserError(f"port {port}: {reason}; choose another with --port (make ui PORT=…)") from None
    store = connect(config.model_name)
    if not store.client.search_runs([store.experiment_id], max_results=1):
        click.echo("No run yet; they appear while dvc repro trains.")
    with suppress(MlflowException):  # not every user of a server may write
        saved_view.save_view(store, config)
    if uri.startswith("http"):
        click.echo(saved_view.format_links(store))
        return
    click.echo("MLflow starts, which takes about ten seconds. Then open:")
    click.echo(saved_view.format_links(store, f"http://127.0.0.1:{port}"))
    # In a variable, since everybody on this machine can read options, and a URI may have a password.
    os.environ.update(MLFLOW_BACKEND_STORE_URI=uri, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    os.execvp("mlflow", ["mlflow", "ui", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)])  # noqa: S606


if __name__ == "__main__":
    ui()
