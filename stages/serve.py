"""Serve a model over HTTP, with a page."""

from pathlib import Path

import click

from stages.common import NumberRange, stage


@stage
@click.option(
    "--model",
    default="champion",
    help="Alias or number of a registered version, or seed-K or bag from models/. An alias is followed.",
)
@click.option("--host", default="127.0.0.1", help="Name or address of this machine to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port; 0 for any that is free.")
@click.option(
    "--name",
    "names",
    multiple=True,
    help="Another name of this server that clients use, such as a proxy's; may be given several times.",
)
@click.option(
    "--poll-seconds",
    type=NumberRange(0.1, 3600),
    default=10.0,
    help="How often to ask the registry whether the alias has moved.",
)
@click.option(
    "--max-size",
    type=NumberRange(0.001, 4096),
    default=256.0,
    help="Mebibytes of an image; of JSON a quarter. Requests have at most three times as much in memory together.",
)
@click.option(
    "--timeout",
    type=NumberRange(0.1, 3600),
    default=20.0,
    help="Seconds for a slow client to send, and for decoding an image.",
)
@click.option(
    "--log",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Log predictions for cxr monitor to this file: hashes and figures, no images and no names.",
)
def serve(
    model: str,
    host: str,
    port: int,
    names: tuple[str, ...],
    poll_seconds: float,
    max_size: float,
    timeout: float,
    log: Path | None,
) -> None:
    """Serve a page and an HTTP API that classify radiographs, until Ctrl-C. For research, not for diagnosis.

    Nothing that is sent is kept. There is no login: whoever can reach the port can use it.
    """
    from pipeline.core import memory
    from pipeline.core.config import load_config
    from pipeline.serving import server
    from pipeline.serving.limits import MEBIBYTE, Limits
    from pipeline.training import determinism

    if host not in server.LOOPBACK:
        click.echo(f"Warning: {host} can be reached from other machines, and there is no login", err=True)
    memory.retain_freed_memory(16 * MEBIBYTE)  # of tensors, but not of large files
    determinism.make_deterministic(cpu_threads=1)  # as evaluate does
    server.serve(
        load_config(),
        model,
        host,
        port,
        device=determinism.select_device(),
        poll_seconds=poll_seconds,
        log_file=log,
        limits=Limits(body_bytes=round(max_size * MEBIBYTE), timeout=timeout),
        names=names,
    )


if __name__ == "__main__":
    serve()
