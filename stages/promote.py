"""Make MLflow show what DVC holds, and promote the best candidate."""

import click

from stages.common import stage


@stage
@click.option("--model", metavar="VERSION", help="Make this version champion, whatever the gate says.")
@click.option("--because", metavar="REASON", help="Why; kept with the version and in `cxr history`.")
def promote(model: str | None, because: str | None) -> None:
    """Complete the MLflow runs and the registry, and make the best candidate champion if it is better.

    Writes metrics/promotion.json. With --model nothing is compared: the version becomes champion.
    """
    from pipeline.core.config import load_config
    from pipeline.tracking import sync

    if (model is None) != (because is None):
        raise click.UsageError('give both: --model VERSION --because "REASON"')
    config = load_config()
    decision = sync.promote_version(config, model, f"by hand: {because}") if model else sync.promote_best(config)
    click.echo(sync.format_decision(config.model_name, decision))


if __name__ == "__main__":
    promote()
