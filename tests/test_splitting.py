import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.config import SplitParams
from pipeline.errors import UserError
from pipeline.splitting import split


def table(labels: list[int], patients: list[str] | None = None, tests: int = 2) -> pd.DataFrame:
    files = [f"a{index:05}.jpg" for index in range(len(labels))] + [f"t{index}.jpg" for index in range(tests)]
    return pd.DataFrame({
        "file": files,
        "set": ["train"] * len(labels) + ["test"] * tests,
        "label": pd.array([*labels, *[None] * tests], dtype="Int64"),
        "patient": [*(patients or [""] * len(labels)), *[""] * tests],
    })  # fmt: skip


def params(folds: int = 5, seed: int = 1) -> SplitParams:
    return SplitParams(folds=folds, seed=seed)


people = st.tuples(st.integers(0, 1), st.sampled_from(["", *"abcdefghijklmnop"]))
manifests = st.lists(people, min_size=4, max_size=60).map(
    lambda rows: table([label for label, _ in rows], [patient for _, patient in rows])
)
parts = st.sampled_from([10, 5, 4, 3, 2])


@settings(max_examples=40, deadline=None)
@example(table([0, 0, 1, 1]), 10, 1)
@example(table([0, 0, 1, 1]), 4, 1)
@example(table([0, 1, 0, 1, 1, 0], [*"eagaef"]), 3, 24)
@example(table([0] * 10 + [1] * 2, [*[""] * 7, *"aaa", "", "a"]), 10, 0)
@given(manifests, parts, st.integers(0, 99))
def test_a_manifest_is_refused_in_one_line_or_every_group_and_class_is_where_it_belongs(rows, folds, seed):
    refused = None
    try:
        found = split(rows, params(folds, seed))
    except UserError as error:
        refused = str(error)
    if refused:
        assert "\n" not in refused
        return
    assert list(found["file"]) == list(rows["file"])
    assert (found.loc[rows["set"] == "test", "subset"] == "test").all()
    labelled = found[rows["set"] == "train"]
    assert set(labelled["subset"]) == {"train", "validation"}
    assert len(labelled[["group", "subset"]].drop_duplicates()) == labelled["group"].nunique()
    for subset in ("train", "validation"):
        assert rows.loc[found["subset"] == subset, "label"].nunique() == 2


@settings(max_examples=15, deadline=None)
@given(st.integers(10, 40), st.integers(10, 40), parts)
def test_as_many_images_as_folds_are_always_enough(negative, positive, folds):
    rows = table([0] * negative + [1] * positive)
    validates = split(rows, params(folds))["subset"] == "validation"
    for label, count in ((0, negative), (1, positive)):
        assert abs((validates & (rows["label"] == label)).sum() - count / folds) < 1.5


def test_the_same_seed_gives_the_same_table_and_another_seed_another():
    rows = table([0, 0, 0, 1] * 25)
    first = split(rows, params(seed=3))
    pd.testing.assert_frame_equal(first, split(rows, params(seed=3)))
    assert (first["subset"] != split(rows, params(seed=4))["subset"]).any()


@pytest.mark.parametrize(
    ("negative", "positive"), [(690, 80), pytest.param(13694, 1570, marks=pytest.mark.slow, id="competition")]
)
def test_classes_keep_their_share(negative, positive):
    rows = table([0] * negative + [1] * positive)
    validation = rows[split(rows, params(10))["subset"] == "validation"]
    assert abs((validation["label"] == 0).sum() - negative / 10) <= 1.6
    assert (validation["label"] == 1).sum() == positive // 10


def test_an_image_of_no_known_patient_is_a_group_of_its_own():
    rows = table([0, 1] * 10, ["p1", "p2"] + [""] * 18)
    groups = split(rows, params())["group"]
    assert list(groups[:3]) == ["p1", "p2", "image:a00002.jpg"]
    assert groups[2:].nunique() == 20


def test_all_images_of_a_patient_go_the_same_way():
    patients = [f"p{index // 5}" for index in range(100)]
    found = split(table([index // 5 % 2 for index in range(100)], patients), params())
    assert len(found[:100][["group", "subset"]].drop_duplicates()) == 20
    assert (found["subset"] == "validation").sum() == 20


@pytest.mark.parametrize("label", [0, 1])
def test_a_class_with_one_group_is_refused(label):
    rows = table([label] * 4 + [1 - label] * 10, ["p1"] * 4 + [""] * 10)
    with pytest.raises(UserError, match=rf"^only 1 group\(s\) of images with label {label}: .*add images or patients$"):
        split(rows, params())


@pytest.mark.parametrize("label", [0, 1])
def test_a_class_without_images_is_refused(label):
    with pytest.raises(UserError, match=rf"^only 0 group\(s\) of images with label {label}: "):
        split(table([1 - label] * 10), params())
