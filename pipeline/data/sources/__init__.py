"""Data sources: each writes one zip in the competition's layout, so that later stages do not depend on the source.

To add a source, write a module here with a function `write_source(params, target)`, and add its parameters, whose
`source` is the module's name, to `DownloadParams` in `pipeline/core/config.py`.
"""

import importlib
from pathlib import Path

from pipeline.core.config import DownloadParams


def fetch_source(params: DownloadParams, target: Path) -> None:
    """Write images, labels and sample submission of the source named by `params.source` to the zip `target`.

    Raises:
        UserError: see `write_source` of the source's module.
    """
    importlib.import_module(f"pipeline.data.sources.{params.source}").write_source(params, target)
