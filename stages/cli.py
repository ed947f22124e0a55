"""`cxr`: every stage by its name, and what people type by hand."""

import importlib

import click

STAGES = ["download", "weights", "prepare", "split", "train", "evaluate", "bag", "report", "promote", "submit"]
COMMANDS = ["train-all", "predict", "sync", "history", "rollback", "verify"]


class Stages(click.Group):
    """Imports a command only when it is called or its help is shown."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return STAGES + COMMANDS

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in STAGES + COMMANDS:
            return None
        module = cmd_name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"stages.{module}"), module)
        return command


@click.command(cls=Stages)
def cxr() -> None:
    """Chest X-ray classifiers: the stages, one by one, and what helps with them. `dvc repro` runs what is due."""
