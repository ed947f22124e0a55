"""Give the alias back to the last champion."""

import click

from stages.common import stage


@stage
@click.option("--because", metavar="REASON", default="rolled back", help="Why; kept in `cxr history`.")
def rollback(because: str) -> None:
    """Make the champion before the present one champion again; a second time goes back further."""
    from pipeline.config import load
    from pipeline.tracking import registry
    from pipeline.tracking.store import connect

    name = load().model_name
    store = connect(name)
    with store.lock:
        last = registry.before(registry.history(store, name))
        registry.crown(store, name, registry.find(store, name, last.version), because, rollback=True)
    click.echo(f"{name}: version {last.version} is champion again: {because}")


if __name__ == "__main__":
    rollback()
