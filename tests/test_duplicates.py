import io
import zipfile
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from xxhash import xxh3_128_hexdigest

from pipeline.core.config import PhantomParams
from pipeline.data import duplicates, images
from pipeline.data.sources import phantom

REAL = ROOT.parent / "shared/data"
SIZE = 64

Picture = Image.Image


def encoded_again(image: Picture) -> Picture:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=40)
    return Image.open(io.BytesIO(stream.getvalue())).convert("L")


def resize(image: Picture) -> Picture:
    return encoded_again(image.resize((300, 260), Image.Resampling.BICUBIC))


def trimmed(image: Picture, left: float = 0.01, right: float = 0.01) -> Picture:
    width, height = image.size
    return image.crop((round(left * width), round(0.01 * height), round((1 - right) * width), round(0.99 * height)))


def brightened(image: Picture) -> Picture:
    return ImageEnhance.Brightness(image).enhance(1.15)


def all_at_once(image: Picture) -> Picture:
    return resize(brightened(trimmed(image)))


CHANGES = [encoded_again, resize, trimmed, partial(trimmed, left=0.02, right=0), brightened, all_at_once]


def found(pictures: list[np.ndarray]) -> list[int]:
    pack = np.stack([images.resize_to_square(picture, SIZE, "stretch") for picture in pictures])
    table = pd.DataFrame({
        "xxh128": [xxh3_128_hexdigest(picture) for picture in pack],
        "phash": [duplicates.perceptual_hash(picture) for picture in pack],
    })  # fmt: skip
    return duplicates.find_duplicates(table, pack).tolist()


@pytest.fixture(scope="module")
def drawn() -> dict[int, np.ndarray]:
    """One radiograph each of sixty patients."""
    params = PhantomParams(
        source="phantom", train=160, test=1, prevalence=0.25, test_prevalence=0, strength=2, confounding=0.6, seed=3
    )
    first = {case.patient: case for case in reversed(phantom.draw_cases(params))}
    return {patient: phantom.draw_radiograph(case) for patient, case in sorted(first.items())[:60]}


def test_radiographs_of_different_patients_are_not_joined(drawn):
    assert found(list(drawn.values())) == list(range(60))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: getattr(change, "__name__", "trimmed on one side"))
def test_a_radiograph_that_was_changed_a_little_is_found(drawn, change):
    changed = [np.asarray(change(Image.fromarray(picture))) for picture in list(drawn.values())[:15]]
    assert found([*drawn.values(), *changed]) == [*range(60), *range(15)]


def test_equal_pixels_are_found_whatever_they_show():
    noise = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE), dtype=np.uint8)
    assert found([noise[0], noise[1], noise[0], noise[1]]) == [0, 1, 0, 1]


def test_what_looks_like_what_looks_like_the_first_is_the_first(drawn):
    image = Image.fromarray(drawn[1])
    chain = [image, trimmed(image), trimmed(trimmed(image)), trimmed(trimmed(trimmed(image)))]
    assert found([np.asarray(one) for one in chain]) == [0, 0, 0, 0]
    assert found([np.asarray(one) for one in (chain[0], chain[3], chain[1], chain[2])]) == [0, 0, 0, 0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_each_image_gets_the_first_of_its_kind(drawn, kinds):
    pictures = list(drawn.values())
    assert found([pictures[kind] for kind in kinds]) == [kinds.index(kind) for kind in kinds]


@pytest.mark.skipif(not REAL.exists(), reason="the real radiographs are not here")
def test_of_a_thousand_real_radiographs_only_the_one_that_is_there_three_times_is_joined():
    files = sorted((REAL / "odd").glob("*_duplicate_*")) + sorted((REAL / "odd").glob("*competition*"))
    with zipfile.ZipFile(REAL / "cxr-real.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        data = [*(path.read_bytes() for path in files), *map(archive.read, names)]
    expected = list(range(len(data)))
    expected[1] = expected[4 + names.index("train/train/cxr_00521.jpg")] = 0
    assert found([images.decode_radiograph(one, SIZE, "stretch")[0] for one in data]) == expected
