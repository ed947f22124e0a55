"""The command line: help, version, suggestions, completion, and tables in a pipe."""

import io
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import error_line_of, invoke, output_of
from rich.table import Table

from stages import cli, common

COMMANDS = [*cli.STAGES, *cli.COMMANDS]
FILE_NAME = "a-radiograph-with-a-long-name-" * 10 + ".png"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_h_and_help_show_the_same_help(command):
    short, long = output_of(f"cxr {command} -h"), output_of(f"cxr {command} --help")
    assert short == long
    assert f"Usage: cxr {command}".strip() in short
    assert "-h, --help" in short


@pytest.mark.parametrize("command", COMMANDS)
def test_h_works_for_a_stage_that_is_run_as_a_module(command):
    module = __import__(f"stages.{command.replace('-', '_')}", fromlist=["_"])
    result = CliRunner().invoke(getattr(module, command.replace("-", "_")), ["-h"])
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")


def test_version_is_that_of_the_package():
    assert output_of("cxr --version") == f"cxr {metadata.version('covid-xray')}\n"


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_command_list_shows_whole_summaries(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    help_text = " ".join(output_of("cxr --help").split())
    assert "..." not in help_text.replace("[ARGS]...", "")
    for name in COMMANDS:
        module = __import__(f"stages.{name.replace('-', '_')}", fromlist=["_"])
        summary = " ".join(getattr(module, name.replace("-", "_")).help.split("\n\n")[0].split())
        assert f"{name} {summary.split('. ')[0].rstrip('.')}" in help_text


def test_help_takes_less_than_300_milliseconds_and_imports_nothing_heavy():
    heavy = {"torch", "mlflow", "numpy", "pandas", "pydantic", "rich", "yaml"}
    code = (
        "import sys; from stages.cli import cxr; cxr(['--help'], standalone_mode=False); "
        f"print({heavy} & set(sys.modules))"
    )
    seconds = []
    for _ in range(5):  # the fastest of five, since other tests share the cores
        start = time.perf_counter()
        completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
        assert completed.stdout.strip().endswith("set()")
    assert min(seconds) < 0.3


@pytest.mark.parametrize(
    ("typo", "command"), [("predcit", "predict"), ("trainall", "train-all"), ("roll-back", "rollback")]
)
def test_a_misspelled_command_gets_a_suggestion_in_one_line(typo, command):
    result = invoke(f"cxr {typo}")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"Error: No such command '{typo}'")
    assert command in line.partition("Did you mean")[2]


def test_an_unknown_command_without_a_similar_name_points_to_the_help():
    assert error_line_of("cxr zzz") == "Error: No such command 'zzz' (see cxr --help)."


def test_a_misspelled_option_gets_a_suggestion():
    assert error_line_of("cxr promote --modle 3") == "Error: No such option '--modle'. Did you mean '--model'?"


def test_a_seed_that_params_yaml_does_not_list_is_not_trained():
    assert error_line_of("cxr train --seed -1") == "Error: --seed -1: not in seeds of params.yaml; add it there"


def test_the_help_explains_shell_completion():
    assert 'eval "$(_CXR_COMPLETE=bash_source cxr)"' in output_of("cxr --help")


@pytest.mark.parametrize(
    ("words", "expected"), [("cxr pre", ["plain,prepare", "plain,predict"]), ("cxr predict x", ["file,x"])]
)
def test_shell_completion_offers_commands_and_files(words, expected):
    env = {**os.environ, "_CXR_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    program = Path(sys.executable).with_name("cxr")
    completed = subprocess.run([program], env=env, capture_output=True, text=True, check=True)
    assert completed.stdout.splitlines() == expected


def printed_table(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    table = Table("file", "label", style="red")
    table.add_row(FILE_NAME, "1")
    monkeypatch.setattr(sys, "stdout", stream)
    common.print_table(table)
    return stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", ["20", "80"])
def test_a_piped_table_has_no_colors_and_whole_names(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm-256color")
    output = printed_table(monkeypatch, io.StringIO())
    assert FILE_NAME in output
    assert "\x1b" not in output
    assert all(line == line.rstrip() for line in output.splitlines())


@pytest.mark.parametrize(("no_color", "colored"), [(None, True), ("1", False)])
def test_no_color_switches_colors_off_on_a_terminal(no_color, colored, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    assert ("\x1b[31m" in printed_table(monkeypatch, Terminal())) == colored


@pytest.mark.parametrize("command", ["promote", "rollback"])
def test_an_option_under_its_old_name_is_refused_with_the_new_one(command):
    assert error_line_of(f"cxr {command} --because x") == "Error: --because is called --reason now"
    assert "--because" not in output_of(f"cxr {command} --help")
