"""Choose which labelled images validate."""

from pathlib import Path

from stages.common import stage


@stage
def split() -> None:
    """Write data/split.csv from data/manifest.csv."""
    from pipeline import manifest, splitting
    from pipeline.config import load
    from pipeline.files import write_csv

    table = splitting.split(manifest.read(Path("data")), load().active.split)
    write_csv(Path("data/split.csv"), table)


if __name__ == "__main__":
    split()
