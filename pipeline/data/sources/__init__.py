"""Data sources: each writes one zip in the competition's layout, so that later stages do not depend on the source.

To add a source, write a module here with a function `write_source(params, target)`, and add its parameters, whose
`source` is the module's name, to `DownloadParams` in `pipeline/core/config.py`.
"""

import importlib
from pathlib import Path

from pipeline.core.config import DownloadParams, KaggleParams, PhantomParams
from pipeline.data import remote


def fetch_source(params: DownloadParams, target: Path) -> None:
    """Write images, labels and sample submission of the source named by `params.source` to the zip `target`.

    Raises:
        UserError: see `write_source` of the source's module.
    """
    importlib.import_module(f"pipeline.data.sources.{params.source}").write_source(params, target)


def name_data(params: DownloadParams) -> str:
    """Return what the user calls the data, for error messages: the path or paths, or the name on Kaggle."""
    if isinstance(params, KaggleParams):
        return f"Kaggle's {params.competition or params.dataset}"
    if isinstance(params, PhantomParams):
        return params.source
    paths = params.path if isinstance(params.path, list) else [params.path or ""]
    return ", ".join(remote.redact_url(path) if remote.is_url(path) else path for path in paths)
