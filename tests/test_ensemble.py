from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.config import EvaluateParams, load_config
from pipeline.core.files import write_json
from pipeline.evaluation import ensemble
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference import candidate
from pipeline.models import classifier, soup
from pipeline.models.classifier import Architecture, Classifier

pytestmark = pytest.mark.usefixtures("one_thread")

PARAMS = EvaluateParams(
    batch_size=1, cpu_threads=1, operating_point="half", min_sensitivity=0.9, expected_prevalence=None, resamples=10
)
probabilities = st.floats(0, 1, width=32)
members = st.integers(1, 7).flatmap(
    lambda width: st.lists(st.lists(probabilities, min_size=width, max_size=width), min_size=1, max_size=6)
)


def rule(given: pd.DataFrame, tie: str = "mean", method: str = "vote") -> EnsembleConfig:
    """Return a rule of equal members, which are the columns."""
    count = given.shape[1]
    return EnsembleConfig(list(given), method, tie, 0.5, [0.5] * count, [1 / count] * count)


def votes(rows: list[list[float]], tie: str) -> list[int]:
    given = pd.DataFrame(rows)
    return list(ensemble.combine(given, rule(given, tie))["vote"])


@pytest.mark.parametrize(("tie", "low", "high"), [("positive", 1, 1), ("negative", 0, 0), ("mean", 0, 1)])
def test_an_even_vote_goes_to_who_wins_ties(tie, low, high):
    assert votes([[0.1, 0.6], [0.45, 0.9]], tie) == [low, high]


def test_a_mean_of_exactly_half_wins_the_tie_for_the_positives():
    assert votes([[0.25, 0.75]], "mean") == [1]


@settings(max_examples=60, deadline=None)
@given(members, st.sampled_from(["positive", "negative", "mean"]))
def test_the_majority_wins_whoever_wins_ties(rows, tie):
    table = pd.DataFrame(rows)
    found = ensemble.combine(table, rule(table, tie))
    for index, row in enumerate(rows):
        count, mean = sum(value >= 0.5 for value in row), found["mean"][index]
        assert found["votes"][index] == count
        assert mean == pytest.approx(sum(row) / len(row))
        assert found["greedy"][index] == pytest.approx(mean)  # of equal weights
        even = {"positive": 1, "negative": 0, "mean": int(mean >= 0.5)}[tie]
        assert found["vote"][index] == (even if 2 * count == len(row) else int(2 * count > len(row)))


@settings(max_examples=40, deadline=None)
@given(members)
def test_the_order_of_the_members_does_not_change_the_vote(rows):
    backwards = [row[::-1] for row in rows]
    for tie in ("positive", "negative"):
        assert votes(rows, tie) == votes(backwards, tie)


def test_members_vote_at_their_own_operating_points():
    rows = pd.DataFrame([[0.2, 0.7, 0.8], [0.2, 0.6, 0.8]])
    found = ensemble.combine(rows, replace(rule(rows), thresholds=[0.1, 0.7, 0.9]))
    assert list(found["votes"]) == [2, 1]
    assert list(found["vote"]) == [1, 0]


def test_the_mean_of_logits_is_that_of_a_geometric_mean_of_odds_and_finite_at_0_and_1():
    rows = pd.DataFrame([[0.5, 0.8], [0.0, 1.0]])
    found = ensemble.combine(rows, rule(rows))["logits"]
    assert found[0] == pytest.approx(2 / 3)  # odds of 1 and 4
    assert found[1] == pytest.approx(0.5)


def test_the_bags_labels_are_its_vote_or_what_the_threshold_makes_of_its_probability():
    rows = pd.DataFrame([[0.6, 0.6, 0.0], [0.5, 0.5, 0.5]])
    assert list(ensemble.predict(rows, rule(rows))["label"]) == [1, 1]
    assert list(ensemble.predict(rows, rule(rows, method="mean"))["label"]) == [0, 1]
    assert list(ensemble.predict(rows, replace(rule(rows, method="mean"), threshold=0.3))["label"]) == [1, 1]
    weighted = replace(rule(rows, method="greedy"), weights=[0.5, 0.5, 0.0])
    assert list(ensemble.predict(rows, weighted)["probability"]) == [0.6, 0.5]


def test_the_bag_keeps_the_index_of_its_members():
    rows = pd.DataFrame({"a": [0.6, 0.2]}, index=["x.jpg", "y.jpg"])
    found = ensemble.predict(rows, rule(rows, "positive"))
    assert found["label"].to_dict() == {"x.jpg": 1, "y.jpg": 0}


def judged(count: int = 120, width: int = 5) -> tuple[np.ndarray, pd.DataFrame]:
    """Return labels and members of which the last ones are worse."""
    rng = np.random.default_rng(1)
    labels = np.arange(count) % 4 == 0
    logits = 3 * labels[:, None] - 1.5 + rng.standard_normal((count, width)) * np.linspace(1.5, 6, width)
    return labels.astype(int), pd.DataFrame(1 / (1 + np.exp(-logits))).add_prefix("seed-")


def loss(labels: np.ndarray, found: np.ndarray) -> float:
    return float(-np.log(np.where(labels == 1, found, 1 - found)).mean())


def test_greedy_selection_is_no_worse_than_any_member_and_leaves_the_bad_ones_out():
    labels, given = judged()
    shares = ensemble.select_greedily(labels, given.to_numpy())
    assert sum(shares) == pytest.approx(1)
    assert shares[-1] == 0
    selected = loss(labels, given.to_numpy() @ np.array(shares))
    assert selected <= min(loss(labels, given[name].to_numpy()) for name in given)
    assert selected < loss(labels, given.mean(axis="columns").to_numpy())


def test_of_members_of_which_one_is_always_right_greedy_selection_takes_that_one():
    labels = np.array([0, 1, 1])
    wrong = np.array([0.9, 0.2, 0.4])
    assert ensemble.select_greedily(labels, np.stack([wrong, labels.astype(float)], axis=1)) == [0, 1]


@pytest.mark.parametrize("method", ["vote", "mean", "logits"])
def test_the_bag_grows_from_the_members_to_the_whole(method):
    labels, given = judged()
    whole = rule(given, method=method)
    found = ensemble.metric_by_ensemble_size(labels, given, whole)
    assert list(found["members"]) == [1, 2, 3, 4, 5]
    assert list(found["subsets"]) == [5, 10, 10, 5, 1]
    assert found["highest"].iloc[-1] == found["lowest"].iloc[-1]
    if method != "logits":
        called = ensemble.predict(given, whole)["label"]
        hits = 2 * (called & labels).sum() / (called.sum() + labels.sum())
        assert found["f1"].iloc[-1] == pytest.approx(hits)


def test_of_many_members_a_sample_of_bags_is_tried_and_the_same_one_twice():
    labels, given = judged(40, 14)
    found = ensemble.metric_by_ensemble_size(labels, given, rule(given))
    assert found["subsets"].max() == ensemble.MAX_SUBSETS
    assert found.equals(ensemble.metric_by_ensemble_size(labels, given, rule(given)))


def test_disagreement_is_the_share_of_images_called_differently():
    given = pd.DataFrame({"a": [0.9, 0.1, 0.6, 0.2], "b": [0.9, 0.7, 0.2, 0.2]})
    assert ensemble.pairwise_disagreement(given, [0.5, 0.5]).to_numpy().tolist() == [["a", "b", 0.5]]
    assert ensemble.pairwise_disagreement(given, [0.5, 0.75])["share"][0] == 0.25
    assert ensemble.pairwise_disagreement(given[["a"]], [0.5]).empty


def test_disputed_images_are_listed_the_most_disputed_first():
    rows = pd.DataFrame({"a": [0.9, 0.1, 0.9, 0.9], "b": [0.9, 0.1, 0.1, 0.1], "c": [0.9, 0.1, 0.1, 0.1]})
    rows["d"] = [0.9, 0.1, 0.1, 0.9]
    files = pd.DataFrame({"file": ["same", "none", "one", "even"]})
    found = ensemble.disagreements(files, ensemble.combine(rows, rule(rows)), 4)
    assert list(found["file"]) == ["even", "one"]


def test_a_single_member_is_its_own_majority():
    labels, given = judged()
    for method in ensemble.METHODS:
        alone = given[["seed-0"]]
        assert ensemble.fit_ensemble(labels, alone, method, "positive", PARAMS) == rule(alone, method="mean")


def test_thresholds_of_members_and_bag_are_chosen_by_the_rule():
    labels, given = judged()
    params = PARAMS.model_copy(update={"operating_point": "sensitivity", "min_sensitivity": 1.0})
    found = ensemble.fit_ensemble(labels, given, "logits", "mean", params)
    assert (given.to_numpy() >= found.thresholds)[labels == 1].all()
    assert ensemble.predict(given, found)["label"][labels == 1].all()
    assert len({found.threshold, *found.thresholds}) == 6


# The average of weights


def network(seed: int, backbone_of: Classifier | None = None) -> Classifier:
    torch.manual_seed(seed)
    made = Classifier(Architecture("squeezenet1_1", [], 0.0, 32, "imagenet", 32, "stretch")).eval()
    if backbone_of:
        made.backbone.load_state_dict(backbone_of.backbone.state_dict())
    return made


def test_on_a_shared_frozen_backbone_the_average_of_weights_answers_with_the_mean_of_logits():
    first = network(0)
    networks = [first, network(1, first), network(2, first)]
    pixels = torch.randint(0, 256, (6, 32, 32), dtype=torch.uint8)
    each = pd.DataFrame({str(index): one.predict_proba(pixels).numpy() for index, one in enumerate(networks)})
    found = soup.average_weights(networks).predict_proba(pixels).numpy()
    assert found == pytest.approx(ensemble.combine(each, rule(each))["logits"].to_numpy(), abs=1e-5)


def test_weights_are_averaged_only_where_members_share_their_start():
    assert ensemble.soup_unavailable_reason("imagenet", [], 10) == ""
    assert "hidden layers" in ensemble.soup_unavailable_reason("imagenet", [256], 10)
    assert "random weights" in ensemble.soup_unavailable_reason("none", [], 10)
    assert ensemble.soup_unavailable_reason("imagenet", [], 1) == "one member only"


# Candidates

BAGGED = pd.DataFrame(columns=["seed-0", "seed-1"])


@pytest.fixture
def models(tmp_path) -> Path:
    """A folder with seed-0 and seed-1 as training leaves them."""
    for seed in (0, 1):
        folder = tmp_path / f"models/seed-{seed}"
        classifier.save_weights(made := network(seed), folder)
        classifier.save_description(made, folder, {})
    return tmp_path / "models"


def test_a_candidate_answers_by_the_rule_that_was_written_with_it(tmp_path, models):
    pixels = torch.randint(0, 256, (5, 32, 32), dtype=torch.uint8)
    each = pd.DataFrame({f"seed-{seed}": network(seed).predict_proba(pixels).numpy() for seed in (0, 1)})
    own = EnsembleConfig(list(each), "greedy", "mean", float(each["seed-1"].median()), [0.1, 0.2], [0.0, 1.0])
    candidate.assemble_candidate(tmp_path / "bag", models, own)
    found = candidate.load_candidate(tmp_path / "bag", torch.device("cpu")).predict(pixels)
    assert found["probability"].to_numpy() == pytest.approx(each["seed-1"].to_numpy(), abs=1e-6)
    assert list(found["label"]) == list(ensemble.predict(each, own)["label"])
    assert 0 < found["label"].sum() < 5


def test_candidates_that_differ_in_an_operating_point_alone_are_different_models(tmp_path, models):
    for threshold in (0.4, 0.5):
        own = replace(rule(BAGGED), threshold=threshold)
        candidate.assemble_candidate(tmp_path / str(threshold), models, own)
    assert candidate.content_hash(tmp_path / "0.4") != candidate.content_hash(tmp_path / "0.5")


def test_rules_are_read_as_they_were_written_and_refused_when_seeds_or_members_have_changed_since(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / "params.yaml")
    two = config.model_copy(update={"seeds": [0, 1]})
    rules = {**{name: rule(BAGGED[[name]], method="mean") for name in BAGGED}, "bag": rule(BAGGED)}
    write_json(ensemble.CANDIDATES, {name: asdict(one) for name, one in rules.items()})
    assert ensemble.load_candidate_configs(two) == rules
    bag = two.active.bag.model_copy(update={"members": [1]})
    profiles = {two.profile: two.active.model_copy(update={"bag": bag})}
    for changed in (config, two.model_copy(update={"profiles": profiles})):
        assert refusal(ensemble.load_candidate_configs, changed).endswith(
            "not those of the present bag; run: dvc repro bag"
        )
