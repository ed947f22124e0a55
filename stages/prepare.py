"""Decode all images."""

from pathlib import Path

from stages.common import stage


@stage
def prepare() -> None:
    """Write data/images.npy, data/manifest.csv and data/quarantine.csv from data/raw.zip."""
    from pipeline.core.config import load_config
    from pipeline.data import packing

    params = load_config().active
    # download.path says where the images are that data/raw.zip refers to by their CRC-32, so no out depends on it.
    packing.pack_images(Path("data/raw.zip"), params.prepare, Path("data"), params.download)


if __name__ == "__main__":
    prepare()
