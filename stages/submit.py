"""Write the submission files for the competition, or send one of them to Kaggle."""

from pathlib import Path

import click

from stages.common import stage


@stage
@click.option("--send", metavar="NAME", help="Send submissions/NAME.csv (best, bag, seed-K ...) to Kaggle; write none.")
@click.option("-m", "--message", metavar="TEXT", help="Description of the submission on Kaggle.")
@click.option("--yes", is_flag=True, help="Do not ask before sending.")
def submit(send: str | None, message: str | None, yes: bool) -> None:
    """Write submissions/best.csv and bag.csv, both also adapted to the prevalence of the test set, and a file per seed.

    With --send, send one of them, wait for its public score, and log the score to MLflow and to submissions.csv.
    """
    if (send is None) != (message is None):
        raise click.UsageError('give both: --send NAME -m "TEXT"')
    if send is not None and message is not None:
        _send(send, message, yes)
    else:
        _write()


def _write() -> None:
    from pipeline.core.config import load_config
    from pipeline.data import layout
    from pipeline.evaluation import ensemble
    from pipeline.kaggle import submission_file

    sample = layout.read_layout(Path("data/raw.zip")).sample
    for name, labels in ensemble.predict_submission_labels(load_config()).items():
        submission_file.write_submission(Path(f"submissions/{name}.csv"), labels, sample)


def _send(name: str, message: str, yes: bool) -> None:
    from contextlib import suppress
    from datetime import UTC, datetime

    from pipeline.core.config import load_config
    from pipeline.core.errors import UserError
    from pipeline.core.files import read_json, sha256_of_file
    from pipeline.evaluation import ensemble
    from pipeline.evaluation.metrics import best_model
    from pipeline.kaggle import client, submission_file
    from pipeline.kaggle import submit as kaggle_submit
    from pipeline.tracking import fingerprint, runs
    from pipeline.tracking.store import connect

    config = load_config()
    competition = kaggle_submit.target_competition(config)
    names = ["best", "bag", "best-adapted", "bag-adapted", *config.model_names]
    if name not in names:
        raise UserError(f"--send {name}: no such submission; choose one of {', '.join(names)}")
    file = Path(f"submissions/{name}.csv")
    digest, current = sha256_of_file(file), None
    with suppress(KeyError):  # models without calibration have no adapted submission
        current = ensemble.predict_submission_labels(config)[name].astype(str).to_dict()
    if submission_file.read_submission(file).to_dict() != current:
        raise UserError(f"{file}: not up to date with the predictions; run: dvc repro submit")
    model = name.removesuffix("-adapted")
    if model == "best":
        model = best_model(read_json(Path("metrics/evaluate.json")))
    fingerprints = fingerprint.candidate_fingerprints(config)
    kaggle_submit.read_submission_log()  # fails before anything is sent if the log is damaged
    store = connect(config.model_name)
    run = runs.find_run(store, fingerprints[model])
    if run is None:
        raise UserError(f"MLflow has no run of {model} to log the score to; run: cxr sync")
    with client.open_client() as api:
        if not yes and not click.confirm(f"Send {file} to {competition.competition}?"):
            click.echo("nothing sent")
            return
        sent = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        number = kaggle_submit.send_submission(api, competition, file, message)
        row = {
            "sent": sent, "competition": competition.competition, "file": name, "model": model, "message": message,
            "sha256": digest, "submission": number,
        }  # fmt: skip
        click.echo(f"submission {number} sent; waiting for its public score")
        kaggle_submit.append_submission({**row, "public_score": None})
        score = kaggle_submit.wait_for_public_score(api, competition, number)
        kaggle_submit.append_submission({**row, "public_score": score})
    runs.log_metrics(store.client, run.info.run_id, {"kaggle/public_score": score})
    log = kaggle_submit.SUBMISSION_LOG
    click.echo(f"{competition.competition}: public score of {name}: {score}; logged to MLflow and {log}")


if __name__ == "__main__":
    submit()
