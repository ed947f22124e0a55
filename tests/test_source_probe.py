"""The source probe: its estimate and interval where the truth is known, what it is of, and when it is unavailable."""

import numpy as np
import pandas as pd
import pytest
from conftest import mlflow_client, seed_runs
from scipy.stats import norm

from pipeline.core.files import read_json
from pipeline.evaluation import shortcuts, source_probe
from pipeline.evaluation.source_probe import DIFFERENCE, MIN_PATIENTS, NETWORK, THUMBNAIL, probe_dataset, probe_sources

UNAVAILABLE = "no two sources, or acquisition clusters, have 5 patients each of one class"


def make_images(patients: dict[tuple[int, str], int], per_patient: int = 1) -> pd.DataFrame:
    """Make images of so many patients by label and source."""
    rows = [
        {"label": label, "source": source, "group": f"{label}{source}{patient}", "acquisition": ""}
        for (label, source), count in patients.items()
        for patient in range(count)
        for _ in range(per_patient)
    ]
    return pd.DataFrame(rows)


def probe(images: pd.DataFrame, features: np.ndarray, thumbnails: np.ndarray | None = None) -> pd.DataFrame:
    return probe_sources(images, features, features if thumbnails is None else thumbnails).set_index("features")


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(source_probe, "RESAMPLES", 100)


@pytest.mark.parametrize("patients", [(MIN_PATIENTS, 20), (12, 12)])
def test_features_that_tell_nothing_have_an_auroc_of_one_half_which_the_interval_covers(few_resamples, patients):
    images = make_images({(0, "A"): patients[0], (0, "B"): patients[1]}, per_patient=2)
    results = []
    for seed in range(15):
        of_patients = np.random.default_rng(seed).normal(size=(2, len(images) // 2, 10))
        features = np.repeat(of_patients, 2, axis=1)  # they identify the patient, which must not help
        results.append(probe(images, *features).loc[[NETWORK, THUMBNAIL], ["value", "low", "high"]].to_numpy(float))
    values, low, high = np.concatenate(results).T
    assert abs(values.mean() - 0.5) < 3 * values.std() / np.sqrt(30)
    # With a coverage of 0.95, more than 5 of 30 have a probability of 0.003.
    assert ((low > 0.5) | (high < 0.5)).sum() <= 5


@pytest.mark.parametrize("separation", [0.5, 1.5, 3.0])
def test_a_known_separation_has_its_auroc(few_resamples, separation):
    images = make_images({(0, "A"): 300, (0, "B"): 150, (1, "A"): 150, (1, "B"): 300})
    features = np.random.default_rng(1).normal(size=(len(images), 3))
    features[:, 0] += separation * (images["source"] == "B")
    features[:, 1] += 5 * images["label"]
    row = probe(images, features).loc[NETWORK]
    truth = norm.cdf(separation / np.sqrt(2))
    assert row["value"] == pytest.approx(truth, abs=0.03)
    assert row["low"] < truth < row["high"]
    assert row[["labels", "sources", "images", "patients"]].tolist() == [2, 2, 900, 900]


def test_the_label_alone_tells_nothing_of_a_source_that_is_confounded_with_it(few_resamples):
    images = make_images({(0, "A"): 30, (0, "B"): 6, (1, "A"): 6, (1, "B"): 30})
    features = images[["label"]].to_numpy(float) * [1.0, -2.0]
    assert probe(images, features).loc[NETWORK, "value"] == 0.5


def test_sources_that_are_told_without_error_have_an_interval_below_one(few_resamples):
    images = make_images({(0, "A"): 8, (0, "B"): 30})
    features = (images[["source"]] == "B").to_numpy(float)
    table = probe(images, features)
    assert table.loc[NETWORK, ["value", "high"]].tolist() == [1, 1]
    assert 0.5 < table.loc[NETWORK, "low"] < 0.95
    assert table.loc[DIFFERENCE, "reason"].startswith("the two do not differ")
    assert table.loc[DIFFERENCE, ["low", "high"]].isna().all()


def test_the_auroc_of_several_sources_is_the_mean_over_their_pairs(few_resamples):
    images = make_images({(1, "A"): 10, (1, "B"): 10, (1, "C"): 10, (1, "D"): MIN_PATIENTS - 1}, per_patient=2)
    row = probe(images, (images[["source"]] == "C").to_numpy(float)).loc[NETWORK]
    assert row["value"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert row[["sources", "images"]].tolist() == [3, 60]  # D has too few patients


def test_pairs_of_sources_are_weighted_by_their_patients(few_resamples):
    images = make_images({(1, "A"): 10, (1, "B"): 10, (1, "C"): MIN_PATIENTS})
    row = probe(images, (images[["source"]] == "C").to_numpy(float)).loc[NETWORK]
    same, other = 10 * 10 / 20, 10 * MIN_PATIENTS / (10 + MIN_PATIENTS)
    assert row["value"] == pytest.approx((0.5 * same + 2 * other) / (same + 2 * other))


def test_features_that_tell_only_the_patient_tell_nothing_of_the_source(few_resamples):
    images = make_images({(1, "A"): 10, (1, "B"): 10}, per_patient=3)
    row = probe(images, pd.get_dummies(images["group"]).to_numpy(float)).loc[NETWORK]
    assert row["value"] == pytest.approx(0.5)


def test_known_sources_are_probed_and_images_of_unknown_ones_left_out(few_resamples):
    images = make_images({(1, "A"): 10, (1, "B"): 10, (1, ""): 10}).assign(acquisition=["1", "2", "3"] * 10)
    row = probe(images, (images[["source"]] == "B").to_numpy(float)).loc[NETWORK]
    assert row[["by", "sources", "images", "value"]].tolist() == ["source", 2, 20, 1]


def test_the_difference_from_a_thumbnail_is_of_the_same_patients(few_resamples):
    images = make_images({(0, "A"): 60, (0, "B"): 60})
    rng = np.random.default_rng(0)
    is_b = (images[["source"]] == "B").to_numpy(float)
    thumbnails = rng.normal(size=(len(images), 2)) + is_b
    table = probe(images, np.hstack([thumbnails, rng.normal(size=(len(images), 1)) + 3 * is_b]), thumbnails)
    assert table.loc[DIFFERENCE, "value"] == table.loc[NETWORK, "value"] - table.loc[THUMBNAIL, "value"]
    low, high = table.loc[DIFFERENCE, ["low", "high"]]
    assert 0 < low < high
    widths = table["high"] - table["low"]
    assert high - low < np.hypot(widths[NETWORK], widths[THUMBNAIL])


def test_clusters_of_acquisition_take_the_place_of_unknown_sources(few_resamples):
    images = make_images({(0, "A"): 10, (0, "B"): 10, (1, "A"): 10})
    features = (images[["source"]] == "B").to_numpy(float)
    hidden = images.assign(source="", acquisition=images["source"].map({"A": "1", "B": "2"}))
    table = probe(hidden, features)
    assert table.loc[NETWORK, ["by", "value"]].tolist() == ["acquisition", 1]
    table = probe(hidden.assign(acquisition=""), features)
    assert set(table["reason"]) == {UNAVAILABLE}
    assert table[["value", "low", "high", "by"]].isna().all(axis=None)
    apart = make_images({(0, "A"): 30, (1, "B"): 30})  # the label is the source
    assert set(probe(apart, apart[["label"]].to_numpy(float))["reason"]) == {UNAVAILABLE}


def test_the_images_of_the_fold_and_of_the_held_out_source_are_probed_with_their_own_features(
    tmp_path, few_resamples, monkeypatch
):
    images = make_images({(0, "A"): 40, (0, "B"): 30}).sample(frac=1, random_state=0)
    is_external = images["source"] == "B"
    folds = pd.array(np.where(is_external, -1, np.arange(70) % 2), dtype="Int64")
    metadata = images.assign(subset=np.where(is_external, "external", "validation"), fold=folds)
    metadata["fold"] = metadata["fold"].mask(is_external)
    tells = is_external.to_numpy(float)
    held_out = ((metadata["fold"] == 0).fillna(False) | is_external).to_numpy(bool)
    np.save(tmp_path / "features.npy", tells[held_out, None])
    np.save(tmp_path / "thumbnails.npy", np.where(held_out, tells, 1 - tells)[:, None, None] * np.ones((1, 4, 4)))
    table = probe_dataset(metadata, 0, tmp_path).set_index("features")
    assert table.loc[[NETWORK, THUMBNAIL], "value"].tolist() == [1, 1]
    assert table.loc[NETWORK, "images"] == held_out.sum()
    monkeypatch.setattr(shortcuts, "MAX_PROBED", 30)
    np.save(tmp_path / "features.npy", tells[shortcuts.choose_probed(metadata, 0), None])
    table = probe_dataset(metadata, 0, tmp_path).set_index("features")
    assert table.loc[[NETWORK, THUMBNAIL], "value"].tolist() == [1, 1]
    assert table.loc[NETWORK, ["images", "patients"]].tolist() == [30, 30]


def test_a_small_source_stays_among_many_images_of_another():
    patients = {(0, "A"): 3000, (1, "A"): 2000, (0, "B"): 30, (1, "B"): 12}
    metadata = make_images(patients, per_patient=2).assign(subset="validation", fold=pd.array([0] * 10084, "Int64"))
    metadata.loc[metadata["source"] == "A", "subset"] = "external"
    chosen = metadata.iloc[shortcuts.choose_probed(metadata, 0)]
    assert len(chosen) == shortcuts.MAX_PROBED
    counts = chosen.groupby(["label", "source"])["group"].nunique()
    assert counts[[(0, "B"), (1, "B")]].tolist() == [30, 12]
    assert counts[[(0, "A"), (1, "A")]].tolist() == [479, 479]


def test_mlflow_has_every_number_of_the_summary_and_no_probe_of_too_few_patients(demo_project):
    summary = read_json(demo_project / "metrics/summary.json")["bag"]
    parent = seed_runs(demo_project)[0].data.tags["mlflow.parentRunId"]
    logged = mlflow_client(demo_project).get_run(parent).data.metrics
    numbers = {key: value for key, value in summary.items() if isinstance(value, float)}
    assert {"f1", "expected_accuracy_high"} <= set(numbers)
    assert {key: logged.get(key) for key in numbers} == pytest.approx(numbers)
    assert summary["first_member_source_probe_auroc"] is None
    assert "first_member_source_probe_auroc" not in logged
