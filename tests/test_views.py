"""Tests of the meaning of written views, and of `prepare.views` and `prepare.excluded_files`."""

from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from conftest import archive_members, write_zip
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config import KaggleParams, PrepareParams
from pipeline.core.errors import UserError
from pipeline.core.files import read_csv, write_csv
from pipeline.data import exclusion, layout, packing, views
from pipeline.data.manifest import read_manifest
from pipeline.data.test_labels import TEST_LABELS
from stages import score, submit

WRITTEN = {
    "PA": [
        "PA", "pa ", " P.A.", "P-A", "Posteroanterior", "postero-anterior", "POSTERO ANTERIOR", "POSTEROANTERIOR",
        "Posterior/Anterior", "PA view", "CHEST PA",
    ],
    "AP": ["AP", "ap", "Antero-posterior", "AP Supine", "AP semi erect", "AP semi-erect", "AP_horizontal", "ap erect"],
    "LL": ["LL", "Left Lateral", "LLAT"],
    "RL": ["RL", "right lateral"],
    "PA AP": ["Frontal", "FRONTAL"],
    "LL RL": ["LATERAL", "Lateral", "L", "lat", "LAT."],
    "": ["SWIMMERS", "COSTAL", "PA LLD", "AP AXIAL", "LAO", "Lateral decubitus", "Axial", "XTABLE LATERAL"],
}  # fmt: skip


@pytest.mark.parametrize(("projections", "written"), [(key, one) for key, texts in WRITTEN.items() for one in texts])
def test_a_written_view_means_its_projections(projections, written):
    assert views.possible_projections(written) & {"PA", "AP", "LL", "RL"} == set(projections.split())


@given(st.lists(st.text("APLRTOSE", min_size=1), min_size=1, max_size=3), st.sampled_from([" ", "-", "_", ". ", "/"]))
def test_case_blanks_and_punctuation_do_not_count(words, separator):
    written = separator.join(words)
    assert views.possible_projections(f" {written.lower()}. ") == views.possible_projections(" ".join(words))


@pytest.mark.parametrize("written", ["", "  ", "?", "UNK", "unknown", "nan", "N/A", "None"])
def test_a_view_that_nobody_knows_is_no_view_and_stays_in(written):
    assert not views.is_known(pd.Series([written])).any()
    assert not views.is_view(pd.Series([written]), ["PA", written]).any()
    assert list(reasons([written], ["PA"])) == [""]


def images(view: list[str], test: int = 1) -> pd.DataFrame:
    names = [f"{index}.jpg" for index in range(len(view))]
    return pd.DataFrame({"file": names, "set": ["train"] * (len(view) - test) + ["test"] * test, "view": view})


def reasons(view: list[str], wanted: list[str] | None) -> pd.Series:
    return exclusion.exclusion_reasons(images(view), PrepareParams(views=wanted))


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        (["PA", "AP"], ["PA", "AP Supine", "Frontal", ""]),
        (["postero-anterior"], ["PA", "Frontal", ""]),
        (["frontal"], ["PA", "AP Supine", "Frontal", ""]),
        (["Lateral"], ["LL", "Lateral", ""]),
        (["ll"], ["LL", "Lateral", ""]),
        (["ap supine"], ["AP Supine", ""]),
        (["costal"], ["COSTAL", ""]),
        (None, ["PA", "AP Supine", "Frontal", "LL", "Lateral", "COSTAL", ""]),
    ],
)
def test_an_image_is_left_out_if_its_view_cannot_be_a_wanted_one(wanted, kept):
    view = ["PA", "AP Supine", "Frontal", "LL", "Lateral", "COSTAL", ""]
    assert [one for one, reason in zip(view, reasons(view, wanted), strict=True) if not reason] == kept


def test_the_reason_has_the_view_as_it_is_written_and_the_view_is_found_in_it_again():
    found = reasons([" Ap Axial ", "PA", "LL"], ["PA"])
    assert list(found) == ["view Ap Axial: not in prepare.views", "", "view LL: not in prepare.views"]
    assert list(exclusion.excluded_views(pd.concat([found, pd.Series(["empty file"])]))) == ["Ap Axial", "LL"]


def test_excluded_files_are_left_out_and_a_name_that_no_image_has_is_an_error():
    table, params = images(["", "LL", ""]), PrepareParams(views=["PA"], excluded_files=["2.jpg"])
    assert list(exclusion.exclusion_reasons(table, params)) == [
        "",
        "view LL: not in prepare.views",
        exclusion.EXCLUDED_FILE,
    ]
    with pytest.raises(UserError, match=r"excluded_files: no image is named '7.jpg'"):
        exclusion.exclusion_reasons(table, PrepareParams(excluded_files=["0.jpg", "7.jpg"]))


def report(table: pd.DataFrame, wanted: list[str], *, needs_every_test_image: bool = False) -> None:
    found = exclusion.exclusion_reasons(table, PrepareParams(views=wanted))
    exclusion.report_exclusions(table, found, wanted, needs_every_test_image=needs_every_test_image)


def test_counts_are_told_of_what_is_left_out_what_is_not_known_and_what_no_image_has(caplog):
    report(images(["PA", "LL", " LL", "", "LL", "PA"], test=2), ["PA", "AP"])
    assert [record.getMessage() for record in caplog.records] == [
        "prepare.views: no image has the view AP; found: 3 × LL, 2 × PA, 1 × not known",
        (
            "3 of 6 images are left out, as prepare.views and prepare.excluded_files say (views: 3 × LL); 1 of them "
            "are test images, which no prediction or submission will have; data/quarantine.csv lists them"
        ),
        "1 of 6 images stay in because their view is not known, the first is 3.jpg",
    ]


def test_nothing_is_told_where_every_image_is_kept(caplog):
    report(images(["PA", "pa", "PA"]), ["PA"])
    assert caplog.records == []


@pytest.mark.parametrize(("view", "name"), [(["LL", "LL", "PA"], "labeled"), (["PA", "PA", "LL"], "test")])
def test_leaving_out_every_image_is_an_error_with_the_views_that_there_are(view, name):
    with pytest.raises(UserError, match=rf"leave out every {name} image; their views: \d × LL;"):
        report(images(view), ["PA"])


def pack(raw, folder, download=None, **changes):
    packing.pack_images(raw, PrepareParams(image_size=32, max_quarantined=0, **changes), folder, download)


@pytest.fixture
def raw_with_views(tmp_path):
    """Return an archive with a lateral view in each set; the labeled one is broken, which does not matter then."""
    members = archive_members()
    raw = write_zip(tmp_path / "raw.zip", members)
    files = layout.read_layout(raw).images.groupby("set")["file"].first()
    rows = "".join(f"{files[name]},p-{name},,Lateral\n" for name in ("train", "test"))
    broken = {f"train/train/{files['train']}": b"broken"}
    return files, write_zip(
        tmp_path / "raw.zip", members | broken | {"metadata.csv": f"File,patient,source,view\n{rows}".encode()}
    )


def test_images_of_other_views_are_in_quarantine_and_not_in_the_pack_and_count_for_no_limit(raw_with_views, tmp_path):
    files, raw = raw_with_views
    pack(raw, tmp_path / "data", views=["PA", "AP"])
    table, array = read_manifest(tmp_path / "data"), np.load(tmp_path / "data/images.npy")
    assert len(array) == len(table) == len(layout.read_layout(raw).images) - 2
    assert not table["file"].isin(files).any()
    quarantine = pd.read_csv(tmp_path / "data/quarantine.csv")
    assert list(quarantine["file"]) == [files["train"], files["test"]]
    assert set(quarantine["reason"]) == {"view Lateral: not in prepare.views"}


def test_a_test_image_that_a_submission_to_kaggle_needs_is_not_left_out(raw_with_views, tmp_path):
    files, raw = raw_with_views
    with pytest.raises(
        UserError, match=rf"1 test images, the first is {files['test']} \(view Lateral: .*\), but a submission"
    ):
        pack(raw, tmp_path / "data", KaggleParams(competition="a"), views=["PA"])
    pack(raw, tmp_path / "data", KaggleParams(dataset="a/b"), views=["PA"])


@pytest.fixture
def project_without_one_test_image(tmp_path, monkeypatch):
    """Return what is needed to submit and to score: an archive of four test images, of which prepare left out one."""
    (tmp_path / "data").mkdir()
    labels = b"File,Label\n" + b"".join(b"t00%d.jpg,1\n" % number for number in range(4))
    write_zip(tmp_path / "data/raw.zip", archive_members() | {TEST_LABELS: labels})
    write_csv(tmp_path / "data/quarantine.csv", pd.DataFrame({"file": ["t001.jpg"], "reason": ["view LL"]}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.core.config.load_config", MagicMock)


@pytest.mark.usefixtures("project_without_one_test_image")
def test_submissions_lack_the_test_images_that_are_left_out_and_this_is_told(monkeypatch):
    predicted = {"bag": pd.Series([1, 0, 1], ["t003.jpg", "t000.jpg", "t002.jpg"])}
    monkeypatch.setattr("pipeline.evaluation.ensemble.predict_submission_labels", lambda _: predicted)
    result = CliRunner().invoke(submit.submit, catch_exceptions=False)
    assert result.stderr == (
        "1 of 4 test images are missing in the submissions, because prepare leaves them out; the first is t001.jpg\n"
    )
    assert read_csv(Path("submissions/bag.csv")).to_numpy().tolist() == [
        ["t000.jpg", 0],
        ["t002.jpg", 1],
        ["t003.jpg", 1],
    ]


@pytest.mark.usefixtures("project_without_one_test_image")
def test_labels_of_test_images_that_are_left_out_are_not_scored(monkeypatch):
    write_csv(Path("predictions/test.csv"), pd.DataFrame({"file": ["t000.jpg", "t002.jpg", "t003.jpg"]}))
    scored = MagicMock(side_effect=UserError("scored"))
    monkeypatch.setattr("pipeline.evaluation.test_scores.score_candidates", scored)
    for name in ("data.manifest.read_split", "evaluation.ensemble.load_candidate_configs", "core.files.read_json"):
        monkeypatch.setattr(f"pipeline.{name}", MagicMock())
    result = CliRunner().invoke(score.score, catch_exceptions=False)
    assert "1 labels are of test images that prepare leaves out; they are not scored" in result.stderr
    assert list(scored.call_args.args[1].index) == ["t000.jpg", "t002.jpg", "t003.jpg"]
