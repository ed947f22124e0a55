"""The estimated prevalence of unlabeled images and its interval."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from pipeline.evaluation import prevalence
from pipeline.evaluation.prevalence import adapt_label_shift, estimate_prevalence


def draw(rng, positives, negatives, separation=2.3):
    labels = np.repeat([1, 0], [positives, negatives])
    return labels, expit(separation * (labels - 0.7) + rng.normal(size=len(labels)))


def estimate(seed=0, positives=40, new_positives=60, resamples=100):
    rng = np.random.default_rng(seed)
    labels, scores = draw(rng, positives, 200)
    _, new_scores = draw(rng, new_positives, 120 - new_positives)
    return estimate_prevalence(labels, scores, np.arange(len(labels)), new_scores, np.arange(120), resamples)


def test_the_estimate_is_the_maximum_of_the_mixture_likelihood():
    rng = np.random.default_rng(1)
    labels, scores = draw(rng, 40, 200)
    _, new_scores = draw(rng, 60, 60)
    result = estimate_prevalence(labels, scores, np.arange(240), new_scores, np.arange(120), 10)
    model = LogisticRegression(C=1e3, tol=1e-8).fit(logit(scores)[:, None], labels)
    ratios = np.exp(model.decision_function(logit(new_scores)[:, None]) - logit(labels.mean()))

    def loss(share):
        return -np.log(share * ratios + 1 - share).sum()

    best = minimize_scalar(loss, bounds=(0, 1), method="bounded", options={"xatol": 1e-8}).x
    assert result.prevalence == pytest.approx(best, abs=1e-3)
    shift = adapt_label_shift(model.predict_proba(logit(new_scores)[:, None])[:, 1], labels.mean())
    np.testing.assert_allclose(result.probabilities, shift["probabilities"], atol=2e-3)


def test_the_vectorized_fits_agree_with_scikit_learn_and_with_em():
    rng = np.random.default_rng(2)
    labels, scores = draw(rng, 30, 170)
    weights = np.vstack([np.ones(200), rng.multinomial(200, np.full(200, 1 / 200), 3)])
    slopes, biases = prevalence._fit_logistic(logit(scores), labels, weights)
    for row, slope, bias in zip(weights, slopes, biases, strict=True):
        model = LogisticRegression(C=1e6, tol=1e-8).fit(logit(scores)[:, None], labels, row)
        assert (slope, bias) == pytest.approx((model.coef_[0, 0], model.intercept_[0]), abs=5e-3)
    calibrated = rng.random(50)
    ratios = calibrated / (1 - calibrated) * 3  # calibrated at a prevalence of 1/4
    (share,) = prevalence._maximize_likelihood(ratios[None], np.ones((1, 50)))
    assert share == pytest.approx(adapt_label_shift(calibrated, 0.25)["prevalence"], abs=1e-5)


def test_the_interval_contains_the_truth_and_only_a_real_difference_is_called_one():
    shifted = [estimate(seed) for seed in range(20)]
    assert sum(result.low <= 0.5 <= result.high for result in shifted) >= 17
    assert all(result.differs for result in shifted)
    same = [estimate(seed, new_positives=20) for seed in range(20)]
    assert sum(result.differs for result in same) <= 3
    assert all(result.low <= result.prevalence <= result.high for result in (*same, *shifted))


@pytest.mark.parametrize("label", [0, 1])
def test_test_images_of_one_class_have_an_exact_end_and_few_of_them_no_difference(label):
    """Of 60 images, none may be of a class whose share is 2.5 %; of 1000, it is another share."""
    rng, labels = np.random.default_rng(0), np.full(400, label)
    labels[:10] = 1 - label

    def estimate_of(count):
        scores, new = (
            1 / (1 + np.exp(-8 * (values - 0.5) - rng.standard_normal(len(values))))
            for values in (labels, np.full(count, label))
        )
        return estimate_prevalence(labels, scores, np.arange(400), new, np.arange(count))

    few, many = estimate_of(60), estimate_of(1000)
    assert few.prevalence == pytest.approx(label, abs=5e-4)
    assert few.high - few.low == pytest.approx(1 - 0.025 ** (1 / 60), rel=0.01)
    assert not few.differs
    assert many.differs


def test_fewer_positive_images_widen_the_interval():
    def width(**changes):
        return np.mean([(r := estimate(seed, **changes)).high - r.low for seed in range(5)])

    assert width(positives=10) > 1.2 * width(positives=150)


@pytest.mark.parametrize(
    ("labels", "scores", "new", "reason"),
    [
        ([0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4], [0.5], "labeled images of one class only"),
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], [], "no test images"),
        ([1, 1, 0, 0], [0.1, 0.2, 0.8, 0.9], [0.5], "does not increase"),
        ([1, 1, 0, 0], [0.5, 0.5, 0.5, 0.5], [0.5], ""),
    ],
)
def test_degenerate_sets_give_no_estimate_but_a_reason(labels, scores, new, reason):
    result = estimate_prevalence(
        np.array(labels), np.array(scores), np.arange(4), np.array(new), np.arange(len(new)), 50
    )
    assert reason in result.reason
    assert result.reason
    assert np.isnan(result.low)
    assert not result.differs
    assert result.probabilities.shape == (len(new),)


def test_one_patient_has_an_estimate_without_an_interval():
    labels, scores = draw(np.random.default_rng(0), 20, 20)
    result = estimate_prevalence(labels, scores, np.zeros(40), scores, np.arange(40), 50)
    assert result.reason == "one patient only"
    assert 0 < result.prevalence < 1
    assert np.isnan([result.low, result.difference_high]).all()


def test_copies_of_every_image_in_its_patient_add_no_information():
    rng = np.random.default_rng(0)
    labels, scores = draw(rng, 20, 40)
    _, new_scores = draw(rng, 15, 15)
    once = estimate_prevalence(labels, scores, np.arange(60), new_scores, np.arange(30), 100)
    copied = [np.repeat(values, 5) for values in (labels, scores, np.arange(60), new_scores, np.arange(30))]
    for arguments in ((*copied[:3], new_scores, np.arange(30)), (labels, scores, np.arange(60), *copied[3:])):
        repeated = estimate_prevalence(*arguments, 100)
        for name in ("prevalence", "low", "high", "difference_low", "difference_high"):
            assert getattr(repeated, name) == pytest.approx(getattr(once, name), abs=5e-3), name


def test_new_images_of_unknown_patients_are_taken_to_have_as_many_images_each_as_the_labeled_ones():
    rng = np.random.default_rng(0)
    (labels, scores), (_, new_scores) = draw(rng, 20, 40), draw(rng, 15, 45)
    for size, groups in ((1, np.arange(60)), (3, np.repeat(np.arange(20), 3))):
        unknown = estimate_prevalence(labels, scores, groups, new_scores, resamples=100)
        ranks = np.argsort(np.argsort(new_scores))
        known = estimate_prevalence(labels, scores, groups, new_scores, ranks // size, 100)
        assert (unknown.low, unknown.high) == (known.low, known.high)
        single = estimate_prevalence(labels, scores, groups, new_scores, np.arange(60), 100)
        widths = [result.high - result.low for result in (unknown, single)]
        assert widths[0] > (1.2 if size == 3 else 0.8) * widths[1]


def test_the_difference_varies_with_both_sets_and_they_are_resampled_independently():
    labels, scores = draw(np.random.default_rng(0), 20, 40, separation=6)
    same = estimate_prevalence(labels, scores, np.arange(60), scores, np.arange(60), 200)
    # Of two independent sets whose classes are told apart: the square root of 2 · 1/3 · 2/3 / 60 is 0.086.
    assert same.difference_high - same.difference_low == pytest.approx(2 * 1.96 * 0.086, rel=0.2)
    assert same.high - same.low == pytest.approx(2 * 1.96 * 0.061, rel=0.2)


@pytest.mark.parametrize(("patients", "reason"), [(4, "fewer than 5 patients of a class"), (5, "")])
def test_few_patients_of_a_class_have_an_estimate_without_an_interval(patients, reason):
    labels, scores = draw(np.random.default_rng(0), 20, 40)
    groups = np.append(np.arange(20) % patients, 20 + np.arange(40))
    result = estimate_prevalence(labels, scores, groups, scores, np.arange(60), 50)
    assert result.reason == reason
    assert 0 < result.prevalence < 1
    assert np.isnan(result.low) == np.isnan(result.difference_low) == bool(reason)
