"""The benchmarks run, and each prints one line of figures; what the figures are is said in docs/performance.md."""

import json

import pytest
from conftest import ROOT, edit_params, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("command", "arguments", "lines"),
    [
        ("python bench/prepare.py", ["20"], 1),
        ("python bench/input.py", ["64", "16"], 1),
        ("python bench/training.py", ["32", "1"], 2),
        ("python bench/memory.py", ["150", "200"], 1),
    ],
)
def test_a_benchmark_prints_its_figures(command, arguments, lines):
    figures = measured(command, *arguments)
    assert len(figures) == lines
    assert all(value > 0 for line in figures for key, value in line.items() if key.startswith(("ratio", "peak")))


@pytest.mark.parametrize(
    ("command", "arguments", "key"),
    [
        ("python bench/seeds.py", ["2", "{project}"], "ratio"),
        ("python bench/startup.py", ["{project}", "1"], "seconds"),
    ],
)
def test_a_benchmark_of_the_whole_project_prints_its_figures(project, command, arguments, key):
    edit_params(project, lambda params: params.update(seeds=[0]))
    run(project, "git", "commit", "-qam", "one seed")
    (line,) = measured(command, *(argument.format(project=project) for argument in arguments))
    assert line[key] > 0


def measured(command: str, *arguments: str) -> list[dict]:
    ended = run(ROOT, *command.split(), *arguments)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
