"""Download the data in the layout of the competition."""

from pathlib import Path

import click

from stages.common import stage


@stage
def download() -> None:
    """Write data/raw.zip from the source of the active profile."""
    from pipeline.core.config import load_config
    from pipeline.core.errors import rename_in_errors
    from pipeline.core.files import atomic_path
    from pipeline.data import layout, sources

    params = load_config().active.download
    with atomic_path(Path("data/raw.zip")) as raw, rename_in_errors({str(raw): sources.name_data(params)}):
        sources.fetch_source(params, raw)
        warnings = layout.read_layout(raw).warnings
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)


if __name__ == "__main__":
    download()
