"""Operating points, cross-fitting, calibration, prevalence, shortcut baselines, and the whole evaluation."""

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

OPERATING_POINT_RULES = ("best_f1", "youden", "sensitivity")
rows = st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1, width=32)), min_size=2, max_size=25)


DEFAULT_CONFIG = config.load_config(ROOT / "params.yaml")


def make_config(seeds: int = 2, **evaluate: object) -> Config:
    """Return the demo's parameters with changes in the section evaluate."""
    section = DEFAULT_CONFIG.active.evaluate.model_copy(update={"resamples": 50, **evaluate})
    profile = DEFAULT_CONFIG.active.model_copy(update={"evaluate": section})
    return DEFAULT_CONFIG.model_copy(update={"seeds": list(range(seeds)), "profiles": {"demo": profile}})


def make_params(rule: str, min_sensitivity: float = 0.9) -> config.EvaluateParams:
    return make_config(operating_point=rule, min_sensitivity=min_sensitivity).active.evaluate


# Operating points


@settings(max_examples=80, deadline=None)
@given(rows, st.sampled_from([0.5, 0.8, 1.0]))
def test_no_threshold_has_a_better_objective_than_the_chosen_one(rows, min_sensitivity):
    labels, probabilities = (np.array(column) for column in zip(*rows, strict=True))
    assume(len(set(labels)) == 2)

    def evaluate(threshold: float) -> tuple[float, float, float]:
        """Return sensitivity, specificity and F1."""
        predicted = probabilities >= threshold
        tp = int((predicted & (labels == 1)).sum())
        sensitivity, specificity = tp / labels.sum(), (~predicted & (labels == 0)).sum() / (labels == 0).sum()
        return sensitivity, specificity, 2 * tp / (predicted.sum() + labels.sum())

    alternatives = [evaluate(value) for value in probabilities]
    chosen = {
        rule: evaluate(operating_point.choose_threshold(labels, probabilities, make_params(rule, min_sensitivity)))
        for rule in OPERATING_POINT_RULES
    }
    assert chosen["best_f1"][2] == pytest.approx(max(f1 for *_, f1 in alternatives))
    assert sum(chosen["youden"][:2]) == pytest.approx(max(sens + spec for sens, spec, _ in alternatives))
    assert chosen["sensitivity"][0] >= min_sensitivity
    best = max(spec for sens, spec, _ in alternatives if sens >= min_sensitivity)
    assert chosen["sensitivity"][1] == pytest.approx(best)


def test_threshold_is_midway_between_two_probabilities_and_nearest_to_one_half():
    labels, probabilities = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.4, 0.9])
    assert operating_point.choose_threshold(labels, probabilities, make_params("best_f1")) == pytest.approx(0.3)
    assert operating_point.choose_threshold(labels, np.full(4, 0.7), make_params("youden")) == pytest.approx(0.35)
    assert operating_point.choose_threshold(labels, probabilities, make_params("half")) == 0.5
    assert operating_point.choose_threshold(np.zeros(4), probabilities, make_params("best_f1")) == 0.5


# Cross-fitting


def test_folds_keep_groups_together_and_predict_each_image_once_with_a_fit_on_others():
    labels, groups = np.arange(60) % 3 == 0, np.arange(60) // 2
    folds = grouped_folds(labels, groups)
    assert len(folds) == FOLD_COUNT
    assert all(not set(groups[fit]) & set(groups[evaluation]) for fit, evaluation in folds)
    in_own_fit = cross_fit(folds, set, lambda fitted, rows: np.array([row in fitted for row in rows]))
    assert not in_own_fit.any()
    assert list(cross_fit(folds, lambda rows: None, lambda _, rows: rows)) == list(range(60))


@pytest.mark.parametrize("labels", [[0, 1, 1], [0] * 20, [0] * 20 + [1] * 4])
def test_no_folds_if_a_class_has_too_few_groups(labels):
    assert grouped_folds(np.array(labels), np.arange(len(labels))) == []
    assert cross_fit([], lambda rows: rows, lambda fitted, rows: rows) is None


# Calibration


def miscalibrated(temperature: float, bias: float) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and probabilities that are calibrated by this temperature and bias."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 40_000)
    labels = rng.random(len(logits)) < 1 / (1 + np.exp(-logits))
    return labels.astype(int), 1 / (1 + np.exp(-temperature * (logits - bias)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_fit_temperature_recovers_the_true_temperature(temperature):
    labels, probabilities = miscalibrated(temperature, 0)
    fitted = calibration.fit_temperature(labels, probabilities)
    assert fitted.temperature == pytest.approx(temperature, rel=0.04)
    assert calibration.expected_calibration_error(labels, fitted(probabilities)) < 0.01


def test_fit_platt_recovers_a_shift_of_all_logits_that_a_temperature_cannot():
    labels, probabilities = miscalibrated(2.0, -1.0)
    fitted = calibration.fit_platt(labels, probabilities)
    assert (fitted.temperature, fitted.bias) == pytest.approx((2.0, -1.0), abs=0.08)
    assert calibration.expected_calibration_error(labels, fitted(probabilities)) < 0.01
    assert (
        calibration.expected_calibration_error(
            labels, calibration.fit_temperature(labels, probabilities)(probabilities)
        )
        > 0.05
    )


@settings(max_examples=60, deadline=None)
@given(rows)
def test_temperature_never_increases_the_loss_and_keeps_the_order(rows):
    labels, probabilities = (np.array(column) for column in zip(*rows, strict=True))
    assume(len(set(labels)) == 2)
    calibrated = calibration.fit_temperature(labels, probabilities)(probabilities)
    clipped = probabilities.clip(calibration.PROBABILITY_EPS, 1 - calibration.PROBABILITY_EPS)
    assert sklearn.log_loss(labels, calibrated) <= sklearn.log_loss(labels, clipped) + 1e-6
    assert (np.diff(calibrated[np.argsort(probabilities)]) >= 0).all()
    assert np.array_equal(calibrated >= 0.5, probabilities >= 0.5)


def test_no_recalibrator_for_a_single_class_or_reversed_probabilities():
    assert calibration.fit_temperature(np.ones(5), np.full(5, 0.9)) is None
    assert calibration.fit_platt(np.ones(5), np.full(5, 0.9)) is None
    assert calibration.fit_platt(np.array([1, 1, 0, 0]), np.array([0.1, 0.2, 0.8, 0.9])) is None


def test_reliability_curve_covers_all_images_and_gives_the_calibration_error():
    labels, probabilities = miscalibrated(2.0, 0)
    table = calibration.reliability_curve(labels, probabilities)
    gap = (table["images"] * (table["probability"] - table["positives"]).abs()).sum() / len(labels)
    assert gap == pytest.approx(calibration.expected_calibration_error(labels, probabilities))
    assert table["images"].sum() == len(labels)


# Prevalence


def test_predictive_values_follow_from_bayes_rule():
    # Liver scans, Altman and Bland 1994 (doi:10.1136/bmj.309.6947.102), at the observed prevalence and at 0.25
    metrics = prevalence.metrics_at_prevalence(231 / 258, 54 / 86, np.array([258 / 344, 0.25]))
    assert metrics["ppv"] == pytest.approx([0.88, 0.45], abs=0.005)
    assert metrics["npv"] == pytest.approx([0.67, 0.95], abs=0.005)
    assert metrics["accuracy"][0] == pytest.approx(285 / 344)
    assert math.isnan(prevalence.metrics_at_prevalence(0.0, 1.0, 0.5)["ppv"])


@pytest.mark.parametrize("true_prevalence", [0.02, 0.3, 0.5, 0.9])
def test_label_shift_recovers_the_prevalence_and_increases_accuracy(true_prevalence):
    # Both classes are normally distributed; Bayes' rule gives P(positive) at a prevalence of 0.1.
    rng = np.random.default_rng(0)
    labels = rng.random(20_000) < true_prevalence
    odds = np.exp(2 * (rng.normal(size=len(labels)) + 2 * labels) - 2) * 0.1 / 0.9
    shift = prevalence.adapt_label_shift(odds / (1 + odds), 0.1)
    assert shift["prevalence"] == pytest.approx(true_prevalence, abs=0.015)
    gain = ((shift["probabilities"] >= 0.5) == labels).mean() - ((odds >= 1) == labels).mean()
    assert gain >= -0.001
    assert gain > 0.03 or true_prevalence < 0.3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.01, 0.99))
def test_label_shift_stays_within_0_and_1_and_keeps_the_order(probabilities, prior):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shift = prevalence.adapt_label_shift(np.array(probabilities), prior)
    assert 0 <= shift["prevalence"] <= 1 + 1e-9
    assert np.isfinite(shift["probabilities"]).all()
    assert (np.diff(shift["probabilities"][np.argsort(probabilities)]) >= -1e-12).all()


# Shortcut baselines


def make_pack(sources: list[str], size: int = 37) -> tuple[pd.DataFrame, np.ndarray]:
    """Return a table and images; every third image is positive and has a brighter border."""
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


def test_baselines_find_shortcuts_that_predict_the_label_and_no_others():
    table, images = make_pack(["a", "b", "b"])
    probabilities, info = shortcuts.fit_baselines(table, images)
    labels = table.loc[probabilities.index, "label"].to_numpy(dtype=int)
    assert list(probabilities.index) == list(range(60, 84))
    for name in ("source", "file_metadata", "thumbnail", "border"):
        assert sklearn.roc_auc_score(labels, probabilities[name]) > 0.95, name
        assert info[name]["threshold"] == pytest.approx(1 / 3)
    table = table.assign(source=np.resize(["a", "b", "a", "b", "b"], 90))
    probabilities, _ = shortcuts.fit_baselines(table, 0 * images + 1)
    assert sklearn.roc_auc_score(labels, probabilities["source"]) < 0.8


def test_unavailable_baselines_have_a_reason():
    table, images = make_pack([""])
    probabilities, info = shortcuts.fit_baselines(table.assign(height=512), 0 * images)
    assert probabilities.isna().all(axis=None)
    assert info["source"]["reason"] == "no source is known of the training images, or one only"
    assert info["file_metadata"]["reason"] == "all training images have the same features"
    assert "the same" in info["border"]["reason"]
    _, info = shortcuts.fit_baselines(table.assign(label=0), images)
    assert info["thumbnail"]["reason"] == "training images of one class only"


@pytest.mark.parametrize("size", [16, 37, 64])
def test_thumbnail_pixels_are_means_over_a_grid(size):
    images = np.random.default_rng(0).integers(0, 256, (3, size, size)).astype(np.uint8)
    thumbnails = shortcuts.make_thumbnails(images, np.array([2, 0]))
    assert thumbnails.shape == (2, 16, 16)
    edges = [index * size // 16 for index in range(17)]
    assert thumbnails[1, 3, 15] == pytest.approx(images[0, edges[3] : edges[4], edges[15] :].mean())


# The whole evaluation


def evaluate(
    folder: Path, labels: list[int], settings: Config, *, sources: tuple[str, ...] = ("a", "b"), per_group: int = 2
) -> Evaluation:
    """Evaluate models whose predictions are mostly correct on these labels, and write the files; warnings fail."""
    rng = np.random.default_rng(0)
    count, names = len(labels), [f"seed-{seed}" for seed in settings.seeds]
    truth = np.array(labels)

    def predict(labels: np.ndarray) -> pd.DataFrame:
        logits = 3 * labels[:, None] - 1.5 + rng.normal(0, 1.5, (len(labels), len(names)))
        return pd.DataFrame(1 / (1 + np.exp(-logits)), columns=names)

    files = [f"{index}.jpg" for index in range(count)]
    validation = predict(truth).assign(file=files, label=labels)
    test = predict(np.arange(12) % 2).assign(file=[f"t{index}.jpg" for index in range(12)])
    groups = np.arange(count) // per_group
    metadata = pd.DataFrame({"file": files, "group": groups, "source": np.resize(sources, count)})
    metadata = metadata.assign(view="", width=600, height=np.resize([500, 700], count)).set_index("file")
    soup = validation[["file", "label"]].assign(subset="validation", soup=validation[names].mean(axis="columns"))
    write_csv(folder / "soup.csv", soup)
    baselines = validation[["file", "label"]].assign(source=0.2 + 0.5 * truth, file_metadata=np.nan)
    write_csv(folder / "shortcuts.csv", baselines)
    scores = {name: score_predictions(truth, validation[name].to_numpy()) for name in names}
    write_json(folder / "evaluate.json", scores)
    info = {"source": {"threshold": 0.4, "reason": ""}, "file_metadata": {"threshold": None, "reason": "all the same"}}
    write_json(folder / "shortcuts.json", info)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictions = {"validation": validation, "test": test}
        evaluation = evaluate_models.evaluate_models(settings, predictions, metadata, folder, folder)
        for path, table in evaluation.tables.items():
            write_csv(folder / path, table)
        write_json(folder / "summary.json", evaluation.summary)
        for name in ("roc", "precision_recall"):
            getattr(curves, f"draw_{name}")(folder / f"{name}.png", truth, validation[names])
            getattr(curves, f"{name}_points")(truth, validation[names[0]])
    return evaluation


LABELS = [int(index % 3 == 0) for index in range(90)]


def test_every_model_ensemble_and_baseline_has_metrics_or_a_reason(tmp_path):
    table = evaluate(tmp_path, LABELS, make_config()).tables["metrics/intervals.csv"]
    bags = [f"bag ({method})" for method in ("vote", "mean", "logits", "greedy", "soup")]
    assert list(table["model"].unique()) == ["seed-0", "seed-1", *bags, "shortcut (source)", "shortcut (file_metadata)"]
    available = table["reason"] == ""
    assert (table[available]["low"] <= table[available]["high"]).all()
    assert table[available]["value"].notna().all()
    assert set(table.loc[~available, "model"]) >= {"shortcut (file_metadata)"}
    assert set(table.loc[table["model"] == "bag (greedy)", "estimate_type"]) == {"cross-fitted"}
    assert set(table.loc[table["model"] == "seed-0", "estimate_type"]) == {"fixed"}


def test_evaluation_is_written_reproducibly(tmp_path):
    for name in ("one", "two"):
        evaluate(tmp_path / name, LABELS, make_config())
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")]
    assert len(files) > 12
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes() for path in files)


def test_metrics_at_a_fitted_operating_point_are_cross_fitted(tmp_path):
    tables = evaluate(tmp_path, LABELS, make_config(operating_point="best_f1")).tables
    points = tables["metrics/operating_points.csv"].set_index(["model", "estimate_type"])
    assert (points.xs("apparent", level=1)["f1"] >= points.xs("cross-fitted", level=1)["f1"] - 0.05).all()
    assert set(tables["metrics/intervals.csv"].query("model == 'seed-0'")["estimate_type"]) == {"cross-fitted"}


def test_summary_has_the_expected_accuracy_at_the_expected_prevalence(tmp_path):
    evaluation = evaluate(tmp_path, LABELS, make_config(expected_prevalence=0.4))
    best = evaluation.summary["best"]
    assert best["expected_accuracy"] == pytest.approx(0.4 * best["recall"] + 0.6 * best["specificity"])
    assert best["expected_accuracy_low"] <= best["expected_accuracy"] <= best["expected_accuracy_high"]
    assert 0 < best["estimated_test_prevalence"] < 1
    assert 0.4 in set(evaluation.tables["metrics/prevalence.csv"]["prevalence"])
    without_expected = evaluate(tmp_path, LABELS, make_config(expected_prevalence=None)).summary["best"]
    assert without_expected["expected_accuracy"] is None


def test_prevalence_interval_of_a_class_without_errors_is_wide():
    labels = np.repeat([0, 1], [150, 20])
    validation = metric_tables.ValidationSet(labels, np.arange(170), 2000)
    predicted = np.where(np.arange(170) < 7, 1, labels)  # seven false positives, no false negative
    sample = validation.bootstrap_metrics(metric_tables.Predictions(predicted, None))
    metrics = metric_tables.prevalence_table(validation, {"model": sample}, 0.5).set_index("prevalence").loc[0.5]
    assert metrics["accuracy"] == pytest.approx((1 + 143 / 150) / 2)
    # The mean of Jeffreys' lower limit for 20 of 20 and the specificity
    assert metrics["accuracy_low"] == pytest.approx((beta.ppf(0.025, 20.5, 0.5) + 143 / 150) / 2, abs=0.01)
    assert metrics["npv_low"] < 0.95 < metrics["npv"] == 1


def test_prevalence_interval_of_a_perfect_model_draws_the_classes_independently():
    labels = np.repeat([0, 1], 30)
    validation = metric_tables.ValidationSet(labels, np.arange(60), 2000)
    sample = validation.bootstrap_metrics(metric_tables.Predictions(labels, None))
    metrics = metric_tables.prevalence_table(validation, {"model": sample}, 0.5).set_index("prevalence").loc[0.5]
    draws = np.random.default_rng(1).beta(30.5, 0.5, (2, 20_000)).mean(axis=0)
    assert metrics["accuracy_low"] == pytest.approx(np.quantile(draws, 0.025), abs=0.005)


def test_held_out_source_has_metrics_in_the_slices(tmp_path):
    settings = make_config()
    split = settings.active.split.model_copy(update={"held_out_source": "a"})
    profile = settings.active.model_copy(update={"split": split})
    settings = settings.model_copy(update={"profiles": {settings.profile: profile}})
    slices = evaluate(tmp_path, LABELS, settings, sources=("a",)).tables["metrics/slices.csv"]
    held_out = slices[slices["by"] == "held-out source"]
    assert set(held_out["slice"]) == {"a"}
    assert held_out["value"].notna().any()
    assert "source" not in set(slices["by"])


def test_slices_mark_small_ones_and_sources_that_need_another_training(tmp_path):
    tables = evaluate(tmp_path, [*LABELS, 0], make_config(), sources=("a",) * 88 + ("b",) * 3).tables
    slices = tables["metrics/slices.csv"].drop_duplicates(["by", "slice"]).set_index(["by", "slice"])
    assert not slices.loc[("source", "a"), "small"]
    assert slices.loc[("source", "b"), "small"]
    assert slices.loc[("source", "b"), "images"] == 3
    assert "training without this source" in slices.loc[("held-out source", "a"), "reason"]
    assert slices.loc[("view", ""), "reason"] == "no view is known"
    assert {slice_ for by, slice_ in slices.index if by == "size"} == {"below 512", "512 to 1023"}


@pytest.mark.parametrize("labels", [[0] * 12, [1] * 12, [0, 1, 1], [1, 0], [0]])
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("rule", ["half", "best_f1"])
def test_undefined_metrics_are_missing_with_a_reason_and_no_warning(tmp_path, labels, seeds, rule):
    evaluation = evaluate(tmp_path, labels, make_config(seeds, operating_point=rule), sources=("",))
    tables, best = evaluation.tables, evaluation.summary["best"]
    intervals = tables["metrics/intervals.csv"]
    missing = intervals["value"].isna() | intervals["low"].isna()
    assert (intervals["reason"] != "").eq(missing).all()
    slices = tables["metrics/slices.csv"].set_index("by")
    assert slices.loc["source", "reason"] == "no source is known"
    calibrations = tables["metrics/calibration.csv"]
    assert (calibrations["loss"].isna() <= (calibrations["reason"] != "")).all()
    if len(set(labels)) == 1:
        assert best["auroc"] is None
        assert best["estimated_test_prevalence"] is None
        assert tables["predictions/adapted.csv"]["best"].isna().all()
    if seeds == 1:
        assert set(tables["metrics/seeds.csv"]["reason"]) <= {"one seed only", "undefined for every seed"}
        assert "one member only" in set(intervals["reason"])
        assert tables["metrics/disagreement.csv"].empty
