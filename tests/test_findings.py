"""Operating points, calibration, prevalence, shortcuts, and all of it where figures cannot be had."""

import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import beta
from sklearn import metrics as sklearn

from pipeline.core import config
from pipeline.core.config import Config
from pipeline.core.files import write_csv, write_json
from pipeline.evaluation import (
    calibration,
    curves,
    evaluate_models,
    metric_tables,
    operating_point,
    prevalence,
    shortcuts,
)
from pipeline.evaluation.cross_fitting import FOLD_COUNT, cross_fit, grouped_folds
from pipeline.evaluation.evaluate_models import Evaluation
from pipeline.evaluation.metrics import score_predictions

RULES = ("best_f1", "youden", "sensitivity")
rows = st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1, width=32)), min_size=2, max_size=25)


SHIPPED = config.load_config(ROOT / "params.yaml")


def shipped(seeds: int = 2, **evaluate: object) -> Config:
    """Return the demo's parameters, changed."""
    section = SHIPPED.active.evaluate.model_copy(update={"resamples": 50, **evaluate})
    profile = SHIPPED.active.model_copy(update={"evaluate": section})
    return SHIPPED.model_copy(update={"seeds": list(range(seeds)), "profiles": {"demo": profile}})


def params(rule: str, floor: float = 0.9) -> config.EvaluateParams:
    return shipped(operating_point=rule, min_sensitivity=floor).active.evaluate


# Operating points


@settings(max_examples=80, deadline=None)
@given(rows, st.sampled_from([0.5, 0.8, 1.0]))
def test_no_threshold_is_better_by_its_rule_than_the_one_chosen(rows, floor):
    labels, given = (np.array(column) for column in zip(*rows, strict=True))
    assume(len(set(labels)) == 2)

    def worth(threshold: float) -> tuple[float, float, float]:
        """Return sensitivity, specificity and F1."""
        predicted = given >= threshold
        hits = int((predicted & (labels == 1)).sum())
        sensitivity, specificity = hits / labels.sum(), (~predicted & (labels == 0)).sum() / (labels == 0).sum()
        return sensitivity, specificity, 2 * hits / (predicted.sum() + labels.sum())

    every = [worth(value) for value in given]
    chosen = {rule: worth(operating_point.choose_threshold(labels, given, params(rule, floor))) for rule in RULES}
    assert chosen["best_f1"][2] == pytest.approx(max(f1 for *_, f1 in every))
    assert sum(chosen["youden"][:2]) == pytest.approx(max(one + other for one, other, _ in every))
    assert chosen["sensitivity"][0] >= floor
    assert chosen["sensitivity"][1] == pytest.approx(max(other for one, other, _ in every if one >= floor))


def test_a_threshold_lies_between_two_probabilities_and_is_the_nearest_to_a_half():
    labels, given = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.4, 0.9])
    assert operating_point.choose_threshold(labels, given, params("best_f1")) == pytest.approx(0.3)
    assert operating_point.choose_threshold(labels, np.full(4, 0.7), params("youden")) == pytest.approx(0.35)
    assert operating_point.choose_threshold(labels, given, params("half")) == 0.5
    assert operating_point.choose_threshold(np.zeros(4), given, params("best_f1")) == 0.5


# Cross-fitting


def test_folds_keep_groups_together_and_measure_each_image_once_by_what_others_chose():
    labels, groups = np.arange(60) % 3 == 0, np.arange(60) // 2
    parts = grouped_folds(labels, groups)
    assert len(parts) == FOLD_COUNT
    assert all(not set(groups[choose]) & set(groups[evaluated]) for choose, evaluated in parts)
    found = cross_fit(parts, set, lambda chosen, rows: np.array([row in chosen for row in rows]))
    assert not found.any()
    assert list(cross_fit(parts, lambda rows: None, lambda _, rows: rows)) == list(range(60))


@pytest.mark.parametrize("labels", [[0, 1, 1], [0] * 20, [0] * 20 + [1] * 4])
def test_there_are_no_folds_of_a_class_with_few_groups(labels):
    assert grouped_folds(np.array(labels), np.arange(len(labels))) == []
    assert cross_fit([], lambda rows: rows, lambda chosen, rows: rows) is None


# Calibration


def logistic(temperature: float, bias: float) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and probabilities whose logits are so many times too large, and moved by the bias before."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 40_000)
    labels = rng.random(len(logits)) < 1 / (1 + np.exp(-logits))
    return labels.astype(int), 1 / (1 + np.exp(-temperature * (logits - bias)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_temperature_is_found_again(temperature):
    labels, given = logistic(temperature, 0)
    fitted = calibration.fit_temperature(labels, given)
    assert fitted.temperature == pytest.approx(temperature, rel=0.04)
    assert calibration.expected_calibration_error(labels, fitted(given)) < 0.01


def test_a_shift_of_all_logits_is_found_again_by_temperature_and_bias_alone():
    labels, given = logistic(2.0, -1.0)
    fitted = calibration.fit_platt(labels, given)
    assert (fitted.temperature, fitted.bias) == pytest.approx((2.0, -1.0), abs=0.08)
    assert calibration.expected_calibration_error(labels, fitted(given)) < 0.01
    assert calibration.expected_calibration_error(labels, calibration.fit_temperature(labels, given)(given)) > 0.05


@settings(max_examples=60, deadline=None)
@given(rows)
def test_a_temperature_never_raises_the_loss_and_keeps_the_order(rows):
    labels, given = (np.array(column) for column in zip(*rows, strict=True))
    assume(len(set(labels)) == 2)
    found = calibration.fit_temperature(labels, given)(given)
    clipped = given.clip(calibration.PROBABILITY_EPS, 1 - calibration.PROBABILITY_EPS)
    assert sklearn.log_loss(labels, found) <= sklearn.log_loss(labels, clipped) + 1e-6
    assert (np.diff(found[np.argsort(given)]) >= 0).all()
    assert np.array_equal(found >= 0.5, given >= 0.5)


def test_what_has_one_class_or_the_wrong_order_is_not_calibrated():
    assert calibration.fit_temperature(np.ones(5), np.full(5, 0.9)) is None
    assert calibration.fit_platt(np.ones(5), np.full(5, 0.9)) is None
    assert calibration.fit_platt(np.array([1, 1, 0, 0]), np.array([0.1, 0.2, 0.8, 0.9])) is None


def test_the_bins_of_a_reliability_diagram_hold_all_images():
    labels, given = logistic(2.0, 0)
    table = calibration.reliability_curve(labels, given)
    gap = (table["images"] * (table["probability"] - table["positives"]).abs()).sum() / len(labels)
    assert gap == pytest.approx(calibration.expected_calibration_error(labels, given))
    assert table["images"].sum() == len(labels)


# Prevalence


def test_predictive_values_are_those_of_bayes_rule():
    # Liver scans of Altman and Bland 1994 (doi:10.1136/bmj.309.6947.102), as found and at a prevalence of 0.25
    found = prevalence.metrics_at_prevalence(231 / 258, 54 / 86, np.array([258 / 344, 0.25]))
    assert found["ppv"] == pytest.approx([0.88, 0.45], abs=0.005)
    assert found["npv"] == pytest.approx([0.67, 0.95], abs=0.005)
    assert found["accuracy"][0] == pytest.approx(285 / 344)
    assert math.isnan(prevalence.metrics_at_prevalence(0.0, 1.0, 0.5)["ppv"])


@pytest.mark.parametrize("there", [0.02, 0.3, 0.5, 0.9])
def test_the_prevalence_of_unlabeled_images_is_found_and_adaptation_gains_accuracy(there):
    # Normal marks of both classes, of which Bayes' rule gives P(positive) at a prevalence of 0.1.
    rng = np.random.default_rng(0)
    labels = rng.random(20_000) < there
    odds = np.exp(2 * (rng.normal(size=len(labels)) + 2 * labels) - 2) * 0.1 / 0.9
    found = prevalence.adapt_label_shift(odds / (1 + odds), 0.1)
    assert found["prevalence"] == pytest.approx(there, abs=0.015)
    plain = ((odds >= 1) == labels).mean()
    gained = ((found["probabilities"] >= 0.5) == labels).mean() - plain
    assert gained >= -0.001
    assert gained > 0.03 or there < 0.3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.01, 0.99))
def test_adaptation_ends_within_0_and_1_and_keeps_the_order(given, prior):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = prevalence.adapt_label_shift(np.array(given), prior)
    assert 0 <= found["prevalence"] <= 1 + 1e-9
    assert np.isfinite(found["probabilities"]).all()
    assert (np.diff(found["probabilities"][np.argsort(given)]) >= -1e-12).all()


# Shortcuts


def pack(sources: list[str], size: int = 37) -> tuple[pd.DataFrame, np.ndarray]:
    """Return a table and images with bright borders where positive; every third image is."""
    count = 90
    labels = np.arange(count) % 3 == 0
    table = pd.DataFrame(
        {
            "label": pd.array(labels.astype(int), dtype="Int64"),
            "subset": ["train"] * 60 + ["validation"] * 24 + ["test"] * 6,
            "source": np.resize(sources, count),
            "width": 512,
            "height": np.where(labels, 400, 512),
        }
    )
    images = np.random.default_rng(0).integers(0, 200, (count, size, size)).astype(np.uint8)
    images[labels, :3] += 50
    return table, images


def test_shortcuts_that_tell_the_label_are_found_and_those_that_do_not_are_no_better_than_chance():
    table, images = pack(["a", "b", "b"])
    found, facts = shortcuts.fit_baselines(table, images)
    labels = table.loc[found.index, "label"].to_numpy(dtype=int)
    assert list(found.index) == list(range(60, 84))
    for name in ("source", "file_metadata", "thumbnail", "border"):
        assert sklearn.roc_auc_score(labels, found[name]) > 0.95, name
        assert facts[name]["threshold"] == pytest.approx(1 / 3)
    found, _ = shortcuts.fit_baselines(table.assign(source=np.resize(["a", "b", "a", "b", "b"], 90)), 0 * images + 1)
    assert sklearn.roc_auc_score(labels, found["source"]) < 0.8


def test_a_shortcut_that_is_not_there_says_why():
    table, images = pack([""])
    found, facts = shortcuts.fit_baselines(table.assign(height=512), 0 * images)
    assert found.isna().all(axis=None)
    assert facts["source"]["reason"] == "no source is known of the training images, or one only"
    assert facts["file_metadata"]["reason"] == "all training images are the same there"
    assert "the same" in facts["border"]["reason"]
    _, facts = shortcuts.fit_baselines(table.assign(label=0), images)
    assert facts["thumbnail"]["reason"] == "training images of one class only"


@pytest.mark.parametrize("size", [16, 37, 64])
def test_a_thumbnail_is_the_mean_of_its_parts(size):
    images = np.random.default_rng(0).integers(0, 256, (3, size, size)).astype(np.uint8)
    found = shortcuts.make_thumbnails(images, np.array([2, 0]))
    assert found.shape == (2, 16, 16)
    edges = [index * size // 16 for index in range(17)]
    assert found[1, 3, 15] == pytest.approx(images[0, edges[3] : edges[4], edges[15] :].mean())


# All together


def find(
    folder: Path, labels: list[int], settings: Config, *, sources: tuple[str, ...] = ("a", "b"), per_group: int = 2
) -> Evaluation:
    """Measure models that are mostly right on these labels; whatever warns fails."""
    rng = np.random.default_rng(0)
    count, names = len(labels), [f"seed-{seed}" for seed in settings.seeds]
    truth = np.array(labels)

    def table(of: np.ndarray) -> pd.DataFrame:
        logits = 3 * of[:, None] - 1.5 + rng.normal(0, 1.5, (len(of), len(names)))
        return pd.DataFrame(1 / (1 + np.exp(-logits)), columns=names)

    files = [f"{index}.jpg" for index in range(count)]
    validation = table(truth).assign(file=files, label=labels)
    test = table(np.arange(12) % 2).assign(file=[f"t{index}.jpg" for index in range(12)])
    facts = pd.DataFrame({"file": files, "group": np.arange(count) // per_group, "source": np.resize(sources, count)})
    facts = facts.assign(view="", width=600, height=np.resize([500, 700], count)).set_index("file")
    soup = validation[["file", "label"]].assign(subset="validation", soup=validation[names].mean(axis="columns"))
    write_csv(folder / "soup.csv", soup)
    write_csv(
        folder / "shortcuts.csv", validation[["file", "label"]].assign(source=0.2 + 0.5 * truth, file_metadata=np.nan)
    )
    write_json(
        folder / "evaluate.json", {name: score_predictions(truth, validation[name].to_numpy()) for name in names}
    )
    known = {"source": {"threshold": 0.4, "reason": ""}, "file_metadata": {"threshold": None, "reason": "all the same"}}
    write_json(folder / "shortcuts.json", known)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate_models.evaluate_models(
            settings, {"validation": validation, "test": test}, facts, folder, folder
        )
        for path, content in found.tables.items():
            write_csv(folder / path, content)
        write_json(folder / "summary.json", found.summary)
        for name in ("roc", "precision_recall"):
            getattr(curves, f"draw_{name}")(folder / f"{name}.png", truth, validation[names])
            getattr(curves, f"{name}_points")(truth, validation[names[0]])
    return found


USUAL = [int(index % 3 == 0) for index in range(90)]


def test_every_model_bag_and_shortcut_has_its_figures_or_a_reason(tmp_path):
    found = find(tmp_path, USUAL, shipped()).tables["metrics/intervals.csv"]
    bags = [f"bag ({way})" for way in ("vote", "mean", "logits", "greedy", "soup")]
    assert list(found["model"].unique()) == ["seed-0", "seed-1", *bags, "shortcut (source)", "shortcut (file_metadata)"]
    there = found["reason"] == ""
    assert (found[there]["low"] <= found[there]["high"]).all()
    assert found[there]["value"].notna().all()
    assert set(found.loc[~there, "model"]) >= {"shortcut (file_metadata)"}
    assert set(found.loc[found["model"] == "bag (greedy)", "estimate_type"]) == {"cross-fitted"}
    assert set(found.loc[found["model"] == "seed-0", "estimate_type"]) == {"fixed"}


def test_the_same_findings_twice_are_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        find(tmp_path / name, USUAL, shipped())
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")]
    assert len(files) > 12
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes() for path in files)


def test_figures_of_a_chosen_operating_point_are_cross_fitted(tmp_path):
    found = find(tmp_path, USUAL, shipped(operating_point="best_f1")).tables
    points = found["metrics/operating_points.csv"].set_index(["model", "estimate_type"])
    assert (points.xs("apparent", level=1)["f1"] >= points.xs("cross-fitted", level=1)["f1"] - 0.05).all()
    assert set(found["metrics/intervals.csv"].query("model == 'seed-0'")["estimate_type"]) == {"cross-fitted"}


def test_the_summary_foretells_accuracy_at_the_expected_prevalence(tmp_path):
    found = find(tmp_path, USUAL, shipped(expected_prevalence=0.4))
    best = found.summary["best"]
    assert best["expected_accuracy"] == pytest.approx(0.4 * best["recall"] + 0.6 * best["specificity"])
    assert best["expected_accuracy_low"] <= best["expected_accuracy"] <= best["expected_accuracy_high"]
    assert 0 < best["estimated_test_prevalence"] < 1
    assert 0.4 in set(found.tables["metrics/prevalence.csv"]["prevalence"])
    nothing = find(tmp_path, USUAL, shipped(expected_prevalence=None)).summary["best"]
    assert nothing["expected_accuracy"] is None


def test_what_no_error_was_seen_in_is_not_foretold_as_sure():
    labels = np.repeat([0, 1], [150, 20])
    validation = metric_tables.ValidationSet(labels, np.arange(170), 2000)
    predicted = np.where(np.arange(170) < 7, 1, labels)  # seven false alarms, and no miss
    sample = validation.bootstrap_metrics(metric_tables.Predictions(predicted, None))
    found = metric_tables.prevalence_table(validation, {"model": sample}, 0.5).set_index("prevalence").loc[0.5]
    assert found["accuracy"] == pytest.approx((1 + 143 / 150) / 2)
    # Half of Jeffreys' lower end for 20 of 20, and half of the specificity
    assert found["accuracy_low"] == pytest.approx((beta.ppf(0.025, 20.5, 0.5) + 143 / 150) / 2, abs=0.01)
    assert found["npv_low"] < 0.95 < found["npv"] == 1


def test_a_perfect_model_is_not_foretold_to_err_about_both_classes_at_once():
    labels = np.repeat([0, 1], 30)
    validation = metric_tables.ValidationSet(labels, np.arange(60), 2000)
    sample = validation.bootstrap_metrics(metric_tables.Predictions(labels, None))
    found = metric_tables.prevalence_table(validation, {"model": sample}, 0.5).set_index("prevalence").loc[0.5]
    drawn = np.random.default_rng(1).beta(30.5, 0.5, (2, 20_000)).mean(axis=0)
    assert found["accuracy_low"] == pytest.approx(np.quantile(drawn, 0.025), abs=0.005)


def test_a_source_that_was_held_out_has_its_figures_there(tmp_path):
    settings = shipped()
    split = settings.active.split.model_copy(update={"held_out_source": "a"})
    profile = settings.active.model_copy(update={"split": split})
    settings = settings.model_copy(update={"profiles": {settings.profile: profile}})
    found = find(tmp_path, USUAL, settings, sources=("a",)).tables["metrics/slices.csv"]
    left_out = found[found["by"] == "source left out"]
    assert set(left_out["slice"]) == {"a"}
    assert left_out["value"].notna().any()
    assert "source" not in set(found["by"])


def test_slices_say_how_small_they_are_and_what_would_need_another_training(tmp_path):
    found = find(tmp_path, [*USUAL, 0], shipped(), sources=("a",) * 88 + ("b",) * 3).tables["metrics/slices.csv"]
    sizes = found.drop_duplicates(["by", "slice"]).set_index(["by", "slice"])
    assert not sizes.loc[("source", "a"), "small"]
    assert sizes.loc[("source", "b"), "small"]
    assert sizes.loc[("source", "b"), "images"] == 3
    assert "training without this source" in sizes.loc[("source left out", "a"), "reason"]
    assert sizes.loc[("view", ""), "reason"] == "no view is known"
    assert {slice_ for by, slice_ in sizes.index if by == "size"} == {"below 512", "512 to 1023"}


@pytest.mark.parametrize("labels", [[0] * 12, [1] * 12, [0, 1, 1], [1, 0], [0]])
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("rule", ["half", "best_f1"])
def test_whatever_cannot_be_had_is_missing_with_a_reason_and_nothing_warns(tmp_path, labels, seeds, rule):
    found = find(tmp_path, labels, shipped(seeds, operating_point=rule), sources=("",))
    intervals = found.tables["metrics/intervals.csv"]
    missing = intervals["value"].isna() | intervals["low"].isna()
    assert (intervals["reason"] != "").eq(missing).all()
    slices = found.tables["metrics/slices.csv"].set_index("by")
    assert slices.loc["source", "reason"] == "no source is known"
    calibrated = found.tables["metrics/calibration.csv"]
    assert (calibrated["loss"].isna() <= (calibrated["reason"] != "")).all()
    if len(set(labels)) == 1:
        assert found.summary["best"]["auroc"] is None
        assert found.summary["best"]["estimated_test_prevalence"] is None
        assert found.tables["predictions/adapted.csv"]["best"].isna().all()
    if seeds == 1:
        assert set(found.tables["metrics/seeds.csv"]["reason"]) <= {"one seed only", "no seed has it"}
        assert "one member only" in set(intervals["reason"])
        assert found.tables["metrics/disagreement.csv"].empty
