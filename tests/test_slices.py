"""Slices of the validation set."""

import numpy as np
import pandas as pd
import pytest

from pipeline.evaluation import slices
from pipeline.evaluation.metric_tables import Predictions, ValidationSet, unavailable_predictions


def make_set(count: int = 120, *, per_patient: int = 2, resamples: int = 100) -> tuple[ValidationSet, Predictions]:
    """Return images of which every third patient is positive, and predictions of which every seventh is wrong."""
    patients = np.arange(count) // per_patient
    labels = (patients % 3 == 0).astype(int)
    wrong = np.arange(count) % 7 == 0
    probabilities = np.where(labels ^ wrong, 0.8, 0.2)
    return ValidationSet(labels, patients, resamples), Predictions(probabilities > 0.5, probabilities)


def make_table(count: int = 120, **columns) -> pd.DataFrame:
    defaults = {"source": "A", "view": "", "width": 512, "height": 600, "sex": "F", "age": 50.0}
    return pd.DataFrame({**defaults, **columns}, index=range(count))


def evaluate(validation: ValidationSet, predictions: Predictions, table: pd.DataFrame) -> pd.DataFrame:
    return slices.slice_table(validation, table, {"bag": predictions})


def one_row_each(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop_duplicates(["by", "slice"]).set_index(["by", "slice"])


def test_sex_and_age_groups_are_slices_and_unknown_ones_are_only_counted():
    count = 360
    validation, predictions = make_set(count)
    sexes, ages = np.resize(["F", "F", "M", "M", "", ""], count), np.repeat([5, 17.9, 18, 39, 40, 64, 65, np.nan], 45)
    table = evaluate(validation, predictions, make_table(count, sex=sexes, age=ages))
    rows = one_row_each(table)
    assert list(rows.loc["age"].index) == ["below 18", "18 to 39", "40 to 64", "65 and more", ""]
    assert list(rows.loc["age", "images"]) == [90, 90, 90, 45, 45]
    unknown = np.flatnonzero(sexes == "")
    assert rows.loc[("sex", ""), "reason"] == "sex not known"
    assert rows.loc[("sex", ""), ["images", "positives"]].tolist() == [120, validation.labels[unknown].sum()]
    assert table.query("slice == ''")["value"].isna().all()
    assert rows.loc["sex", "images"].sum() == count


def test_metrics_and_patient_counts_of_a_slice_are_those_of_its_images(monkeypatch):
    monkeypatch.delattr("pipeline.evaluation.metric_tables.bootstrap_weights")  # no metric of a slice is resampled
    validation, predictions = make_set(240)
    sexes = np.where(np.arange(240) < 150, "F", "M")
    table = evaluate(validation, predictions, make_table(240, sex=sexes)).query("by == 'sex' and slice == 'F'")
    rows = table.set_index("metric")
    labels, predicted = validation.labels[:150], predictions.predicted[:150]
    assert rows.loc["accuracy", "value"] == pytest.approx((labels == predicted).mean())
    assert rows.loc["recall", "value"] == pytest.approx(predicted[labels == 1].mean())
    assert rows.loc["recall", "low"] < rows.loc["recall", "value"] < rows.loc["recall", "high"]
    assert rows.loc["accuracy", slices.COUNTS].tolist() == [150, labels.sum(), 75, 25, 50]


@pytest.mark.parametrize(("positive", "negative", "reason"), [
    (9, 30, "9 positive patients, fewer than 10"), (30, 1, "1 negative patient, fewer than 10"), (10, 10, ""),
])  # fmt: skip
def test_a_slice_with_few_patients_of_a_class_has_counts_and_a_reason_but_no_values(positive, negative, reason):
    labels = np.repeat([1, 0], [3 * positive, 3 * negative])  # three images of every patient
    validation = ValidationSet(labels, np.arange(len(labels)) // 3, 50)
    probabilities = np.where(labels, 0.9, 0.1)
    table = evaluate(validation, Predictions(labels, probabilities), make_table(len(labels))).query("by == 'source'")
    assert (table["images"] == len(labels)).all()
    assert (table["positive_patients"] == positive).all()
    if reason:
        assert table[["value", "low", "high"]].isna().all(axis=None)
        assert (table["reason"] == reason).all()
    else:
        assert (table.set_index("metric").loc[["accuracy", "recall", "auroc"], "value"] == 1).all()


def test_sources_and_acquisitions_are_kinds_of_slices_if_given():
    validation, predictions = make_set()
    table = make_table(source=["A", "B"] * 60)
    rows = one_row_each(evaluate(validation, predictions, table))
    assert list(rows.loc["source"].index) == ["A", "B"]
    assert "acquisition" not in rows.index.get_level_values("by")
    rows = one_row_each(evaluate(validation, predictions, table.assign(acquisition=[1, 2] * 60)))
    assert list(rows.loc["acquisition"].index) == ["1", "2"]


def test_nothing_known_one_image_and_unavailable_models_have_reasons():
    validation, predictions = make_set()
    rows = one_row_each(evaluate(validation, predictions, make_table(source="", sex="", age=np.nan)))
    assert [rows.loc[(by, ""), "reason"] for by in ("source", "view", "sex", "age")] == [
        "no source is known", "no view is known", "no sex is known", "no age is known"
    ]  # fmt: skip
    assert (rows.loc[[(by, "") for by in ("source", "view", "sex", "age")], "images"] == 120).all()
    single = ValidationSet(np.array([1]), np.array(["p"]), 50)
    table = evaluate(single, Predictions(np.array([1]), np.array([0.9])), make_table(1))
    assert table["value"].isna().all()
    assert (table["reason"] != "").all()
    table = evaluate(validation, unavailable_predictions("one member only"), make_table())
    assert set(table.query("by == 'size'")["reason"]) == {"one member only"}


def test_the_size_of_an_image_is_that_of_its_shorter_edge():
    sizes = [(511, 900), (512, 600), (3000, 1023), (1024, 1024), (2047, 9000), (2048, 2048), (9000, 5000), (2050, 8000)]
    width, height = np.resize(sizes, (120, 2)).T
    validation, predictions = make_set()
    rows = one_row_each(evaluate(validation, predictions, make_table(width=width, height=height))).loc["size", "images"]
    assert rows.to_dict() == {"below 512": 15, "512 to 1023": 30, "1024 to 2047": 30, "2048 and more": 45}


def test_an_unavailable_model_has_its_own_reason_also_in_a_slice_of_few_patients():
    validation, _ = make_set()
    table = make_table(source=["A"] * 114 + ["B"] * 6)
    reasons = one_row_each(evaluate(validation, unavailable_predictions("one member only"), table))["reason"]
    assert reasons["source", "A"] == reasons["source", "B"] == "one member only"
