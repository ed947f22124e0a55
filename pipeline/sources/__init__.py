"""Every source writes one zip in the competition's layout, so that nothing after it knows where data came from.

A new source is a module here, a section in `pipeline/config.py` and a line in `fetch`.
"""

from pathlib import Path

from pipeline.config import ArchiveParams, KaggleParams, PhantomParams


def fetch(params: PhantomParams | ArchiveParams | KaggleParams, target: Path) -> None:
    """Write the source's images, labels and sample submission to the zip `target`."""
    if isinstance(params, PhantomParams):
        from pipeline.sources import phantom

        phantom.write(params, target)
    elif isinstance(params, KaggleParams):
        from pipeline.sources import competition

        competition.write(params, target)
    else:
        from pipeline.sources import archive

        archive.write(params, target)
