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
    """Split and check; `duplicates` says of which earlier row a row is a duplicate."""
    same = np.arange(len(rows))
    for row, first in (duplicates or {}).items():
        same[row] = first
    found = splitting.split_dataset(rows, same, params)
    splitting.check_split(rows, same, found)
    return found


def params(folds: int = 5, seed: int = 1, cross_validate: bool = False, source: str | None = None) -> SplitParams:
    return SplitParams(folds=folds, seed=seed, cross_validate=cross_validate, held_out_source=source)


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
    labeled = found[rows["set"] == "train"]
    assert set(labeled["subset"]) == {"train", "validation"}
    assert len(labeled[["group", "subset"]].drop_duplicates()) == labeled["group"].nunique()
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


def test_folds_are_numbered_for_every_labeled_image_and_the_first_validates():
    rows = table([0, 0, 0, 1] * 25)
    found = split(rows, params(4))
    labeled = rows["set"] == "train"
    assert set(found.loc[labeled, "fold"]) == {0, 1, 2, 3}
    assert found.loc[~labeled, "fold"].isna().all()
    assert ((found["subset"] == "validation") == (found["fold"] == 0).fillna(value=False)).all()
    for fold in range(4):
        assert rows.loc[found["fold"] == fold, "label"].nunique() == 2


def test_in_cross_validation_every_fold_has_both_classes_or_it_is_refused():
    rows = table([0] * 10 + [1] * 3)
    assert (split(rows, params(4))["subset"] == "validation").any()
    with pytest.raises(UserError, match=r"^split.folds = 4: not every fold has both classes"):
        split(rows, params(4, cross_validate=True))
    found = split(rows, params(3, cross_validate=True))
    assert found.equals(split(rows, params(3)))


def test_a_seed_validates_on_the_fold_of_its_number_only_in_cross_validation():
    assert [params(4, cross_validate=True).validation_fold(seed) for seed in range(6)] == [0, 1, 2, 3, 0, 1]
    assert {params(4).validation_fold(seed) for seed in range(6)} == {0}


def test_a_radiograph_that_is_there_twice_goes_one_way_and_takes_its_patients_along():
    patients = [f"p{index // 2}" for index in range(40)]
    # p0 = {0, 1}, p10 = {20, 21}, p19 = {38, 39}: one radiograph of each is one of another.
    found = split(table([index // 2 % 2 for index in range(40)], patients), params(), {20: 1, 39: 21})
    assert list(found["group"][[0, 1, 20, 21, 38, 39]]) == ["p0"] * 6
    assert found["group"][:40].nunique() == 18
    assert len(set(found["fold"][[0, 1, 20, 21, 38, 39]])) == 1


def test_a_test_image_ties_the_patients_that_share_it():
    found = split(table([0, 1] * 10), params(), {20: 3, 21: 3})
    assert list(found["group"][[3, 20, 21]]) == ["image:a00003.jpg"] * 3


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=12), st.integers(0, 99))
def test_whatever_is_there_twice_no_fold_shares_a_patient_or_a_radiograph_with_another(pairs, seed):
    rows = table([0, 1] * 20, [f"p{index % 25}" if index % 3 else "" for index in range(40)])
    twice = {max(pair): min(pair) for pair in pairs if pair[0] != pair[1]}
    firsts = {row: first for row, first in twice.items() if first not in twice}
    try:
        split(rows, params(3, seed), firsts)
    except UserError as error:
        assert "add images or patients" in str(error) or "split.folds" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("patients", "same", "kind"),
    [(["p1", "p1", "", ""], [0, 1, 2, 3], "patient p1"), ([""] * 4, [0, 0, 2, 3], "radiograph a00000.jpg")],
)
def test_a_split_that_leaks_is_refused(patients, same, kind):
    rows = table([0, 1, 0, 1], patients, tests=0)
    leaking = pd.DataFrame({"file": rows["file"], "group": rows["file"], "subset": "train", "fold": [0, 1, 1, 0]})
    with pytest.raises(UserError, match=rf"^data/split.csv: the {kind} is in 2 folds, .*; do not use this split"):
        splitting.check_split(rows, np.array(same), leaking)


def test_a_source_that_is_held_out_validates_with_all_images_of_its_patients():
    rows = table([0, 1, 0, 1, 0, 1, 0, 1], ["p", "q", "r", "s", "t", "u", "v", "p"])
    rows["source"] = ["here"] * 2 + ["there"] * 6 + ["here", ""]
    found = split(rows, params(source="here"))
    assert list(found["subset"]) == ["validation"] * 2 + ["train"] * 5 + ["validation"] + ["test"] * 2
    assert list(found["fold"][:8]) == [0, 0, 1, 1, 1, 1, 1, 0]


def test_a_source_without_both_classes_is_not_held_out():
    rows = table([0, 0, 0, 1, 1, 0])
    rows["source"] = ["here", "here", "", "", "there", "there", "here", ""]
    for source in ("here", "elsewhere"):
        with pytest.raises(UserError) as caught:
            split(rows, params(source=source))
        inside, outside = (
            ("2 negative", "2 negative, 2 positive") if source == "here" else ("0 negative", "4 negative, 2")
        )
        assert str(caught.value).startswith(
            f"split.held_out_source = {source}: both parts need both classes, but it, with all of its patients, has "
            f"{inside}, 0 positive, and the rest {outside}"
        )
        assert str(caught.value).endswith("the known sources are: here, there")


def test_one_source_and_a_fold_for_each_seed_are_not_validated_on_at_once():
    with pytest.raises(ValueError, match="two ways to validate"):
        params(cross_validate=True, source="here")
