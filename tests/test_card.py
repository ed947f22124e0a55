import json

import numpy as np
import pandas as pd
import pytest

from pipeline.report import data_card


def table(**columns: list) -> pd.DataFrame:
    """Describe four negative and four positive images, two of which validate, and two test images."""
    count = 10
    known = {
        "file": [f"{index}.jpg" for index in range(count)],
        "set": ["train"] * 8 + ["test"] * 2,
        "label": pd.array([0, 0, 0, 0, 1, 1, 1, 1, None, None], dtype="Int64"),
        "xxh128": [f"{index:02}" for index in range(count)],
        **{name: [""] * count for name in ("patient", "source", "view", "license")},
        **dict.fromkeys(("width", "height"), 512),
    }
    return pd.DataFrame({**known, **columns})


QUARANTINE = pd.DataFrame({"file": ["x.jpg", "y.jpg"], "reason": ["empty file", "empty file"]})


def described(manifest: pd.DataFrame, same: dict[int, int] | None = None) -> dict:
    subset = ["validation", "train", "train", "train", "validation", "train", "train", "train", "test", "test"]
    first = [(same or {}).get(row, row) for row in range(len(manifest))]
    split = pd.DataFrame({"file": manifest["file"], "group": manifest["file"], "subset": subset})
    return data_card.describe_data(manifest, QUARANTINE, split, np.array(first))


def test_classes_are_counted_by_subset_source_view_license_and_size():
    found = described(table(source=["a"] * 6 + ["b"] * 4, view=["PA"] * 9 + [""], license=["CC0"] * 10))
    assert found["subset"]["validation"] == {"negative": 1, "positive": 1, "test": 0}
    assert found["source"] == {
        "a": {"negative": 4, "positive": 2, "test": 0}, "b": {"negative": 0, "positive": 2, "test": 2}
    }  # fmt: skip
    assert found["view"]["not known"] == {"negative": 0, "positive": 0, "test": 1}
    assert found["license"] == {"CC0": {"negative": 4, "positive": 4, "test": 2}}
    assert found["size"] == {"512×512": {"negative": 4, "positive": 4, "test": 2}}
    assert found["quarantine"] == {"empty file": 2}


def test_a_source_that_tells_the_label_is_said_to():
    assert described(table(source=["a"] * 4 + ["b"] * 6))["source_alone"] == {"accuracy": 1.0, "f1": 1.0}


def test_a_source_that_tells_nothing_is_worth_the_better_constant():
    found = described(table(source=["a", "b"] * 5))["source_alone"]
    assert found["accuracy"] == 0.5
    assert found["f1"] == pytest.approx(2 / 3)  # of calling everything positive


def test_one_source_or_none_gives_no_guess():
    assert described(table())["source_alone"] is None


def test_duplicates_are_listed_with_their_labels_and_sets():
    manifest = table(xxh128=["00", "00", *(f"{index:02}" for index in range(2, 10))])
    assert described(manifest, {1: 0, 6: 3, 9: 2})["duplicates"] == [
        {"files": ["0.jpg", "1.jpg"], "equal": True, "labels": [0], "sets": ["train"]},
        {"files": ["2.jpg", "9.jpg"], "equal": False, "labels": [0], "sets": ["test", "train"]},
        {"files": ["3.jpg", "6.jpg"], "equal": False, "labels": [0, 1], "sets": ["train"]},
    ]


def test_what_makes_scores_doubtful_is_a_line_each():
    found = described(table(patient=["p1", *[""] * 7, "p1", "p2"]), {6: 3, 9: 2})
    assert data_card.data_warnings(found) == [
        "1 radiograph(s) are there twice with different labels, the first is 3.jpg = 6.jpg",
        "1 radiograph(s) are in train and in test, the first is 2.jpg = 9.jpg",
        "1 patient(s) are in train and in test, the first is p1",
    ]
    assert data_card.data_warnings(described(table())) == []


def test_the_card_is_the_same_bytes_twice_and_can_be_read(tmp_path):
    for folder in ("one", "two"):
        data_card.write_data_card(tmp_path / folder, described(table(source=["a"] * 4 + ["b"] * 6), {6: 3}))
    for name in ("card.md", "card.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    text = (tmp_path / "one/card.md").read_text()
    assert "| a | 4 | 0 | 0 |" in text
    assert "With different labels: 1\n\n- 3.jpg = 6.jpg" in text
    assert "2 × empty file" in text
    assert json.loads((tmp_path / "one/card.json").read_text())["images"] == 10
