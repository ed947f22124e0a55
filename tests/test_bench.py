"""Every benchmark runs and prints its results as JSON lines."""

import base64
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, json_lines, output_of, run, use_project
from PIL import Image
from scipy.special import expit

from pipeline.data.sources import phantom
from pipeline.data.sources.phantom import PhantomCase

pytestmark = pytest.mark.slow


def check_results(results: list[dict], lines: int) -> None:
    assert len(results) == lines
    assert all(value > 0 for line in results for key, value in line.items() if key.startswith(("ratio", "peak")))


@pytest.mark.parametrize(
    ("command", "arguments", "lines"),
    [
        ("python bench/prepare.py", ["20"], 1),
        ("python bench/input.py", ["64", "16"], 1),
        ("python bench/training.py", ["16", "1", "64"], 2),
        ("python bench/memory.py", ["150", "200"], 1),
        ("python bench/allocator.py", ["1", "1", "64"], 2),
        ("python bench/busy.py", ["1", "0.05", "alexnet-predict", "0"], 3),
        ("python bench/predict.py", ["1", "squeezenet1_1", "64", "1", "2"], 1),
        ("python bench/coverage.py", ["2", "1"], 2088),
        ("python bench/shortcuts.py", ["phantom", "60", "1", "epochs=1", "epochs=1,noise=15"], 3),
    ],
)
def test_a_benchmark_that_needs_a_process_of_its_own_prints_its_results(command, arguments, lines):
    check_results(run_benchmark(command, *arguments), lines)


@pytest.mark.parametrize(
    ("command", "arguments", "lines"),
    [
        ("python bench/decode.py", ["1"], 1),
        ("python bench/duplicates.py", ["300"], 1),
        ("python bench/duplicates.py", ["3000", "random"], 1),
        ("python bench/scale.py", ["300"], 9),
        ("python bench/intervals.py", ["20"], 1),
        ("python bench/recipe_intervals.py", ["2", "3"], 7),
        ("python bench/shift.py", ["4"], 34),
        ("python bench/selection.py", ["2"], 108),
        ("python bench/gate.py", ["1"], 54),
        ("python bench/operating_point.py", ["2"], 144),
    ],
)
def test_a_benchmark_prints_its_results(command, arguments, lines, run_here):
    check_results(run_here(command, *arguments), lines)


def test_the_servers_of_the_serving_benchmark_have_models_that_predict(tmp_path, empty_store, monkeypatch):
    import mlflow

    monkeypatch.syspath_prepend(ROOT / "bench")
    import serving
    from common import radiographs

    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    use_project(tmp_path, monkeypatch)
    commands = serving.make_models(tmp_path, "timm/tf_efficientnet_lite0", 64)
    assert [command[:2] for command in commands.values()] == [["cxr", "serve"], *[["mlflow", "models"]] * 2]
    images = [base64.b64encode(image).decode() for image in radiographs(2)]
    for server in ("registered", "plain"):
        probabilities = mlflow.pyfunc.load_model(commands[server][-1]).predict(pd.DataFrame({"image": images}))
        assert probabilities["probability"].between(0, 1, inclusive="neither").tolist() == [True, True]
    Path("image.jpg").write_bytes(radiographs(1)[0])
    assert "image.jpg" in output_of("cxr predict image.jpg")  # by the champion, as cxr serve does


def lungs_of(case: PhantomCase) -> np.ndarray:
    body_rng, pose_rng = (np.random.default_rng([case.seed, purpose, case.number]) for purpose in (1, 2))
    body, pose = phantom._draw_body(body_rng, case), phantom._draw_pose(pose_rng, case.view)
    share, _ = phantom._anatomy(phantom._body_coordinates(pose, body), body)
    return share > 0.25


def test_boxes_of_lungs_are_compared_with_the_masks_of_the_same_names(tmp_path, run_here):
    folders = images, masks, corners = [tmp_path / name for name in ("images", "masks", "corners")]
    for folder in folders:
        folder.mkdir()
    corner = np.zeros((256, 256), bool)
    corner[:4, :8] = True
    for number in range(1, 7):
        case = PhantomCase(0, number, number, "train", 0)
        Image.fromarray(phantom.draw_radiograph(case)).save(images / f"{number}.PNG")
        Image.fromarray(lungs_of(case)).save(masks / f"{number}.png")
        Image.fromarray(corner).save(corners / f"{number}.png")
    Image.fromarray(corner).save(masks / "other.png")
    (of_lungs,), (of_corners,) = (
        run_here("python bench/lung_field.py", str(images), str(path)) for path in folders[1:]
    )
    assert (of_lungs["images"], of_lungs["not found"]) == (6, 0)
    assert of_lungs["lungs in the box"]["minimum"] > 0.95
    assert of_lungs["overlap"]["minimum"] > 0.6
    assert 0.3 < of_lungs["area"] < 0.9
    assert of_corners["lungs in the box"]["median"] == of_corners["overlap"]["median"] == 0


def test_the_benchmark_of_the_startup_time_prints_its_result(demo_project):
    (line,) = run_benchmark("python bench/startup.py", str(demo_project), "1")
    assert line["seconds"] > 0


def test_the_benchmark_of_frozen_features_predicts_a_source_that_is_left_out(demo_project, run_here):
    *lines, chosen = run_here(
        "python bench/frozen_features.py", str(demo_project), "B", "timm/tf_efficientnet_lite0", "64"
    )
    assert len(lines) == 36
    aurocs = [float(line["auroc"].split()[0]) for line in lines]
    assert 0.9 < max(aurocs) <= 1
    assert set(chosen["chosen"]) <= {line["features"] for line in lines}


def copy_with_changed_predictions(
    project: Path, target: Path, name: str, change: Callable[[pd.Series, pd.Series], pd.Series]
) -> Path:
    """Copy the files that a benchmark reads, with copy_with_changed_predictions predictions in one table."""
    shutil.copytree(project / "data", target / "data", ignore=shutil.ignore_patterns("*.zip", "*.npy", "weights"))
    shutil.copytree(project / "predictions", target / "predictions")
    path = target / f"predictions/{name}.csv"
    table = pd.read_csv(path)
    for seed in ("seed-0", "seed-1"):
        table[seed] = change(table[seed], table.get("label", pd.Series([0, 1] * len(table))[: len(table)]))
    table.to_csv(path, index=False)
    return target


def test_adaptation_is_evaluated_with_the_labels_of_the_test_set(demo_project, tmp_path, run_here):
    rng = np.random.default_rng(0)
    log_odds = {0: -1.5, 1: 0.5}  # too low for the positives, as at a threshold chosen at a low prevalence

    def draw(probabilities: pd.Series, label: pd.Series) -> pd.Series:
        return pd.Series(expit(rng.normal(label.map(log_odds), 1)), probabilities.index)

    project = copy_with_changed_predictions(demo_project, tmp_path / "first", "validation", draw)
    project = copy_with_changed_predictions(project, tmp_path / "second", "test", draw)
    test = pd.read_csv(project / "predictions/test.csv")
    labels = tmp_path / "labels.csv"
    pd.DataFrame({"File": test["file"], "Label": ([0, 1] * len(test))[: len(test)]}).to_csv(labels)
    *rows, estimate = run_here("python bench/adaptation.py", str(project), str(labels))
    assert [line["predictions"] for line in rows] == ["plain", "calibrated", "adapted"]
    assert rows[2]["over calibrated"][0] == pytest.approx(rows[2]["accuracy"] - rows[1]["accuracy"], abs=2e-3)
    assert estimate["prevalence"] == 0.5
    assert estimate["estimated"] > pd.read_csv(project / "predictions/validation.csv")["label"].mean()


def run_benchmark(command: str, *arguments: str) -> list[dict]:
    result = run(ROOT, "python", "-m", "tests.forked", command.removeprefix("python "), *arguments)
    assert result.returncode == 0, result.stderr
    return json_lines(result.stdout)
