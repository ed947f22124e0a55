"""Download the data in the layout of the competition."""

from pathlib import Path

from stages.common import stage


@stage
def download() -> None:
    """Write data/raw.zip from the source of the active profile."""
    from pipeline.core.config import load_config
    from pipeline.core.files import atomic_path
    from pipeline.data import layout, sources

    with atomic_path(Path("data/raw.zip")) as raw:
        sources.fetch_source(load_config().active.download, raw)
        layout.read_layout(raw)


if __name__ == "__main__":
    download()
