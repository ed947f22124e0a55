"""Write the competition's submission files, and send one when asked."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.common import stage

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.core.config import Config


@stage
@click.option("--send", metavar="NAME", help="Write nothing, but send Kaggle best, bag or seed-K as it was written.")
@click.option("-m", "--message", metavar="TEXT", help="What Kaggle shows beside it.")
@click.option("--yes", is_flag=True, help="Do not ask before sending.")
def submit(send: str | None, message: str | None, yes: bool) -> None:
    """Write submissions/best.csv, bag.csv, both adapted to the test set's prevalence, and one file per seed.

    With --send, send one of them, wait for its public score, and log that to MLflow and to submissions.csv.
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
    from pipeline.kaggle import submission_file

    sample = layout.read_layout(Path("data/raw.zip")).sample
    for name, labels in _labels(load_config()).items():
        submission_file.write_submission(Path(f"submissions/{name}.csv"), labels, sample)


def _labels(config: "Config") -> "dict[str, pd.Series]":
    """Return what each submission says of the test images, by file."""
    from pipeline.core.files import read_csv, read_json
    from pipeline.evaluation import ensemble
    from pipeline.evaluation.metrics import apply_threshold, best_model

    test, adapted = (read_csv(Path(f"predictions/{name}.csv")).set_index("file") for name in ("test", "adapted"))
    labels = {
        name: ensemble.predict(test, rule)["label"] for name, rule in ensemble.load_candidate_configs(config).items()
    }
    labels["best"] = labels[best_model(read_json(Path("metrics/evaluate.json")))]
    for role in adapted.dropna(axis="columns"):
        labels[f"{role}-adapted"] = apply_threshold(adapted[role])
    return labels


def _send(name: str, message: str, yes: bool) -> None:
    from contextlib import suppress
    from datetime import UTC, datetime

    from pipeline.core.config import load_config
    from pipeline.core.errors import UserError
    from pipeline.core.files import read_json, sha256_of_file
    from pipeline.evaluation.metrics import best_model
    from pipeline.kaggle import client, submission_file
    from pipeline.kaggle import submit as kaggle_submit
    from pipeline.tracking import fingerprint, runs
    from pipeline.tracking.store import connect

    config = load_config()
    competition = kaggle_submit.target_competition(config)
    names = ["best", "bag", "best-adapted", "bag-adapted", *config.model_names]
    if name not in names:
        raise UserError(f"--send {name}: there is no such file; choose one of {', '.join(names)}")
    file = Path(f"submissions/{name}.csv")
    digest, present = sha256_of_file(file), None
    with suppress(KeyError):  # what cannot be calibrated is not adapted
        present = _labels(config)[name].astype(str).to_dict()
    if submission_file.read_submission(file).to_dict() != present:
        raise UserError(f"{file}: not what the present predictions say; run: dvc repro submit")
    model = name.removesuffix("-adapted")
    if model == "best":
        model = best_model(read_json(Path("metrics/evaluate.json")))
    marks = {"bag": fingerprint.training_fingerprint(config), **fingerprint.model_fingerprints(config)}
    kaggle_submit.read_submission_log()  # what cannot be added to is refused before anything is sent
    store = connect(config.model_name)
    run = runs.find_run(store, marks[model])
    if run is None:
        raise UserError(f"MLflow has no run of {model} to log the score to; run: cxr sync")
    with client.open_client() as api:
        if not yes and not click.confirm(f"Send {file} to {competition.competition}?"):
            click.echo("nothing is sent")
            return
        sent = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        number = kaggle_submit.send_submission(api, competition, file, message)
        row = {
            "sent": sent, "competition": competition.competition, "file": name, "model": model, "message": message,
            "sha256": digest, "submission": number,
        }  # fmt: skip
        click.echo(f"submission {number} is sent, and waits for its public score")
        kaggle_submit.append_submission({**row, "public_score": None})
        score = kaggle_submit.wait_for_public_score(api, competition, number)
        kaggle_submit.append_submission({**row, "public_score": score})
    runs.log_metrics(store.client, run.info.run_id, {"kaggle/public_score": score})
    click.echo(
        f"{competition.competition}: {name} has public score {score}; logged to MLflow and {kaggle_submit.SUBMISSION_LOG}"
    )


if __name__ == "__main__":
    submit()
