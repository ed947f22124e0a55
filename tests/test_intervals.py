import math
import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from pipeline.evaluation import calibration
from pipeline.evaluation.intervals import bootstrap_weights, compare_metrics, confidence_intervals
from pipeline.evaluation.metrics import compute_metrics, score_predictions

rows = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.52, 0.9, 1.0]), st.integers(0, 5)),
    min_size=1,
    max_size=30,
)


def arrays(rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels, probabilities, groups = zip(*rows, strict=True)
    return np.array(labels), np.array(probabilities), np.array(groups)


def make_predictions(count: int, per_group: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, probabilities and groups."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) // per_group % 4 == 0
    return labels.astype(int), np.clip(0.3 * labels + rng.random(count) * 0.7, 0, 1), np.arange(count) // per_group


@settings(max_examples=80, deadline=None)
@given(rows)
def test_first_row_has_the_scores_of_the_original_set(rows):
    labels, probabilities, groups = arrays(rows)
    metrics = compute_metrics(labels, probabilities >= 0.5, probabilities, bootstrap_weights(groups, 3)).iloc[0]
    scores = dict(score_predictions(labels, probabilities))
    if not labels.any():
        scores["f1"] = None
    for metric, value in scores.items():
        assert math.isnan(metrics[metric]) if value is None else metrics[metric] == pytest.approx(value), metric
    assert metrics["brier"] == pytest.approx(np.mean((labels - probabilities) ** 2))
    assert metrics["calibration_error"] == pytest.approx(calibration.expected_calibration_error(labels, probabilities))


def test_f1_is_undefined_on_a_resample_without_a_positive():
    labels = np.repeat([1, 0], [3, 97])
    predicted = labels.copy()
    predicted[-1] = 1  # one false positive
    samples = compute_metrics(labels, predicted, None, bootstrap_weights(np.arange(100), 2000))
    assert samples["f1"].isna().equals(samples["recall"].isna())
    f1 = confidence_intervals(labels, predicted, np.arange(100), samples).set_index("metric").loc["f1"]
    assert 0.4 <= f1["low"] < f1["value"] == pytest.approx(6 / 7)


@settings(max_examples=60, deadline=None)
@given(rows)
def test_metrics_of_a_resample_equal_those_of_scikit_learn_with_sample_weights(rows):
    labels, probabilities, groups = arrays(rows)
    assume(len(set(groups)) > 1)
    predicted = (probabilities >= 0.5).astype(int)
    weights = bootstrap_weights(groups, 2)
    metrics, drawn = compute_metrics(labels, predicted, probabilities, weights).iloc[1], weights[1]
    assume(len(set(labels[drawn > 0])) == 2)
    kwargs = {"sample_weight": drawn}
    resampled = np.repeat(labels, drawn), np.repeat(probabilities, drawn)
    assert dict(metrics) == pytest.approx(
        {
            "accuracy": sklearn.accuracy_score(labels, predicted, **kwargs),
            "f1": sklearn.f1_score(labels, predicted, zero_division=0, **kwargs),
            "recall": sklearn.recall_score(labels, predicted, **kwargs),
            "precision": sklearn.precision_score(labels, predicted, zero_division=math.nan, **kwargs),
            "specificity": sklearn.recall_score(labels, predicted, pos_label=0, **kwargs),
            "balanced_accuracy": sklearn.balanced_accuracy_score(labels, predicted, **kwargs),
            "loss": sklearn.log_loss(labels, probabilities, **kwargs),
            "auroc": sklearn.roc_auc_score(labels, probabilities, **kwargs),
            "average_precision": sklearn.average_precision_score(labels, probabilities, **kwargs),
            "brier": sklearn.brier_score_loss(labels, probabilities, **kwargs),
            "calibration_error": calibration.expected_calibration_error(*resampled),
        },
        nan_ok=True,
    )


def test_images_of_a_group_are_resampled_together():
    groups = np.array(["b", "a", "b", "c", "a"])
    drawn = bootstrap_weights(groups, 50)
    assert drawn.shape == (51, 5)
    assert (drawn[0] == 1).all()
    assert (drawn[:, 0] == drawn[:, 2]).all()
    assert (drawn[:, 1] == drawn[:, 4]).all()
    assert (drawn[1:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert (bootstrap_weights(groups, 50) == drawn).all()


def test_interval_contains_the_value_and_is_wider_for_grouped_images():
    widths = []
    for per_group in (1, 8):
        labels, probabilities, _ = make_predictions(320, 8)
        groups = np.arange(320) // per_group
        table = confidence_intervals(labels, probabilities >= 0.5, groups, samples(labels, probabilities, groups))
        table = table.set_index("metric").drop("calibration_error")  # it is biased upwards in resamples
        assert (table["low"] <= table["value"]).all()
        assert (table["value"] <= table["high"]).all()
        widths.append(table["high"] - table["low"])
    assert widths[1]["f1"] > widths[0]["f1"]


def samples(labels, probabilities, groups, count=400):
    return compute_metrics(labels, probabilities >= 0.5, probabilities, bootstrap_weights(groups, count))


def test_proportion_of_independent_images_has_wilsons_interval():
    # 81 of 263, Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), table I
    labels, probabilities = np.ones(263, dtype=int), np.repeat([0.9, 0.1], [81, 182])
    groups = np.arange(263)
    table = confidence_intervals(labels, probabilities >= 0.5, groups, samples(labels, probabilities, groups))
    table = table.set_index("metric")
    assert table.loc["recall", "method"] == "wilson"
    assert table.loc["recall", ["low", "high"]].tolist() == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert table.loc["f1", "method"] == "bootstrap"


def test_perfect_proportion_of_grouped_images_has_wilsons_interval_over_groups():
    labels, groups = np.ones(40, dtype=int), np.arange(40) // 4
    table = confidence_intervals(labels, labels, groups, samples(labels, np.full(40, 0.9), groups)).set_index("metric")
    assert table.loc["recall", ["low", "high"]].tolist() == pytest.approx([0.7225, 1], abs=5e-5)  # 10 of 10
    assert table.loc["f1", "reason"] == "all resamples have the same value: too few images or errors for an interval"
    assert math.isnan(table.loc["f1", "low"])


def test_bootstrap_interval_of_a_mean_has_the_theoretical_width():
    labels, probabilities, _ = make_predictions(400)
    groups = np.repeat(np.arange(200), 2)
    table = confidence_intervals(labels, probabilities >= 0.5, groups, samples(labels, probabilities, groups, 4000))
    low, high = table.set_index("metric").loc["brier", ["low", "high"]]
    squares = ((labels - probabilities) ** 2).reshape(200, 2).mean(axis=1)
    assert high - low == pytest.approx(2 * 1.96 * squares.std() / math.sqrt(200), rel=0.06)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("count", [1, 3])
def test_undefined_metrics_have_a_reason_and_no_warning(label, count):
    labels, probabilities, groups = np.full(count, label), np.full(count, 0.2), np.zeros(count)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = confidence_intervals(labels, probabilities >= 0.5, groups, samples(labels, probabilities, groups))
    table = table.set_index("metric")
    assert table.loc["auroc", "reason"] == "images of one class only"
    assert table.loc["precision", "reason"] == "no image is predicted positive"
    undefined = "specificity" if label else "recall"
    assert table.loc[undefined, "reason"] == f"no {'negative' if label else 'positive'} image"
    assert table.loc["loss", "reason"] == "one group only"
    assert (table["value"].isna() <= (table["reason"] != "")).all()


def test_interval_of_a_paired_difference_is_narrower_than_that_of_each_model():
    labels, probabilities, groups = make_predictions(300)
    other = np.clip(probabilities + 0.02 * np.sin(np.arange(300)), 0, 1)
    ours, theirs = samples(labels, probabilities, groups), samples(labels, other, groups)
    difference = compare_metrics(ours, theirs).set_index("metric").loc["auroc"]
    assert difference["difference"] == pytest.approx(ours["auroc"][0] - theirs["auroc"][0])
    single = confidence_intervals(labels, probabilities >= 0.5, groups, ours).set_index("metric").loc["auroc"]
    assert difference["high"] - difference["low"] < (single["high"] - single["low"]) / 2
    assert compare_metrics(ours, ours)["difference"].eq(0).all()
    without_probabilities = compute_metrics(labels, other >= 0.5, None, bootstrap_weights(groups, 400))
    assert set(compare_metrics(ours, without_probabilities)["metric"]) == {
        "accuracy", "f1", "recall", "precision", "specificity", "balanced_accuracy",
    }  # fmt: skip
