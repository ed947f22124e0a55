"""Write the submission files for the competition, or send one of them to Kaggle."""

from pathlib import Path

import click

from stages.common import stage


@stage
@click.option(
    "--send", metavar="NAME", help="Send submissions/NAME.csv (best, bag, seed-K ...) to Kaggle; write no file."
)
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
    from pipeline.core.files import read_csv
    from pipeline.data import layout
    from pipeline.evaluation import ensemble
    from pipeline.kaggle import submission_file

    sample = layout.read_layout(Path("data/raw.zip")).sample
    is_excluded = sample["File"].isin(read_csv(Path("data/quarantine.csv"))["file"])
    if is_excluded.any():
        click.echo(
            f"{is_excluded.sum()} of {len(sample)} test images are missing in the submissions, because prepare leaves "
            f"them out; the first is {sample['File'][is_excluded].iloc[0]}",
            err=True,
        )
    sample = sample[~is_excluded]
    for name, labels in ensemble.predict_submission_labels(load_config()).items():
        submission_file.write_submission(Path(f"submissions/{name}.csv"), labels, sample)


def _send(name: str, message: str, yes: bool) -> None:
    from pipeline.core.config import load_config
    from pipeline.kaggle.client import open_client
    from pipeline.kaggle.submit import SUBMISSION_LOG, target_competition
    from pipeline.tracking import submission

    config = load_config()
    params = target_competition(config)
    candidate = submission.find_submission(config, name)
    with open_client() as client:
        if not yes and not click.confirm(f"Send {candidate.file} to {params.competition}?"):
            click.echo("nothing sent")
            return
        row = submission.send(client, params, candidate, message)
        click.echo(f"submission {row['submission']} sent; waiting for its public score")
        score = submission.log_public_score(client, params, candidate, row)
    click.echo(f"{params.competition}: public score of {name}: {score}; logged to MLflow and {SUBMISSION_LOG}")


if __name__ == "__main__":
    submit()
