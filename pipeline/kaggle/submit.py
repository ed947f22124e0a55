"""Submission of files to Kaggle, their public scores, and the log of submissions."""

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

SUBMISSION_LOG = Path("submissions.csv")  # not in submissions/, which DVC deletes before it runs the stage
COLUMNS = ["sent", "competition", "file", "model", "message", "sha256", "submission", "public_score"]
POLL_SECONDS = 5  # between two requests for the score
TIMEOUT_SECONDS = 900  # of the wait for the score


def target_competition(config: Config) -> KaggleParams:
    """Return the competition that the data of the active profile come from.

    Raises:
        UserError: the data do not come from a competition.
    """
    params = config.active.download
    if not isinstance(params, KaggleParams) or params.competition is None:
        raise UserError(
            f"params.yaml: {config.profile}.download: the data do not come from a competition, so there is none to "
            "submit to; set source: kaggle and competition, or use another profile"
        )
    return params


def send_submission(client: KaggleClient, params: KaggleParams, file: Path, message: str) -> int:
    """Upload the file, create one submission, and return its number.

    Raises:
        UserError: Kaggle refuses or does not answer.
    """
    api = client.competitions.competition_api_client
    content = file.read_bytes()
    upload_request = ApiStartSubmissionUploadRequest()
    upload_request.competition_name, upload_request.file_name = params.competition, file.name
    upload_request.content_length = len(content)
    upload_request.last_modified_epoch_seconds = int(file.stat().st_mtime)

    def upload() -> str:
        location = api.start_submission_upload(upload_request)  # its URL can be used only once
        requests.put(location.create_url, content, timeout=TIMEOUT).raise_for_status()
        return str(location.token)

    submission = ApiCreateSubmissionRequest()
    submission.competition_name, submission.submission_description = params.competition, message
    submission.blob_file_tokens = retry(upload, params)
    return int(retry(lambda: api.create_submission(submission), params, repeatable=False).ref)


def wait_for_public_score(client: KaggleClient, params: KaggleParams, number: int) -> float:
    """Wait until Kaggle has scored the submission, and return its public score.

    Raises:
        UserError: Kaggle cannot score it, or has not after `TIMEOUT_SECONDS`.
    """
    api = client.competitions.competition_api_client
    request = ApiListSubmissionsRequest()
    request.competition_name = params.competition
    label = f"{page_url(params)}/submissions: submission {number}"
    end = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < end:
        submissions = retry(lambda: api.list_submissions(request), params).submissions or []
        for submission in submissions:
            if submission.ref == number and submission.status == SubmissionStatus.ERROR:
                raise UserError(f"{label}: Kaggle cannot score it: {' '.join(submission.error_description.split())}")
            if submission.ref == number and submission.status == SubmissionStatus.COMPLETE and submission.public_score:
                return float(submission.public_score)
        time.sleep(POLL_SECONDS)
    raise UserError(f"{label} is not scored yet; see its score there, and do not send it again")


def read_submission_log() -> pd.DataFrame:
    """Read the log of submissions, one row per submission, all fields as text.

    Raises:
        UserError: `SUBMISSION_LOG` is not a table with the columns `COLUMNS`.
    """
    return (
        read_text_table(SUBMISSION_LOG, str(SUBMISSION_LOG), COLUMNS)
        if SUBMISSION_LOG.exists()
        else pd.DataFrame(columns=COLUMNS)
    )


def append_submission(row: dict[str, Any]) -> None:
    """Append a row of `COLUMNS` to `SUBMISSION_LOG`; replace the row of the same submission."""
    rows = read_submission_log()
    others = rows[rows["submission"] != str(row["submission"])]
    write_csv(SUBMISSION_LOG, pd.concat([others, pd.DataFrame([row], dtype=object)]))
