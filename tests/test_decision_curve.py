"""Decision curves, against worked examples and the published formula."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from pipeline.evaluation.decision_curve import COLUMNS, THRESHOLDS, decision_curve, net_benefit

LABELS = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
PROBABILITIES = np.array([0.05, 0.1, 0.15, 0.2, 0.3, 0.6, 0.2, 0.5, 0.7, 0.9])


def at(table, threshold: float, prevalence: float | None = None):
    """Return the row of one threshold, by default at the prevalence of the images."""
    of_prevalence = table[table["prevalence"] == (table["prevalence"].iloc[0] if prevalence is None else prevalence)]
    return of_prevalence[np.isclose(of_prevalence["threshold"], threshold)].iloc[0]


def test_net_benefit_is_that_of_a_table_computed_by_hand():
    table = decision_curve(LABELS, PROBABILITIES)
    # From 0.2 on: 4 true and 3 false positives of 10, at odds 1/4. From 0.5 on: 3 and 1, at odds 1.
    assert at(table, 0.2)["net_benefit"] == pytest.approx(4 / 10 - 3 / 10 / 4)
    assert at(table, 0.5)["net_benefit"] == pytest.approx(3 / 10 - 1 / 10)
    assert at(table, 0.2)["treat_all"] == pytest.approx(4 / 10 - 6 / 10 / 4)
    assert (table["treat_none"] == 0).all()
    assert list(table["threshold"]) == pytest.approx(list(THRESHOLDS))


def test_the_published_worked_example():
    """Vickers, Van Calster and Steyerberg (2016, BMJ 352:i6): 1000 men, 200 cancers, at a threshold of 10 %.

    Biopsy in all: 200 true and 800 false positives. By a model: 180 of the cancers and 400 of the others.
    """
    threshold = np.array([0.1])
    assert net_benefit(np.ones(1), np.zeros(1), 0.2, threshold) == pytest.approx(200 / 1000 - 800 / 1000 / 9)
    model = net_benefit(np.array([180 / 200]), np.array([400 / 800]), 0.2, threshold)
    assert model == pytest.approx(180 / 1000 - 400 / 1000 / 9)


def test_treating_all_has_no_net_benefit_at_the_prevalence():
    table = decision_curve(LABELS, PROBABILITIES, [0.1])
    assert at(table, 0.4)["treat_all"] == pytest.approx(0)
    assert at(table, 0.1, 0.1)["treat_all"] == pytest.approx(0)


def test_a_perfect_model_has_the_prevalence_as_net_benefit_everywhere():
    table = decision_curve(LABELS, np.where(LABELS == 1, 1.0, 0.0), [0.1])
    assert table["net_benefit"].to_numpy() == pytest.approx(table["prevalence"].to_numpy())


def test_another_prevalence_is_that_of_images_drawn_at_it():
    rng = np.random.default_rng(0)

    def draw(prevalence: float, count: int = 200_000) -> tuple[np.ndarray, np.ndarray]:
        labels = (rng.random(count) < prevalence).astype(int)
        log_ratio = rng.normal(np.where(labels == 1, 2, -2), 2)  # its own log likelihood ratio: N(±2, 2²)
        return labels, expit(log_ratio + np.log(prevalence / (1 - prevalence)))

    shifted = decision_curve(*draw(0.15), [0.5]).query("prevalence == 0.5")
    drawn = decision_curve(*draw(0.5))
    assert np.abs(shifted["net_benefit"].to_numpy() - drawn["net_benefit"].to_numpy())[:90].max() < 0.03


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.99, 1.0])), min_size=2, max_size=30))
def test_it_agrees_with_counting_and_never_exceeds_the_prevalence(rows):
    labels, probabilities = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    table = decision_curve(labels, probabilities)
    if len(set(labels)) < 2:
        assert table.empty
        return
    for row in table.iloc[::7].itertuples():
        treated = probabilities >= row.threshold
        tp, fp = (treated & (labels == 1)).mean(), (treated & (labels == 0)).mean()
        assert row.net_benefit == pytest.approx(tp - fp * row.threshold / (1 - row.threshold))
        assert row.net_benefit <= row.prevalence + 1e-12


@pytest.mark.parametrize(("labels", "probabilities"), [([1, 1], [0.2, 0.9]), ([0, 1], [0.2, np.nan]), ([], [])])
def test_without_both_classes_or_probabilities_there_are_no_rows(labels, probabilities):
    table = decision_curve(np.array(labels), np.array(probabilities), [0.5])
    assert table.empty
    assert list(table.columns) == COLUMNS


def test_every_prevalence_has_one_curve():
    table = decision_curve(LABELS, PROBABILITIES, [0.1, LABELS.mean(), 0.1])
    assert list(table["prevalence"]) == [0.4] * len(THRESHOLDS) + [0.1] * len(THRESHOLDS)
