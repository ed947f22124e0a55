"""Who was champion."""

import click

from stages.common import stage


@stage
def history() -> None:
    """Show who was champion from when to when, and why."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.core.config import load_config
    from pipeline.tracking import registry
    from pipeline.tracking.store import connect

    name = load_config().model_name
    reigns = registry.champion_history(connect(name), name)
    if not reigns:
        click.echo(f"{name} had no champion yet; run: dvc repro promote")
        return
    table = Table("version", "since", "until", "why")
    ends = [reign.since for reign in reigns[1:]] + ["now"]
    for reign, end in zip(reigns, ends, strict=True):
        table.add_row(reign.version, reign.since, end, reign.why)
    Console(markup=False, emoji=False).print(table)


if __name__ == "__main__":
    history()
