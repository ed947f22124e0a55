"""Every source writes one zip in the competition's layout, so that nothing after it knows where data came from.

A new source is a module here, a section in `pipeline/core/config.py` and a case in `fetch`.
"""

from pathlib import Path

from pipeline.core.config import (
    ArchiveParams,
    CovidChestXrayParams,
    CovidxParams,
    DownloadParams,
    KaggleParams,
    PhantomParams,
    TableParams,
)


def fetch_source(params: DownloadParams, target: Path) -> None:
    """Write the source's images, labels and sample submission to the zip `target`."""
    match params:
        case PhantomParams():
            from pipeline.data.sources import phantom

            phantom.write(params, target)
        case ArchiveParams():
            from pipeline.data.sources import archive

            archive.write(params, target)
        case KaggleParams():
            from pipeline.data.sources import kaggle

            kaggle.write(params, target)
        case CovidxParams():
            from pipeline.data.sources import covidx

            covidx.write(params, target)
        case CovidChestXrayParams():
            from pipeline.data.sources import covid_chestxray

            covid_chestxray.write(params, target)
        case TableParams():
            from pipeline.data.sources import table

            table.write(params, target)
