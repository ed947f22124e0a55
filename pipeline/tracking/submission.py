"""A submission to Kaggle: checked against predictions and runs before it is sent, and logged with its public score."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kagglesdk.kaggle_client import KaggleClient

from pipeline.core.config import BAG, Config, KaggleParams
from pipeline.core.errors import UserError
from pipeline.core.files import read_json, sha256_of_file
from pipeline.evaluation import ensemble
from pipeline.evaluation.metrics import best_model
from pipeline.kaggle import submission_file, submit
from pipeline.tracking import runs
from pipeline.tracking.fingerprint import candidate_fingerprints
from pipeline.tracking.store import Store, connect


@dataclass(frozen=True)
class Submission:
    """One of the files in submissions/, and the MLflow run of its model."""

    name: str
    file: Path
    model: str
    store: Store
    run_id: str


def find_submission(config: Config, name: str) -> Submission:
    """Return the submission of this name.

    Raises:
        UserError: it does not exist, is not up to date, its model has no run, or the log of submissions is damaged.
    """
    names = ["best", BAG, "best-adapted", f"{BAG}-adapted", *config.model_names]
    if name not in names:
        raise UserError(f"--send {name}: no such submission; choose one of {', '.join(names)}")
    file, current = Path(f"submissions/{name}.csv"), None
    with suppress(KeyError):  # models without calibration have no adapted submission
        current = ensemble.predict_submission_labels(config)[name].astype(str).to_dict()
    if submission_file.read_submission(file).to_dict() != current:
        raise UserError(f"{file}: not up to date with the predictions; run: dvc repro submit")
    model = name.removesuffix("-adapted")
    if model == "best":
        model = best_model(read_json(Path("metrics/evaluate.json")))
    fingerprint = candidate_fingerprints(config)[model]
    submit.read_submission_log()
    store = connect(config.model_name)
    run = runs.find_run(store, fingerprint)
    if run is None:
        raise UserError(f"MLflow has no run of {model} to log the score to; run: cxr sync")
    return Submission(name, file, model, store, run.info.run_id)


def send(client: KaggleClient, params: KaggleParams, submission: Submission, message: str) -> dict[str, Any]:
    """Send the file, and append it to the log of submissions; return its row there.

    Raises:
        UserError: see `submit.send_submission`.
    """
    sent = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    row = {
        "sent": sent, "competition": params.competition, "file": submission.name, "model": submission.model,
        "message": message, "sha256": sha256_of_file(submission.file),
        "submission": submit.send_submission(client, params, submission.file, message), "public_score": None,
    }  # fmt: skip
    submit.append_submission(row)
    return row


def log_public_score(client: KaggleClient, params: KaggleParams, submission: Submission, row: dict[str, Any]) -> float:
    """Wait for the public score of a row of the log, write it there, and log it to the run.

    Raises:
        UserError: see `submit.wait_for_public_score`.
    """
    score = submit.wait_for_public_score(client, params, row["submission"])
    submit.append_submission({**row, "public_score": score})
    runs.log_metrics(submission.store.client, submission.run_id, {"kaggle/public_score": score})
    return score
