"""Show the champion history."""

import click

from stages.common import print_table, stage


@stage
def history() -> None:
    """Show the champion history: every champion, from when to when, and why it was promoted."""
    from rich.table import Column, Table

    from pipeline.core.config import load_config
    from pipeline.tracking import registry
    from pipeline.tracking.store import connect

    name = load_config().model_name
    records = registry.champion_history(connect(name), name)
    if not records:
        click.echo(f"{name} has had no champion yet; run: dvc repro promote")
        return
    columns = [Column(header, overflow="fold") for header in ("version", "since", "until", "reason")]
    table = Table(*columns, title=f"Champion history of {name}", title_justify="left")
    ends = [record.since for record in records[1:]] + ["now"]
    for record, end in zip(records, ends, strict=True):
        table.add_row(record.version, record.since, end, record.reason)
    print_table(table)


if __name__ == "__main__":
    history()
