"""The benchmarks run, and each prints one line of figures; what the figures are is said in docs/performance.md."""

import json

import pytest
from conftest import ROOT, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("command", "arguments", "lines"),
    [
        ("python bench/prepare.py", ["20"], 1),
        ("python bench/duplicates.py", ["300"], 1),
        ("python bench/input.py", ["64", "16"], 1),
        ("python bench/training.py", ["16", "1"], 2),
        ("python bench/memory.py", ["150", "200"], 1),
        ("python bench/intervals.py", ["20"], 1),
        ("python bench/predict.py", ["1", "squeezenet1_1", "64"], 1),
    ],
)
def test_a_benchmark_prints_its_figures(command, arguments, lines):
    figures = measured(command, *arguments)
    assert len(figures) == lines
    assert all(value > 0 for line in figures for key, value in line.items() if key.startswith(("ratio", "peak")))


def test_the_benchmark_of_the_start_prints_its_figure(built):
    (line,) = measured("python bench/startup.py", str(built), "1")
    assert line["seconds"] > 0


def measured(command: str, *arguments: str) -> list[dict]:
    ended = run(ROOT, *command.split(), *arguments)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
