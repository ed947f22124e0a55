"""The benchmarks run, and each prints one line of figures; what the figures are is said in docs/performance.md."""

import json

import pandas as pd
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


def test_an_ablation_of_nothing_finds_no_difference(built):
    lines = measured("python bench/ablation.py", str(built), str(built))
    assert [line["metric"] for line in lines] == ["loss", "auroc", "average_precision", "f1"]
    assert all(line["difference"] == 0 and line["better"] == "0 of 2" for line in lines)


def test_what_adaptation_gains_is_measured_on_the_labels_of_the_test_set(built, tmp_path):
    test = pd.read_csv(built / "predictions/test.csv")
    labels = tmp_path / "labels.csv"
    pd.DataFrame({"File": test["file"], "Label": [0, 1] * (len(test) // 2)}).to_csv(labels)
    *ways, found = measured("python bench/adaptation.py", str(built), str(labels))
    assert [line["way"] for line in ways] == ["plain", "calibrated", "adapted"]
    assert ways[2]["over plain"][0] == pytest.approx(ways[2]["accuracy"] - ways[0]["accuracy"], abs=2e-3)
    assert found["prevalence"] == 0.5
    assert 0 <= found["estimated"] <= 1


def measured(command: str, *arguments: str) -> list[dict]:
    ended = run(ROOT, *command.split(), *arguments)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
