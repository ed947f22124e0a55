"""Correction of metrics for selection on the validation set, and ranks."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from pipeline.core.errors import UserError
from pipeline.core.files import write_csv
from pipeline.evaluation import selection
from pipeline.evaluation.evaluate_models import load_epoch_predictions
from pipeline.evaluation.intervals import bootstrap_weights, confidence_intervals
from pipeline.evaluation.metrics import kept_epoch, score_predictions

LABELS = np.repeat([0, 1], [30, 15])
GROUPS = np.arange(45) // 2


def draw_probabilities(seeds: int, epochs: int, separation: float, labels: np.ndarray = LABELS) -> np.ndarray:
    """Return P(positive) (S, E, N) of models that are equally good."""
    noise = np.random.default_rng(0).normal(size=(seeds, epochs, len(labels)))
    return np.round(1 / (1 + np.exp(-separation * (labels - 0.5) - noise)), 2)


def estimate_bias(
    probabilities: np.ndarray, keep: str = "best_f1", labels: np.ndarray = LABELS, groups: np.ndarray = GROUPS,
    folds: np.ndarray | None = None, resamples: int = 400,
) -> pd.DataFrame:  # fmt: skip
    return selection.estimate_selection_bias(
        labels,
        np.zeros(len(labels)) if folds is None else folds,
        probabilities,
        keep,
        bootstrap_weights(groups, resamples)[1:],
        range(len(probabilities)),
        lambda members, _: members.mean(axis=2),
        lambda scores, _: np.full(len(scores), 0.5),
    )


@pytest.mark.parametrize("keep", ["best_f1", "best_loss", "last"])
def test_bias_is_that_of_a_plain_loop_with_repeated_images(keep):
    folds = np.resize([0, 0, 0, 1, 1], len(LABELS))
    probabilities = draw_probabilities(3, 4, 1.0)
    probabilities[1, 3, folds == 1] = np.nan  # stopped early
    weights, totals = bootstrap_weights(GROUPS, 20)[1:], {}
    for counts in weights:
        rows, left_out = np.repeat(np.arange(len(LABELS)), counts), np.flatnonzero(counts == 0)
        seeds = []
        for of_seed in probabilities:
            kept = np.empty(len(LABELS))
            for fold in (0, 1):
                of_fold = rows[folds[rows] == fold]
                epochs = [epoch for epoch in of_seed if not np.isnan(epoch[folds == fold]).any()]
                history = [score_predictions(LABELS[of_fold], epoch[of_fold]) for epoch in epochs]
                kept[folds == fold] = epochs[kept_epoch(history, keep)][folds == fold]
            seeds.append(kept)
        scores = [score_predictions(LABELS[rows], kept[rows]) for kept in seeds]
        best = max(range(3), key=lambda seed: (scores[seed]["f1"], -scores[seed]["loss"]))
        for name, values in {**dict(enumerate(seeds)), "best": seeds[best], "bag": np.mean(seeds, axis=0)}.items():
            hits = (values >= 0.5) == (LABELS == 1)
            cells = [[hits[part][LABELS[part] == label].sum(), (LABELS[part] == label).sum()]
                     for part in (rows, left_out) for label in (1, 0)]  # fmt: skip
            aurocs = [roc_auc_score(LABELS[part], values[part]) for part in (rows, left_out)]
            totals.setdefault(name, []).append([*np.ravel(cells), aurocs[0] - aurocs[1]])
    bias = estimate_bias(probabilities, keep, folds=folds, resamples=20)
    for name, values in totals.items():
        recall, negatives, left_recall, left_negatives = np.sum(values, axis=0)[:8].reshape(4, 2).tolist()
        optimism = [
            recall[0] / recall[1] - left_recall[0] / left_recall[1],
            negatives[0] / negatives[1] - left_negatives[0] / left_negatives[1],
            np.mean(values, axis=0)[8],
        ]
        assert bias.loc[name].to_numpy() == pytest.approx(selection.OPTIMISM_FRACTION * np.array(optimism)), name


def test_without_a_choice_there_is_next_to_no_bias():
    bias = estimate_bias(draw_probabilities(1, 1, 2.0), resamples=2000)
    assert bias.abs().max(axis=None) < 0.01
    # With `last`, only the best of the seeds is chosen.
    bias = estimate_bias(draw_probabilities(4, 5, 1.0), "last", resamples=2000)
    assert bias.drop(index="best").abs().max(axis=None) < 0.01
    assert bias.loc["best", "recall"] + bias.loc["best", "specificity"] > 0.05


def test_corrected_metrics_of_pure_noise_are_those_of_chance():
    labels = np.repeat([0, 1], 50)
    differences = []
    for index in range(20):
        rng = np.random.default_rng(index)
        probabilities = rng.random((5, 8, 100))
        bias = estimate_bias(probabilities, labels=labels, groups=np.arange(100), resamples=200).loc["best"]
        epochs = selection.choose_epochs(labels, np.zeros(100), probabilities, "best_f1", np.ones((1, 100)))[0, :, 0]
        kept = probabilities[np.arange(5), epochs]
        scores = [score_predictions(labels, values) for values in kept]
        best = max(scores, key=lambda score: score["f1"])
        apparent = best["recall"] + best["specificity"]
        differences.append([apparent - 1, apparent - bias["recall"] - bias["specificity"] - 1])
    (apparent, corrected), error = np.mean(differences, axis=0), np.std(differences, axis=0)[1] / np.sqrt(20)
    assert apparent > 0.15
    assert abs(corrected) < max(3 * error, 0.05)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_epochs_are_those_that_training_keeps(data):
    count, epochs = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    labels = np.array(data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    values = data.draw(
        st.lists(st.sampled_from([0.1, 0.4, 0.5, 0.9]), min_size=count * epochs, max_size=count * epochs)
    )
    probabilities = np.reshape(values, (1, epochs, count))
    for keep in ("best_f1", "best_loss", "last"):
        chosen = selection.choose_epochs(labels, np.zeros(count), probabilities, keep, np.ones((1, count)))
        history = [score_predictions(labels, epoch) for epoch in probabilities[0]]
        losses = [round(score["loss"], 12) for score in history]  # equal but for rounding errors
        expected = kept_epoch([score | {"loss": loss} for score, loss in zip(history, losses, strict=True)], keep)
        assert chosen.tolist() == [[[expected]]]


def test_degenerate_sets_have_no_correction_or_one_of_the_class_they_have():
    one_group = estimate_bias(draw_probabilities(2, 2, 1.0), groups=np.zeros(45))
    assert one_group.isna().all(axis=None)
    no_positives = estimate_bias(draw_probabilities(2, 2, 1.0), labels=0 * LABELS)
    assert no_positives[["recall", "auroc"]].isna().all(axis=None)
    assert no_positives["specificity"].notna().all()
    table = correct_metrics(0 * LABELS, LABELS, GROUPS, (np.nan, 0.1))
    assert math.isnan(table.loc["f1", "value"])
    assert math.isnan(table.loc["f1", "low"])


def test_uncorrected_rates_have_the_intervals_of_the_apparent_metrics():
    predicted = np.where(np.arange(45) % 7 == 0, 1 - LABELS, LABELS)
    table = correct_metrics(LABELS, predicted, GROUPS, (0.0, 0.0))
    apparent = confidence_intervals(LABELS, predicted, GROUPS).set_index("metric")
    for metric in ("accuracy", "f1", "precision", "balanced_accuracy"):
        assert table.loc[metric].tolist() == pytest.approx(apparent.loc[metric, ["value", "low", "high"]].tolist())
    only_sensitivity = correct_metrics(LABELS, predicted, GROUPS, (0.1, 0.0))
    assert only_sensitivity.loc["specificity"].equals(table.loc["specificity"])
    assert (only_sensitivity.loc["recall"] < table.loc["recall"]).all()
    lower = correct_metrics(LABELS, predicted, GROUPS, (0.1, 0.05))
    assert lower.loc["recall", "value"] == pytest.approx(apparent.loc["recall", "value"] - 0.1)
    sensitivity, specificity = lower.loc["recall", "value"], lower.loc["specificity", "value"]
    assert lower.loc["accuracy", "value"] == pytest.approx((15 * sensitivity + 30 * specificity) / 45)
    assert (lower["low"] < table["low"])[["accuracy", "f1", "recall", "specificity"]].all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=15))
def test_weighted_auroc_is_that_of_repeated_images(rows):
    labels, scores, weights = (np.array(column) for column in zip(*rows, strict=True))
    repeated = np.repeat(labels, weights)
    value = selection.weighted_auroc(labels, scores[None] / 4, weights[None].astype(float))[0]
    if len(set(repeated)) < 2:
        assert math.isnan(value)
    else:
        assert value == pytest.approx(roc_auc_score(repeated, np.repeat(scores, weights)))


def test_rank_probabilities_share_ties_and_leave_out_undefined_resamples():
    samples = pd.DataFrame({"a": [0.5, 0.9, 0.4, np.nan], "b": [0.5, 0.8, 0.6, 0.1], "c": [0.5, 0.1, 0.6, 0.2]})
    assert selection.rank_probabilities(samples).tolist() == pytest.approx([4 / 9, 5 / 18, 5 / 18])
    assert selection.rank_probabilities(samples.iloc[3:]).isna().all()


def correct_metrics(
    labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray, bias: tuple[float, float]
) -> pd.DataFrame:
    rates = selection.correct_rates(labels, predicted, groups, pd.Series(bias, ["recall", "specificity"]))
    return selection.corrected_metrics(labels, *rates)


def write_epochs(folder, name: str, files: list[str], folds: list[int], epochs: int) -> None:
    columns = {f"epoch-{epoch}": np.arange(len(files)) / 10 + epoch for epoch in range(1, epochs + 1)}
    write_csv(folder / name / "validation.csv", pd.DataFrame({"fold": folds, "file": files, **columns}))


def test_epoch_predictions_are_in_the_order_of_the_files_and_end_with_the_training(tmp_path):
    write_epochs(tmp_path, "seed-0", ["c.jpg", "a.jpg", "b.jpg"], [1, 0, 1], 2)
    write_epochs(tmp_path, "seed-1", ["a.jpg", "b.jpg", "c.jpg"], [0, 1, 1], 3)
    files = pd.Series(["a.jpg", "b.jpg", "c.jpg"])
    epochs = load_epoch_predictions(["seed-0", "seed-1"], files, tmp_path)
    assert epochs.folds.tolist() == [0, 1, 1]
    assert epochs.probabilities[0, 1].tolist() == [2.1, 2.2, 2.0]
    assert np.isnan(epochs.probabilities[0, 2]).all()
    assert epochs.probabilities[1, 2].tolist() == [3.0, 3.1, 3.2]


def test_epoch_predictions_of_other_images_or_folds_are_an_error(tmp_path):
    write_epochs(tmp_path, "seed-0", ["a.jpg", "b.jpg"], [0, 1], 2)
    write_epochs(tmp_path, "seed-1", ["a.jpg", "b.jpg"], [1, 1], 2)
    with pytest.raises(UserError, match=r"seed-0/validation.csv: other images than in predictions/validation.csv"):
        load_epoch_predictions(["seed-0"], pd.Series(["a.jpg", "d.jpg"]), tmp_path)
    with pytest.raises(UserError, match=r"seed-1/validation.csv: other folds than in models/seed-0"):
        load_epoch_predictions(["seed-0", "seed-1"], pd.Series(["a.jpg", "b.jpg"]), tmp_path)
