import csv
import io
import os
import zipfile
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.core.config import PhantomParams
from pipeline.data.sources import phantom

SMALL = PhantomParams(
    source="phantom", train=24, test=8, prevalence=0.25, test_prevalence=0.5, strength=1, confounding=0.6, seed=7
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("phantom") / "images.zip"
    phantom.write(SMALL, target)
    return target


def plan(**changes) -> list[phantom.PhantomCase]:
    return phantom.draw_cases(SMALL.model_copy(update=changes))


def rows(archive: Path, name: str) -> list[dict[str, str]]:
    with zipfile.ZipFile(archive) as content:
        return list(csv.DictReader(io.StringIO(content.read(name).decode())))


def association(planned: list[phantom.PhantomCase]) -> float:
    """Share of A among positives less that among negatives."""
    shares = [np.mean([case.source == "A" for case in planned if case.label == label]) for label in (0, 1)]
    return float(shares[1] - shares[0])


def test_equal_params_give_equal_bytes_whatever_the_number_of_workers(archive, tmp_path, monkeypatch):
    workers = len(os.sched_getaffinity(0)) + 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(workers)))
    phantom.write(SMALL, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()


def test_another_seed_gives_other_images():
    first, second = plan(seed=1)[0], replace(plan(seed=1)[0], seed=2)
    assert (phantom.draw_radiograph(first) != phantom.draw_radiograph(second)).mean() > 0.5


def test_the_zip_has_the_competitions_layout_and_no_test_labels(archive):
    planned = plan()
    with zipfile.ZipFile(archive) as content:
        assert content.testzip() is None
        assert content.namelist() == [
            "train_labels.csv", "sample_submission.csv", "metadata.csv",
            *(f"{case.split}/{case.split}/{case.file}" for case in planned),
        ]  # fmt: skip
        entries = content.infolist()
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}
    assert {entry.external_attr >> 16 for entry in entries} == {0o644}


def test_the_tables_list_the_planned_cases_and_the_submission_is_all_zero(archive):
    planned = plan()
    train = [case for case in planned if case.split == "train"]
    test = [case for case in planned if case.split == "test"]
    assert rows(archive, "train_labels.csv") == [{"File": c.file, "Label": str(c.label)} for c in train]
    assert rows(archive, "sample_submission.csv") == [{"File": c.file, "Label": "0"} for c in test]
    assert rows(archive, "metadata.csv") == [
        {"File": c.file, "patient": f"p{c.patient:05d}", "source": c.source, "view": c.view} for c in planned
    ]


def test_images_are_gray_jpegs_of_512_pixels_with_halved_color(archive):
    with zipfile.ZipFile(archive) as content:
        for name in content.namelist()[3:]:
            with Image.open(io.BytesIO(content.read(name))) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (512, 512))
                assert [layer[1:3] for layer in image.layer] == [(2, 2), (1, 1), (1, 1)]
                pixels = np.asarray(image)
            assert (pixels == pixels[..., :1]).all()
            assert pixels.std() > 30


@pytest.mark.parametrize(("prevalence", "test_prevalence"), [(0.125, 0.5), (0, 1), (0.33, 0.21)])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_split_has_exactly_the_rounded_number_of_positives(prevalence, test_prevalence, seed):
    planned = plan(train=83, test=41, prevalence=prevalence, test_prevalence=test_prevalence, seed=seed)
    labels = {split: [case.label for case in planned if case.split == split] for split in ("train", "test")}
    assert {split: len(found) for split, found in labels.items()} == {"train": 83, "test": 41}
    assert sum(labels["train"]) == round(prevalence * 83)
    assert sum(labels["test"]) == round(test_prevalence * 41)


def test_a_patient_has_one_to_four_images_of_one_label_source_and_split():
    patients = defaultdict(list)
    for case in plan(train=400, test=200):
        patients[case.patient].append(case)
    assert sorted(patients) == list(range(1, len(patients) + 1))
    for images in patients.values():
        assert 1 <= len(images) <= 4
        assert len({(case.label, case.source, case.split) for case in images}) == 1


def test_neither_name_nor_order_nor_patient_number_tells_the_label():
    planned = [case for case in plan(train=4000, test=8) if case.split == "train"]
    labels = [case.label for case in planned]
    assert [case.file for case in planned] == sorted(case.file for case in planned)
    for position in ([case.number for case in planned], [case.patient for case in planned]):
        assert abs(np.corrcoef(position, labels)[0, 1]) < 0.06
    neighbors = np.mean([a.patient == b.patient for a, b in pairwise(planned)])
    assert neighbors < 0.01


def test_opacities_brighten_the_lower_outer_zones_of_both_lungs_most():
    shown = [case for case in plan(train=120) if case.opacity][:12]
    change = np.mean(
        [phantom.draw_radiograph(c) - phantom.draw_radiograph(replace(c, opacity=0.0)).astype(float) for c in shown],
        axis=0,
    )
    right, middle, left = change[:, 50:180], change[:, 220:300], change[:, 340:470]
    for lung in (right, left):
        assert lung[240:400].mean() > 3
        assert lung[240:400].mean() > 1.5 * lung[80:220].mean()
        assert lung[240:400].mean() > 3 * middle[240:400].mean()


def test_only_opacities_tell_a_positive_from_the_same_picture_without_them():
    case = next(case for case in plan() if case.label)
    assert (phantom.draw_radiograph(replace(case, label=0)) == phantom.draw_radiograph(case)).all()


def test_greater_strength_gives_denser_opacities():
    weak, strong = plan(strength=0.5), plan(strength=2)
    assert [4 * case.opacity for case in weak] == pytest.approx([case.opacity for case in strong])


@pytest.mark.parametrize("view", ["PA", "AP"])
@pytest.mark.parametrize("look_alike", phantom.MIMICS)
def test_every_look_alike_changes_the_picture(view, look_alike):
    healthy = phantom.PhantomCase(seed=3, number=1, patient=1, split="train", label=0, view=view)
    assert (
        phantom.draw_radiograph(healthy) != phantom.draw_radiograph(replace(healthy, look_alike=look_alike))
    ).mean() > 0.002


@pytest.mark.parametrize("confounding", [0, 0.6, 1])
def test_the_source_tells_the_label_in_training_as_far_as_asked_and_never_in_the_test_set(confounding):
    planned = plan(train=8000, test=4000, prevalence=0.5, confounding=confounding)
    assert association([c for c in planned if c.split == "train"]) == pytest.approx(confounding, abs=0.08)
    assert association([c for c in planned if c.split == "test"]) == pytest.approx(0, abs=0.1)
