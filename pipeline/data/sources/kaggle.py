"""A competition or a data set of Kaggle, as the zip that Kaggle keeps of it."""

import shutil
import zipfile
from pathlib import Path

from kagglehub.clients import download_file
from kagglehub.exceptions import DataCorruptionError
from kagglehub.handle import DatasetHandle, ResourceHandle, parse_competition_handle, parse_dataset_handle
from kagglesdk.competitions.types.competition_api_service import ApiDownloadDataFilesRequest
from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest
from kagglesdk.kaggle_client import KaggleClient
from requests import Response

from pipeline.core.config import KaggleParams
from pipeline.core.errors import UserError
from pipeline.data import layout
from pipeline.kaggle import client


def write(params: KaggleParams, target: Path) -> None:
    """Download the zip; what a broken download left beside `target` is not downloaded again.

    kagglehub resumes, shows how far it is and compares the hash that Kaggle sends.

    Raises:
        UserError: Kaggle refuses or does not answer, the disk is too small, or what came is no whole zip.
    """
    name = params.competition or params.dataset or ""
    handle = parse_competition_handle(name) if params.competition else parse_dataset_handle(name)
    part = target.with_name(f".{name.replace('/', '-')}.part")
    with client.open_client() as api:
        client.retry(lambda: _download(api, handle, part), params)
    if not _is_whole(part):
        part.unlink()
        raise UserError(f"{client.page_url(params)}: what Kaggle sends is no whole zip; run again, or look there")
    part.replace(target)


def _download(api: KaggleClient, handle: ResourceHandle, part: Path) -> None:
    with _ask(api, handle) as response:
        size = int(response.headers.get("Content-Length", 0))
        missing = size - (part.stat().st_size if part.exists() else 0)
        free = shutil.disk_usage(part.parent).free
        if missing > free:
            raise UserError(
                f"{part.parent}: {missing / 1e9:.2f} GB are coming from Kaggle and the disk has {free / 1e9:.2f} GB "
                "free; free some space and run again"
            )
        download_file(response, str(part), handle)
    # kagglehub does not look at how the server answers when it resumes.
    if size and part.stat().st_size != size:
        part.unlink()
        raise DataCorruptionError


def _ask(api: KaggleClient, handle: ResourceHandle) -> Response:
    """Return the answer that the zip comes with, of which nothing is read yet."""
    answer: Response
    if isinstance(handle, DatasetHandle):
        dataset = ApiDownloadDatasetRequest()
        dataset.owner_slug, dataset.dataset_slug = handle.owner, handle.dataset
        dataset.dataset_version_number = handle.version
        answer = api.datasets.dataset_api_client.download_dataset(dataset)
    else:
        files = ApiDownloadDataFilesRequest()
        files.competition_name = handle.competition
        answer = api.competitions.competition_api_client.download_data_files(files)
    return answer


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except layout.DAMAGED_ZIP_ERRORS:
        return False
