"""Referral of the least certain images."""

import numpy as np
import pytest
from scipy.special import expit

from pipeline.evaluation.calibration import Recalibrator
from pipeline.evaluation.metric_tables import Predictions, ValidationSet, unavailable_predictions
from pipeline.evaluation.referral import SHARES, referral_table, threshold_uncertainty

COUNT = 400


def make_predictions(errors: int = 40) -> tuple[ValidationSet, Predictions, np.ndarray]:
    """Return a validation set of patients with one image, predictions, and which of them are wrong."""
    rng = np.random.default_rng(0)
    labels = (rng.random(COUNT) < 0.3).astype(int)
    wrong = np.zeros(COUNT, dtype=bool)
    wrong[rng.permutation(COUNT)[:errors]] = True
    return ValidationSet(labels, np.arange(COUNT), 200), Predictions(np.where(wrong, 1 - labels, labels), None), wrong


def test_perfect_uncertainty_refers_every_error_first():
    validation, predictions, wrong = make_predictions()
    table = referral_table(validation, predictions, wrong.astype(float)).set_index("share")
    assert table.loc[0, "accuracy"] == pytest.approx(0.9)
    assert table.loc[0.05, "accuracy"] == pytest.approx(1 - 20 / 380)
    assert (table.loc[0.1:, ["accuracy", "f1", "recall"]] == 1).all(axis=None)
    assert table.loc[0.1, "uncertainty"] == 1
    assert table.loc[0.15, "uncertainty"] == 0
    assert list(table["images"]) == [COUNT - 20 * step for step in range(11)]
    assert (table.loc[0.1:, "accuracy_low"] < 1).all()
    assert (table["accuracy_low"] <= table["accuracy"]).all()


def test_useless_uncertainty_gains_nothing():
    validation, predictions, _ = make_predictions()
    for uncertainty in (np.zeros(COUNT), np.random.default_rng(5).random(COUNT)):
        table = referral_table(validation, predictions, uncertainty)
        assert table["accuracy"].to_numpy() == pytest.approx(0.9, abs=0.04)  # two standard errors of 200 images
        assert table["uncertainty"].isna().sum() == 1


def test_ties_refer_a_random_share_whatever_the_order_of_the_images():
    labels = np.arange(COUNT) % 2
    validation, errors = ValidationSet(labels, np.arange(COUNT), 1), np.arange(COUNT) < 40
    for wrong in (errors, errors[::-1]):
        predictions = Predictions(np.where(wrong, 1 - labels, labels), None)
        table = referral_table(validation, predictions, np.zeros(COUNT), np.array([0.25, 0.5]))
        assert table["accuracy"].to_numpy() == pytest.approx(0.9, abs=0.04)


def test_the_number_of_referred_images_is_exact_where_the_share_is():
    labels = np.arange(180) % 2
    validation, predictions = ValidationSet(labels, np.arange(180), 1), Predictions(labels, None)
    table = referral_table(validation, predictions, labels.astype(float), SHARES[7:8])
    assert list(table["images"]) == [180 - 63]  # in floats, 0.35 × 180 is below 63


def test_reversed_uncertainty_loses_accuracy():
    validation, predictions, wrong = make_predictions()
    table = referral_table(validation, predictions, -wrong.astype(float))
    assert table["accuracy"].iloc[-1] == pytest.approx(1 - 40 / 200)


def test_uncertainty_is_highest_at_the_threshold_and_symmetric_in_log_odds():
    uncertainty = threshold_uncertainty(expit(np.array([-3.0, -1.0, 0.0, 1.0, 3.0])), 0.5)
    assert uncertainty == pytest.approx([-3, -1, 0, -1, -3], abs=1e-9)
    assert np.isfinite(threshold_uncertainty(np.array([0.0, 1.0]), 0.5)).all()


def test_recalibration_does_not_change_the_order():
    probabilities = np.random.default_rng(0).random(100)
    recalibrate = Recalibrator(2.5, -1.0)
    before = threshold_uncertainty(probabilities, 0.3)
    after = threshold_uncertainty(recalibrate(probabilities), float(recalibrate(np.array([0.3]))[0]))
    assert (np.argsort(before) == np.argsort(after)).all()


def test_a_set_that_keeps_no_positive_has_reasons_and_an_unavailable_model_has_no_rows():
    labels = np.array([0] * 30 + [1] * 3)
    validation = ValidationSet(labels, np.arange(33), 200)
    table = referral_table(validation, Predictions(labels, None), labels.astype(float))
    last = table.iloc[-1]
    assert np.isnan(last["recall"])
    assert last["reason"]
    assert last["positives"] == 0
    assert referral_table(validation, unavailable_predictions("none"), labels.astype(float)).empty
    one = referral_table(
        ValidationSet(np.array([1]), np.array(["g"]), 50), Predictions(np.array([1]), None), np.zeros(1)
    )
    assert (one["images"] == 1).all()
