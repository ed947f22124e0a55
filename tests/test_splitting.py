import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.core.config import SplitParams
from pipeline.core.errors import UserError
from pipeline.data import splitting


def table(labels: list[int], patients: list[str] | None = None, tests: int = 2) -> pd.DataFrame:
    files = [f"a{index:05}.jpg" for index in range(len(labels))] + [f"t{index}.jpg" for index in range(tests)]
    return pd.DataFrame({
        "file": files,
        "set": ["train"] * len(labels) + ["test"] * tests,
        "label": pd.array([*labels, *[None] * tests], dtype="Int64"),
        "patient": [*(patients or [""] * len(labels)), *[""] * tests],
    })  # fmt: skip


def split(rows: pd.DataFrame, params: SplitParams, duplicates: dict[int, int] | None = None) -> pd.DataFrame:
    """Split and check the split; `duplicates` maps rows to the earlier rows that they duplicate."""
    duplicate_groups = np.arange(len(rows))
    for row, first in (duplicates or {}).items():
        duplicate_groups[row] = first
    result = splitting.split_dataset(rows, duplicate_groups, params)
    splitting.check_split(rows, duplicate_groups, result)
    return result


def params(folds: int = 5, seed: int = 1, cross_validate: bool = False, source: str | None = None) -> SplitParams:
    return SplitParams(folds=folds, seed=seed, cross_validate=cross_validate, held_out_source=source)


labels_and_patients = st.tuples(st.integers(0, 1), st.sampled_from(["", *"abcdefghijklmnop"]))
manifests = st.lists(labels_and_patients, min_size=4, max_size=60).map(
    lambda rows: table([label for label, _ in rows], [patient for _, patient in rows])
)
fold_counts = st.sampled_from([10, 5, 4, 3, 2])


@settings(max_examples=40, deadline=None)
@example(table([0, 0, 1, 1]), 10, 1)
@example(table([0, 0, 1, 1]), 4, 1)
@example(table([0, 1, 0, 1, 1, 0], [*"eagaef"]), 3, 24)
@example(table([0] * 10 + [1] * 2, [*[""] * 7, *"aaa", "", "a"]), 10, 0)
@given(manifests, fold_counts, st.integers(0, 99))
def test_a_split_keeps_groups_together_and_both_classes_in_each_subset_or_gives_an_error(rows, folds, seed):
    message = None
    try:
        result = split(rows, params(folds, seed))
    except UserError as error:
        message = str(error)
    if message:
        assert "\n" not in message
        return
    assert list(result["file"]) == list(rows["file"])
    assert (result.loc[rows["set"] == "test", "subset"] == "test").all()
    labeled = result[rows["set"] == "train"]
    assert set(labeled["subset"]) == {"train", "validation"}
    assert len(labeled[["group", "subset"]].drop_duplicates()) == labeled["group"].nunique()
    for subset in ("train", "validation"):
        assert rows.loc[result["subset"] == subset, "label"].nunique() == 2


@settings(max_examples=15, deadline=None)
@given(st.integers(10, 40), st.integers(10, 40), fold_counts)
def test_as_many_images_per_class_as_folds_are_always_enough(negative, positive, folds):
    rows = table([0] * negative + [1] * positive)
    is_validation = split(rows, params(folds))["subset"] == "validation"
    for label, count in ((0, negative), (1, positive)):
        assert abs((is_validation & (rows["label"] == label)).sum() - count / folds) < 1.5


def test_the_same_seed_gives_the_same_split_and_another_seed_another():
    rows = table([0, 0, 0, 1] * 25)
    first = split(rows, params(seed=3))
    pd.testing.assert_frame_equal(first, split(rows, params(seed=3)))
    assert (first["subset"] != split(rows, params(seed=4))["subset"]).any()


@pytest.mark.parametrize(
    ("negative", "positive"), [(690, 80), pytest.param(13694, 1570, marks=pytest.mark.slow, id="competition")]
)
def test_the_validation_set_has_the_prevalence_of_the_whole(negative, positive):
    rows = table([0] * negative + [1] * positive)
    validation = rows[split(rows, params(10))["subset"] == "validation"]
    assert abs((validation["label"] == 0).sum() - negative / 10) <= 1.6
    assert (validation["label"] == 1).sum() == positive // 10


def test_an_image_of_an_unknown_patient_is_a_separate_group():
    rows = table([0, 1] * 10, ["p1", "p2"] + [""] * 18)
    groups = split(rows, params())["group"]
    assert list(groups[:3]) == ["p1", "p2", "image:a00002.jpg"]
    assert groups[2:].nunique() == 20


def test_all_images_of_a_patient_are_in_the_same_subset():
    patients = [f"p{index // 5}" for index in range(100)]
    result = split(table([index // 5 % 2 for index in range(100)], patients), params())
    assert len(result[:100][["group", "subset"]].drop_duplicates()) == 20
    assert (result["subset"] == "validation").sum() == 20


@pytest.mark.parametrize("label", [0, 1])
def test_a_class_with_one_group_is_an_error(label):
    rows = table([label] * 4 + [1 - label] * 10, ["p1"] * 4 + [""] * 10)
    with pytest.raises(UserError, match=rf"^only 1 group\(s\) of images with label {label}: .*add images or patients$"):
        split(rows, params())


@pytest.mark.parametrize("label", [0, 1])
def test_a_class_without_images_is_an_error(label):
    with pytest.raises(UserError, match=rf"^only 0 group\(s\) of images with label {label}: "):
        split(table([1 - label] * 10), params())


def test_every_labeled_image_has_a_fold_and_fold_0_is_the_validation_set():
    rows = table([0, 0, 0, 1] * 25)
    result = split(rows, params(4))
    labeled = rows["set"] == "train"
    assert set(result.loc[labeled, "fold"]) == {0, 1, 2, 3}
    assert result.loc[~labeled, "fold"].isna().all()
    assert ((result["subset"] == "validation") == (result["fold"] == 0).fillna(value=False)).all()
    for fold in range(4):
        assert rows.loc[result["fold"] == fold, "label"].nunique() == 2


def test_in_cross_validation_a_fold_without_both_classes_is_an_error():
    rows = table([0] * 10 + [1] * 3)
    assert (split(rows, params(4))["subset"] == "validation").any()
    with pytest.raises(UserError, match=r"^split.folds = 4: not every fold has both classes"):
        split(rows, params(4, cross_validate=True))
    result = split(rows, params(3, cross_validate=True))
    assert result.equals(split(rows, params(3)))


def test_every_fold_validates_only_in_cross_validation():
    assert params(4, cross_validate=True).validation_folds == [0, 1, 2, 3]
    assert params(4).validation_folds == [0]


def test_patients_that_share_a_radiograph_are_one_group():
    patients = [f"p{index // 2}" for index in range(40)]
    # Images 1 of p0 and 20 of p10 are duplicates, and so are 21 of p10 and 39 of p19.
    result = split(table([index // 2 % 2 for index in range(40)], patients), params(), {20: 1, 39: 21})
    assert list(result["group"][[0, 1, 20, 21, 38, 39]]) == ["p0"] * 6
    assert result["group"][:40].nunique() == 18
    assert len(set(result["fold"][[0, 1, 20, 21, 38, 39]])) == 1


def test_patients_that_share_a_test_image_are_one_group():
    result = split(table([0, 1] * 10), params(), {20: 3, 21: 3})
    assert list(result["group"][[3, 20, 21]]) == ["image:a00003.jpg"] * 3


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=12), st.integers(0, 99))
def test_folds_share_no_patient_and_no_radiograph_whatever_the_duplicates(pairs, seed):
    rows = table([0, 1] * 20, [f"p{index % 25}" if index % 3 else "" for index in range(40)])
    duplicates = {max(pair): min(pair) for pair in pairs if pair[0] != pair[1]}
    firsts = {row: first for row, first in duplicates.items() if first not in duplicates}
    try:
        split(rows, params(3, seed), firsts)
    except UserError as error:
        assert "add images or patients" in str(error) or "split.folds" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("patients", "duplicate_groups", "shared"),
    [(["p1", "p1", "", ""], [0, 1, 2, 3], "patient p1"), ([""] * 4, [0, 0, 2, 3], "radiograph a00000.jpg")],
)
def test_a_split_that_leaks_is_an_error(patients, duplicate_groups, shared):
    rows = table([0, 1, 0, 1], patients, tests=0)
    leaking = pd.DataFrame({"file": rows["file"], "group": rows["file"], "subset": "train", "fold": [0, 1, 1, 0]})
    with pytest.raises(UserError, match=rf"^data/split.csv: {shared} is in 2 folds, .*; do not use this split"):
        splitting.check_split(rows, np.array(duplicate_groups), leaking)


@pytest.mark.parametrize("cross_validate", [False, True])
def test_all_images_of_the_patients_of_the_held_out_source_are_external_and_in_no_fold(cross_validate):
    rows = table([0, 1, 0, 1, 0, 1, 0, 1], ["p", "q", "r", "s", "t", "u", "v", "p"])
    rows["source"] = ["A"] * 2 + ["B"] * 6 + ["A", ""]
    result = split(rows, params(2, cross_validate=cross_validate, source="A"))
    external = [0, 1, 7]
    assert list(result.index[result["subset"] == "external"]) == external
    assert result["fold"].isna().tolist() == [row in (*external, 8, 9) for row in range(10)]
    # The other images are split as if the source did not exist.
    rest = split(rows.drop(index=external).reset_index(drop=True), params(2, cross_validate=cross_validate))
    assert result.drop(index=external)["fold"].tolist() == rest["fold"].tolist()
    assert result.drop(index=external)["subset"].tolist() == rest["subset"].tolist()


def test_an_external_image_of_a_training_patient_is_an_error():
    rows = table([0, 1, 0, 1], ["p1", "p2", "p3", "p1"], tests=0)
    leaking = pd.DataFrame(
        {
            "file": rows["file"],
            "group": rows["file"],
            "subset": ["train", "train", "validation", "external"],
            "fold": pd.array([1, 1, 0, None], dtype="Int64"),
        }
    )
    with pytest.raises(UserError, match=r"^data/split.csv: patient p1 is in 2 folds"):
        splitting.check_split(rows, np.arange(4), leaking)


def test_holding_out_a_source_without_both_classes_is_an_error():
    rows = table([0, 0, 0, 1, 1, 0])
    rows["source"] = ["A", "A", "", "", "B", "B", "A", ""]
    with pytest.raises(UserError, match=r"this source have 1 negative, 1 positive, and all others 2 negative, 0 posit"):
        split(table([0, 0, 0, 1]).assign(source=["A", "A", "B", "B", "", ""]), params(source="B"))
    for source in ("A", "C"):
        with pytest.raises(UserError) as error:
            split(rows, params(source=source))
        inside, outside = ("2 negative", "2 negative, 2 positive") if source == "A" else ("0 negative", "4 negative, 2")
        assert str(error.value).startswith(
            f"split.held_out_source = {source}: external validation and training need both classes, but the patients "
            f"of this source have {inside}, 0 positive, and all others {outside}"
        )
        assert str(error.value).endswith("choose another of the sources: A, B")


@pytest.mark.parametrize("cross_validate", [False, True])
def test_more_folds_than_images_are_an_error(cross_validate):
    quantifier = "not every" if cross_validate else "no"
    with pytest.raises(UserError, match=f"^split.folds = 9: {quantifier} fold has both classes and leaves both for"):
        split(table([0, 0, 1, 1]), params(9, cross_validate=cross_validate))


def test_a_fold_without_a_class_does_not_validate():
    rows = table([0] * 30 + [1] * 2)
    for seed in range(10):
        validation = split(rows, params(10, seed))["subset"] == "validation"
        assert (validation & (rows["label"] == 1)).sum() == 1
