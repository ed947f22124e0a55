import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn import metrics as sklearn

from pipeline.core.errors import UserError
from pipeline.data.dataset import PackedImages
from pipeline.evaluation import calibration, curves
from pipeline.evaluation.intervals import compare_predictions
from pipeline.evaluation.metric_tables import Predictions
from pipeline.evaluation.metrics import best_model, score_predictions
from pipeline.inference.dataset import probability_table
from pipeline.kaggle import submission_file
from pipeline.models.classifier import Architecture, Classifier
from pipeline.report import model_table

pytestmark = pytest.mark.usefixtures("one_thread")

counts = st.integers(0, 12)
probabilities = st.floats(0, 1, width=32)


def predictions_with_counts(tn: int, fp: int, fn: int, tp: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and probabilities with this confusion matrix at the threshold 0.5."""
    labels = np.repeat([0, 0, 1, 1], [tn, fp, fn, tp])
    return labels, np.repeat([0.2, 0.7, 0.4, 0.9], [tn, fp, fn, tp])


# Scores


@settings(max_examples=60, deadline=None)
@given(counts, counts, counts, counts)
def test_scores_follow_from_the_confusion_matrix(tn, fp, fn, tp):
    assume(tn + fp + fn + tp)
    scores = score_predictions(*predictions_with_counts(tn, fp, fn, tp))
    assert scores["accuracy"] == (tn + tp) / (tn + fp + fn + tp)
    assert scores["recall"] == (tp / (tp + fn) if tp + fn else None)
    assert scores["precision"] == (tp / (tp + fp) if tp + fp else None)
    assert scores["specificity"] == (tn / (tn + fp) if tn + fp else None)
    assert scores["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp else 0)
    both_classes = tn + fp and tp + fn
    balanced = pytest.approx((tp / (tp + fn) + tn / (tn + fp)) / 2) if both_classes else None
    assert scores["balanced_accuracy"] == balanced
    loss = -(tn * math.log(0.8) + fp * math.log(0.3) + fn * math.log(0.4) + tp * math.log(0.9))
    assert scores["loss"] == pytest.approx(loss / (tn + fp + fn + tp))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), probabilities), min_size=2, max_size=30))
def test_scores_equal_those_of_scikit_learn(rows):
    labels, probabilities = (np.array(column) for column in zip(*rows, strict=True))
    assume(len(set(labels)) == 2)
    predicted = (probabilities >= 0.5).astype(int)
    scores = score_predictions(labels, probabilities)
    assert scores == pytest.approx({
        "loss": sklearn.log_loss(labels, probabilities),
        "accuracy": sklearn.accuracy_score(labels, predicted),
        "f1": sklearn.f1_score(labels, predicted, zero_division=0),
        "recall": sklearn.recall_score(labels, predicted),
        "precision": sklearn.precision_score(labels, predicted) if predicted.any() else None,
        "specificity": sklearn.recall_score(labels, predicted, pos_label=0),
        "balanced_accuracy": sklearn.balanced_accuracy_score(labels, predicted),
        "auroc": sklearn.roc_auc_score(labels, probabilities),
        "average_precision": sklearn.average_precision_score(labels, probabilities),
    }, abs=1e-12)  # fmt: skip
    assert scores["f1"] == sklearn.f1_score(labels, predicted, zero_division=0)  # to the bit: it selects the best epoch


def test_a_probability_of_one_half_is_predicted_positive():
    assert score_predictions(np.array([1, 0]), np.array([0.5, 0.49]))["accuracy"] == 1


def test_predicted_labels_replace_the_default_threshold():
    scores = score_predictions(np.array([0, 1, 1, 0]), np.array([0.9, 0.1, 0.9, 0.1]), np.array([0, 1, 1, 0]))
    assert (scores["f1"], scores["accuracy"]) == (1, 1)
    assert scores["auroc"] == 0.5


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_undefined_metrics_of_a_single_class_are_none_without_a_warning(label, probability):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score_predictions(np.full(3, label), np.full(3, probability))
    undefined = {"auroc", "average_precision", "balanced_accuracy", "recall" if label == 0 else "specificity"}
    if probability < 0.5:
        undefined |= {"precision"}
    assert {key for key, value in scores.items() if value is None} == undefined
    assert all(math.isfinite(value) for value in scores.values() if value is not None)


def test_a_wrong_probability_of_0_or_1_has_a_finite_loss():
    assert math.isfinite(score_predictions(np.array([0, 1]), np.array([1.0, 0.0], dtype=np.float32))["loss"])


def test_best_model_breaks_ties_of_f1_by_loss_then_by_order():
    models = {name: {"f1": f1, "loss": loss} for name, f1, loss in [("a", 0.8, 0.1), ("b", 0.9, 0.3), ("c", 0.9, 0.2)]}
    assert best_model(models) == "c"
    assert best_model({**models, "d": {"f1": 0.91, "loss": 9.0}}) == "d"
    assert best_model({"z": models["c"], "c": models["c"]}) == "z"


# Predictions


def test_probability_table_has_a_column_per_model_and_the_rows_in_the_requested_order(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 40, 40)).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    architecture = {
        "head_hidden": [],
        "dropout": 0.2,
        "size": 40,
        "normalization": "none",
        "packed_size": 40,
        "resize": "stretch",
    }
    models = {name: [Classifier(Architecture("squeezenet1_1", **architecture)).eval()] for name in ("seed-3", "seed-1")}
    rows = [6, 0, 3, 2, 5]
    table = probability_table(models, PackedImages(tmp_path / "images.npy", torch.device("cpu")), rows)
    assert list(table.columns) == ["seed-3", "seed-1"]
    for name, (network,) in models.items():
        expected = [network.predict_proba(torch.from_numpy(images[row : row + 1])).item() for row in rows]
        assert table[name].to_numpy() == pytest.approx(expected, abs=1e-5)


# Table of models


def models() -> dict:
    first, second = (score_predictions(*predictions_with_counts(*cells)) for cells in ((5, 2, 1, 4), (4, 3, 2, 3)))
    return {"seed-0": first, "seed-1": second, "bag (vote)": {**first, "loss": None, "auroc": None}}


def test_model_table_has_a_column_per_model_and_a_row_per_metric():
    table = model_table.build_table(models())
    assert list(table.columns) == ["seed-0", "seed-1", "bag (vote)"]
    assert list(table.index) == list(models()["seed-0"])
    assert table.loc["f1", "seed-1"] == models()["seed-1"]["f1"]
    assert math.isnan(table.loc["loss", "bag (vote)"])


def test_model_table_has_the_corrected_headline_first_and_says_what_each_column_is(tmp_path):
    intervals = pd.DataFrame(
        [
            ["seed-0", "apparent", "f1", 8 / 11],
            ["seed-1", "fixed", "f1", 6 / 11],
            ["bag (vote)", "cross-fitted", "f1", 0.7],
            ["seed-0", "corrected", "f1", 0.6],
        ],
        columns=["model", "estimate_type", "metric", "value"],
    )
    table = model_table.build_table(models(), intervals, ["bag (vote)", "seed-0"])
    assert list(table.columns) == ["seed-0, corrected", "seed-0", "seed-1", "bag (vote)"]
    assert table.loc["f1"].tolist() == pytest.approx([0.6, 8 / 11, 6 / 11, 8 / 11])
    assert math.isnan(table.loc["loss", "seed-0, corrected"])
    model_table.write_table(tmp_path, table, model_table.describe_estimates(table, intervals))
    assert (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()[-1] == (
        "Corrected for selection on the validation set: seed-0. Not selected on the validation set: seed-1. "
        "Apparent, that is selected on the validation set and therefore optimistic: seed-0, bag (vote). "
        "Log loss is that of the scores, before recalibration."
    )


def test_model_table_is_written_as_csv_markdown_and_png(tmp_path):
    model_table.write_table(tmp_path, model_table.build_table(models()))
    table = pd.read_csv(tmp_path / "table.csv", index_col="metric")
    pd.testing.assert_frame_equal(table, model_table.build_table(models()), check_names=False, rtol=1e-8)
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["|  | seed-0 | seed-1 | bag (vote) |", "| --- | ---: | ---: | ---: |"]
    assert lines[2].startswith("| log loss | ")
    assert lines[2].endswith(" | – |")
    assert f"| F1 | {8 / 11:.3f} | {6 / 11:.3f} | {8 / 11:.3f} |" in lines
    assert {line.count("|") for line in lines} == {5}
    with Image.open(tmp_path / "table.png") as image:
        image.load()
        assert image.format == "PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "table.md", "table.png"]


def test_a_metric_undefined_for_every_model_is_a_dash_without_a_warning(tmp_path):
    # Precision is undefined for models that predict no image positive.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score_predictions(*predictions_with_counts(5, 0, 2, 0))
        model_table.write_table(tmp_path, model_table.build_table({"seed-0": scores, "seed-1": scores}))
    assert "| PPV | – | – |" in (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()


def test_model_table_is_written_reproducibly(tmp_path):
    for name in ("one", "two"):
        model_table.write_table(tmp_path / name, model_table.build_table(models()))
    for name in ("table.csv", "table.md", "table.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# Submissions


def sample(*files: str) -> pd.DataFrame:
    return pd.DataFrame({"File": files, "Label": "0"})


def test_submission_rows_follow_the_order_of_the_sample(tmp_path):
    labels = pd.Series({"a.jpg": 1, "b.jpg": 0, "c.jpg": 1})
    submission_file.write_submission(tmp_path / "s.csv", labels, sample("c.jpg", "a.jpg", "b.jpg"))
    assert (tmp_path / "s.csv").read_text() == "File,Label\nc.jpg,1\na.jpg,1\nb.jpg,0\n"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"a.jpg": 1}, "b.jpg"),
        ({"a.jpg": 1, "b.jpg": 0, "c.jpg": 0}, "c.jpg"),
        (pd.Series([1, 0, 0], index=["a.jpg", "b.jpg", "b.jpg"]), "b.jpg"),
        ({"a.jpg": 1, "b.jpg": 2}, "0 or 1"),
        ({"a.jpg": 1, "b.jpg": float("nan")}, "0 or 1"),
    ],
    ids=["missing file", "extra file", "duplicate file", "not a label", "NaN"],
)
def test_predictions_that_do_not_match_the_sample_raise(tmp_path, labels, expected):
    path = tmp_path / "s.csv"
    with pytest.raises(UserError) as caught:
        submission_file.write_submission(path, pd.Series(labels), sample("a.jpg", "b.jpg"))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert message.endswith("run: dvc repro evaluate")
    assert not path.exists()


# Curves


LABELS = np.array([0, 0, 1, 1, 0, 1])
MODELS = pd.DataFrame({"seed-0": [0.1, 0.6, 0.4, 0.9, 0.2, 0.8], "seed-1": [0.3, 0.2, 0.9, 0.7, 0.6, 0.1]})


def test_areas_under_the_curve_points_equal_the_scores():
    roc = curves.roc_points(LABELS, MODELS["seed-0"].to_numpy())
    assert list(roc.columns) == ["fpr", "tpr"]
    assert np.trapezoid(roc["tpr"], roc["fpr"]) == pytest.approx(score_predictions(LABELS, MODELS["seed-0"])["auroc"])
    points = curves.precision_recall_points(LABELS, MODELS["seed-0"].to_numpy())
    assert list(points.columns) == ["recall", "precision"]
    steps = -points["recall"].diff()[1:].to_numpy() * points["precision"][:-1].to_numpy()
    assert steps.sum() == pytest.approx(score_predictions(LABELS, MODELS["seed-0"])["average_precision"])


# Paired comparison


def compare_f1(labels, groups, ours, theirs, margin=0):
    table = compare_predictions(labels, groups, Predictions(ours, None), Predictions(theirs, None), margin)
    return table.set_index("metric").loc["f1"]


@given(st.lists(st.tuples(*[st.integers(0, 1)] * 3, st.integers(0, 4)), min_size=1, max_size=40))
@settings(deadline=None)
def test_difference_in_f1_equals_that_of_scikit_learn(rows):
    labels, ours, theirs, groups = np.array(rows).T
    result = compare_f1(labels, groups, ours, theirs)
    expected = sklearn.f1_score(labels, ours, zero_division=0) - sklearn.f1_score(labels, theirs, zero_division=0)
    reverse = compare_f1(labels, groups, theirs, ours)
    if not labels.any():
        assert result["reason"] == "no positive image"
        return
    assert result["difference"] == pytest.approx(expected)
    assert reverse["difference"] == pytest.approx(-expected)
    if len(set(groups)) == 1:
        assert np.isnan(result["low"])
        assert result["reason"]
    if not np.isnan(result["low"]):
        assert result["low"] <= result["difference"] <= result["high"]
        assert result["probability"] + reverse["probability"] == pytest.approx(1)


def test_a_perfect_model_is_better_than_a_wrong_one_and_not_than_an_equal_one():
    labels = np.tile([0, 1], 50)
    result = compare_f1(labels, np.arange(100), labels, 1 - labels)
    assert result["difference"] == 1
    assert result["low"] > 0.5
    assert result["probability"] > 0.999
    assert compare_f1(labels, np.arange(100), labels, labels)["probability"] == pytest.approx(0.5)
    assert compare_f1(labels, np.arange(100), labels, 1 - labels, margin=1)["probability"] == pytest.approx(0.5)


def test_grouping_images_by_patient_widens_the_interval_of_the_difference():
    labels = np.tile([0, 1, 1, 1], 30)
    ours, theirs = labels.copy(), labels.copy()
    ours[1:20:4], theirs[1:40:4] = 0, 0
    ungrouped = compare_f1(labels, np.arange(120), ours, theirs)
    grouped = compare_f1(labels, np.arange(120) // 20, ours, theirs)
    assert grouped["difference"] == pytest.approx(ungrouped["difference"])
    assert grouped["high"] - grouped["low"] > ungrouped["high"] - ungrouped["low"]


# Calibration error


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=60))
@settings(deadline=None)
def test_calibration_error_is_the_weighted_mean_gap_of_the_bins(rows):
    labels, probabilities = (np.array(column) for column in zip(*rows, strict=True))
    gap = 0.0
    for index in range(10):
        in_bin = (probabilities * 10).astype(int).clip(max=9) == index
        if in_bin.any():
            gap += abs(probabilities[in_bin].mean() - labels[in_bin].mean()) * in_bin.sum() / len(labels)
    assert calibration.expected_calibration_error(labels, probabilities) == pytest.approx(gap)


def test_calibration_error_is_0_for_correct_and_1_for_wrong_probabilities_of_0_or_1():
    labels = np.array([0, 1, 1])
    assert calibration.expected_calibration_error(labels, labels.astype(float)) == 0
    assert calibration.expected_calibration_error(labels, 1 - labels.astype(float)) == 1
