"""The expected accuracy for a test set without labels."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.expected_accuracy import Strata, _design_effect, choose_strata, estimate_accuracy


def make(cells):
    """Expand cells (source, label, predicted): images to columns."""
    rows = [key for key, count in cells.items() for _ in range(count)]
    sources, labels, predicted = (np.array(column) for column in zip(*rows, strict=True))
    return sources, labels.astype(int), predicted.astype(int)


VALIDATION = {
    ("A", 1, 1): 36, ("A", 1, 0): 4, ("A", 0, 0): 70, ("A", 0, 1): 30,
    ("B", 1, 1): 10, ("B", 1, 0): 10, ("B", 0, 0): 392, ("B", 0, 1): 8,
}  # fmt: skip


def estimate(validation, test, by="source", **arguments):
    sources, labels, predicted = make(validation)
    test_sources, test_labels, test_predicted = make(test)
    strata = Strata(sources, test_sources, by)
    if not by:
        strata = Strata(np.full(len(sources), ""), np.full(len(test_sources), ""), "")
    groups = np.arange(len(labels))
    estimated = estimate_accuracy(labels, predicted, groups, test_predicted, strata, **arguments)
    return estimated, float((test_labels == test_predicted).mean())


def test_the_mix_of_the_test_set_counts_not_that_of_the_validation_set():
    # In both sets: sensitivity 0.9 and specificity 0.7 in A, 0.5 and 0.98 in B.
    test = {
        ("A", 1, 1): 45, ("A", 1, 0): 5, ("A", 0, 0): 35, ("A", 0, 1): 15,
        ("B", 1, 1): 25, ("B", 1, 0): 25, ("B", 0, 0): 49, ("B", 0, 1): 1,
    }  # fmt: skip
    estimated, truth = estimate(VALIDATION, test, expected_prevalence=0.5)
    assert truth == pytest.approx((0.8 + 0.74) / 2)
    assert estimated.value == pytest.approx(truth, abs=0.03)
    assert estimated.low < truth < estimated.high
    assert estimated.method == "post-stratification by source, at the expected prevalence 0.5"
    assert not estimated.reason
    a, b = (row._asdict() for row in estimated.strata.itertuples(index=False))
    assert (a["sensitivity"], a["specificity"], b["sensitivity"], b["specificity"]) == (0.9, 0.7, 0.5, 0.98)
    assert a["prevalence"] == pytest.approx(0.5, abs=0.1)
    assert a["positive_patients"] == 40


def test_without_strata_it_is_bayes_rule_at_the_expected_prevalence():
    test = {("", 1, 1): 32, ("", 1, 0): 8, ("", 0, 0): 55, ("", 0, 1): 5}
    validation = {("", 1, 1): 16, ("", 1, 0): 4, ("", 0, 0): 135, ("", 0, 1): 15}
    estimated, truth = estimate(validation, test, by="", expected_prevalence=0.4)
    assert estimated.value == pytest.approx(0.4 * 0.8 + 0.6 * 0.9)
    assert estimated.low < truth < estimated.high
    assert estimated.method == "Bayes' rule, at the expected prevalence 0.4"
    differing, _ = estimate(validation, test, by="", expected_prevalence=0.4, shift="the test images differ")
    assert differing.reason == "cannot be estimated: the test images differ"
    assert np.isnan([differing.value, differing.low, differing.high]).all()


def test_an_expected_prevalence_that_the_predictions_exclude_is_not_used():
    test = {("", 1, 1): 45, ("", 1, 0): 5, ("", 0, 0): 50}
    validation = {("", 1, 1): 90, ("", 1, 0): 10, ("", 0, 0): 900}
    estimated, _ = estimate(validation, test, by="", expected_prevalence=0.02)
    unused, _ = estimate(validation, test, by="")
    assert (estimated.value, estimated.low, estimated.high) == (unused.value, unused.low, unused.high)
    assert estimated.method == "Bayes' rule (the expected prevalence 0.02 is excluded by the predictions)"
    assert unused.method == "Bayes' rule"
    assert estimated.strata["prevalence"][0] == pytest.approx(0.5, abs=0.02)


def test_where_source_and_label_coincide_it_cannot_be_estimated():
    validation = {("A", 1, 1): 19, ("A", 1, 0): 1, ("B", 0, 0): 150, ("B", 0, 1): 5}
    # All of A is predicted positive and all of B negative, as by a model that knows only the source.
    test = {("A", 1, 1): 25, ("A", 0, 1): 25, ("B", 1, 0): 25, ("B", 0, 0): 25}
    for expected in (0.5, None):
        estimated, truth = estimate(validation, test, expected_prevalence=expected)
        assert np.isnan(estimated.value)
        assert estimated.reason.startswith("cannot be estimated: no negative validation image is of A")
        assert "no positive validation image is of B" in estimated.reason
        assert estimated.low < truth < estimated.high


def test_a_source_without_positives_gives_a_range_from_none_to_many():
    validation = VALIDATION | {("C", 0, 0): 95, ("C", 0, 1): 5}
    known = {("A", 1, 1): 27, ("A", 1, 0): 3, ("A", 0, 0): 21, ("A", 0, 1): 9}
    for unknown in ({("C", 0, 0): 38, ("C", 0, 1): 2}, {("C", 0, 0): 28, ("C", 1, 0): 8, ("C", 1, 1): 4}):
        estimated, truth = estimate(validation, known | unknown)
        assert np.isnan(estimated.value)
        assert "no positive validation image is of C, as 40 % of the test images are" in estimated.reason
        assert "if the test set has none either" in estimated.reason
        assert estimated.low < truth < estimated.high
    assert np.isnan(estimated.strata.set_index("stratum").loc["C", "sensitivity"])


def test_a_source_that_the_validation_set_lacks_may_be_all_right_or_all_wrong():
    test = {("A", 1, 1): 45, ("A", 1, 0): 5, ("new", 0, 0): 50}
    estimated, _ = estimate(VALIDATION, test)
    assert "no validation image is of new, as 50 % of the test images are" in estimated.reason
    assert "if the test set" not in estimated.reason
    assert estimated.high - estimated.low > 0.5


def test_no_test_images_and_no_errors():
    sources, labels, predicted = make(VALIDATION)
    nothing = np.array([], dtype=int)
    estimated = estimate_accuracy(labels, predicted, sources, nothing, Strata(sources, nothing, "source"))
    assert estimated.reason == "cannot be estimated: no test images"
    perfect, _ = estimate(
        {("A", 1, 1): 20, ("A", 0, 0): 150}, {("A", 1, 1): 20, ("A", 0, 0): 20}, expected_prevalence=0.5
    )
    assert perfect.value == perfect.high == 1
    assert 0.8 < perfect.low < 0.99


def test_images_of_one_patient_count_as_fewer():
    labels, predicted = np.repeat([1, 0], [40, 200]), np.repeat([1, 0, 0, 1], [30, 10, 180, 20])
    test_predicted = np.repeat([1, 0], [50, 50])
    strata = Strata(np.full(240, ""), np.full(100, ""), "")
    widths = [
        (estimated := estimate_accuracy(labels, predicted, np.arange(240) // size, test_predicted, strata, 0.5)).high
        - estimated.low
        for size in (1, 5)
    ]
    assert widths[1] > 1.3 * widths[0]


def test_patients_of_the_class_that_the_test_images_are_of_widen_the_range_most():
    # Sensitivity and specificity are 0.8. In five of the patients of one class all images are wrong.
    labels, hits, images = np.repeat([1, 0], 100), np.tile(np.repeat([0, 1], [20, 80]), 2), np.arange(200)
    test_predicted = np.repeat([1, 0], [1360, 640])  # as of four in five positive images
    widths = []
    for clustered in (1, 0):
        groups = np.where(labels == clustered, images // 4, 1000 + images)
        strata = Strata(np.full(200, ""), np.full(2000, ""), "")
        predicted = np.where(hits == 1, labels, 1 - labels)
        estimated = estimate_accuracy(labels, predicted, groups, test_predicted, strata)
        widths.append(estimated.high - estimated.low)
    assert widths[0] > 1.2 * widths[1]


def test_test_images_are_assumed_to_be_alike_within_patients_as_the_validation_images_are():
    labels, hits = np.repeat([1, 0], 2000), np.tile(np.repeat([1, 0], [1800, 200]), 2)
    predicted, test_predicted = np.where(hits == 1, labels, 1 - labels), np.arange(100) % 2
    strata = Strata(np.full(4000, ""), np.full(100, ""), "")
    for size, excluded in ((1, True), (8, False)):  # images per patient, all right or all wrong
        groups = np.arange(4000) // size
        estimated = estimate_accuracy(labels, predicted, groups, test_predicted, strata, 0.3)
        assert ("is excluded by the predictions" in estimated.method) == excluded


def test_patients_with_as_many_errors_as_their_source_has_count_as_independent_images():
    sources, labels, hits = np.repeat(["A", "B"], 80), np.tile([1, 0], 80), np.tile([1, 1, 1, 1, 1, 1, 1, 0], 20)
    hits[80:] = np.tile([1, 1, 0, 0], 20)
    predicted, test_predicted = np.where(hits == 1, labels, 1 - labels), np.arange(60) % 2
    strata = Strata(sources, np.repeat(["A", "B"], 30), "source")
    one, other = (
        estimate_accuracy(labels, predicted, np.arange(160) // size, test_predicted, strata) for size in (1, 8)
    )
    assert (one.value, one.low, one.high) == (other.value, other.low, other.high)


@pytest.mark.parametrize("size", [1, 4])
def test_known_patients_of_the_test_images_count_and_not_those_of_the_validation_images(size):
    # Rates are known from many images. Where a validation patient has four, half of their variance is in common.
    rng = np.random.default_rng(0)
    patients = np.arange(8000) // size
    noise = rng.normal(size=8000) + (rng.normal(size=8000)[patients] if size > 1 else 0)
    labels = patients % 2
    predicted = np.where(noise < np.quantile(noise, 0.8), labels, 1 - labels)
    strata, test_predicted = Strata(np.full(8000, ""), np.full(400, ""), ""), np.arange(400) // 40 % 2
    groups = {"unknown": None, "single": np.arange(400), "pairs": np.arange(400) // 2, "tens": np.arange(400) // 10}
    widths = {}
    for name, test_groups in groups.items():
        estimated = estimate_accuracy(labels, predicted, patients, test_predicted, strata, 0.5, test_groups=test_groups)
        widths[name] = (estimated.high - estimated.low) ** 2
    if size == 1:  # nothing is known of their correlation, so that it may be 1
        assert widths["unknown"] == widths["single"]
        correlation = 1.0
    else:
        correlation = (widths["unknown"] / widths["single"] - 1) / 3
        assert 0.2 < correlation < 0.5
    assert widths["pairs"] / widths["single"] == pytest.approx(1 + correlation, rel=0.15)
    assert widths["tens"] / widths["single"] == pytest.approx(1 + 9 * correlation, rel=0.25)


def test_the_design_effect_of_equal_groups_is_the_ratio_of_the_variances_of_means():
    rng = np.random.default_rng(0)
    hits = rng.random((10, 1)) + rng.random((10, 4)) > 0.8
    expected = hits.mean(axis=1).var(ddof=1) / 10 / (hits.var() / hits.size)
    assert 1 < expected < 4
    everything = np.ones(40, dtype=bool)
    assert _design_effect(hits.ravel(), everything, np.arange(40) // 4, np.zeros(40)) == pytest.approx(expected)
    assert _design_effect(everything, everything, np.arange(40) // 4, np.zeros(40)) == 4


def metadata(sources, views):
    return pd.DataFrame({"source": sources, "view": views})


def test_strata_are_by_source_then_view_and_only_where_both_classes_have_patients():
    labels, groups = np.tile([0, 1], 40), np.arange(80)
    sources, views = np.repeat(["A", "B"], 40), np.tile(np.repeat(["AP", "PA"], 10), 4)
    validation = metadata(sources, views)
    test = metadata(["A", "A", "B", ""], ["AP", "PA", "AP", "PA"])
    strata = choose_strata(labels, groups, validation, test)
    assert strata.by == "source and view"
    assert list(strata.test) == ["A AP", "A PA", "B", "unknown source"]
    assert set(strata.validation) == {"A AP", "A PA", "B"}
    for patients, by in ((4, "source"), (5, "source and view")):  # of each class, at each view
        assert choose_strata(labels, groups // 2 % patients, validation, test).by == by
    few = choose_strata(labels, groups // 20, validation, test)
    assert (few.by, set(few.validation)) == ("source", {"A", "B"})


def test_without_known_differences_there_are_no_strata():
    labels, groups = np.array([0, 1]), np.arange(2)
    by_view = choose_strata(labels, groups, metadata(["", ""], ["AP", "PA"]), metadata(["", ""], ["AP", ""]))
    assert (by_view.by, list(by_view.test)) == ("view", ["AP", "unknown view"])
    for source in ("", "A"):
        none = choose_strata(labels, groups, metadata([source] * 2, ["", ""]), metadata([source], [""]))
        assert (none.by, set(none.test), set(none.validation)) == ("", {""}, {""})


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("AB"), st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30),
       st.lists(st.tuples(st.sampled_from("ABC"), st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30),
       st.sampled_from([None, 0.1, 0.5]))  # fmt: skip
def test_a_range_is_always_within_0_and_1_and_around_the_value(validation, test, expected):
    def count(rows):
        return {row: rows.count(row) for row in rows}

    estimated, _ = estimate(count(validation), count(test), expected_prevalence=expected)
    assert 0 <= estimated.low <= estimated.high <= 1
    assert np.isnan(estimated.value) == bool(estimated.reason)
    if not estimated.reason:
        assert estimated.low <= estimated.value <= estimated.high
