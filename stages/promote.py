"""Bring MLflow up to date with DVC's files, and promote the best candidate if it passes the gate."""

import click

from stages.common import renamed_option, stage


@stage
@click.option("--model", metavar="VERSION", help="Make this version champion, without the gate.")
@click.option("--reason", metavar="TEXT", help="Why; stored with the version and shown by `cxr history`.")
@renamed_option("--because", "--reason")
def promote(model: str | None, reason: str | None) -> None:
    """Bring the MLflow runs and registry up to date, and make the best candidate champion if it passes the gate.

    Writes metrics/promotion.json. With --model, that version becomes champion without a comparison.
    """
    from pipeline.core.config import load_config
    from pipeline.tracking import backfill, promotion, saved_view
    from pipeline.tracking.store import connect

    if (model is None) != (reason is None):
        raise click.UsageError('give both: --model VERSION --reason "TEXT"')
    config = load_config()
    store = connect(config.model_name)
    if model is not None:
        decision = promotion.promote_version(store, config, model, f"manual: {reason}")
    else:
        versions = backfill.backfill(store, config)
        decision = promotion.promote_best(store, config, versions)
    click.echo(promotion.format_decision(config.model_name, decision))
    click.echo(saved_view.format_links(store))


if __name__ == "__main__":
    promote()
