"""Decode all images."""

from pathlib import Path

from stages.common import stage


@stage
def prepare() -> None:
    """Write data/images.npy, data/manifest.csv and data/quarantine.csv from data/raw.zip."""
    from pipeline.core.config import load_config
    from pipeline.data import packing

    packing.pack_images(Path("data/raw.zip"), load_config().active.prepare, Path("data"))


if __name__ == "__main__":
    prepare()
