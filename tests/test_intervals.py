import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn

from pipeline.evaluation import calibration, influence
from pipeline.evaluation.calibration_regression import fit_calibration
from pipeline.evaluation.intervals import (
    auroc_interval,
    auroc_variance,
    bootstrap_weights,
    compare_predictions,
    confidence_intervals,
    design_effect,
    draw_rates,
    effective_size,
    percentile_interval,
    wilson_quantiles,
)
from pipeline.evaluation.metric_tables import Predictions
from pipeline.evaluation.metrics import THRESHOLD_METRICS, compute_metrics, score_predictions
from pipeline.evaluation.sample_size import patients_for_half_width, sample_size_table

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
    assert samples["f1"].isna().any()
    assert samples["f1"].isna().equals(samples["recall"].isna())


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
            "npv": sklearn.precision_score(labels, predicted, pos_label=0, zero_division=math.nan, **kwargs),
            "mcc": sklearn.matthews_corrcoef(labels, predicted, **kwargs)
            if len(set(predicted[drawn > 0])) == 2
            else math.nan,
            **dict(
                zip(
                    ("positive_likelihood_ratio", "negative_likelihood_ratio"),
                    likelihood_ratios(labels, predicted, drawn),
                    strict=True,
                )
            ),
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


def likelihood_ratios(labels, predicted, weights) -> list[float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a division by 0
        ratios = sklearn.class_likelihood_ratios(
            labels, predicted, sample_weight=weights, replace_undefined_by={"LR+": math.nan, "LR-": math.nan}
        )
    return [float(ratio) for ratio in ratios]


def intervals(labels, probabilities, groups, threshold=0.5):
    table = confidence_intervals(labels, (probabilities >= threshold).astype(int), groups, probabilities)
    return table.set_index("metric")


def width(table, metric) -> float:
    return table.loc[metric, "high"] - table.loc[metric, "low"]


@settings(max_examples=60, deadline=None)
@given(rows)
def test_an_interval_contains_the_value_and_lies_in_the_range_of_the_metric_or_there_is_a_reason(rows):
    table = intervals(*arrays(rows)).drop(index=["calibration_intercept", "calibration_slope"])
    without = table["low"].isna()
    assert without.equals(table["high"].isna())
    assert without.equals(table["reason"] != "")
    known = table[~without]
    assert (known["low"] <= known["value"]).all()
    assert (known["value"] <= known["high"]).all()
    assert (known["low"] < known["high"]).all()
    assert (known["low"] >= np.where(known.index == "mcc", -1, 0)).all()
    unbounded = ["positive_likelihood_ratio", "negative_likelihood_ratio", "loss", "brier"]
    assert (known["high"].drop(index=unbounded, errors="ignore") <= 1).all()


@settings(max_examples=30, deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_intervals_do_not_depend_on_the_order_of_images_or_the_names_of_groups(rows, random):
    labels, probabilities, groups = arrays(rows)
    order = list(range(len(labels)))
    random.shuffle(order)
    names = np.array(random.sample(["a", "b", "c", "d", "e", "f"], 6))[groups]
    first = intervals(labels, probabilities, groups)
    second = intervals(labels[order], probabilities[order], names[order])
    pd.testing.assert_frame_equal(first, second, rtol=1e-6, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(rows)
def test_swapping_the_classes_swaps_sensitivity_and_specificity_and_predictive_values(rows):
    labels, probabilities, groups = arrays(rows)
    predicted = (probabilities >= 0.5).astype(int)
    first, second = (
        confidence_intervals(*arguments, groups).set_index("metric")
        for arguments in ((labels, predicted), (1 - labels, 1 - predicted))
    )
    # Draws of sensitivity and specificity are exchanged, so that quantiles agree up to the spacing of the draws.
    for metric, other, tolerance in (("recall", "specificity", 1e-9), ("precision", "npv", 0.02)):
        for column in ("value", "low", "high"):
            assert first.loc[metric, column] == pytest.approx(second.loc[other, column], abs=tolerance, nan_ok=True)


def test_intervals_are_wider_for_fewer_patients_and_for_grouped_images():
    labels, probabilities, _ = make_predictions(320, 8)
    single, grouped = (intervals(labels, probabilities, np.arange(320) // per_group) for per_group in (1, 8))
    half = intervals(labels[:160], probabilities[:160], np.arange(160))
    for metric in single.index.drop("calibration_error"):
        assert width(half, metric) > width(single, metric), metric
    for metric in ("f1", "recall", "auroc", "accuracy", "mcc"):
        assert width(grouped, metric) > width(single, metric), metric


def test_copies_of_every_image_in_its_group_add_no_information():
    labels, probabilities, groups = make_predictions(200)
    once = intervals(labels, probabilities, groups)
    thrice = intervals(*(np.repeat(values, 3) for values in (labels, probabilities, groups)))
    for metric in once.index.drop("calibration_error"):
        # Singletons need no estimate of a design effect, and so no quantile of t.
        assert width(thrice, metric) == pytest.approx(width(once, metric), rel=0.06), metric


def samples(labels, probabilities, groups, count=400):
    return compute_metrics(labels, probabilities >= 0.5, probabilities, bootstrap_weights(groups, count))


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)],
)
def test_proportion_of_independent_images_has_wilsons_interval(successes, count, low, high):
    # Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), table I
    labels, predicted = np.ones(count, dtype=int), (np.arange(count) < successes).astype(int)
    recall = confidence_intervals(labels, predicted, np.arange(count)).set_index("metric").loc["recall"]
    assert recall["method"] == "Wilson"
    assert [recall["low"], recall["high"]] == pytest.approx([low, high], abs=5e-5)
    specificity = confidence_intervals(1 - labels, 1 - predicted, np.arange(count)).set_index("metric")
    assert specificity.loc["specificity", ["low", "high"]].tolist() == pytest.approx([low, high], abs=5e-5)


@pytest.mark.parametrize(("successes", "low"), [(1, 0.0018), (2, 0.0123), (3, 0.0282)])
def test_proportion_of_few_images_has_the_poisson_limit_of_brown_cai_and_dasgupta(successes, low):
    # Brown, Cai and DasGupta 2001 (doi:10.1214/ss/1009213286): lower limit chi²(0.05; 2 x) / (2 n), upper Wilson
    ends = wilson_quantiles(successes / 29, 29, np.array([-1.959964, 1.959964]))
    assert ends[0] == pytest.approx(stats.chi2.ppf(0.05, 2 * successes) / 2 / 29)
    assert ends[0] == pytest.approx(low, abs=5e-5)
    assert ends[1] == pytest.approx(stats.binomtest(successes, 29).proportion_ci(method="wilson").high)


def test_perfect_proportion_of_equal_groups_has_wilsons_interval_over_groups():
    labels, groups = np.ones(400, dtype=int), np.arange(400) // 4
    recall = confidence_intervals(labels, labels, groups).set_index("metric").loc["recall"]
    size = 100 * (stats.t.ppf(0.975, 399) / stats.t.ppf(0.975, 99)) ** 2
    assert [recall["low"], recall["high"]] == pytest.approx([size / (size + 1.959964**2), 1], abs=1e-6)


def test_design_effect_of_equal_groups_is_the_ratio_of_the_variances_of_means():
    rng = np.random.default_rng(0)
    hits = (rng.random((30, 1)) + rng.random((30, 4)) > 0.8).astype(float)
    expected = hits.mean(axis=1).var(ddof=1) / 30 / (hits.var() / (hits.size - 1))
    assert 1 < expected < 4
    groups = np.repeat(np.arange(30), 4)
    assert design_effect(hits.ravel(), groups) == pytest.approx(expected)
    assert design_effect(hits.ravel(), np.arange(120)) == pytest.approx(1)
    assert design_effect(np.ones(120), groups) == 4
    assert effective_size(hits.ravel(), np.arange(120)) == pytest.approx(120)
    assert math.isnan(effective_size(hits.ravel(), np.zeros(120)))


def test_balanced_accuracy_has_about_the_mover_interval_of_newcombes_worked_example():
    # 56/70 and 48/80: the difference 0.2 has the interval 0.0524 to 0.3339, Newcombe 1998
    # (doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I), table II, method 10. With specificity
    # 1 - 48/80, the balanced accuracy is (1 + difference) / 2.
    labels = np.repeat([1, 0], [70, 80])
    predicted = np.repeat([1, 0, 1, 0], [56, 14, 48, 32])
    row = confidence_intervals(labels, predicted, np.arange(150)).set_index("metric").loc["balanced_accuracy"]
    assert [2 * row["low"] - 1, 2 * row["high"] - 1] == pytest.approx([0.0524, 0.3339], abs=0.004)


def test_quantiles_of_the_confidence_distribution_are_wilsons_limits():
    for level in (0.5, 0.9, 0.99):
        ends = wilson_quantiles(0.8, 40, stats.norm.ppf([(1 - level) / 2, (1 + level) / 2]))
        expected = stats.binomtest(32, 40).proportion_ci(level, method="wilson")
        assert ends == pytest.approx([expected.low, expected.high])


def test_draws_of_rates_are_dependent_only_if_patients_have_images_of_both_classes():
    labels, predicted = np.tile([1, 0], 100), np.tile([1, 0, 1, 0, 0, 1, 1, 0], 25)
    sensitivity, specificity = draw_rates(labels, predicted, np.arange(200))
    assert abs(np.corrcoef(sensitivity, specificity)[0, 1]) < 0.01
    sensitivity, specificity = draw_rates(labels, predicted, np.arange(200) // 2)
    assert np.corrcoef(sensitivity, specificity)[0, 1] > 0.99
    assert np.quantile(sensitivity, 0.975) == pytest.approx(
        stats.binomtest(75, 100).proportion_ci(method="wilson").high, abs=1e-3
    )
    # Six patients with one positive and three negative images, all right or all wrong: rounding puts it above 1.
    labels, patients = np.tile([1, 0, 0, 0], 6), np.arange(24) // 4
    assert not np.isnan(draw_rates(labels, np.where(patients == 0, labels, 1 - labels), patients)).any()


def test_auroc_variance_is_near_that_of_hanley_and_mcneil_and_matches_a_simulation():
    # Hanley and McNeil 1982 (doi:10.1148/radiology.143.1.7063747): AUROC 0.893, 51 abnormal and 58 normal images,
    # standard error 0.032 by their formula for exponential scores.
    assert math.sqrt(auroc_variance(0.893, 51, 58)) == pytest.approx(0.032, abs=0.002)
    rng = np.random.default_rng(0)
    positives = rng.standard_normal((4000, 15, 1)) + math.sqrt(2) * stats.norm.ppf(0.9)
    auroc = (positives > rng.standard_normal((4000, 1, 40))).mean(axis=(1, 2))
    assert auroc_variance(0.9, 15, 40) == pytest.approx(auroc.var(), rel=0.08)


def test_auroc_interval_is_one_sided_at_its_bounds_and_symmetric():
    low, high = auroc_interval(1, 20, 155)
    assert high == 1
    assert 0.9 < low < 1
    assert auroc_interval(0, 20, 155) == pytest.approx((0, 1 - low))
    assert auroc_interval(0.7, 20, 155) == pytest.approx([1 - end for end in auroc_interval(0.3, 20, 155)][::-1])
    assert auroc_interval(1, 10, 155)[0] < low


def test_influence_on_the_auroc_gives_the_variance_of_delong():
    # DeLong, DeLong and Clarke-Pearson 1988: the variance of placements, by the definition over all pairs.
    labels, probabilities, groups = make_predictions(60)
    probabilities = probabilities.round(1)  # ties
    positives, negatives = probabilities[labels == 1], probabilities[labels == 0]
    wins = (positives[:, None] > negatives) + (positives[:, None] == negatives) / 2
    expected = sum(wins.mean(axis=axis).var(ddof=1) / wins.shape[1 - axis] for axis in (0, 1))
    variance = influence.clustered_covariance(
        influence.auroc_influence(labels, probabilities)[:, None], labels, groups
    )[0, 0]
    assert variance == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(rows)
def test_influence_is_the_change_of_the_metric_with_the_weight_of_an_image(rows):
    labels, probabilities, _ = arrays(rows)
    assume(len(set(labels)) == 2)
    predicted, step = (probabilities >= 0.5).astype(int), 1e-5
    weights = np.ones((len(labels), len(labels))) + step * np.eye(len(labels))
    slopes = (
        compute_metrics(labels, predicted, probabilities, weights)
        - compute_metrics(labels, predicted, probabilities, np.ones_like(weights))
    ) / step
    found = dict(zip(THRESHOLD_METRICS, influence.threshold_influence(labels, predicted).T, strict=True))
    found["auroc"] = influence.auroc_influence(labels, probabilities)
    found["average_precision"] = influence.average_precision_influence(labels, probabilities)
    for metric, values in found.items():
        if np.isfinite(slopes[metric]).all() and np.isfinite(values).all():
            expected = influence.center_by_class(slopes[metric].to_numpy(), labels)
            assert values == pytest.approx(expected, abs=1e-3 * max(1, abs(expected).max())), metric


def test_jackknife_has_the_standard_error_of_the_bootstrap():
    labels, probabilities, _ = make_predictions(600, 3)
    groups = np.arange(600) // 3
    ours = intervals(labels, probabilities, groups)
    sample = samples(labels, probabilities, groups, 2000)
    for metric in ("recall", "specificity", "balanced_accuracy"):
        low, high = percentile_interval(sample[metric])
        assert width(ours, metric) == pytest.approx(high - low, rel=0.12), metric


def test_perfect_predictions_have_one_sided_intervals_or_a_reason():
    labels, groups = np.repeat([1, 0], [20, 155]), np.arange(175)
    table = intervals(labels, np.where(labels == 1, 0.9, 0.1), groups)
    for metric in ("f1", "recall", "specificity", "precision", "npv", "auroc", "average_precision", "mcc", "accuracy"):
        assert table.loc[metric, "value"] == 1
        assert 0.6 < table.loc[metric, "low"] < 1
        assert table.loc[metric, "high"] == 1
    assert table.loc["positive_likelihood_ratio", "reason"] == "images of one class only, or no false positive"
    assert "fewer than 3 patients" in table.loc["brier", "reason"]
    assert "separate the classes" in table.loc["calibration_slope", "reason"]


@pytest.mark.parametrize(("patients", "has_interval"), [(2, False), (3, True)])
def test_losses_and_calibration_have_an_interval_from_three_patients_with_an_error_on(patients, has_interval):
    labels, groups = np.repeat([1, 0], [30, 30]), np.append(np.arange(30) // 3, 10 + np.arange(30))
    probabilities = np.where(labels == 1, 0.8, 0.2) + np.linspace(-0.1, 0.1, 60)
    probabilities[: patients * 3] = 0.25  # three images of each patient
    table = intervals(labels, probabilities, groups)
    for metric in ("loss", "brier", "calibration_intercept", "calibration_slope"):
        assert np.isfinite(table.loc[metric, "low"]) == has_interval, metric
        assert ("fewer than 3 patients" in table.loc[metric, "reason"]) != has_interval, metric


def test_images_are_ranked_by_the_scores_and_not_by_the_probabilities():
    labels, scores, groups = make_predictions(200)
    probabilities = np.random.default_rng(1).random(200)
    by_scores = confidence_intervals(labels, labels, groups, probabilities, scores).set_index("metric")
    for metric in ("auroc", "average_precision"):
        assert by_scores.loc[metric].equals(intervals(labels, scores, groups).loc[metric]), metric
    assert by_scores.loc["brier"].equals(intervals(labels, probabilities, groups).loc["brier"])


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("count", [1, 3])
def test_undefined_metrics_have_a_reason_and_no_warning(label, count):
    labels, probabilities, groups = np.full(count, label), np.full(count, 0.2), np.zeros(count)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = intervals(labels, probabilities, groups)
    assert table.loc["auroc", "reason"] == "images of one class only"
    assert table.loc["precision", "reason"] == "no image is predicted positive"
    undefined = "specificity" if label else "recall"
    assert table.loc[undefined, "reason"] == f"no {'negative' if label else 'positive'} image"
    assert table.loc["loss", "reason"] == "one patient only"
    assert (table["value"].isna() <= (table["reason"] != "")).all()


def test_a_class_from_one_patient_has_no_interval_that_needs_it():
    labels = np.repeat([1, 0], [5, 50])
    groups = np.repeat(np.arange(51), [5, *[1] * 50])
    probabilities = np.where(labels == 1, 0.7, np.linspace(0, 0.9, 55))
    table = intervals(labels, probabilities, groups)
    assert table.loc["specificity", "reason"] == ""
    for metric in ("recall", "f1", "auroc", "average_precision", "loss", "calibration_intercept"):
        assert table.loc[metric, "reason"] == "images of one class are from one patient only", metric


def test_intervals_of_few_positive_patients_cover():
    """A small version of bench/coverage.py: 24 positive and 60 negative images of 12 and 60 patients."""
    rng, covered, replicates = np.random.default_rng(0), {"recall": 0, "auroc": 0, "f1": 0}, 150
    separation = math.sqrt(2) * stats.norm.ppf(0.9)
    labels, groups = np.repeat([1, 0], [24, 60]), np.concatenate([np.arange(24) // 2, 12 + np.arange(60)])
    sensitivity, fpr = stats.norm.cdf(separation / 2), stats.norm.sf(separation / 2)
    truth = {
        "recall": sensitivity,
        "auroc": 0.9,
        "f1": 2 * 24 * sensitivity / (24 * sensitivity + 24 + 60 * fpr),
    }
    for _ in range(replicates):
        scores = math.sqrt(0.5) * (rng.standard_normal(72)[groups] + rng.standard_normal(84)) + separation * labels
        probabilities = 1 / (1 + np.exp(separation / 2 - scores))
        table = intervals(labels, probabilities, groups)
        for metric, value in truth.items():
            covered[metric] += table.loc[metric, "low"] <= value <= table.loc[metric, "high"]
    low, high = stats.binom.ppf([0.001, 0.999], replicates, [0.94, 0.965])
    assert all(low <= count <= high for count in covered.values()), covered


# Calibration


def test_calibration_intercept_and_slope_are_those_of_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 2, 500)
    labels = (rng.random(500) < 1 / (1 + np.exp(-(0.6 * logits + 0.5)))).astype(int)
    probabilities = 1 / (1 + np.exp(-logits))
    (intercept, slope), deviations = fit_calibration(labels, probabilities)
    model = LogisticRegression(C=np.inf, tol=1e-10).fit(logits[:, None], labels)
    assert slope == pytest.approx(model.coef_[0, 0], rel=1e-4)
    assert np.mean(1 / (1 + np.exp(-(logits + intercept)))) == pytest.approx(labels.mean())
    # With a correct model, the robust standard error is near that from the information, about 1 / sqrt(sum p(1-p) x²).
    fitted = model.predict_proba(logits[:, None])[:, 1]
    features = np.column_stack([np.ones(500), logits])
    information = features.T @ (features * (fitted * (1 - fitted))[:, None])
    error = math.sqrt((deviations[:, 1] ** 2).sum())
    assert error == pytest.approx(math.sqrt(np.linalg.inv(information)[1, 1]), rel=0.1)
    table = intervals(labels, probabilities, np.arange(500))
    assert width(table, "calibration_slope") == pytest.approx(2 * 1.965 * error, rel=0.02)


@pytest.mark.parametrize("probabilities", [[0.1, 0.2, 0.8, 0.9], [0.5, 0.5, 0.5, 0.5]], ids=["separable", "constant"])
def test_there_is_no_calibration_slope_without_a_finite_optimum(probabilities):
    (intercept, slope), _ = fit_calibration(np.array([0, 0, 1, 1]), np.array(probabilities))
    assert math.isfinite(intercept)
    assert math.isnan(slope)


@pytest.mark.parametrize("images_per_patient", [1, 4])
def test_the_interval_of_the_calibration_intercept_covers_where_the_prevalence_is_sampled_too(images_per_patient):
    """The probabilities are calibrated but say little (AUROC 0.71), so the sampled prevalence matters most."""
    rng, covered, replicates, patients = np.random.default_rng(0), 0, 150, 200
    groups = np.repeat(np.arange(patients), images_per_patient)
    for _ in range(replicates):
        logits = (0.8 * rng.standard_normal(patients) - 2)[groups]
        probabilities = 1 / (1 + np.exp(-logits))
        labels = (rng.random(patients)[groups] < probabilities).astype(int)
        row = intervals(labels, probabilities, groups).loc["calibration_intercept"]
        covered += row["low"] <= 0 <= row["high"]
    low, high = stats.binom.ppf([0.001, 0.999], replicates, [0.94, 0.97])
    assert low <= covered <= high


# Differences


def predictions(probabilities) -> Predictions:
    return Predictions((probabilities >= 0.5).astype(int), probabilities)


def test_interval_of_a_paired_difference_is_narrower_than_that_of_each_model():
    labels, probabilities, groups = make_predictions(300)
    ours, theirs = predictions(probabilities), predictions(np.clip(probabilities + 0.02 * np.sin(np.arange(300)), 0, 1))
    table = compare_predictions(labels, groups, ours, theirs).set_index("metric")
    single = intervals(labels, probabilities, groups)
    expected = compute_metrics(labels, ours.predicted, ours.probabilities, np.ones((1, 300))) - compute_metrics(
        labels, theirs.predicted, theirs.probabilities, np.ones((1, 300))
    )
    for metric in ("auroc", "average_precision", "brier", "loss", "accuracy", "f1"):
        assert table.loc[metric, "difference"] == pytest.approx(expected[metric][0])
        assert width(table, metric) < width(single, metric) / 1.5, metric
    reverse = compare_predictions(labels, groups, theirs, ours).set_index("metric")
    assert reverse["low"].to_numpy() == pytest.approx(-table["high"].to_numpy())
    assert (reverse["probability"] + table["probability"]).to_numpy() == pytest.approx(1)


def test_difference_in_auroc_has_the_standard_error_of_a_paired_bootstrap():
    labels, probabilities, _ = make_predictions(400, 2)
    groups = np.arange(400) // 2
    other = np.clip(probabilities + np.random.default_rng(1).normal(0, 0.1, 400), 0, 1)
    table = compare_predictions(labels, groups, predictions(probabilities), predictions(other)).set_index("metric")
    bootstrap = samples(labels, probabilities, groups, 2000) - samples(labels, other, groups, 2000)
    for metric in ("auroc", "brier", "accuracy", "f1"):
        low, high = percentile_interval(bootstrap[metric])
        assert width(table, metric) == pytest.approx(high - low, rel=0.12), metric
        assert table.loc[metric, "probability"] == pytest.approx((bootstrap[metric][1:] > 0).mean(), abs=0.1)


def test_models_that_agree_have_an_interval_of_their_difference_that_is_not_a_point():
    labels, probabilities, groups = make_predictions(100)
    table = compare_predictions(labels, groups, predictions(probabilities), predictions(probabilities))
    table = table.set_index("metric")
    assert table["difference"].eq(0).all()
    assert (table.loc[["accuracy", "f1", "recall"], "low"] < 0).all()
    assert table.loc["auroc", "reason"].startswith("the two do not differ")
    without_probabilities = Predictions(predictions(probabilities).predicted, None)
    assert list(compare_predictions(labels, groups, predictions(probabilities), without_probabilities)["metric"]) == (
        THRESHOLD_METRICS
    )


@pytest.mark.parametrize("label", [0, 1])
def test_differences_on_images_of_one_class_have_reasons(label):
    labels, probabilities, groups = np.full(6, label), np.linspace(0.1, 0.9, 6), np.arange(6)
    other = predictions(probabilities[::-1])
    table = compare_predictions(labels, groups, predictions(probabilities), other).set_index("metric")
    assert table.loc["auroc", "reason"] == "images of one class only"
    assert table.loc["accuracy", "low"] < 0 < table.loc["accuracy", "high"]
    one_group = compare_predictions(labels, np.zeros(6), predictions(probabilities), other).set_index("metric")
    assert one_group.loc["accuracy", "reason"] == "one patient only"


# Sample size


def test_more_patients_give_the_half_width():
    hits, groups = (np.arange(40) % 5 > 0).astype(float), np.arange(40)
    more = patients_for_half_width(hits, groups)
    ends = {
        count: wilson_quantiles(0.8, count, np.array([-1.959964, 1.959964])) for count in (40 + more - 1, 40 + more)
    }
    assert ends[40 + more][1] - ends[40 + more][0] <= 0.1 < ends[40 + more - 1][1] - ends[40 + more - 1][0]
    assert 200 < more < 230  # 0.8 × 0.2 × (1.96 / 0.05)² = 246 patients
    assert patients_for_half_width(hits, groups, 0.2) == 0
    assert patients_for_half_width(np.repeat(hits, 3), np.repeat(groups, 3)) == pytest.approx(more, abs=2)
    assert patients_for_half_width(hits, np.zeros(40)) is None


def test_sample_size_table_counts_images_and_patients_of_each_class():
    labels, predicted = np.repeat([1, 0], [6, 20]), np.repeat([1, 0, 0], [4, 2, 20])
    groups = np.concatenate([[0, 0, 1, 1, 2, 2], 10 + np.arange(20) // 2])
    table = sample_size_table(labels, predicted, groups).set_index("metric")
    assert table["images"].tolist() == [6, 20]
    assert table["patients"].tolist() == [3, 10]
    assert table["effective_images"].tolist() == pytest.approx([3, 10])  # whole patients are right or wrong
    assert (table["more_patients"] > 0).all()
    alone = sample_size_table(labels, predicted, np.zeros(26)).set_index("metric")
    assert alone["more_patients"].isna().all()
