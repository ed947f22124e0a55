from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, error_message
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from pipeline.core.config import EvaluateParams, FindingParams, load_config
from pipeline.core.files import read_json, write_json
from pipeline.evaluation import ensemble
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference import candidate
from pipeline.models import classifier, soup
from pipeline.models.classifier import Architecture, Classifier
from pipeline.tracking.model_folder import open_model_folder

pytestmark = pytest.mark.usefixtures("one_thread")

PARAMS = EvaluateParams(
    operating_point="half", min_sensitivity=0.9, recalibration="none", expected_prevalence=None, resamples=10
)
probabilities = st.floats(0, 1, width=32)
members = st.integers(1, 7).flatmap(
    lambda width: st.lists(st.lists(probabilities, min_size=width, max_size=width), min_size=1, max_size=6)
)


def make_config(predictions: pd.DataFrame, tie: str = "mean", method: str = "vote") -> EnsembleConfig:
    """Return an ensemble of all columns with equal weights and the threshold 0.5."""
    count = predictions.shape[1]
    return EnsembleConfig(list(predictions), method, tie, [1 / count] * count, 0.5)


def majority(rows: list[list[float]], tie: str) -> list[int]:
    predictions = pd.DataFrame(rows)
    return list(ensemble.predict(predictions, make_config(predictions, tie))["label"])


@pytest.mark.parametrize(("tie", "low", "high"), [("positive", 1, 1), ("negative", 0, 0), ("mean", 0, 1)])
def test_tie_parameter_decides_an_even_vote(tie, low, high):
    assert majority([[0.1, 0.6], [0.45, 0.9]], tie) == [low, high]


def test_mean_of_exactly_one_half_decides_an_even_vote_as_positive():
    assert majority([[0.25, 0.75]], "mean") == [1]


@settings(max_examples=100, deadline=None)
@given(members, st.sampled_from(["positive", "negative", "mean"]), st.sampled_from([0.5, 0.1, 0.9]))
def test_label_of_the_vote_is_that_of_a_count_of_votes(rows, tie, threshold):
    table = pd.DataFrame(rows)
    config = replace(make_config(table, tie), threshold=threshold)
    combined, label = ensemble.combine(table, config), ensemble.predict(table, config)["label"]
    for index, row in enumerate(rows):
        count, mean = sum(value >= threshold for value in row), combined["mean"][index]
        assert combined["votes"][index] == count
        assert mean == pytest.approx(sum(row) / len(row))
        assert combined["greedy"][index] == pytest.approx(mean)  # the weights are equal
        even = {"positive": 1, "negative": 0, "mean": int(mean >= threshold)}[tie]
        assert label[index] == (even if 2 * count == len(row) else int(2 * count > len(row)))
        assert min(row) <= combined["vote"][index] <= max(row)


@settings(max_examples=40, deadline=None)
@given(members)
def test_vote_does_not_depend_on_the_order_of_the_members(rows):
    reversed_rows = [row[::-1] for row in rows]
    for tie in ("positive", "negative"):
        assert majority(rows, tie) == majority(reversed_rows, tie)


def test_mean_logit_is_the_geometric_mean_of_odds_and_finite_at_0_and_1():
    rows = pd.DataFrame([[0.5, 0.8], [0.0, 1.0]])
    logits = ensemble.combine(rows, make_config(rows))["logits"]
    assert logits[0] == pytest.approx(2 / 3)  # odds of 1 and 4
    assert logits[1] == pytest.approx(0.5)


def test_ensemble_label_is_the_vote_or_the_probability_at_the_threshold():
    rows = pd.DataFrame([[0.6, 0.6, 0.0], [0.5, 0.5, 0.5]])
    assert list(ensemble.predict(rows, make_config(rows))["label"]) == [1, 1]
    assert list(ensemble.predict(rows, make_config(rows, method="mean"))["label"]) == [0, 1]
    assert list(ensemble.predict(rows, replace(make_config(rows, method="mean"), threshold=0.3))["label"]) == [1, 1]
    weighted = replace(make_config(rows, method="greedy"), weights=[0.5, 0.5, 0.0])
    assert list(ensemble.predict(rows, weighted)["score"]) == [0.6, 0.5]


def test_probability_is_the_recalibrated_score_and_the_label_is_decided_before():
    rows = pd.DataFrame([[0.2, 0.2], [0.5, 0.9]])
    recalibrated = replace(make_config(rows, method="mean"), temperature=2.0, bias=-2.0, prevalence=0.1)
    predicted = ensemble.predict(rows, recalibrated)
    assert list(predicted["score"]) == pytest.approx([0.2, 0.7])
    assert predicted["probability"].to_numpy() == pytest.approx(expit(logit([0.2, 0.7]) / 2 - 2))
    assert list(predicted["label"]) == [0, 1]
    finding = FindingParams(name="effusion", positive="present")
    assert ensemble.describe_output(recalibrated, finding) == (
        "probability of effusion; label 1 (present) means a probability of at least 0.119; "
        "probabilities are calibrated for 10.0% positives, as in the validation set"
    )
    assert "0.500; probabilities are not calibrated" in ensemble.describe_output(make_config(rows), finding)


def test_ensemble_keeps_the_index_of_the_predictions():
    rows = pd.DataFrame({"a": [0.6, 0.2]}, index=["x.jpg", "y.jpg"])
    predicted = ensemble.predict(rows, make_config(rows, "positive"))
    assert predicted["label"].to_dict() == {"x.jpg": 1, "y.jpg": 0}


def make_predictions(count: int = 120, width: int = 5) -> tuple[np.ndarray, pd.DataFrame]:
    """Return labels and P(positive) of members, of decreasing quality."""
    rng = np.random.default_rng(1)
    labels = np.arange(count) % 4 == 0
    logits = 3 * labels[:, None] - 1.5 + rng.standard_normal((count, width)) * np.linspace(1.5, 6, width)
    return labels.astype(int), pd.DataFrame(1 / (1 + np.exp(-logits))).add_prefix("seed-")


def log_loss(labels: np.ndarray, probability: np.ndarray) -> float:
    return float(-np.log(np.where(labels == 1, probability, 1 - probability)).mean())


def test_greedy_selection_has_a_lower_loss_than_any_member_and_drops_the_worst():
    labels, predictions = make_predictions()
    weights = ensemble.select_greedily(labels, predictions.to_numpy())
    assert sum(weights) == pytest.approx(1)
    assert weights[-1] == 0
    loss = log_loss(labels, predictions.to_numpy() @ np.array(weights))
    assert loss <= min(log_loss(labels, predictions[name].to_numpy()) for name in predictions)
    assert loss < log_loss(labels, predictions.mean(axis="columns").to_numpy())


def test_greedy_selection_takes_only_a_perfect_member():
    labels = np.array([0, 1, 1])
    wrong = np.array([0.9, 0.2, 0.4])
    assert ensemble.select_greedily(labels, np.stack([wrong, labels.astype(float)], axis=1)) == [0, 1]


@pytest.mark.parametrize("method", ["vote", "mean", "logits"])
def test_metric_by_ensemble_size_covers_single_members_to_the_whole_ensemble(method):
    labels, predictions = make_predictions()
    config = make_config(predictions, method=method)
    table = ensemble.metric_by_ensemble_size(labels, predictions, config)
    assert list(table["members"]) == [1, 2, 3, 4, 5]
    assert list(table["subsets"]) == [5, 10, 10, 5, 1]
    assert table["highest"].iloc[-1] == table["lowest"].iloc[-1]
    if method != "logits":
        predicted = ensemble.predict(predictions, config)["label"]
        f1 = 2 * (predicted & labels).sum() / (predicted.sum() + labels.sum())
        assert table["f1"].iloc[-1] == pytest.approx(f1)


def test_subsets_of_many_members_are_sampled_reproducibly():
    labels, predictions = make_predictions(40, 14)
    table = ensemble.metric_by_ensemble_size(labels, predictions, make_config(predictions))
    assert table["subsets"].max() == ensemble.MAX_SUBSETS
    assert table.equals(ensemble.metric_by_ensemble_size(labels, predictions, make_config(predictions)))


def test_pairwise_disagreement_is_the_share_of_images_with_different_labels():
    predictions = pd.DataFrame({"a": [0.9, 0.1, 0.6, 0.2], "b": [0.9, 0.7, 0.2, 0.2]})
    assert ensemble.pairwise_disagreement(predictions, 0.5).to_numpy().tolist() == [["a", "b", 0.5]]
    assert ensemble.pairwise_disagreement(predictions, 0.65)["share"][0] == 0.25
    assert ensemble.pairwise_disagreement(predictions[["a"]], 0.5).empty


def test_disagreements_list_the_closest_votes_first():
    rows = pd.DataFrame({"a": [0.9, 0.1, 0.9, 0.9], "b": [0.9, 0.1, 0.1, 0.1], "c": [0.9, 0.1, 0.1, 0.1]})
    rows["d"] = [0.9, 0.1, 0.1, 0.9]
    files = pd.DataFrame({"file": ["same", "none", "a-quarter", "even"]})
    table = ensemble.images_with_disagreement(files, ensemble.combine(rows, make_config(rows)), 4)
    assert list(table["file"]) == ["even", "a-quarter"]


def test_single_member_ignores_method_and_tie():
    labels, predictions = make_predictions()
    for method in ensemble.METHODS:
        member = predictions[["seed-0"]]
        config = ensemble.fit_ensemble(labels, member, labels, method, "positive", PARAMS)
        assert config == make_config(member, method="mean")


@pytest.mark.parametrize("method", ensemble.METHODS)
def test_threshold_of_every_method_follows_the_operating_point_rule(method):
    labels, predictions = make_predictions()
    params = PARAMS.model_copy(update={"operating_point": "sensitivity", "min_sensitivity": 1.0})
    config = ensemble.fit_ensemble(labels, predictions, np.arange(len(labels)), method, "mean", params)
    assert ensemble.predict(predictions, config)["label"][labels == 1].all()
    assert config.threshold != 0.5


@pytest.mark.parametrize("method", ensemble.METHODS)
def test_recalibration_of_every_method_is_fitted_to_its_score(method):
    labels, predictions = make_predictions(2000)
    params = PARAMS.model_copy(update={"recalibration": "platt"})
    config = ensemble.fit_ensemble(labels, predictions, np.arange(len(labels)), method, "mean", params)
    predicted = ensemble.predict(predictions, config)
    assert config.prevalence == pytest.approx(0.25)
    assert log_loss(labels, predicted["probability"]) < log_loss(labels, predicted["score"])
    assert predicted["probability"].mean() == pytest.approx(0.25, abs=0.005)


def test_ensemble_that_cannot_be_recalibrated_is_calibrated_for_no_prevalence():
    labels, predictions = make_predictions()
    params = PARAMS.model_copy(update={"recalibration": "platt"})
    for wrong in (0 * labels, 1 - labels):
        config = ensemble.fit_ensemble(wrong, predictions, labels, "mean", "mean", params)
        assert (config.temperature, config.bias, config.prevalence) == (1.0, 0.0, None)


# Averaged weights


def make_network(seed: int, backbone_of: Classifier | None = None) -> Classifier:
    torch.manual_seed(seed)
    network = Classifier(Architecture("squeezenet1_1", [], 0.0, 32, "imagenet", 32, "stretch")).eval()
    if backbone_of:
        network.backbone.load_state_dict(backbone_of.backbone.state_dict())
    return network


def test_averaged_weights_on_a_shared_frozen_backbone_predict_the_mean_logit():
    first = make_network(0)
    networks = [first, make_network(1, first), make_network(2, first)]
    pixels = torch.randint(0, 256, (6, 32, 32), dtype=torch.uint8)
    table = pd.DataFrame({str(index): one.predict_proba(pixels).numpy() for index, one in enumerate(networks)})
    averaged = soup.average_weights(networks).predict_proba(pixels).numpy()
    assert averaged == pytest.approx(ensemble.combine(table, make_config(table))["logits"].to_numpy(), abs=1e-5)


def test_weights_are_averaged_only_if_members_share_their_initial_weights():
    assert ensemble.soup_unavailable_reason("imagenet", [], 10) == ""
    assert "hidden layers" in ensemble.soup_unavailable_reason("imagenet", [256], 10)
    assert "random weights" in ensemble.soup_unavailable_reason("none", [], 10)
    assert ensemble.soup_unavailable_reason("imagenet", [], 1) == "one member only"


# Candidates

MEMBERS = pd.DataFrame(columns=["seed-0", "seed-1"])


@pytest.fixture
def models(tmp_path) -> Path:
    """A folder with seed-0 and seed-1 as written by training."""
    for seed in (0, 1):
        folder = tmp_path / f"models/seed-{seed}"
        classifier.save_weights([network := make_network(seed)], folder)
        classifier.save_description(network, folder, {})
    return tmp_path / "models"


def test_loaded_candidate_predicts_with_the_config_it_was_written_with(tmp_path, models):
    pixels = torch.randint(0, 256, (5, 32, 32), dtype=torch.uint8)
    networks = {f"seed-{seed}": classifier.place_for_inference(make_network(seed), pixels.device) for seed in (0, 1)}
    members = pd.DataFrame({name: network.predict_proba(pixels).numpy() for name, network in networks.items()})
    threshold = float(members["seed-1"].median())
    config = EnsembleConfig(list(members), "greedy", "mean", [0.0, 1.0], threshold, 2.0, -0.5, 0.1)
    candidate.assemble_candidate(tmp_path / "bag", models, config)
    predicted = candidate.load_candidate(tmp_path / "bag", torch.device("cpu")).predict(pixels)
    assert predicted["score"].to_numpy() == pytest.approx(members["seed-1"].to_numpy(), abs=1e-6)
    expected = expit(logit(members["seed-1"].to_numpy()) / 2 - 0.5)
    assert predicted["probability"].to_numpy() == pytest.approx(expected, abs=1e-6)
    assert list(predicted["label"]) == list(ensemble.predict(members, config)["label"])
    assert 0 < predicted["label"].sum() < 5


def test_candidate_of_an_earlier_release_is_refused_in_one_line(tmp_path, monkeypatch, models):
    candidate.assemble_candidate(tmp_path / "bag", models, make_config(MEMBERS))
    fields = read_json(tmp_path / "bag/candidate.json") | {"thresholds": [0.5, 0.5]}
    write_json(tmp_path / "bag/candidate.json", fields)
    message = error_message(candidate.load_candidate, tmp_path / "bag", torch.device("cpu"))
    assert message.endswith("candidate.json: written by an earlier release; train again with: dvc repro")
    monkeypatch.chdir(tmp_path)
    write_json(ensemble.CANDIDATES, {"bag": fields})
    message = error_message(ensemble.load_candidate_configs, load_config(ROOT / "params.yaml"))
    assert message == "metrics/candidates.json: written by an earlier release; run: dvc repro bag"


def test_a_model_of_an_earlier_release_that_lacks_the_last_fields_has_a_hash(tmp_path, models):
    path = models / "seed-0/model.json"
    write_json(path, {key: value for key, value in read_json(path).items() if key != "feature_maps"})
    candidate.assemble_candidate(tmp_path / "bag", models, make_config(MEMBERS))
    assert len(candidate.content_hash(tmp_path / "bag")) == 64


def test_candidates_with_different_thresholds_have_different_hashes(tmp_path, models):
    for threshold in (0.4, 0.5):
        config = replace(make_config(MEMBERS), threshold=threshold)
        candidate.assemble_candidate(tmp_path / str(threshold), models, config)
    assert candidate.content_hash(tmp_path / "0.4") != candidate.content_hash(tmp_path / "0.5")


def test_candidate_configs_load_as_written_and_raise_if_seeds_or_members_have_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / "params.yaml")
    two_seeds = config.model_copy(update={"seeds": [0, 1]})
    candidates = {name: make_config(MEMBERS[[name]], method="mean") for name in MEMBERS}
    candidates["bag"] = make_config(MEMBERS)
    fields = {name: asdict(one) for name, one in candidates.items()}
    write_json(ensemble.CANDIDATES, {**fields, "weights_sha256": {"seed-0": "a" * 64, "seed-1": "b" * 64}})
    assert ensemble.load_candidate_configs(two_seeds) == candidates
    bag = two_seeds.active.bag.model_copy(update={"members": [1]})
    profiles = {two_seeds.profile: two_seeds.active.model_copy(update={"bag": bag})}
    for changed in (config, two_seeds.model_copy(update={"profiles": profiles})):
        assert error_message(ensemble.load_candidate_configs, changed).endswith(
            "differ from those in metrics/candidates.json; run: dvc repro bag"
        )


def test_a_model_that_was_trained_again_is_not_combined_with_the_thresholds_of_the_last_one(
    tmp_path, monkeypatch, models
):
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / "params.yaml").model_copy(update={"seeds": [0, 1]})
    fields = {name: asdict(make_config(MEMBERS[[name]], method="mean")) for name in MEMBERS}
    write_json(
        ensemble.CANDIDATES,
        {**fields, "bag": asdict(make_config(MEMBERS)), "weights_sha256": ensemble.read_weights_hashes(MEMBERS)},
    )
    classifier.save_weights([network := make_network(2)], models / "seed-0")
    classifier.save_description(network, models / "seed-0", {})
    with open_model_folder(config, "seed-1") as found:
        assert candidate.load_candidate(found.folder, torch.device("cpu")).config.members == ["seed-1"]
    for name in ("seed-0", "bag"):
        assert error_message(open_model_folder(config, name).__enter__) == (
            "models/seed-0: not the model that metrics/candidates.json was fitted to; run: dvc repro"
        )
    write_json(ensemble.CANDIDATES, {**fields, "bag": asdict(make_config(MEMBERS))})  # as an earlier release wrote it
    assert error_message(ensemble.check_weights, ["seed-1"]).startswith("models/seed-1: not the model that")
