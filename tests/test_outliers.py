"""Tests of the ranking of unusual images, and of the contact sheet."""

import zipfile
from functools import cache

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from odd_files import chest
from PIL import Image, ImageFont
from scipy.ndimage import gaussian_filter, shift, zoom

from pipeline.data import images as decoding
from pipeline.data import outliers

SHARED = ROOT.parent / "shared/data"
COUNT, SIZE = 120, 64


def draw_chest(rng: np.random.Generator) -> np.ndarray:
    """Draw a chest whose place, size, brightness, texture and noise vary: uint8 (64, 64)."""
    picture = chest(80) * rng.uniform(0.7, 1) + rng.uniform(0, 30)
    picture += 12 * gaussian_filter(rng.normal(size=picture.shape), 4) / 0.07 + rng.normal(0, 5, picture.shape)
    scaled = zoom(shift(picture, rng.uniform(-3, 3, 2), order=1, mode="nearest"), rng.uniform(0.95, 1.05), order=1)
    start = (len(scaled) - SIZE) // 2
    return scaled[start:, start:][:SIZE, :SIZE].clip(0, 255).astype(np.uint8)


@cache
def draw_chests(count: int = COUNT) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.stack([draw_chest(rng) for _ in range(count)])


def most_unusual(pictures: np.ndarray, count: int) -> set[int]:
    return set(np.argsort(-outliers.rank_outliers(pictures))[:count].tolist())


def odd_pictures() -> dict[str, np.ndarray]:
    first = draw_chests()[:4]
    noise = gaussian_filter(np.random.default_rng(2).normal(size=(SIZE, SIZE)), 2)
    disk = 220 * (np.hypot(*np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]) < 0.7)
    return {
        "on its side": np.rot90(first[0]),
        "upside down": first[1][::-1],
        "inverted": 255 - first[2],
        "a part of it": np.asarray(Image.fromarray(first[3]).crop((20, 30, 40, 50)).resize((SIZE, SIZE))),
        "texture": (255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8),
        "a disk": disk.astype(np.uint8),
    }


@pytest.mark.parametrize("name", odd_pictures())
def test_a_picture_of_another_kind_is_the_most_unusual_one(name):
    assert most_unusual(np.stack([*draw_chests(), odd_pictures()[name]]), 1) == {COUNT}


def test_several_pictures_of_one_kind_do_not_hide_each_other():
    rng, usual = np.random.default_rng(3), draw_chests()
    odd = np.stack([np.rot90(draw_chest(rng)) for _ in range(COUNT // 10)])
    assert most_unusual(np.concatenate([usual, odd]), len(odd)) == set(range(COUNT, COUNT + len(odd)))


def test_distances_are_the_same_with_any_number_of_threads_and_on_disk(tmp_path, monkeypatch):
    pictures, distances = draw_chests(), outliers.rank_outliers(draw_chests())
    np.save(tmp_path / "images.npy", pictures)
    for threads in (1, 3):
        monkeypatch.setattr(outliers, "cpu_count", lambda threads=threads: threads)
        assert (outliers.rank_outliers(np.load(tmp_path / "images.npy", mmap_mode="r")) == distances).all()


def test_of_many_images_a_sample_says_what_is_usual(monkeypatch):
    pictures = np.stack([*draw_chests(), *odd_pictures().values()])
    monkeypatch.setattr(outliers, "MAX_SAMPLE", 80)
    monkeypatch.setattr(outliers, "MAX_WAITING", 1)
    assert most_unusual(pictures, 6) == set(range(COUNT, COUNT + 6))


@pytest.mark.parametrize("count", [1, 2, 19, 20])
def test_few_images_have_finite_distances(count):
    distances = outliers.rank_outliers(draw_chests()[:count])
    assert distances.shape == (count,)
    assert np.isfinite(distances).all()
    assert (outliers.rank_outliers(np.zeros((count, SIZE, SIZE), np.uint8)) < 1e-3).all()


def test_images_of_another_size_are_resized():
    larger = np.stack([np.asarray(Image.fromarray(one).resize((96, 96))) for one in draw_chests()[:40]])
    correlation = np.corrcoef(outliers.rank_outliers(larger), outliers.rank_outliers(draw_chests()[:40]))
    assert correlation[0, 1] > 0.5


def tile(sheet: np.ndarray, index: int) -> np.ndarray:
    top, left = index // 8 * (outliers.TILE + outliers.CAPTION), index % 8 * outliers.TILE
    return sheet[top : top + outliers.TILE - 2, left : left + outliers.TILE - 2]


def test_the_contact_sheet_shows_the_first_48_images_row_by_row(tmp_path):
    grays = np.arange(50, dtype=np.uint8) * 5
    pictures = np.broadcast_to(grays[:, None, None], (50, 32, 32))
    titles = [f"{index} " + "ein_sehr_langer_Name_für_ein_Bild" for index in range(50)]
    for name in ("a.jpg", "b.jpg"):
        outliers.write_contact_sheet(tmp_path / name, np.array(pictures), titles)
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()
    sheet = np.asarray(Image.open(tmp_path / "a.jpg")).astype(int)
    assert sheet.shape == (6 * (outliers.TILE + outliers.CAPTION), 8 * outliers.TILE)
    for index in range(48):
        assert np.abs(tile(sheet, index)[8:-8, 8:-8] - grays[index]).max() <= 3
        caption = sheet[index // 8 * (outliers.TILE + outliers.CAPTION) + outliers.TILE :][: outliers.CAPTION]
        assert caption[:, index % 8 * outliers.TILE :][:, : outliers.TILE].max() > 150  # some text
    outliers.write_contact_sheet(tmp_path / "one.jpg", np.array(pictures)[:1], ["one"])
    assert Image.open(tmp_path / "one.jpg").size == (outliers.TILE, outliers.TILE + outliers.CAPTION)


def test_a_long_title_is_shortened_in_its_middle():
    font = ImageFont.load_default(size=11)
    assert outliers.shorten("1. a.jpg", font) == "1. a.jpg"
    short = outliers.shorten("12. patient_0001_study_0002_series_0003_image_0004.dcm (train)", font)
    assert font.getlength(short) <= outliers.TILE - 4
    start, end = short.split("…")
    assert start.startswith("12. patient_0")
    assert end.endswith(".dcm (train)")


def test_the_table_lists_all_images_the_most_unusual_first_and_no_label(tmp_path):
    pictures = np.stack([*draw_chests()[:60], *odd_pictures().values()])
    manifest = pd.DataFrame({"file": [f"{row:03}" for row in range(66)], "set": "train", "label": 1})
    manifest.loc[65, "set"] = "test"
    table = outliers.write_outliers(tmp_path, manifest, pictures)
    written = pd.read_csv(tmp_path / "outliers.csv", dtype={"file": str})
    assert list(written.columns) == ["file", "set", "distance"]
    assert list(written["file"]) == list(table["file"])
    assert sorted(written["file"]) == list(manifest["file"])
    assert written["distance"].is_monotonic_decreasing
    assert set(written["file"].head(6)) == {f"{row:03}" for row in range(60, 66)}
    assert list(written["file"][written["set"] == "test"]) == ["065"]
    assert Image.open(tmp_path / "contact_sheet.jpg").size[0] == 8 * outliers.TILE


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real radiographs")
def test_a_ct_slice_and_a_lateral_view_are_among_the_most_unusual_of_real_radiographs():
    with zipfile.ZipFile(SHARED / "cxr-real.zip") as archive:
        members = [name for name in archive.namelist() if name.endswith(".jpg")][::4]
        files = [archive.read(name) for name in members]
    files += [
        (SHARED / "odd" / name).read_bytes() for name in ("15_ct_slice_not_cxr.jpg", "12_large_lateral_4298x4300.jpg")
    ]
    pictures = np.stack([decoding.decode_radiograph(data, SIZE, "stretch")[0] for data in files])
    assert {len(files) - 2, len(files) - 1} <= most_unusual(pictures, 24)
