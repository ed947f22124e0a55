"""Roll back to the previous champion."""

import click

from stages.common import renamed_option, stage


@stage
@click.option("--reason", metavar="TEXT", default="rolled back", help="Why; shown by `cxr history`.")
@renamed_option("--because", "--reason")
def rollback(reason: str) -> None:
    """Make the previous champion champion again; repeated rollbacks go further back."""
    from pipeline.core.config import load_config
    from pipeline.tracking import promotion, registry
    from pipeline.tracking.store import connect

    config = load_config()
    store = connect(config.model_name)
    target = registry.rollback_target(store, config.model_name)
    decision = promotion.promote_version(store, config, target.version, reason, rollback=True)
    click.echo(promotion.format_decision(config.model_name, decision))


if __name__ == "__main__":
    rollback()
