"""The `cxr` command: a command per stage, and commands for use by hand."""

import importlib

import click

from stages.common import CONTEXT_SETTINGS

STAGES = ["download", "weights", "prepare", "split", "train", "evaluate", "bag", "report", "promote", "submit"]
COMMANDS = [
    "data", "train-all", "tune", "external-validation", "compare", "predict", "score", "sync", "history", "rollback",
    "export", "serve", "monitor", "ui", "verify",
]  # fmt: skip
EPILOG = """\b
Enable shell completion in bash (likewise: zsh_source, fish_source) with:
  eval "$(_CXR_COMPLETE=bash_source cxr)"
"""


class LazyGroup(click.Group):
    """Imports the module of a command only when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return STAGES + COMMANDS

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = cmd_name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"stages.{module}"), module)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:  # click suggests only commands that are already imported
            names = self.list_commands(ctx)
            message = f"No such command {error.command_name!r} (see cxr --help)."
            raise click.exceptions.NoSuchCommand(error.command_name, message, names) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their whole summaries, which click would cut at the width of the terminal."""
        for title, names in (("Stages, in the order of dvc repro", STAGES), ("Other commands", COMMANDS)):
            commands = {name: self.get_command(ctx, name) for name in names}
            with formatter.section(title):
                formatter.write_dl(
                    [(name, command.get_short_help_str(limit=1000)) for name, command in commands.items() if command]
                )


@click.command(cls=LazyGroup, context_settings=CONTEXT_SETTINGS, epilog=EPILOG)
@click.version_option(package_name="covid-xray", prog_name="cxr", message="%(prog)s %(version)s")
def cxr() -> None:
    """Train, evaluate, register and use chest X-ray classifiers. `dvc repro` runs the stages that are out of date."""
