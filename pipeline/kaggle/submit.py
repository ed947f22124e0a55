"""Sending a submission file to Kaggle, and what became of it."""

import time
from pathlib import Path
from typing import Any

import pandas as pd
import requests
from kagglesdk.competitions.types.competition_api_service import (
    ApiCreateSubmissionRequest,
    ApiListSubmissionsRequest,
    ApiStartSubmissionUploadRequest,
)
from kagglesdk.competitions.types.submission_status import SubmissionStatus
from kagglesdk.kaggle_client import KaggleClient

from pipeline.core.config import Config, KaggleParams
from pipeline.core.errors import UserError
from pipeline.core.files import read_text_table, write_csv
from pipeline.kaggle.client import TIMEOUT, page_url, retry

SUBMISSION_LOG = Path("submissions.csv")  # not in submissions/, which DVC deletes whenever it writes it anew
COLUMNS = ["sent", "competition", "file", "model", "message", "sha256", "submission", "public_score"]
POLL_SECONDS, TIMEOUT_SECONDS = 5, 900  # seconds between two looks at the score, and until nobody looks any more


def target_competition(config: Config) -> KaggleParams:
    """Return the competition that the active profile's data come from.

    Raises:
        UserError: they come from elsewhere.
    """
    params = config.active.download
    if not isinstance(params, KaggleParams) or params.competition is None:
        raise UserError(
            f"params.yaml: {config.profile}.download: the data are no competition's, so there is none to send to; "
            "set source: kaggle and competition, or another profile"
        )
    return params


def send_submission(client: KaggleClient, params: KaggleParams, file: Path, message: str) -> int:
    """Upload the file, submit it once, and return the submission's number.

    Raises:
        UserError: Kaggle refuses, or does not answer.
    """
    api = client.competitions.competition_api_client
    content = file.read_bytes()
    announced = ApiStartSubmissionUploadRequest()
    announced.competition_name, announced.file_name = params.competition, file.name
    announced.content_length, announced.last_modified_epoch_seconds = len(content), int(file.stat().st_mtime)

    def upload() -> str:
        place = api.start_submission_upload(announced)  # an address that is used once
        requests.put(place.create_url, content, timeout=TIMEOUT).raise_for_status()
        return str(place.token)

    submission = ApiCreateSubmissionRequest()
    submission.competition_name, submission.submission_description = params.competition, message
    submission.blob_file_tokens = retry(upload, params)
    return int(retry(lambda: api.create_submission(submission), params, repeatable=False).ref)


def wait_for_public_score(client: KaggleClient, params: KaggleParams, number: int) -> float:
    """Wait until Kaggle has scored the submission, and return its public score.

    Raises:
        UserError: Kaggle cannot score it, or takes longer than `PATIENCE`.
    """
    api = client.competitions.competition_api_client
    wanted = ApiListSubmissionsRequest()
    wanted.competition_name = params.competition
    where = f"{page_url(params)}/submissions: submission {number}"
    end = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < end:
        listed = retry(lambda: api.list_submissions(wanted), params).submissions or []
        for found in listed:
            if found.ref == number and found.status == SubmissionStatus.ERROR:
                raise UserError(f"{where}: Kaggle cannot score it: {' '.join(found.error_description.split())}")
            if found.ref == number and found.status == SubmissionStatus.COMPLETE and found.public_score:
                return float(found.public_score)
        time.sleep(POLL_SECONDS)
    raise UserError(f"{where} has no score yet; look there, nothing sends it again")


def read_submission_log() -> pd.DataFrame:
    """Return what was sent so far, a row of texts per submission.

    Raises:
        UserError: `LOG` is not as it was written.
    """
    return (
        read_text_table(SUBMISSION_LOG, str(SUBMISSION_LOG), COLUMNS)
        if SUBMISSION_LOG.exists()
        else pd.DataFrame(columns=COLUMNS)
    )


def append_submission(row: dict[str, Any]) -> None:
    """Append a row of `COLUMNS` to `LOG`, in place of an earlier one about the same submission."""
    known = read_submission_log()
    others = known[known["submission"] != str(row["submission"])]
    write_csv(SUBMISSION_LOG, pd.concat([others, pd.DataFrame([row], dtype=object)]))
