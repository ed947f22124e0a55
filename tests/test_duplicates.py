import io
import itertools
import zipfile
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from scipy.fft import dctn
from scipy.sparse.csgraph import connected_components
from xxhash import xxh3_128_hexdigest

from pipeline.core.config import PhantomParams
from pipeline.data import duplicates, images
from pipeline.data.sources import phantom

REAL = ROOT.parent / "shared/data"
SIZE = 64


def reencode(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=40)
    return Image.open(io.BytesIO(stream.getvalue())).convert("L")


def resize(image: Image.Image) -> Image.Image:
    return reencode(image.resize((300, 260), Image.Resampling.BICUBIC))


def crop(image: Image.Image, left: float = 0.01, right: float = 0.01) -> Image.Image:
    width, height = image.size
    return image.crop((round(left * width), round(0.01 * height), round((1 - right) * width), round(0.99 * height)))


def brighten(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1.15)


def change_everything(image: Image.Image) -> Image.Image:
    return resize(brighten(crop(image)))


CHANGES = [reencode, resize, crop, partial(crop, left=0.02, right=0), brighten, change_everything]


def find_groups(radiographs: list[np.ndarray]) -> list[int]:
    pack = np.stack([images.resize_to_square(radiograph, SIZE, "stretch") for radiograph in radiographs])
    table = pd.DataFrame({
        "xxh128": [xxh3_128_hexdigest(pixels) for pixels in pack],
        "phash": [duplicates.perceptual_hash(pixels) for pixels in pack],
    })  # fmt: skip
    return duplicates.find_duplicates(table, pack).tolist()


@pytest.mark.parametrize("size", [16, 32, 40, 64, 160, 224, 512, 992, 2048])
@pytest.mark.parametrize("levels", [(0, 256), (0, 2), (250, 256)])
def test_the_perceptual_hash_is_that_of_pillows_thumbnail(size, levels):
    pixels = np.random.default_rng(size).integers(*levels, (size, size)).astype(np.uint8)
    thumbnail = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=1.0)
    frequencies = dctn(np.asarray(thumbnail, dtype=np.float32))[:16, :16]
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(duplicates.perceptual_hash(pixels)), np.uint8))
    assert (bits == (frequencies > np.median(frequencies)).ravel()).all()


@pytest.fixture(scope="module")
def radiographs() -> dict[int, np.ndarray]:
    """One radiograph of each of sixty patients."""
    params = PhantomParams(
        source="phantom", train=160, test=1, prevalence=0.25, test_prevalence=0, strength=2, confounding=0.6, seed=3
    )
    first_cases = {case.patient: case for case in reversed(phantom.draw_cases(params))}
    return {patient: phantom.draw_radiograph(case) for patient, case in sorted(first_cases.items())[:60]}


def test_radiographs_of_different_patients_are_not_duplicates(radiographs):
    assert find_groups(list(radiographs.values())) == list(range(60))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: getattr(change, "__name__", "crop on one side"))
def test_slightly_changed_copies_are_duplicates(radiographs, change):
    changed = [np.asarray(change(Image.fromarray(pixels))) for pixels in list(radiographs.values())[:15]]
    assert find_groups([*radiographs.values(), *changed]) == [*range(60), *range(15)]


def test_images_with_equal_pixels_are_duplicates_whatever_their_content():
    noise = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE), dtype=np.uint8)
    assert find_groups([noise[0], noise[1], noise[0], noise[1]]) == [0, 1, 0, 1]


def test_duplicates_of_duplicates_are_in_one_group(radiographs):
    image = Image.fromarray(radiographs[1])
    chain = [image, crop(image), crop(crop(image)), crop(crop(crop(image)))]
    assert find_groups([np.asarray(copy) for copy in chain]) == [0, 0, 0, 0]
    assert find_groups([np.asarray(copy) for copy in (chain[0], chain[3], chain[1], chain[2])]) == [0, 0, 0, 0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_the_group_of_an_image_is_its_first_duplicate(radiographs, indices):
    pixels = list(radiographs.values())
    assert find_groups([pixels[index] for index in indices]) == [indices.index(index) for index in indices]


@pytest.mark.parametrize(("distance", "expected"), [(40, [0, 0]), (41, [0, 1])])
def test_only_images_whose_hashes_differ_in_at_most_40_bits_are_compared(radiographs, distance, expected):
    pack = np.stack([images.resize_to_square(radiographs[1], SIZE, "stretch")] * 2)
    hashes = [bytes(32).hex(), np.packbits(np.arange(256) < distance).tobytes().hex()]
    table = pd.DataFrame({"xxh128": ["a", "b"], "phash": hashes})
    assert duplicates.find_duplicates(table, pack).tolist() == expected


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_groups_are_those_of_comparing_all_pairs_whatever_is_compared_at_once(radiographs, data):
    indices = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    changes = data.draw(st.lists(st.sampled_from([lambda image: image, *CHANGES]), min_size=12, max_size=12))
    sources = [Image.fromarray(list(radiographs.values())[index]) for index in indices]
    changed = [np.asarray(change(image)) for change, image in zip(changes, sources, strict=False)]
    pack = np.stack([images.resize_to_square(radiograph, SIZE, "stretch") for radiograph in changed])
    # Hashes at distances on both sides of the limit, whatever the images.
    bits = np.zeros((len(pack), 256), dtype=np.uint8)
    for row in bits:
        start, length = data.draw(st.tuples(st.integers(0, 20), st.integers(15, 25)))
        row[start : start + length] = 1
    table = pd.DataFrame({
        "xxh128": [xxh3_128_hexdigest(pixels) for pixels in pack],
        "phash": [np.packbits(row).tobytes().hex() for row in bits],
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("QUERIES", "CHUNK_SIZE", "CACHED_EDGE_IMAGES"):
            monkeypatch.setattr(duplicates, name, data.draw(st.integers(1, 4)))
        assert duplicates.find_duplicates(table, pack).tolist() == compare_all_pairs(table["xxh128"], bits, pack)


def compare_all_pairs(hashes: pd.Series, bits: np.ndarray, pack: np.ndarray) -> list[int]:
    """Group images by definition: of images with equal pixels, the first one is compared with all others."""
    edge_images = np.stack([duplicates._edge_image(pixels) for pixels in pack])
    first = [list(hashes).index(value) for value in hashes]
    linked = np.zeros((len(pack), len(pack)), dtype=bool)
    for i, j in itertools.combinations(sorted(set(first)), 2):
        is_near = np.count_nonzero(bits[i] != bits[j]) <= duplicates.MAX_HAMMING_DISTANCE
        linked[i, j] = (
            is_near and duplicates.similarity(edge_images[i], edge_images[[j]])[0] >= duplicates.MIN_SIMILARITY
        )
    _, components = connected_components(linked)
    return [int(np.flatnonzero(components == components[row])[0]) for row in first]


@pytest.mark.skipif(not REAL.exists(), reason="the real radiographs are missing")
def test_the_only_duplicates_among_a_thousand_real_radiographs_are_three_known_copies():
    files = sorted((REAL / "odd").glob("*_duplicate_*")) + sorted((REAL / "odd").glob("*competition*"))
    with zipfile.ZipFile(REAL / "cxr-real.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        data = [*(path.read_bytes() for path in files), *map(archive.read, names)]
    expected = list(range(len(data)))
    expected[1] = expected[4 + names.index("train/train/cxr_00521.jpg")] = 0
    assert find_groups([images.decode_radiograph(content, SIZE, "stretch")[0] for content in data]) == expected
