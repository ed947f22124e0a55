"""Show the champion history."""

import sys

import click

from stages.common import print_table, stage

# Columns and their largest widths on a terminal, which leave some thirty of a hundred characters for the reason.
WIDTHS = {
    "version": None, "candidate": None, "F1 (95 % CI)": 12, "from (UTC)": 10, "until (UTC)": 10, "decided by": 10,
    "why": None,
}  # fmt: skip


@stage
def history() -> None:
    """Show the champion history: every champion, from when to when, who decided and why."""
    from rich import box
    from rich.table import Column, Table

    from pipeline.core.config import load_config
    from pipeline.tracking import registry
    from pipeline.tracking.store import connect
    from pipeline.tracking.version_card import MISSING, format_time

    name = load_config().model_name
    store = connect(name)
    records = registry.champion_history(store, name)
    if not records:
        click.echo(f"{name} has had no champion yet; run: dvc repro promote")
        return
    is_terminal = sys.stdout.isatty()
    columns = [
        Column(header, overflow="fold", max_width=width if is_terminal else None) for header, width in WIDTHS.items()
    ]
    title = f"Champion history of {name}"
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    last = records[-1].version
    is_deleted = last not in {str(version.version) for version in registry.list_versions(store, name)}
    ends = [format_time(record.since) for record in records[1:]] + ["deleted" if is_deleted else "now"]
    for record, end in zip(records, ends, strict=True):
        known = [value or MISSING for value in (record.candidate, record.f1, format_time(record.since), end)]
        reason = " ".join(record.reason.split())  # one line
        table.add_row(record.version, *known, record.decided_by or MISSING, reason)
    print_table(table)
    if is_deleted:
        click.echo(f"{name} has no champion: version {last} was deleted; run: cxr sync")


if __name__ == "__main__":
    history()
