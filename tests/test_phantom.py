import csv
import io
import os
import platform
import sys
import zipfile
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run
from PIL import Image

from pipeline.core.config import PhantomParams
from pipeline.core.files import md5_of_file
from pipeline.data.sources import phantom

SMALL = PhantomParams(
    source="phantom",
    version=2,
    train=24,
    test=8,
    prevalence=0.25,
    test_prevalence=0.5,
    strength=1,
    confounding=0.6,
    seed=7,
)
MD5 = {2: "180a480094336140f937c11344842235"}  # of the archive of SMALL, without SIMD extensions
WRITE_ARCHIVE = """
import sys
from pathlib import Path
from pipeline.core.config import PhantomParams
from pipeline.data.sources import phantom
phantom.write_source(PhantomParams.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("phantom") / "images.zip"
    phantom.write_source(SMALL, target)
    return target


def draw_cases(**changes) -> list[phantom.PhantomCase]:
    return phantom.draw_cases(SMALL.model_copy(update=changes))


def read_table(archive: Path, name: str) -> list[dict[str, str]]:
    with zipfile.ZipFile(archive) as content:
        return list(csv.DictReader(io.StringIO(content.read(name).decode())))


def source_difference(cases: list[phantom.PhantomCase]) -> float:
    """Return the share of source A among positives minus that among negatives."""
    shares = [np.mean([case.source == "A" for case in cases if case.label == label]) for label in (0, 1)]
    return float(shares[1] - shares[0])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the last bits of exp and sin depend on the architecture")
def test_the_bytes_of_a_version_do_not_change(tmp_path):
    path, simd = tmp_path / "images.zip", " ".join(np.show_config("dicts")["SIMD Extensions"]["found"])
    command = [sys.executable, "-c", WRITE_ARCHIVE, SMALL.model_dump_json(), str(path)]
    completed = run(ROOT, *command, NPY_DISABLE_CPU_FEATURES=simd, PYTHONPATH=str(ROOT))
    assert completed.returncode == 0, completed.stderr
    message = "the drawing changed: raise demo.download.version, so that `dvc repro` draws again"
    assert md5_of_file(path) == MD5[SMALL.version], message


def test_equal_params_give_equal_bytes_whatever_the_number_of_workers(archive, tmp_path, monkeypatch):
    workers = len(os.sched_getaffinity(0)) + 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(workers)))
    phantom.write_source(SMALL, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()


def test_another_seed_gives_other_images():
    first, second = draw_cases(seed=1)[0], replace(draw_cases(seed=1)[0], seed=2)
    assert (phantom.draw_radiograph(first) != phantom.draw_radiograph(second)).mean() > 0.5


def test_the_zip_has_the_layout_of_the_competition(archive):
    cases = draw_cases()
    with zipfile.ZipFile(archive) as content:
        assert content.testzip() is None
        assert content.namelist() == [
            "train_labels.csv", "sample_submission.csv", "metadata.csv", "test_labels.csv",
            *(f"{case.split}/{case.split}/{case.file}" for case in cases),
        ]  # fmt: skip
        entries = content.infolist()
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}
    assert {entry.external_attr >> 16 for entry in entries} == {0o644}


def test_the_tables_list_all_cases_and_the_labels_of_test_images_apart(archive):
    cases = draw_cases()
    train = [case for case in cases if case.split == "train"]
    test = [case for case in cases if case.split == "test"]
    assert read_table(archive, "train_labels.csv") == [{"File": c.file, "Label": str(c.label)} for c in train]
    assert read_table(archive, "sample_submission.csv") == [{"File": c.file, "Label": "0"} for c in test]
    assert read_table(archive, "metadata.csv") == [
        {
            "File": c.file, "patient": f"p{c.patient:05d}", "source": c.source, "view": c.view, "sex": c.sex,
            "age": str(c.age),
        }
        for c in cases
    ]  # fmt: skip
    assert read_table(archive, "test_labels.csv") == [{"File": c.file, "Label": str(c.label)} for c in test]


def test_images_are_gray_512_pixel_jpegs_with_chroma_subsampling(archive):
    with zipfile.ZipFile(archive) as content:
        for name in content.namelist()[4:]:
            with Image.open(io.BytesIO(content.read(name))) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (512, 512))
                assert [layer[1:3] for layer in image.layer] == [(2, 2), (1, 1), (1, 1)]
                pixels = np.asarray(image)
            assert (pixels == pixels[..., :1]).all()
            assert pixels.std() > 30


@pytest.mark.parametrize(("prevalence", "test_prevalence"), [(0.125, 0.5), (0, 1), (0.33, 0.21)])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_split_has_exactly_the_rounded_number_of_positives(prevalence, test_prevalence, seed):
    cases = draw_cases(train=83, test=41, prevalence=prevalence, test_prevalence=test_prevalence, seed=seed)
    labels = {split: [case.label for case in cases if case.split == split] for split in ("train", "test")}
    assert {split: len(values) for split, values in labels.items()} == {"train": 83, "test": 41}
    assert sum(labels["train"]) == round(prevalence * 83)
    assert sum(labels["test"]) == round(test_prevalence * 41)


def test_a_patient_has_one_to_four_images_of_one_label_source_and_split():
    patients = defaultdict(list)
    for case in draw_cases(train=400, test=200):
        patients[case.patient].append(case)
    assert sorted(patients) == list(range(1, len(patients) + 1))
    for images in patients.values():
        assert 1 <= len(images) <= 4
        assert len({(case.label, case.source, case.split) for case in images}) == 1


def test_sex_and_age_belong_to_the_patient_and_are_independent_of_label_and_source():
    cases = draw_cases(train=4000, test=1000, prevalence=0.5)
    patients = {case.patient: case for case in cases}
    assert all((case.sex, case.age) == (patients[case.patient].sex, patients[case.patient].age) for case in cases)
    women = np.array([case.sex == "F" for case in patients.values()])
    ages = np.array([case.age for case in patients.values()])
    assert women.mean() == pytest.approx(0.5, abs=0.04)
    assert all(case.sex == "F" for case in cases if case.breasts)
    assert 1 <= ages.min() < 18
    assert 65 < ages.max() <= 95
    for trait in ("label", "source", "split"):
        values = np.array([getattr(case, trait) for case in patients.values()])
        for value in np.unique(values):
            assert women[values == value].mean() == pytest.approx(women.mean(), abs=0.06)
            assert ages[values == value].mean() == pytest.approx(ages.mean(), abs=2.5)


def test_name_order_and_patient_number_do_not_reveal_the_label():
    cases = [case for case in draw_cases(train=4000, test=8) if case.split == "train"]
    labels = [case.label for case in cases]
    assert [case.file for case in cases] == sorted(case.file for case in cases)
    for position in ([case.number for case in cases], [case.patient for case in cases]):
        assert abs(np.corrcoef(position, labels)[0, 1]) < 0.06
    neighbors = np.mean([a.patient == b.patient for a, b in pairwise(cases)])
    assert neighbors < 0.01


def test_opacities_are_brightest_in_the_lower_outer_zones_of_both_lungs():
    cases = [case for case in draw_cases(train=120) if case.opacity][:12]
    change = np.mean(
        [phantom.draw_radiograph(c) - phantom.draw_radiograph(replace(c, opacity=0.0)).astype(float) for c in cases],
        axis=0,
    )
    right, middle, left = change[:, 50:180], change[:, 220:300], change[:, 340:470]
    for lung in (right, left):
        assert lung[240:400].mean() > 3
        assert lung[240:400].mean() > 1.5 * lung[80:220].mean()
        assert lung[240:400].mean() > 3 * middle[240:400].mean()


def test_the_label_changes_an_image_only_through_the_opacities():
    case = next(case for case in draw_cases() if case.label)
    assert (phantom.draw_radiograph(replace(case, label=0)) == phantom.draw_radiograph(case)).all()


def test_a_higher_strength_gives_denser_opacities():
    weak, strong = draw_cases(strength=0.5), draw_cases(strength=2)
    assert [4 * case.opacity for case in weak] == pytest.approx([case.opacity for case in strong])


@pytest.mark.parametrize("view", ["PA", "AP"])
@pytest.mark.parametrize("mimic", phantom.MIMICS)
def test_every_mimic_changes_the_image(view, mimic):
    healthy = phantom.PhantomCase(seed=3, number=1, patient=1, split="train", label=0, view=view)
    with_mimic = replace(healthy, mimic=mimic)
    assert (phantom.draw_radiograph(healthy) != phantom.draw_radiograph(with_mimic)).mean() > 0.002


@pytest.mark.parametrize("confounding", [0, 0.6, 1])
def test_the_source_predicts_the_label_as_configured_in_training_and_not_in_the_test_set(confounding):
    cases = draw_cases(train=8000, test=4000, prevalence=0.5, confounding=confounding)
    assert source_difference([c for c in cases if c.split == "train"]) == pytest.approx(confounding, abs=0.08)
    assert source_difference([c for c in cases if c.split == "test"]) == pytest.approx(0, abs=0.1)
