import csv
import io
import json
import random
import re
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from conftest import ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_files import chest, dicom, encoded, formats
from PIL import Image
from pydicom.uid import JPEG2000, JPEGBaseline8Bit, JPEGLossless

from pipeline.data import images
from pipeline.data.images import UnusableError, decode_radiograph, resize_to_square

pytestmark = pytest.mark.filterwarnings("ignore")  # decoders warn of what is odd
SHARED = ROOT.parent / "shared/data"
FORMATS = formats()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def pixels(data: bytes, size: int = 64) -> np.ndarray:
    return decode_radiograph(data, size, "stretch")[0]


def reason(data: bytes) -> str:
    with pytest.raises(UnusableError) as caught:
        decode_radiograph(data, 64, "stretch")
    return str(caught.value)


def drawn(seed: int, size: int, low: int, high: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (size, size))


seeds = st.integers(0, 2**32)


@pytest.mark.parametrize("name", FORMATS)
def test_a_radiograph_looks_the_same_in_every_format(name):
    found, shape = decode_radiograph(FORMATS[name], 64, "stretch")
    assert shape == (64, 64)
    assert found.dtype == np.uint8
    lossy = name in ("lossy.webp", "picture.avif", "baseline.dcm") or name.endswith(".jpg")
    assert np.abs(found.astype(int) - chest()).mean() <= (2 if lossy else 0)


@settings(max_examples=40, deadline=None)
@given(
    seeds,
    st.integers(32, 48),
    st.sampled_from([("PNG", {}), ("TIFF", {}), ("BMP", {}), ("WEBP", {"lossless": True, "exact": True})]),
)
def test_a_gray_image_saved_without_loss_comes_back_equal_at_its_own_size(seed, size, kind):
    name, options = kind
    image = drawn(seed, size, 0, 256).astype(np.uint8)
    gray = Image.fromarray(image)
    found = pixels(encoded(gray.convert("RGB") if name == "WEBP" else gray, name, **options), size)
    assert (found == image).all()


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 60_000), st.integers(20, 5_000))
def test_sixteen_bits_are_scaled_by_the_range_they_use(seed, least, levels):
    image = drawn(seed, 32, least, least + levels).astype(np.uint16)
    low, high = int(image.min()), int(image.max())
    expected = (image.astype(float) - low) * 255 / (high - low)
    found = pixels(encoded(Image.fromarray(image)), 32)
    assert found.min() == 0
    assert found.max() == 255
    assert np.abs(found - expected).max() <= 0.5


def test_a_twelve_bit_ramp_is_never_saturated_white():
    ramp = np.linspace(500, 4095, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    found = pixels(encoded(Image.fromarray(ramp)))
    assert (np.diff(found.ravel().astype(int)) >= 0).all()
    assert (found == 255).mean() < 0.01
    assert len(np.unique(found)) == 256


def test_a_transparent_entry_of_a_palette_is_black():
    indices = (np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) // 5) % 2
    image = Image.fromarray(indices)
    image.putpalette([200, 200, 200, 90, 90, 90])
    assert (pixels(encoded(image)) == np.where(indices == 0, 200, 90)).all()
    assert (pixels(encoded(image, transparency=0)) == np.where(indices == 0, 0, 90)).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_lie_on_black_and_opaque_ones_stay(mode):
    gray = chest()
    alpha = np.zeros_like(gray)
    alpha[:, 20:], alpha[:, 40:] = 128, 255
    channels = [Image.fromarray(gray)] * (len(mode) - 1) + [Image.fromarray(alpha)]
    found = pixels(encoded(Image.merge(mode, channels)))
    assert not found[:, :20].any()
    assert np.abs(found[:, 20:40] - gray[:, 20:40] * (128 / 255)).max() <= 1
    assert (found[:, 40:] == gray[:, 40:]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_rotation_is_applied(orientation, kind):
    image = Image.fromarray(chest()[:48])
    undone = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = image if undone is None else image.transpose(undone)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found, shape = decode_radiograph(encoded(stored, kind, exif=exif, quality=95), 64, "stretch")
    assert shape == image.size
    assert np.abs(found.astype(int) - pixels(encoded(image))).max() <= (0 if kind == "PNG" else 12)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [64, 77, 200])
def test_a_jpeg_made_from_gray_has_the_pixels_that_pillow_gives(mode, subsampling, size):
    for options in ({}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 3}, {"comment": b"x"}):
        data = encoded(Image.fromarray(noise(size, size)).convert(mode), "JPEG", subsampling=subsampling, **options)
        assert (pixels(data, size) == np.asarray(Image.open(io.BytesIO(data)).convert("L"))).all()
        assert (images._gray_jpeg(data) is None) == ("progressive" in options)


@pytest.mark.parametrize("quality", [20, 75, 95, 100])
def test_how_coarse_a_jpeg_is_stands_in_its_quantization_table(quality):
    data = encoded(Image.fromarray(chest()), "JPEG", quality=quality)
    own = np.mean(Image.open(io.BytesIO(data)).quantization[0])
    exif = b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data  # in which a thumbnail has a table, too
    finest = encoded(Image.fromarray(chest()), "JPEG", quality=100)
    assert images.jpeg_quantization(data) == own
    assert images.jpeg_quantization(finest[:2] + exif + finest[2:]) == 1
    assert images.jpeg_quantization(encoded(Image.fromarray(chest()), "PNG")) == 0


def test_a_tint_becomes_luma():
    gray = Image.fromarray(chest())
    for black, white in [("#000000", "#ffe8c0"), ("#001030", "#e0f0ff")]:
        tinted = Image.merge("RGB", [gray.point(curve) for curve in curves(black, white)])
        for kind, most in ("PNG", 0), ("JPEG", 12):
            found = pixels(encoded(tinted, kind, **({"quality": 95} if kind == "JPEG" else {})))
            assert np.abs(found.astype(int) - np.asarray(tinted.convert("L"))).max() <= most


def curves(black: str, white: str) -> list[list[int]]:
    """Return per channel what each gray becomes where black and white are colored."""
    ends = [[int(color[at : at + 2], 16) for color in (black, white)] for at in (1, 3, 5)]
    return [np.linspace(low, high, 256).round().astype(int).tolist() for low, high in ends]


def test_a_radiograph_with_a_small_colored_mark_is_usable():
    marked = Image.fromarray(chest(256)).convert("RGB")
    marked.paste("red", (200, 20, 216, 36))
    for kind in ("PNG", "JPEG"):
        pixels(encoded(marked, kind))


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_color_photograph_is_refused_and_the_same_in_gray_is_not(name, kind):
    photograph = Image.fromarray(sklearn.datasets.load_sample_image(name))
    assert reason(encoded(photograph, kind)) == "a color photograph or drawing"
    pixels(encoded(photograph.convert("L").convert("RGB"), kind))


@settings(max_examples=40, deadline=None)
@given(st.integers(32, 90), st.integers(32, 90), st.integers(16, 70), st.sampled_from(["stretch", "pad"]))
def test_any_shape_becomes_the_square_asked_for(width, height, size, resize):
    found, shape = decode_radiograph(encoded(Image.fromarray(chest(90)).resize((width, height))), size, resize)
    assert found.shape == (size, size)
    assert found.dtype == np.uint8
    assert shape == (width, height)


def test_padding_keeps_the_shape_and_lies_in_the_middle_on_black():
    wide = Image.fromarray(chest(128) // 2 + 100).crop((0, 0, 128, 64))
    found = decode_radiograph(encoded(wide), 64, "pad")[0]
    assert not found[:16].any()
    assert not found[48:].any()
    assert (found[16:48] == np.asarray(wide.resize((64, 32), Image.Resampling.BILINEAR))).all()
    tall = decode_radiograph(encoded(wide.transpose(Image.Transpose.ROTATE_90)), 64, "pad")[0]
    assert not tall[:, :16].any()
    assert tall[:, 16:48].all()


def test_a_square_image_is_the_same_stretched_and_padded():
    for size in (32, 64, 100):
        stretched, padded = (decode_radiograph(FORMATS["gray.png"], size, resize)[0] for resize in ("stretch", "pad"))
        assert (stretched == padded).all()


def test_shrinking_is_antialiased():
    lines = np.tile(np.array([0, 255], dtype=np.uint8), (128, 64))
    found = pixels(encoded(Image.fromarray(lines)), 32)
    assert (np.abs(found[:, 2:-2].astype(int) - 127) <= 3).all()


def flat(level: int, spread: int = 0) -> Image.Image:
    return Image.fromarray((level + noise(64, 64) % (spread + 1)).astype(np.uint8))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty file"),
        (b"File,Label\na.jpg,1\n", "not an image in a known format"),
        (b"\x00" * 500, "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "not an image in a known format"),
        (encoded(Image.new("L", (31, 64))), "too small: 31×64 pixels"),
        (encoded(Image.new("L", (64, 1)), "JPEG"), "too small: 64×1 pixels"),
        (encoded(Image.new("L", (40, 401))), "too narrow: 40×401 pixels"),
        (encoded(flat(0)), "blank or nearly so"),
        (encoded(flat(255).convert("RGB"), "JPEG"), "blank or nearly so"),
        (encoded(flat(200, 5)), "blank or nearly so"),
        (encoded(Image.new("RGBA", (64, 64), (255, 255, 255, 0))), "blank or nearly so"),
        (encoded(Image.fromarray(noise(64, 64).astype(np.uint16) % 4 + 40000)), "blank or nearly so"),
        (dicom(noise(64, 64).astype(np.uint16) % 4 + 400, RescaleSlope=0.5, RescaleIntercept=0), "blank or nearly so"),
        (encoded(Image.fromarray(np.full((64, 64), np.nan, np.float32)), "TIFF"), "values that are not finite"),
    ],
)
def test_what_is_no_radiograph_is_unusable_with_a_reason(data, expected):
    assert reason(data) == expected


def test_a_white_page_with_a_few_words_is_nearly_blank():
    page = Image.new("L", (512, 512), 255)
    page.paste(0, (40, 40, 80, 60))
    assert reason(encoded(page)) == "blank or nearly so"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_unusable_with_a_reason_of_one_line(name, share):
    data = FORMATS[name]
    said = reason(data[: int(len(data) * share)])
    assert re.fullmatch(r"(broken (image|DICOM): .+|not an image in a known format)", said)


def test_a_jpeg_with_something_after_its_end_is_usable():
    assert (pixels(FORMATS["rgb.jpg"] + b"\r\n-- itch") == pixels(FORMATS["rgb.jpg"])).all()


def test_a_picture_too_large_to_decode_is_refused_unread():
    small = encoded(Image.new("1", (64, 64)))
    for side, said in (8_000, "too large: 8000×8000 pixels"), (20_000, "decompression bomb"):
        header = b"IHDR" + side.to_bytes(4, "big") * 2 + small[24:29]
        data = small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]
        assert said in reason(data)
    frame = FORMATS["rgb.jpg"].index(b"\xff\xc0") + 5
    data = FORMATS["rgb.jpg"][:frame] + struct.pack(">HH", 8000, 8000) + FORMATS["rgb.jpg"][frame + 4 :]
    assert reason(data) == "too large: 8000×8000 pixels"


def test_a_jpeg_of_endless_scans_is_refused():
    data = FORMATS["progressive.jpg"]
    last = data.rindex(b"\xff\xda")
    assert reason(data[:-2] + data[last:-2] * 300 + data[-2:]) == "broken image: a JPEG of too many scans"
    chests = Image.fromarray(chest()), Image.fromarray(255 - chest())
    several = encoded(chests[0], "MPO", save_all=True, append_images=chests[1:], progressive=True)
    pixels(several)
    end = several.index(b"\xff\xd9")
    scan = several[several.rindex(b"\xff\xda", 0, end) : end]
    assert reason(several[:end] + scan * 300 + several[end:]) == "broken image: a JPEG of too many scans"


def test_a_radiograph_with_a_damaged_exif_is_taken_as_it_lies():
    exif = Image.Exif()
    exif[0x0112], exif[0x8298], exif[0x010F] = 1, "somebody", "a maker"
    sound = encoded(Image.fromarray(chest()), "JPEG", exif=exif)
    begin = sound.index(b"Exif\0\0") + 6
    length = int.from_bytes(sound[begin - 8 : begin - 6], "big") - 8
    chance, expected = random.Random(1), pixels(sound)
    for _ in range(2000):
        data = bytearray(sound)
        for _ in range(chance.choice([1, 2, 8])):
            data[begin + chance.randrange(length)] = chance.choice([chance.randrange(256), chance.randrange(16), 255])
        found = pixels(bytes(data))
        assert any((found == turned).all() for turned in turns(expected))


def turns(image: np.ndarray) -> list[np.ndarray]:
    return [np.rot90(side, count) for side in (image, image.T) for count in range(4)]


def test_a_dicom_is_rescaled_and_the_window_is_applied():
    deep = chest().astype(np.uint16) * 10
    windowed = dicom(deep, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=1000, WindowWidth=1000)
    expected = np.clip((deep * 2.0 - 1000 - 999.5) / 999 + 0.5, 0, 1) * 255
    assert np.abs(pixels(windowed) - expected).max() <= 1
    assert (pixels(windowed) == 255).any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"Modality": "CT"}, "no radiograph: a DICOM of modality CT"),
        ({"NumberOfFrames": 3}, "a DICOM of 3 frames"),
        ({"PhotometricInterpretation": "RGB"}, "a DICOM in color (RGB)"),
        ({"Rows": 9000, "Columns": 9000}, "too large: 9000×9000 pixels"),
        ({"Rows": 128}, "broken DICOM: "),
        ({"BitsAllocated": 7}, "broken DICOM: "),
    ],
)
def test_a_dicom_that_is_no_radiograph_is_unusable_with_a_reason(changes, said):
    assert reason(dicom(chest(), **changes)).startswith(said)


def test_a_dicom_that_no_decoder_here_reads_names_its_compression():
    assert "JPEG Lossless" in reason(dicom(chest(), JPEGLossless, b"\xff\xd8\xff\xd9"))


def test_a_deflated_dicom_is_refused_before_it_is_inflated():
    deflated = FORMATS["plain.dcm"].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    assert reason(deflated).startswith("a deflated DICOM")


def test_a_dicom_whose_picture_is_larger_than_it_says_is_unusable():
    deep = chest().astype(np.uint16) * 100
    stream = bytearray(encoded(Image.fromarray(deep), "JPEG2000", no_jp2=True))
    size = stream.index(b"\xff\x51") + 6
    for at in (size, size + 16):
        stream[at : at + 8] = struct.pack(">II", 3000, 3000)
    assert reason(dicom(deep, JPEG2000, bytes(stream))) == "broken DICOM: of 64×64 pixels, with 3000×3000 inside"
    picture = encoded(Image.fromarray(chest(80)), "JPEG")
    assert reason(dicom(chest(), JPEGBaseline8Bit, picture)) == "broken DICOM: of 64×64 pixels, with 80×80 inside"


@pytest.mark.parametrize(
    "wrong", [noise(64, 64, 3), noise(64, 64) / 2, noise(64, 64).astype(int) - 1, noise(64, 64).astype(int) * 2]
)
def test_pixels_that_are_not_gray_bytes_are_unusable(wrong):
    with pytest.raises(UnusableError, match="not gray pixels"):
        resize_to_square(wrong, 64, "stretch")


def test_thousands_of_damaged_files_neither_crash_nor_hang_nor_fill_the_memory():
    ended = run(ROOT, sys.executable, "tests/fuzzing.py", "8000", "7", PYTHONPATH=str(ROOT))
    assert ended.returncode == 0, ended.stderr[-3000:]
    became = json.loads(ended.stdout)
    assert became["decoded"] + became["unusable"] == 8000
    assert min(became["decoded"], became["unusable"]) > 1000
    assert became["peak_mb"] < 1500


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real files beside the project")
def test_real_odd_files_are_radiographs_except_those_that_are_broken():
    with (SHARED / "odd/NOTES.csv").open() as notes:
        names = [row["file"] for row in csv.DictReader(notes)]
    assert len(names) == 26
    refused = {}
    for name in names:
        try:
            found = decode_radiograph((SHARED / "odd" / name).read_bytes(), 128, "stretch")[0]
        except UnusableError as error:
            refused[name] = str(error)
        else:
            assert found.std() > 10, name
            assert (found == 255).mean() < 0.25, name
    assert refused.pop("23_empty.jpg") == "empty file"
    assert {name: said[:14] for name, said in refused.items()} == dict.fromkeys(
        ["20_jpeg_truncated.jpg", "21_png_truncated.png"], "broken image: "
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real files beside the project")
def test_a_dicom_and_the_inverted_picture_made_from_it_are_negatives_of_each_other():
    names = "18_dicom_16bit_monochrome1_j2k.dcm", "19_png_16bit_gray_inverted.png"
    radiograph, negative = (pixels(Path(SHARED, "odd", name).read_bytes()).ravel() for name in names)
    assert np.corrcoef(radiograph, negative)[0, 1] < -0.99


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real files beside the project")
def test_no_real_radiograph_is_refused():
    with zipfile.ZipFile(SHARED / "cxr-real.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        assert len(names) == 953
        for name in names:
            decode_radiograph(archive.read(name), 64, "stretch")
