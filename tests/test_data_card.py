"""Tests of the data card."""

import json

import numpy as np
import pandas as pd
import pytest

from pipeline.report import data_card


def build_manifest(**columns: list) -> pd.DataFrame:
    """Return four negative and four positive images, two of them for validation, and two test images."""
    count = 10
    defaults = {
        "file": [f"{index}.jpg" for index in range(count)],
        "set": ["train"] * 8 + ["test"] * 2,
        "label": pd.array([0, 0, 0, 0, 1, 1, 1, 1, None, None], dtype="Int64"),
        "xxh128": [f"{index:02}" for index in range(count)],
        **{name: [""] * count for name in ("patient", "source", "view", "sex", "license", "manufacturer", "modality")},
        "age": [np.nan] * count,
        **dict.fromkeys(("width", "height"), 512),
    }
    return pd.DataFrame({**defaults, **columns})


DIVIDED = "images of one patient may be in both training and validation set"
QUARANTINE = pd.DataFrame({"file": ["x.jpg", "y.jpg"], "reason": ["empty file", "empty file"]})


def describe(
    manifest: pd.DataFrame,
    duplicate_of: dict[int, int] | None = None,
    quarantine: pd.DataFrame = QUARANTINE,
    outliers: pd.DataFrame | None = None,
) -> dict:
    """Build the card; `duplicate_of` maps a row to the first row of its group of duplicates."""
    subset = ["validation", "train", "train", "train", "validation", "train", "train", "train", "test", "test"]
    duplicate_groups = [(duplicate_of or {}).get(row, row) for row in range(len(manifest))]
    split = pd.DataFrame({"file": manifest["file"], "group": manifest["file"], "subset": subset})
    return data_card.describe_data(manifest, quarantine, split, np.array(duplicate_groups), outliers=outliers)


def counts(negative: int, positive: int, test: int, patients: tuple[int, int, int] = (0, 0, 0)) -> dict[str, int]:
    images = {"negative": negative, "positive": positive, "test": test}
    return images | dict(zip(["negative_patients", "positive_patients", "test_patients"], patients, strict=True))


def test_known_patients_are_counted_beside_their_images(tmp_path):
    patients = ["p1", "p1", "p2", "", "p1", "p3", "p3", "p4", "p5", ""]
    card = describe(build_manifest(patient=patients, source=["a"] * 10))
    assert card["source"] == {"a": counts(4, 4, 2, (2, 3, 1))}  # p1 has images of both classes
    data_card.write_data_card(tmp_path, card)
    assert "| a | 4 (2 patients) | 4 (3 patients) | 2 (1 patient) |" in (tmp_path / "card.md").read_text()


def test_classes_are_counted_by_subset_source_view_license_and_size():
    card = describe(build_manifest(source=["a"] * 6 + ["b"] * 4, view=["PA"] * 9 + [""], license=["CC0"] * 10))
    assert card["subset"]["validation"] == counts(1, 1, 0)
    assert card["source"] == {"a": counts(4, 2, 0), "b": counts(0, 2, 2)}
    assert card["view"]["not known"] == counts(0, 0, 1)
    assert card["license"] == {"CC0": counts(4, 4, 2)}
    assert card["size"] == {"512×512": counts(4, 4, 2)}
    assert card["quarantine"] == {"empty file": 2}


def test_sex_is_counted_and_age_summarized_by_class(tmp_path):
    card = describe(
        build_manifest(sex=["F"] * 5 + ["M", "", "", "F", ""], age=[30, 50, 70, *[None] * 4, 63.5, 9, None])
    )
    assert card["sex"]["F"] == counts(4, 1, 1)
    assert card["sex"]["not known"] == counts(0, 2, 1)
    assert card["age"] == {
        "negative": {"images": 3, "median": 50, "lowest": 30, "highest": 70},
        "positive": {"images": 1, "median": 63.5, "lowest": 63.5, "highest": 63.5},
        "test": {"images": 1, "median": 9, "lowest": 9, "highest": 9},
    }
    data_card.write_data_card(tmp_path, card)
    text = (tmp_path / "card.md").read_text()
    assert "| negative | 3 | 50 | 30 | 70 |" in text
    assert "| M | 0 | 1 | 0 |" in text
    data_card.write_data_card(tmp_path, describe(build_manifest()))
    assert "## Age in years\n\nNot known." in (tmp_path / "card.md").read_text()


def test_a_source_that_determines_the_label_scores_one():
    assert describe(build_manifest(source=["a"] * 4 + ["b"] * 6))["source_only_baseline"] == {
        "accuracy": 1.0,
        "f1": 1.0,
        "majority_accuracy": 0.5,
    }


def test_an_uninformative_source_scores_as_the_better_constant():
    card = describe(build_manifest(source=["a", "b"] * 5))["source_only_baseline"]
    assert card["accuracy"] == 0.5
    assert card["majority_accuracy"] == 0.5
    assert card["f1"] == pytest.approx(2 / 3)  # by predicting every image positive


def test_one_source_or_none_gives_no_baseline():
    assert describe(build_manifest())["source_only_baseline"] is None


def test_duplicates_are_listed_with_their_labels_and_sets():
    manifest = build_manifest(xxh128=["00", "00", *(f"{index:02}" for index in range(2, 10))])
    assert describe(manifest, {1: 0, 6: 3, 9: 2})["duplicates"] == [
        {"files": ["0.jpg", "1.jpg"], "identical_pixels": True, "labels": [0], "sets": ["train"]},
        {"files": ["2.jpg", "9.jpg"], "identical_pixels": False, "labels": [0], "sets": ["test", "train"]},
        {"files": ["3.jpg", "6.jpg"], "identical_pixels": False, "labels": [0, 1], "sets": ["train"]},
    ]


def test_conflicting_labels_and_leaks_are_warnings():
    card = describe(build_manifest(patient=["p1", *[""] * 7, "p1", "p2"]), {6: 3, 9: 2})
    assert data_card.data_warnings(card) == [
        f"the patient of 7 labeled images is not known, the first is 1.jpg; {DIVIDED}",
        "1 radiograph(s) have copies with different labels, the first is 3.jpg = 6.jpg",
        "1 radiograph(s) are in both train and test, the first is 2.jpg = 9.jpg",
        "1 patient(s) are in both train and test, the first is p1",
    ]
    assert data_card.data_warnings(describe(build_manifest(patient=[f"p{row}" for row in range(10)]))) == []


def test_data_without_any_patient_are_a_warning():
    assert data_card.data_warnings(describe(build_manifest())) == [
        f"the patient of all labeled images is not known, the first is 0.jpg; {DIVIDED}"
    ]


def test_manufacturer_and_modality_are_counted_and_shown_where_they_are_known(tmp_path):
    card = describe(build_manifest(manufacturer=["Acme"] * 6 + [""] * 4))
    assert card["manufacturer"] == {"Acme": counts(4, 2, 0), "not known": counts(0, 2, 2)}
    data_card.write_data_card(tmp_path, card)
    text = (tmp_path / "card.md").read_text()
    assert "## Images by manufacturer" in text
    assert "## Images by modality" not in text


def test_views_that_prepare_left_out_are_counted(tmp_path):
    reasons = ["view LL: not in prepare.views"] * 3 + ["view Lateral: not in prepare.views", "empty file"]
    quarantine = pd.DataFrame({"file": list("abcde"), "reason": reasons})
    card = describe(build_manifest(view=["PA"] * 10), quarantine=quarantine)
    assert card["excluded_views"] == {"LL": 3, "Lateral": 1}
    data_card.write_data_card(tmp_path, card)
    text = (tmp_path / "card.md").read_text()
    assert "Before prepare.views left out 4 images, there were also: 3 × LL, 1 × Lateral." in text
    assert "3 × view LL: not in prepare.views" in text
    assert describe(build_manifest())["excluded_views"] == {}


def test_the_most_unusual_images_are_listed_with_what_to_do(tmp_path):
    manifest = build_manifest()
    ranking = pd.DataFrame({"file": manifest["file"][::-1], "set": "train", "distance": np.arange(10, 0, -1) * 1.23456})
    card = describe(manifest, outliers=ranking)
    assert card["outliers"]["files"] == list(ranking["file"])
    assert card["outliers"]["median_distance"] == 6.79
    data_card.write_data_card(tmp_path, card)
    text = (tmp_path / "card.md").read_text()
    assert "## Most unusual images" in text
    assert "| 9.jpg | 12.35 |" in text
    assert "prepare.excluded_files" in text
    assert describe(manifest)["outliers"] is None


def test_the_card_is_deterministic_and_readable(tmp_path):
    for folder in ("one", "two"):
        data_card.write_data_card(tmp_path / folder, describe(build_manifest(source=["a"] * 4 + ["b"] * 6), {6: 3}))
    for name in ("card.md", "card.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    text = (tmp_path / "one/card.md").read_text()
    assert "| a | 4 | 0 | 0 |" in text
    assert "Duplicates with different labels: 1\n\n- 3.jpg = 6.jpg" in text
    assert "2 × empty file" in text
    assert json.loads((tmp_path / "one/card.json").read_text())["images"] == 10
