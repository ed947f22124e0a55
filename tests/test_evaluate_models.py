"""Cross-fitting, calibration, prevalence, shortcut baselines, and the whole evaluation."""

import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from pipeline.core import config
from pipeline.core.config import Config
from pipeline.core.files import write_csv, write_json
from pipeline.evaluation import (
    calibration,
    curves,
    evaluate_models,
    metric_tables,
    prevalence,
    shortcuts,
)
from pipeline.evaluation.cross_fitting import FOLD_COUNT, cross_fit, grouped_folds
from pipeline.evaluation.evaluate_models import Evaluation
from pipeline.evaluation.metrics import score_predictions

rows = st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1, width=32)), min_size=2, max_size=25)


DEFAULT_CONFIG = config.load_config(ROOT / "params.yaml")


def make_config(seeds: int = 2, **evaluate: object) -> Config:
    """Return the demo's parameters with changes in the section evaluate."""
    section = DEFAULT_CONFIG.active.evaluate.model_copy(update={"resamples": 50, **evaluate})
    profile = DEFAULT_CONFIG.active.model_copy(update={"evaluate": section})
    return DEFAULT_CONFIG.model_copy(update={"seeds": list(range(seeds)), "profiles": {"demo": profile}})


# Cross-fitting


def test_folds_keep_groups_together_and_predict_each_image_once_with_a_fit_on_others():
    labels, groups = np.arange(60) % 3 == 0, np.arange(60) // 2
    folds = grouped_folds(labels, groups)
    assert len(folds) == FOLD_COUNT
    assert all(not set(groups[fit]) & set(groups[evaluation]) for fit, evaluation in folds)
    in_own_fit = cross_fit(folds, set, lambda fitted, rows: np.array([row in fitted for row in rows]))
    assert not in_own_fit.any()
    assert list(cross_fit(folds, lambda rows: None, lambda _, rows: rows)) == list(range(60))


@pytest.mark.parametrize(
    ("labels", "per_group"), [([0, 1, 1], 1), ([0] * 20, 1), ([0] * 20 + [1] * 4, 1), ([0] * 80 + [1] * 16, 4)]
)
def test_no_folds_if_a_class_has_too_few_groups(labels, per_group):
    assert grouped_folds(np.array(labels), np.arange(len(labels)) // per_group) == []
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
            "fold": pd.array([1] * 60 + [0] * 24 + [None] * 6, dtype="Int64"),
            "source": np.resize(sources, count),
            "width": 512,
            "height": np.where(labels, 400, 512),
            "bytes": 9000,
            "jpeg_quantization": 20.0,
            "view": np.where(labels, "AP", "PA"),
            "sex": np.resize(["F", "M", ""], count),
            "age": np.where(labels, 70.0, np.nan),
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
    for name in ("source", "view", "demographics", "file_metadata", "thumbnail", "border"):
        assert sklearn.roc_auc_score(labels, probabilities[name]) > 0.95, name
        assert info[name]["threshold"] == pytest.approx(1 / 3)
    ages = np.where(np.arange(90) % 2, 30.0, 70.0)
    table = table.assign(source=np.resize(["a", "b", "a", "b", "b"], 90), sex="", age=ages, height=512)
    probabilities, info = shortcuts.fit_baselines(table, 0 * images + 1)
    assert sklearn.roc_auc_score(labels, probabilities["source"]) < 0.8
    assert sklearn.roc_auc_score(labels, probabilities["demographics"]) < 0.8
    assert info["file_metadata"]["reason"], "the age is no property of the file"


def test_unavailable_baselines_have_a_reason():
    table, images = make_pack([""])
    unknown = table.assign(height=512, view="", sex="", age=np.nan)
    probabilities, info = shortcuts.fit_baselines(unknown, 0 * images)
    assert probabilities.isna().all(axis=None)
    assert info["source"]["reason"] == "no source is known of the training images, or one only"
    assert info["view"]["reason"] == "no view is known of the training images, or one only"
    assert info["demographics"]["reason"] == "all training images have the same features"
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
    folder: Path,
    labels: list[int],
    settings: Config,
    *,
    sources: tuple[str, ...] = ("a", "b"),
    per_group: int = 2,
    test_patients: str = "pairs",
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
    all_files, groups = [*files, *test["file"]], [f"g{index // per_group}" for index in range(count + 12)]
    metadata = pd.DataFrame({"file": all_files, "group": groups, "patient": groups, "label": [*labels, *[pd.NA] * 12]})
    if test_patients != "pairs":
        metadata.loc[count:, "group"] = test["file"].to_list()
        metadata.loc[count:, "patient"] = test["file"].to_list() if test_patients == "single" else ""
    metadata = metadata.assign(
        subset=["validation"] * count + ["test"] * 12,
        fold=pd.array([0] * count + [None] * 12, dtype="Int64"),
        source=np.resize(sources, count + 12),
        view="",
        sex="",
        age=np.nan,
        width=600,
        height=np.resize([500, 700], count + 12),
    ).set_index("file")
    acquisition = pd.DataFrame({"file": all_files, "cluster": "", "bytes": rng.normal(size=count + 12)})
    write_csv(folder / "acquisition.csv", acquisition)
    np.save(folder / "thumbnails.npy", rng.random((count + 12, 4, 4)))
    np.save(folder / "embeddings.npy", rng.normal(size=(count + 12, 3)))
    np.save(folder / "features.npy", rng.normal(size=(count, 3)))
    soup = validation[["file", "label"]].assign(subset="validation", soup=validation[names].mean(axis="columns"))
    write_csv(folder / "soup.csv", soup)
    baselines = validation[["file", "label"]].assign(source=0.2 + 0.5 * truth, file_metadata=np.nan)
    write_csv(folder / "shortcuts.csv", baselines)
    scores = {name: score_predictions(truth, validation[name].to_numpy()) for name in names}
    write_json(folder / "evaluate.json", scores)
    info = {"source": {"threshold": 0.4, "reason": ""}, "file_metadata": {"threshold": None, "reason": "all the same"}}
    write_json(folder / "shortcuts.json", info)
    for name in names:
        epochs = pd.DataFrame({"fold": 0, "file": files, "epoch-1": 0.4 + 0.2 * rng.random(count)})
        write_csv(folder / name / "validation.csv", epochs.assign(**{"epoch-2": validation[name]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictions = {"validation": validation, "test": test}
        epochs = evaluate_models.load_epoch_predictions(names, validation["file"], folder)
        evaluation = evaluate_models.evaluate_models(settings, predictions, epochs, metadata, folder, folder)
        for path, table in evaluation.tables.items():
            write_csv(folder / path, table)
        write_json(folder / "summary.json", evaluation.summary)
        for name in ("roc", "precision_recall"):
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
    types = table.set_index(["model", "metric"])["estimate_type"]
    assert types["seed-0"]["f1"] == types["seed-0"]["auroc"] == "fixed"
    assert types["seed-0"]["loss"] == "cross-fitted", "the recalibration is fitted"


def make_selecting_config(keep: str, seeds: int = 2, **evaluate: object) -> Config:
    settings = make_config(seeds, **evaluate)
    train = settings.active.train.model_copy(update={"keep": keep})
    profile = settings.active.model_copy(update={"train": train})
    return settings.model_copy(update={"profiles": {settings.profile: profile}})


@pytest.mark.parametrize(("keep", "seeds"), [("last", 1), ("last", 3), ("best_f1", 1), ("best_f1", 3)])
def test_what_was_selected_on_the_validation_set_is_corrected_or_called_apparent(tmp_path, keep, seeds):
    evaluation = evaluate(tmp_path, LABELS, make_selecting_config(keep, seeds, resamples=200))
    table, summary = evaluation.tables["metrics/intervals.csv"], evaluation.summary
    assert list(summary) == ["bag", "best", "validation"]
    bag, best = summary["bag"]["model"], summary["best"]["model"]
    types = table[table["metric"] == "f1"].groupby("model")["estimate_type"].agg(list)
    corrected = ["apparent", "corrected"]
    assert types[bag] == (["fixed"] if keep == "last" else corrected)
    assert types[best] == (["fixed"] if keep == "last" and seeds == 1 else corrected)
    others = [f"seed-{seed}" for seed in range(seeds) if f"seed-{seed}" != best]
    assert all(types[seed] == (["fixed"] if keep == "last" else corrected) for seed in others)
    for role, name in (("bag", bag), ("best", best)):
        f1 = table.query("model == @name and metric == 'f1'")["value"]
        assert summary[role]["f1"] == f1.iloc[-1]
        assert summary[role].get("apparent_f1", f1.iloc[0]) == f1.iloc[0]
        assert summary[role]["estimate_type"] == types[name][-1]
        assert summary[role]["f1_low"] < summary[role]["f1"] < summary[role]["f1_high"]
    if seeds > 1:
        assert summary["best"]["f1"] < summary["best"]["apparent_f1"]
    assert summary["validation"] == {
        "images": 90, "positives": 30, "patients": 45, "positive_patients": 30, "negative_patients": 45,
    }  # fmt: skip


@pytest.mark.parametrize("method", ["vote", "greedy"])
def test_correction_covers_every_way_to_combine_and_a_fitted_threshold(tmp_path, method):
    settings = make_selecting_config("best_loss", 3, operating_point="youden")
    bag = settings.active.bag.model_copy(update={"method": method})
    profile = settings.active.model_copy(update={"bag": bag})
    summary = evaluate(tmp_path, LABELS, settings.model_copy(update={"profiles": {settings.profile: profile}})).summary
    assert summary["bag"]["model"] == f"bag ({method})"
    assert summary["bag"]["estimate_type"] == "corrected"
    bag_metrics = summary["bag"]
    apparent = bag_metrics["apparent_recall"] + bag_metrics["apparent_specificity"]
    assert bag_metrics["recall"] + bag_metrics["specificity"] < apparent


def test_ranks_of_the_candidates_add_up_to_1(tmp_path):
    ranks = evaluate(tmp_path, LABELS, make_config()).tables["metrics/ranks.csv"]
    assert list(ranks["model"])[:2] == ["seed-0", "seed-1"]
    assert ranks["model"].iloc[2].startswith("bag (")
    assert ranks["probability"].sum() == pytest.approx(1)


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
    types = tables["metrics/intervals.csv"].query("model == 'seed-0'").set_index("metric")["estimate_type"]
    assert set(types[["f1", "recall", "loss"]]) == {"cross-fitted"}
    assert types["auroc"] == "fixed", "it needs no threshold"
    point, confusion = points.loc["bag (mean)"].loc["cross-fitted"], tables["plots/bag_confusion.csv"]
    counts = pd.crosstab(confusion["actual"], confusion["predicted"])
    assert counts.to_numpy().ravel().tolist() == point[["tn", "fp", "fn", "tp"]].tolist()
    assert list(counts.index) == list(counts.columns) == ["negative", "positive"]


def test_summary_has_the_expected_accuracy_of_the_bag_and_the_source_probe_of_its_first_member(tmp_path):
    evaluation = evaluate(tmp_path, LABELS, make_config(expected_prevalence=0.4))
    bag, best = evaluation.summary["bag"], evaluation.summary["best"]
    assert bag["expected_accuracy_low"] <= bag["expected_accuracy"] <= bag["expected_accuracy_high"]
    assert best["expected_accuracy"] is None
    assert best["expected_accuracy_reason"]
    assert 0 < best["estimated_test_prevalence"] < 1
    probe = evaluation.tables["metrics/source_probe.csv"].set_index("features")
    estimate = [bag[f"first_member_source_probe_auroc{end}"] for end in ("", "_low", "_high")]
    assert estimate == probe.loc["network", ["value", "low", "high"]].tolist()
    assert bag["thumbnail_source_probe_auroc"] == probe.loc["thumbnail", "value"]
    assert 0 < estimate[1] < estimate[0] < estimate[2] < 1


def test_test_images_without_patients_are_taken_to_be_grouped_like_the_labeled_ones(tmp_path):
    unknown, known = (
        evaluate(tmp_path, LABELS, make_config(), test_patients=patients) for patients in ("unknown", "single")
    )
    assert unknown.summary["bag"]["expected_accuracy_low"] < known.summary["bag"]["expected_accuracy_low"]
    highest = "estimated_test_prevalence_high"
    assert unknown.summary["bag"][highest] > known.summary["bag"][highest]
    p, known_p = (evaluation.tables["metrics/shift.csv"]["p"] for evaluation in (unknown, known))
    assert (p >= known_p).all()
    assert (p > known_p).any()


def test_metrics_at_the_expected_prevalence_are_those_of_the_rates_in_the_summary(tmp_path):
    evaluation = evaluate(tmp_path, LABELS, make_config(expected_prevalence=0.4))
    for role in ("bag", "best"):
        metrics = evaluation.summary[role]
        table = evaluation.tables["metrics/prevalence.csv"].set_index(["model", "prevalence"])
        row = table.loc[(metrics["model"], 0.4)]
        assert row["estimate_type"] == metrics["estimate_type"]
        assert row["accuracy"] == pytest.approx(0.4 * metrics["recall"] + 0.6 * metrics["specificity"])
        assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]


def accuracy_at_half(labels: np.ndarray, predicted: np.ndarray, bias: dict[str, float] | None = None) -> pd.Series:
    """Return the row of the prevalence table for a prevalence of 0.5; every image is its own group."""
    validation = metric_tables.ValidationSet(labels, np.arange(len(labels)), 10)
    rows = pd.DataFrame([bias] if bias else [], ["model"] if bias else [], columns=["recall", "specificity"])
    models = {"model": metric_tables.Predictions(predicted, None)}
    return metric_tables.prevalence_table(validation, models, rows, 0.5).set_index("prevalence").loc[0.5]


def wilson_draws(successes: int, count: int, seed: int) -> np.ndarray:
    """Return draws that have the limits of Wilson's interval, of any confidence level, as their quantiles."""
    draws = np.random.default_rng(seed).normal(size=40_000)
    squares, share = draws**2 / count, successes / count
    half_width = np.sign(draws) * np.sqrt(squares * (share * (1 - share) + squares / 4))
    return (share + squares / 2 + half_width) / (1 + squares)


def test_prevalence_interval_of_a_class_without_errors_is_wide():
    labels = np.repeat([0, 1], [150, 20])
    predicted = np.where(np.arange(170) < 7, 1, labels)  # seven false positives, no false negative
    metrics = accuracy_at_half(labels, predicted)
    assert metrics["accuracy"] == pytest.approx((1 + 143 / 150) / 2)
    draws = (wilson_draws(20, 20, 0) + wilson_draws(143, 150, 1)) / 2
    assert metrics["accuracy_low"] == pytest.approx(np.quantile(draws, 0.025), abs=0.003)
    assert metrics["npv_low"] < 0.95 < metrics["npv"] == 1


def test_prevalence_interval_of_a_perfect_model_draws_the_classes_independently():
    labels = np.repeat([0, 1], 30)
    draws = (wilson_draws(30, 30, 0) + wilson_draws(30, 30, 1)) / 2
    assert accuracy_at_half(labels, labels)["accuracy_low"] == pytest.approx(np.quantile(draws, 0.025), abs=0.003)


def test_expected_accuracy_is_corrected_for_selection():
    labels = np.repeat([0, 1], 30)
    predicted = np.where(np.arange(60) % 10 == 0, 1 - labels, labels)  # three errors in each class
    metrics = accuracy_at_half(labels, predicted, {"recall": 0.1, "specificity": 0.05})
    assert metrics["estimate_type"] == "corrected"
    assert metrics["accuracy"] == pytest.approx(0.9 - (0.1 + 0.05) / 2)
    assert metrics["accuracy_low"] < metrics["accuracy"] < metrics["accuracy_high"]


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
