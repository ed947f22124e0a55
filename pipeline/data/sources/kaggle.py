"""Source: the zip of a Kaggle competition or data set."""

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
from pipeline.core.files import DamagedFileError, check_disk_space, check_zip
from pipeline.kaggle import client


def write_source(params: KaggleParams, target: Path) -> None:
    """Download the zip, resuming an interrupted download in the folder of `target`.

    kagglehub resumes, shows the progress and verifies the hash that Kaggle sends.

    Raises:
        UserError: Kaggle refuses or does not answer, the disk is too small, or the zip is damaged.
    """
    name = params.competition or params.dataset or ""
    handle = parse_competition_handle(name) if params.competition else parse_dataset_handle(name)
    partial = target.with_name(f".{name.replace('/', '-')}.part")
    with client.open_client() as api:
        client.retry(lambda: _download(api, handle, partial), params)
    try:
        check_zip(partial)
    except DamagedFileError as error:
        partial.unlink()
        raise UserError(
            f"{client.page_url(params)}: the zip from Kaggle is damaged ({error}); run again, or check that page"
        ) from None
    partial.replace(target)


def _download(api: KaggleClient, handle: ResourceHandle, partial: Path) -> None:
    with _request_zip(api, handle) as response:
        size = int(response.headers.get("Content-Length", 0))
        check_disk_space(partial.parent, size - (partial.stat().st_size if partial.exists() else 0))
        download_file(response, str(partial), handle)
    # kagglehub does not check the status of the response with which a download resumes.
    if size and partial.stat().st_size != size:
        partial.unlink()
        raise DataCorruptionError


def _request_zip(api: KaggleClient, handle: ResourceHandle) -> Response:
    """Return the response with the zip, whose body is not read yet."""
    response: Response
    if isinstance(handle, DatasetHandle):
        dataset_request = ApiDownloadDatasetRequest()
        dataset_request.owner_slug, dataset_request.dataset_slug = handle.owner, handle.dataset
        dataset_request.dataset_version_number = handle.version
        response = api.datasets.dataset_api_client.download_dataset(dataset_request)
    else:
        competition_request = ApiDownloadDataFilesRequest()
        competition_request.competition_name = handle.competition
        response = api.competitions.competition_api_client.download_data_files(competition_request)
    return response
