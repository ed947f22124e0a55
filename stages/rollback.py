"""Give the alias back to the last champion."""

import click

from stages.common import stage


@stage
@click.option("--because", metavar="REASON", default="rolled back", help="Why; kept in `cxr history`.")
def rollback(because: str) -> None:
    """Make the champion before the present one champion again; a second time goes back further."""
    from pipeline.core.config import load_config
    from pipeline.tracking import registry, sync
    from pipeline.tracking.store import connect

    config = load_config()
    last = registry.rollback_target(connect(config.model_name), config.model_name)
    decision = sync.promote_version(config, last.version, because, rollback=True)
    click.echo(sync.format_decision(config.model_name, decision))


if __name__ == "__main__":
    rollback()
