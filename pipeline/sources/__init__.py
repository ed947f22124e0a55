"""Every source writes one zip in the competition's layout, so that nothing after it knows where data came from.

A new source is a module here, a section in `pipeline/config.py` and a case in `fetch`.
"""

from pathlib import Path

from pipeline.config import (
    ArchiveParams,
    CohenParams,
    CovidxParams,
    DownloadParams,
    KaggleParams,
    PhantomParams,
    TableParams,
)


def fetch(params: DownloadParams, target: Path) -> None:
    """Write the source's images, labels and sample submission to the zip `target`."""
    match params:
        case PhantomParams():
            from pipeline.sources import phantom

            phantom.write(params, target)
        case ArchiveParams():
            from pipeline.sources import archive

            archive.write(params, target)
        case KaggleParams():
            from pipeline.sources import competition

            competition.write(params, target)
        case CovidxParams():
            from pipeline.sources import covidx

            covidx.write(params, target)
        case CohenParams():
            from pipeline.sources import cohen

            cohen.write(params, target)
        case TableParams():
            from pipeline.sources import table

            table.write(params, target)
