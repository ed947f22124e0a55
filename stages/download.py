"""Bring the data in, in the competition's layout."""

from pathlib import Path

from stages.common import stage


@stage
def download() -> None:
    """Write data/raw.zip from the profile's source."""
    from pipeline.core.config import load
    from pipeline.core.files import replacing
    from pipeline.data import layout, sources

    with replacing(Path("data/raw.zip")) as raw:
        sources.fetch(load().active.download, raw)
        layout.read(raw)


if __name__ == "__main__":
    download()
