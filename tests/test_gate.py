"""The comparison in front of the champion alias: its p-value, its level, and the images that it may use."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from pipeline.core.config import EvaluateParams
from pipeline.evaluation import gate
from pipeline.evaluation.metric_tables import ValidationSet
from pipeline.evaluation.metrics import count_groups
from pipeline.evaluation.operating_point import choose_threshold


def draw_models(seed: int, models: int, images: int = 60, positives: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels and equally good predictions (images, models), alike because some images are hard for all."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(images) < positives).astype(int)
    scores = 2 * labels[:, None] + 0.8 * rng.standard_normal((images, 1)) + 0.6 * rng.standard_normal((images, models))
    return labels, (scores >= 1.3).astype(int)


def plausible_epochs(labels, groups, epochs, all_rows) -> list[np.ndarray]:
    """Return the epochs (of all rows) that are within two standard errors of the best, by a loop over groups."""
    scores = [f1_score(labels, epoch, zero_division=0) for epoch in epochs.T]
    best = int(np.argmax(scores))

    def influence(rows: np.ndarray, column: int) -> float:
        predicted = epochs[:, column]
        hits, size = (labels * predicted)[rows].sum(), (labels + predicted)[rows].sum()
        return (2 * hits - scores[column] * size) / (labels + predicted).sum()

    kept = []
    for column, score in enumerate(scores):
        gaps = [influence(groups == name, column) - influence(groups == name, best) for name in np.unique(groups)]
        if scores[best] - score <= 2 * np.sqrt(np.sum(np.square(gaps))):
            kept.append(all_rows[:, column])
    return kept


def plain_p_value(labels, groups, challenger, champion, candidates, resamples, margin, folds) -> float:
    """Compute the p-value one resample, candidate, fold and epoch at a time, with scikit-learn's F1."""
    names = np.unique(groups)
    draws = np.random.default_rng(0).integers(2, size=(resamples, len(names)))
    observed = f1_score(labels, challenger) - f1_score(labels, champion) - margin
    reached = 0
    for draw in draws:
        exchanged = np.isin(groups, names[draw == 1])
        advantages = []
        for epochs in candidates:
            ours, theirs = np.empty(len(labels)), np.empty(len(labels))
            for fold in np.unique(folds):
                rows = folds == fold
                pairs = [
                    (np.where(exchanged, champion, epoch)[rows], np.where(exchanged, epoch, champion)[rows])
                    for epoch in plausible_epochs(labels[rows], groups[rows], epochs[rows], epochs)
                ]
                gains = [np.subtract(*(f1_score(labels[rows], one, zero_division=0) for one in pair)) for pair in pairs]
                ours[rows], theirs[rows] = pairs[int(np.argmax(gains))]
            advantages.append(f1_score(labels, ours, zero_division=0) - f1_score(labels, theirs, zero_division=0))
        reached += max(advantages) >= observed - 1e-9
    return (1 + reached) / (1 + resamples)


@pytest.mark.parametrize(("fold_count", "margin"), [(1, 0.0), (3, 0.0), (1, 0.05)])
def test_the_p_value_is_that_of_a_plain_loop(fold_count, margin):
    labels, models = draw_models(3, 8)
    groups = np.arange(60) // 2
    folds = groups % fold_count
    models[:, 4] = 0  # an epoch before the model has learned anything
    candidates = [models[:, 1:4], models[:, 4:7], models[:, 7:]]
    best = 1 + int(np.argmax([f1_score(labels, model) for model in models[:, 1:].T]))
    arguments = (labels, groups, models[:, best], models[:, 0], candidates, 40, margin)
    p_value = gate.randomization_p_value(*arguments, folds if fold_count > 1 else None)
    assert p_value == pytest.approx(plain_p_value(*arguments, folds))
    assert 1 / 41 < p_value < 1


def test_an_equal_model_is_promoted_in_at_most_five_percent_of_first_comparisons_though_it_is_the_best_of_many():
    """The limit is the 99.9 % quantile of the binomial distribution for a level of 5 %."""
    promoted = better = 0
    for seed in range(200):
        labels, models = draw_models(seed, 21)
        scores = [f1_score(labels, model) for model in models.T]
        best = 1 + int(np.argmax(scores[1:]))
        candidates = list(models[:, 1:].reshape(60, 5, 4).transpose(1, 0, 2))
        p_value = gate.randomization_p_value(labels, np.arange(60), models[:, best], models[:, 0], candidates, 200)
        promoted += p_value <= gate.comparison_level(0.05, 1)
        better += scores[best] > scores[0]
    assert better > 180
    assert promoted <= 20


def test_a_much_better_model_is_promoted():
    labels, models = draw_models(0, 2)
    p_value = gate.randomization_p_value(labels, np.arange(60), labels, models[:, 0], [labels[:, None], models], 2000)
    assert p_value < 0.01


def test_a_copy_of_the_champion_is_never_promoted_and_a_single_patient_shows_nothing():
    labels, models = draw_models(0, 1)
    assert gate.randomization_p_value(labels, np.arange(60), models[:, 0], models[:, 0], [models], 100) == 1
    one_patient = gate.randomization_p_value(labels, np.zeros(60), labels, models[:, 0], [labels[:, None]], 200)
    assert one_patient > 0.3


@pytest.mark.parametrize("value", [0, 1])
def test_images_of_one_class_have_a_p_value(value):
    labels, predicted = np.full(12, value), np.arange(12)[:, None] % 2
    p_value = gate.randomization_p_value(labels, np.arange(12), predicted[:, 0], 1 - predicted[:, 0], [predicted], 50)
    assert 0 < p_value <= 1


@given(st.integers(0, 1000), st.floats(0, 0.5))
@settings(max_examples=20, deadline=None)
def test_the_p_value_grows_with_the_margin_and_with_the_number_of_candidates(seed, margin):
    labels, models = draw_models(seed, 4, 30, 8)
    common = (labels, np.arange(30), models[:, 1], models[:, 0])
    one, several = [models[:, [1]]], [models[:, [column]] for column in (1, 2, 3)]
    p_value = gate.randomization_p_value(*common, one, 100)
    assert p_value <= gate.randomization_p_value(*common, one, 100, margin)
    assert p_value <= gate.randomization_p_value(*common, several, 100)


def test_the_levels_of_twenty_comparisons_bound_the_probability_of_a_false_promotion_by_a_quarter():
    levels = [gate.comparison_level(0.05, number) for number in range(1, 21)]
    assert levels[0] == 0.05
    assert sum(levels) == pytest.approx(0.18, abs=0.001)


def test_labels_after_every_epoch_are_cross_fitted_where_thresholds_are_chosen():
    rng = np.random.default_rng(0)
    labels = (np.arange(60) < 20).astype(int)
    scores = np.clip(0.3 * labels[:, None] + 0.5 * rng.random((60, 3)), 0, 1)
    scores[:, 2] = np.nan  # training had stopped
    validation = ValidationSet(labels, np.arange(60), 1)
    assert gate.predict_by_epoch(validation, scores, EvaluateParams()).tolist() == (scores >= 0.5).astype(int).tolist()
    params = EvaluateParams(operating_point="best_f1")
    predicted = gate.predict_by_epoch(validation, scores, params)
    for fit_rows, rows in validation.folds:
        for epoch in (0, 1):
            column = scores[:, epoch]
            threshold = choose_threshold(labels[fit_rows], column[fit_rows], fit_rows, params)
            assert predicted[rows, epoch].tolist() == (column[rows] >= threshold).astype(int).tolist()


def test_images_that_a_model_was_trained_on_are_left_out_with_those_of_the_same_patient():
    images = pd.DataFrame(
        [
            ("validated", "p1"), ("trained", "p2"), ("new, of a patient trained on", "p2"),
            ("validated, of a patient trained on", "p2"), ("new", "p3"), ("new, of a patient validated", "p1"),
        ],
        columns=["checksum", "group"],
    )  # fmt: skip
    known = pd.DataFrame(
        {
            "checksum": ["validated", "trained", "validated, of a patient trained on", "gone"],
            "label": [1, np.nan, 0, np.nan],
        }
    )
    remaining = gate.find_comparable_images(images["checksum"], images["group"].to_numpy(), known)
    assert remaining.index.tolist() == [0, 4]
    assert remaining[0] == 1
    assert np.isnan(remaining[4])


def test_patients_are_counted_once_per_class():
    assert count_groups(np.array([1, 1, 0, 0, 0]), np.array(["a", "a", "a", "b", "c"])) == (1, 3)
