"""The benchmarks run, and each prints one line of figures; what the figures are is said in docs/performance.md."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run
from scipy.special import expit

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("command", "arguments", "lines"),
    [
        ("python bench/prepare.py", ["20"], 1),
        ("python bench/duplicates.py", ["300"], 1),
        ("python bench/input.py", ["64", "16"], 1),
        ("python bench/training.py", ["16", "1"], 2),
        ("python bench/memory.py", ["150", "200"], 1),
        ("python bench/allocator.py", ["1", "1"], 2),
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


def changed(project: Path, target: Path, name: str, change: Callable[[pd.Series, pd.Series], pd.Series]) -> Path:
    """Copy what a benchmark reads of the project, with other predictions of one table."""
    shutil.copytree(project / "data", target / "data", ignore=shutil.ignore_patterns("*.zip", "*.npy", "weights"))
    shutil.copytree(project / "predictions", target / "predictions")
    path = target / f"predictions/{name}.csv"
    table = pd.read_csv(path)
    for seed in ("seed-0", "seed-1"):
        table[seed] = change(table[seed], table.get("label", pd.Series([0, 1] * len(table))[: len(table)]))
    table.to_csv(path, index=False)
    return target


def test_an_ablation_says_which_of_two_recipes_is_better(built, tmp_path):
    better = changed(built, tmp_path / "better", "validation", lambda _, label: 0.1 + 0.8 * label)
    worse = changed(built, tmp_path / "worse", "validation", lambda _, label: 0.9 - 0.8 * label)
    lines = {line["metric"]: line for line in measured("python bench/ablation.py", str(better), str(worse))}
    assert list(lines) == ["loss", "calibrated_loss", "auroc", "average_precision", "f1"]
    assert lines["loss"]["difference"] < 0 < lines["auroc"]["difference"]
    assert {line["better"] for metric, line in lines.items() if metric != "calibrated_loss"} == {"2 of 2"}
    ended = run(ROOT, "python", "bench/ablation.py", str(better), str(built.parent))
    assert ended.returncode


def test_what_adaptation_gains_is_measured_on_the_labels_of_the_test_set(built, tmp_path):
    rng = np.random.default_rng(0)
    odds = {0: -1.5, 1: 0.5}  # a positive is too faint for a threshold chosen where positives are rare

    def drawn(given: pd.Series, label: pd.Series) -> pd.Series:
        return pd.Series(expit(rng.normal(label.map(odds), 1)), given.index)

    project = changed(built, tmp_path / "first", "validation", drawn)
    project = changed(project, tmp_path / "second", "test", drawn)
    test = pd.read_csv(project / "predictions/test.csv")
    labels = tmp_path / "labels.csv"
    pd.DataFrame({"File": test["file"], "Label": ([0, 1] * len(test))[: len(test)]}).to_csv(labels)
    *ways, found = measured("python bench/adaptation.py", str(project), str(labels))
    assert [line["way"] for line in ways] == ["plain", "calibrated", "adapted"]
    assert ways[2]["over calibrated"][0] == pytest.approx(ways[2]["accuracy"] - ways[1]["accuracy"], abs=2e-3)
    assert found["prevalence"] == 0.5
    assert found["estimated"] > pd.read_csv(project / "predictions/validation.csv")["label"].mean()


def measured(command: str, *arguments: str) -> list[dict]:
    ended = run(ROOT, *command.split(), *arguments)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
