"""Tests for label shift without the labels of the new images: their level, their power, and what they compute."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import energy_distance

from pipeline.evaluation.dataset_shift import (
    adjust_for_multiplicity,
    describe_shift,
    discrimination,
    fit_mixture,
    shift_table,
    standardize,
)


def draw(rng, positives, negatives, features=1, separation=2.0, shift=0.0):
    """Draw patients of two images each, with correlated features; the first feature tells the classes apart."""
    labels = np.repeat([1, 0], [positives, negatives])
    groups = np.arange(len(labels)) // 2
    values = rng.normal(size=(len(labels) // 2 + 1, features))[groups] + rng.normal(size=(len(labels), features))
    values[:, 0] += separation * labels
    return values + shift, labels, groups


def p_values(count, new_positives=40, resamples=99, **shift):
    results = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        features, labels, groups = draw(rng, 20, 150, shift.get("features", 1))
        new, _, new_groups = draw(rng, new_positives, 80 - new_positives, **shift)
        results.append(fit_mixture(features, labels, groups, new, new_groups, resamples).p)
    return np.array(results)


@pytest.mark.parametrize("features", [1, 20])
@pytest.mark.parametrize("new_positives", [10, 40])
def test_label_shift_alone_is_rarely_rejected(features, new_positives):
    # With a level of 0.05, more than 9 of 80 have a probability of 0.008.
    assert (p_values(80, new_positives, features=features) <= 0.05).sum() <= 9


@pytest.mark.parametrize(("positives", "most"), [(6, 13), (10, 6), (20, 3)])
def test_few_patients_of_a_class_do_not_make_its_share_small_or_label_shift_a_shift(positives, most):
    fits = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        labels, new_labels = np.repeat([1, 0], [positives, 175 - positives]), np.repeat([1, 0], 100)
        features, new = (rng.normal(size=(len(one), 32)) for one in (labels, new_labels))
        features[:, 0] += 2.3 * labels  # the other features tell nothing
        new[:, 0] += 2.3 * new_labels
        fits.append(fit_mixture(features, labels, np.arange(175), new, np.arange(200), 99))
    assert np.mean([fit.prevalence for fit in fits]) == pytest.approx(0.5, abs=0.1)
    assert sum(fit.p <= 0.05 for fit in fits) <= most


def test_new_images_of_unknown_patients_are_grouped_like_those_of_their_class():
    """Positive patients have a series of six images, negative ones have one; nothing but the prevalence differs."""

    def draw_series(rng, patients, negatives):
        labels, groups = np.repeat([1, 0], [6 * patients, negatives]), np.repeat(np.arange(patients), 6)
        groups = np.concatenate([groups, patients + np.arange(negatives)])
        values = rng.normal(size=(patients + negatives, 20))[groups] + 0.5 * rng.normal(size=(len(labels), 20))
        values[:, 0] += 2 * labels
        return values, labels, groups

    rejected = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        new, _, _ = draw_series(np.random.default_rng(1000 + seed), 10, 40)
        rejected += fit_mixture(*draw_series(rng, 20, 150), new, None, 99).p <= 0.05
    assert rejected <= 6  # 18 if all were grouped like the negatives


def test_a_shift_that_is_no_mixture_is_rejected():
    np.testing.assert_allclose(p_values(10, shift=-2.5), 0.01)  # the smallest of 99 resamples, which is not 0
    assert (p_values(10, features=20, shift=1.0) <= 0.05).all()


def test_the_distance_is_the_energy_distance_to_the_mixture():
    rng = np.random.default_rng(0)
    features, labels, groups = draw(rng, 20, 60)
    new, _, _ = draw(rng, 30, 30)
    fit = fit_mixture(features, labels, groups, new, resamples=9)
    scaled = standardize(np.concatenate([features, new]))[:, 0]
    old, new_scaled = scaled[:80], scaled[80:]

    def distance(share):
        weights = np.where(labels == 1, share / 20, (1 - share) / 60)
        return energy_distance(old, new_scaled, weights, np.ones(60)) ** 2

    best = minimize_scalar(distance, bounds=(0, 1), method="bounded", options={"xatol": 1e-9})
    assert fit.distance == pytest.approx(best.fun)
    assert fit.prevalence == pytest.approx(best.x, abs=0.05)  # less what each class is similar to itself


@pytest.mark.parametrize(
    ("labels", "new", "reason"),
    [
        ([1] * 4 + [0] * 20, 10, "fewer than 5 positive patients"),
        ([1] * 24, 10, "fewer than 5 negative patients"),
        ([1] * 12 + [0] * 12, 1, "fewer than two test images"),
        ([1] * 12 + [0] * 12, 0, "fewer than two test images"),
        ([1] * 12 + [0] * 12, 10, "all images have the same features"),
    ],
)
def test_sets_that_cannot_be_compared_have_a_reason(labels, new, reason):
    arguments = np.ones((24, 3)), np.array(labels), np.arange(24), np.ones((new, 3))
    fit = fit_mixture(*arguments)
    assert fit.reason == reason
    assert np.isnan([fit.p, fit.distance, fit.prevalence]).all()
    assert np.isnan(discrimination(*arguments, None, fit.prevalence))


def test_missing_and_constant_features_tell_nothing():
    features = np.array([[1.0, 5, np.nan, 7], [3, 5, np.nan, np.nan]])
    np.testing.assert_array_equal(standardize(features), [[-1, 0, 0, 0], [1, 0, 0, 0]])
    assert standardize(np.zeros((0, 2))).shape == (0, 2)


def test_images_are_told_apart_if_they_differ_and_not_by_their_prevalence():
    rng = np.random.default_rng(0)
    features, labels, groups = draw(rng, 60, 300, features=5)
    same, _, same_groups = draw(rng, 150, 150, features=5)
    other, _, _ = draw(rng, 150, 150, features=5, shift=1.5)
    arguments = features, labels, groups
    assert discrimination(*arguments, same, same_groups, 0.5) == pytest.approx(0.5, abs=0.07)
    assert discrimination(*arguments, same, same_groups, 1 / 6) > 0.6  # with the wrong weights, the classes differ
    assert discrimination(*arguments, other, None, 0.5) > 0.8


def test_images_of_one_patient_do_not_help_to_tell_the_others_apart():
    rng = np.random.default_rng(0)
    # Every patient has four equal images, by which it would be known again, and nothing tells the two sets apart.
    features, new = (np.repeat(rng.normal(size=(60, 80)), 4, axis=0) for _ in range(2))
    labels, groups = np.arange(240) // 4 % 2, np.arange(240) // 4
    assert discrimination(features, labels, groups, new, groups, 0.5) == pytest.approx(0.5, abs=0.15)
    assert discrimination(features, labels, np.arange(240), new, np.arange(240), 0.5) > 0.9


def test_p_values_are_adjusted_as_in_holms_procedure():
    # With three tests: 3 · 0.01, max(0.03, 2 · 0.02), max(0.04, 0.03).
    adjusted = adjust_for_multiplicity(np.array([0.02, np.nan, 0.01, 0.03]))
    np.testing.assert_allclose(adjusted, [0.04, np.nan, 0.03, 0.04])
    np.testing.assert_array_equal(adjust_for_multiplicity(np.array([0.9, 0.8])), [1, 1])


def test_the_table_names_what_differs():
    rng = np.random.default_rng(0)
    features, labels, groups = draw(rng, 40, 200, features=5)
    new, _, new_groups = draw(rng, 50, 50, features=5)
    sets = {"score": (features[:, :1], new[:, :1]), "thumbnail": (features, new + 2), "unknown": (features, new[:0])}
    table = shift_table(sets, dict.fromkeys(sets, labels), dict.fromkeys(sets, groups), new_groups)
    assert list(table["features"]) == ["score", "thumbnail", "unknown"]
    text = describe_shift(table)
    assert "differ by thumbnail" in text
    assert "mixture" not in text
    assert table["reason"].iloc[2]
    assert describe_shift(table.iloc[[0, 2]]) == ""
    pd.testing.assert_frame_equal(
        table, shift_table(sets, dict.fromkeys(sets, labels), dict.fromkeys(sets, groups), new_groups)
    )


def test_large_sets_are_limited_to_whole_patients_of_each_class():
    rng = np.random.default_rng(0)
    features, labels, groups = draw(rng, 20, 3000)
    new, _, new_groups = draw(rng, 100, 100)
    fit = fit_mixture(features, labels, groups, new, new_groups, 49)
    assert fit.prevalence == pytest.approx(0.5, abs=0.2)
    assert 0 < fit.p <= 1


@pytest.mark.parametrize("patients_known", [True, False])
def test_of_many_new_images_some_whole_patients_are_compared(patients_known):
    rng = np.random.default_rng(0)
    features, labels, groups = draw(rng, 100, 100)
    count = 60_000  # all pairs would take 29 GB
    new, new_groups = rng.normal(size=(count, 1)), np.arange(count) // 4
    sets = {"score": (features[:, :1], new)}
    table = shift_table(sets, {"score": labels}, {"score": groups}, new_groups if patients_known else None)
    assert list(table["images"]) == [2000]
    assert 0 < table.loc[0, "p"] <= 1
