"""Thresholds and the promise of the rule `sensitivity`, figures at a fitted threshold, and calibrated probabilities."""

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import binom, norm
from sklearn.metrics import roc_auc_score

from pipeline.core.config import Config, EvaluateParams, load_config
from pipeline.evaluation import calibration, operating_point
from pipeline.evaluation.cross_fitted_predictor import (
    CrossFittedPredictor,
    fair_threshold_comparison,
    operating_point_table,
)
from pipeline.evaluation.intervals import bootstrap_weights
from pipeline.evaluation.metric_tables import ValidationSet, interval_table

rows = st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1, width=32)), min_size=2, max_size=25)
DEFAULT_CONFIG = load_config(ROOT / "params.yaml")


def make_params(rule: str, min_sensitivity: float = 0.9) -> EvaluateParams:
    return EvaluateParams(operating_point=rule, min_sensitivity=min_sensitivity)


def make_config(rule: str, **evaluate: object) -> Config:
    section = DEFAULT_CONFIG.active.evaluate.model_copy(update={"operating_point": rule, **evaluate})
    profile = DEFAULT_CONFIG.active.model_copy(update={"evaluate": section})
    return DEFAULT_CONFIG.model_copy(update={"profiles": {DEFAULT_CONFIG.profile: profile}})


def choose(labels: np.ndarray, scores: np.ndarray, params: EvaluateParams) -> float:
    """Choose a threshold where every image is its own group."""
    return operating_point.choose_threshold(labels, scores, np.arange(len(labels)), params)


def limit(scores: np.ndarray, min_sensitivity: float = 0.9, groups: np.ndarray | None = None) -> float:
    groups = np.arange(len(scores)) if groups is None else groups
    return float(operating_point.sensitivity_limits(scores, groups, np.ones((1, len(scores))), min_sensitivity)[0])


def make_validation(count: int = 300, *, seed: int = 0, resamples: int = 200) -> tuple[ValidationSet, np.ndarray]:
    """Return images, a quarter of them positive, in pairs, and overlapping scores."""
    rng, labels = np.random.default_rng(seed), (np.arange(count) % 8 < 2).astype(int)
    scores = expit(2 * labels - 1 + rng.normal(0, 1.5, count))
    return ValidationSet(labels, np.arange(count) // 2, resamples), scores


# Thresholds


@settings(max_examples=40, deadline=None)
@given(rows)
def test_no_threshold_has_a_better_objective_than_the_chosen_one(rows):
    labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    assume(len(set(labels)) == 2)

    def evaluate(threshold: float) -> tuple[float, float]:
        """Return F1, and the sum of sensitivity and specificity."""
        predicted = scores >= threshold
        tp = int((predicted & (labels == 1)).sum())
        specificity = (~predicted & (labels == 0)).sum() / (labels == 0).sum()
        return 2 * tp / (predicted.sum() + labels.sum()), tp / labels.sum() + specificity

    for index, rule in enumerate(("best_f1", "youden")):
        chosen = evaluate(choose(labels, scores, make_params(rule)))[index]
        assert chosen == pytest.approx(max(evaluate(value)[index] for value in scores))


def test_threshold_is_midway_between_two_scores_and_nearest_to_one_half():
    labels, scores = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.4, 0.9])
    assert choose(labels, scores, make_params("best_f1")) == pytest.approx(0.3)
    assert choose(labels, np.full(4, 0.7), make_params("youden")) == pytest.approx(0.35)
    assert choose(labels, scores, make_params("half")) == 0.5
    assert choose(np.zeros(4), scores, make_params("best_f1")) == 0.5


@pytest.mark.parametrize("rule", ["best_f1", "youden"])
def test_thresholds_on_resamples_are_those_of_images_that_are_repeated(rule):
    validation, scores = make_validation(60, resamples=20)
    thresholds = operating_point.choose_thresholds(
        validation.labels, scores, validation.groups, validation.weights, make_params(rule)
    )
    for weights, threshold in zip(validation.weights, thresholds, strict=True):
        repeated = np.repeat(np.arange(60), weights)
        expected = choose(validation.labels[repeated], scores[repeated], make_params(rule))
        assert np.array_equal(scores[repeated] >= threshold, scores[repeated] >= expected)


def test_resample_without_one_class_gets_the_default_threshold():
    weights = np.array([[1, 1, 1], [2, 1, 0], [0, 0, 3]])
    labels, scores, groups = np.array([0, 0, 1]), np.array([0.1, 0.2, 0.4]), np.arange(3)
    for rule in ("best_f1", "youden", "sensitivity"):
        thresholds = operating_point.choose_thresholds(labels, scores, groups, weights, make_params(rule))
        assert list(thresholds[1:]) == [0.5, 0.5]
        assert thresholds[0] < 0.4


# Sensitivity that is kept with 95 % confidence


@pytest.mark.parametrize(("positives", "misses"), [(29, 0), (45, 0), (46, 1), (60, 1), (61, 2), (75, 2), (76, 3)])
def test_allowed_misses_are_those_of_wilks(positives, misses):
    # Sample sizes for 90 % with 95 % confidence from the order statistics 1 to 4 (Wilks 1941)
    scores = np.linspace(0.01, 0.99, positives)
    assert limit(scores) == scores[misses]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 120), st.sampled_from([0.5, 0.8, 0.9, 0.95]), st.randoms(use_true_random=False))
def test_limit_allows_as_many_misses_as_the_binomial_distribution_excludes(positives, min_sensitivity, random):
    scores = np.array(random.sample(range(1, 1000), positives)) / 1000
    allowed = [miss for miss in range(positives) if binom.cdf(miss, positives, 1 - min_sensitivity) <= 0.05]
    if allowed:
        assert limit(scores, min_sensitivity) == np.sort(scores)[allowed[-1]]
    else:
        assert limit(scores, min_sensitivity) <= scores.min()


@pytest.mark.parametrize(("positives", "factor"), [(10, 2.355), (15, 2.068), (20, 1.926), (25, 1.838)])
def test_limit_of_few_positives_is_a_tolerance_limit_of_normal_log_odds(positives, factor):
    # One-sided tolerance factors for 90 % with 95 % confidence (Natrella 1963, table A-7)
    logits = norm.ppf((np.arange(positives) + 0.5) / positives)
    logits /= logits.std(ddof=1)
    assert logit(limit(expit(1 + logits))) == pytest.approx(1 - max(factor, -logits.min()), abs=0.002)


def test_images_of_one_patient_count_as_one():
    scores = np.linspace(0.01, 0.99, 29)
    pairs, groups = np.repeat(scores, 2), np.repeat(np.arange(29), 2)
    assert limit(pairs, groups=groups) == scores[0]
    labels, params = np.ones(58, dtype=int), make_params("sensitivity")
    with_negative = np.append(labels, 0), np.append(groups, 29)
    assert operating_point.sensitivity_caveat(*with_negative, params) == ""
    assert "there are 28;" in operating_point.sensitivity_caveat(*(column[2:] for column in with_negative), params)


def test_limit_of_a_resample_is_that_of_repeated_images_with_new_patients():
    rng = np.random.default_rng(0)
    for positives in (14, 60):
        scores, groups = rng.random(positives), np.arange(positives) // 2
        weights = bootstrap_weights(groups, 10)
        limits = operating_point.sensitivity_limits(scores, groups, weights, 0.8)
        for weight, expected in zip(weights, limits, strict=True):
            copies = np.concatenate([np.arange(count) for count in weight])
            repeated = np.repeat(np.arange(positives), weight)
            names = [f"{groups[row]}, copy {copy}" for row, copy in zip(repeated, copies, strict=True)]
            assert limit(scores[repeated], 0.8, np.array(names)) == pytest.approx(expected)


@pytest.mark.parametrize(("positives", "needs_normal"), [(20, True), (60, False)])
def test_sensitivity_is_kept_in_95_of_100_data_sets(positives, needs_normal):
    rng, labels = np.random.default_rng(0), np.repeat([1, 0], [positives, 100])
    params, kept = make_params("sensitivity"), []
    for _ in range(300):
        threshold = choose(labels, expit(rng.normal(size=len(labels)) + 2 * labels), params)
        kept.append(norm.sf(logit(threshold) - 2) >= 0.9)
    assert np.mean(kept) >= 0.93  # 0.95 less one and a half standard errors
    caveat = operating_point.sensitivity_caveat(labels, np.arange(len(labels)), params)
    assert bool(caveat) == needs_normal


def test_caveat_gives_the_number_of_patients_that_is_needed():
    def caveat(labels: list[int], groups: object, rule: str = "sensitivity", least: float = 0.9) -> str:
        return operating_point.sensitivity_caveat(np.array(labels), np.array(groups), make_params(rule, least))

    labels = [1] * 20 + [0] * 20
    promise = "a sensitivity of 0.9 cannot be guaranteed with 95 % confidence: "
    assert caveat(labels, np.arange(40)) == promise + (
        "it needs at least 29 positive patients, there are 20; the threshold assumes normally distributed log odds, "
        "and without that assumption the confidence is 88 %"
    )
    assert "there are 11, by their numbers of images as good as 4;" in caveat(labels, [0] * 10 + list(range(1, 31)))
    assert caveat([1] * 29 + [0], np.arange(30)) == ""
    assert caveat(labels, np.arange(40), "youden") == ""
    assert caveat(labels, np.arange(40), least=0.0) == ""
    assert "no number of patients is enough" in caveat(labels, np.arange(40), least=1.0)
    assert caveat([0] * 5, np.arange(5)) == promise + "images of one class only, so the threshold is 0.5"


@settings(max_examples=60, deadline=None)
@given(rows, st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.integers(1, 4))
def test_rule_sensitivity_gives_a_threshold_for_any_images(rows, min_sensitivity, per_group):
    labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    assume(len(set(labels)) == 2)
    groups = np.arange(len(labels)) // per_group
    threshold = operating_point.choose_threshold(labels, scores, groups, make_params("sensitivity", min_sensitivity))
    assert 0 <= threshold <= 1
    assert (scores[labels == 1] >= threshold).mean() >= min_sensitivity


# Figures at a fitted threshold


def test_only_what_was_fitted_is_cross_fitted():
    validation, scores = make_validation()
    table = pd.DataFrame({"one": scores, "two": scores**2})
    expected = {  # by rule and method: types of F1, AUROC and log loss
        ("half", "mean", "none"): ["fixed", "fixed", "fixed"],
        ("half", "vote", "platt"): ["fixed", "fixed", "cross-fitted"],
        ("youden", "mean", "none"): ["cross-fitted", "fixed", "fixed"],
        ("half", "greedy", "none"): ["cross-fitted", "cross-fitted", "cross-fitted"],
    }
    for (rule, method, recalibration), types in expected.items():
        predictor = CrossFittedPredictor(make_config(rule, recalibration=recalibration), validation, table, method)
        predictions = predictor.predictions
        assert [predictions.type_of(metric) for metric in ("f1", "auroc", "loss")] == types
        samples = predictor.bootstrap_metrics(validation)
        assert samples.loc[0, "auroc"] == pytest.approx(roc_auc_score(validation.labels, predictor.scores))
        intervals = interval_table(validation, {"bag": predictions}, {"bag": samples}).set_index("metric")
        assert list(intervals.loc[["f1", "auroc", "loss"], "estimate_type"]) == types


def test_what_cannot_be_cross_fitted_is_apparent():
    validation = ValidationSet(np.array([0, 0, 1, 1]), np.arange(4), 20)
    predictor = CrossFittedPredictor(make_config("youden"), validation, pd.DataFrame({"one": [0.1, 0.3, 0.2, 0.8]}))
    assert predictor.predictions.estimate_type == predictor.predictions.probability_type == "apparent"


def test_table_of_operating_points_counts_the_predictions_beside_it():
    validation, scores = make_validation()
    params = make_config("youden").active.evaluate
    predictor = CrossFittedPredictor(make_config("youden"), validation, pd.DataFrame({"one": scores}))
    table = operating_point_table(validation, {"one": predictor}, params).set_index("estimate_type")
    assert list(table.index) == ["cross-fitted", "apparent"]
    for _, row in table.iterrows():
        assert row[["tp", "fp", "fn", "tn"]].sum() == 300
        assert row["recall"] == row["tp"] / (row["tp"] + row["fn"])
        assert row["specificity"] == row["tn"] / (row["tn"] + row["fp"])
        assert row["f1"] == pytest.approx(2 * row["tp"] / (2 * row["tp"] + row["fp"] + row["fn"]))
    assert row["tp"] == ((scores >= row["threshold"]) & (validation.labels == 1)).sum()
    assert row["probability_threshold"] != row["threshold"]
    assert row["prevalence"] == validation.labels.mean()


def test_resamples_vary_with_the_threshold_that_is_fitted():
    validation, scores = make_validation()
    predictor = CrossFittedPredictor(make_config("youden"), validation, pd.DataFrame({"one": scores}))
    fixed, refitted = (
        validation.bootstrap_metrics(predictor.predictions),
        predictor.bootstrap_metrics(validation),
    )
    assert refitted.loc[0].equals(fixed.loc[0])
    assert refitted.loc[1:, "auroc"].equals(fixed.loc[1:, "auroc"])
    for metric in ("recall", "specificity"):
        assert refitted.loc[1:, metric].std() > 1.1 * fixed.loc[1:, metric].std()
        assert refitted.loc[1:, metric].mean() == pytest.approx(fixed.loc[0, metric], abs=0.05)
        assert refitted[metric].between(0, 1).all()
    intervals, wider = (
        interval_table(validation, {"one": predictor.predictions}, {"one": samples}).set_index("metric")
        for samples in (fixed.iloc[:1], refitted)
    )
    assert wider.loc["specificity", "low"] < intervals.loc["specificity", "low"]
    assert wider.loc["recall", "method"] == "Wilson, threshold refitted"
    assert wider.loc["auroc"].equals(intervals.loc["auroc"])
    half = CrossFittedPredictor(make_config("half"), validation, pd.DataFrame({"one": scores}))
    assert half.bootstrap_metrics(validation).equals(validation.bootstrap_metrics(half.predictions))


def test_baseline_is_as_good_as_a_model_with_the_same_order():
    validation, scores = make_validation()
    baselines = {
        name: CrossFittedPredictor(make_config("best_f1"), validation, pd.DataFrame({name: values}))
        for name, values in {"shortcut": scores * 0.1, "noise": np.random.default_rng(1).random(300)}.items()
    }
    table = fair_threshold_comparison(
        make_config("half"),
        validation,
        "model",
        scores,
        {name: baseline.predictions for name, baseline in baselines.items()},
        {name: baseline.bootstrap_metrics(validation) for name, baseline in baselines.items()},
    ).set_index(["model", "metric"])
    assert set(table["rule"]) == {"best_f1"}
    assert abs(table.loc[("shortcut", "f1"), "difference"]) < 0.02  # at 0.5, it would find no positive
    assert table.loc[("noise", "f1"), "high"] < 0


# Calibrated probabilities


def test_platts_targets_are_reached_where_two_scores_separate_the_classes():
    # Platt 1999: (positives + 1) / (positives + 2) and 1 / (negatives + 2)
    labels = np.repeat([1, 0], [18, 98])
    fitted = calibration.fit_platt(labels, np.where(labels == 1, 0.9, 0.1))
    assert fitted(np.array([0.9, 0.1])) == pytest.approx([19 / 20, 1 / 100], abs=0.002)


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_recalibrated_probability_of_eight_in_ten_is_right_in_eight_of_ten(method):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 40_000)
    labels, scores = (rng.random(40_000) < expit(logits)).astype(int), expit(3 * logits)
    probabilities = calibration.fit_recalibrator(labels, scores, method)(scores)
    assert labels[np.abs(probabilities - 0.8) < 0.05].mean() == pytest.approx(0.8, abs=0.02)
    assert labels[np.abs(scores - 0.8) < 0.05].mean() < 0.7


@pytest.mark.parametrize(
    ("labels", "method", "reason"),
    [
        ([0, 1], "none", "recalibration: none"),
        ([1, 1], "platt", "images of one class only"),
        ([1, 0], "platt", "higher scores do not mean more positives"),
    ],
)
def test_recalibration_that_cannot_be_fitted_changes_nothing_and_says_why(labels, method, reason):
    recalibrator = calibration.fit_recalibrator(np.array(labels), np.array([0.2, 0.7]), method)
    assert recalibrator.reason == reason
    assert list(recalibrator(np.array([0.0, 0.3, 1.0]))) == [0.0, 0.3, 1.0]


def test_a_bias_alone_shifts_the_log_odds_also_of_tiny_probabilities():
    probabilities = np.array([1e-6, 0.2, 1 - 1e-6])
    assert logit(calibration.Recalibrator(bias=0.5)(probabilities)) == pytest.approx(logit(probabilities) + 0.5)


def test_scores_that_hardly_tell_the_classes_apart_are_not_recalibrated():
    labels, scores = np.repeat([1, 0, 1, 0], [51, 49, 49, 51]), np.repeat([0.999, 0.001], 100)
    assert calibration.fit_recalibrator(labels, scores, "platt").reason == "higher scores do not mean more positives"


def test_reliability_curve_has_counts_and_intervals_over_groups():
    labels, probabilities = np.repeat([0, 1, 0], [10, 10, 5]), np.repeat([0.55, 0.05], [20, 5])
    table = calibration.reliability_curve(labels, probabilities).set_index("bin")
    assert table.loc[5, ["images", "groups", "positive_images"]].tolist() == [20, 20, 10]
    assert table.loc[5, ["low", "high"]].tolist() == pytest.approx([0.2934, 0.7066], abs=1e-4)  # Jeffreys, 10 of 20
    assert table.loc[0, "low"] == 0
    assert table.loc[0, "high"] == pytest.approx(0.3794, abs=1e-4)  # Jeffreys, 0 of 5
    paired = calibration.reliability_curve(labels, probabilities, np.arange(25) // 2).set_index("bin")
    assert paired.loc[5, "groups"] == 10
    assert paired.loc[5, ["low", "high"]].tolist() == pytest.approx([0.2235, 0.7765], abs=1e-4)  # Jeffreys, 5 of 10
    mixed = calibration.reliability_curve(labels, probabilities, np.arange(25) % 10).set_index("bin")
    assert mixed.loc[5, ["groups", "positive_groups", "negative_groups"]].tolist() == [10, 10, 10]
    assert mixed.loc[5, ["low", "high"]].tolist() == paired.loc[5, ["low", "high"]].tolist()
