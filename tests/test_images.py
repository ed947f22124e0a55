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
from odd_files import chest, dicom, encode, formats, tiff
from PIL import Image
from pydicom.uid import JPEG2000, JPEGBaseline8Bit

from pipeline.data import images
from pipeline.data.images import UnusableError, decode_radiograph, resize_to_square

pytestmark = pytest.mark.filterwarnings("ignore")  # of the decoders
SHARED = ROOT.parent / "shared/data"
FORMATS = formats()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def pixels(data: bytes, size: int = 64) -> np.ndarray:
    return decode_radiograph(data, size, "stretch")[0]


def reason(data: bytes) -> str:
    with pytest.raises(UnusableError) as error:
        decode_radiograph(data, 64, "stretch")
    return str(error.value)


def random_image(seed: int, size: int, low: int, high: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (size, size))


seeds = st.integers(0, 2**32)


@pytest.mark.parametrize("name", FORMATS)
def test_a_radiograph_looks_the_same_in_every_format(name):
    decoded, shape = decode_radiograph(FORMATS[name], 64, "stretch")
    assert shape == (64, 64)
    assert decoded.dtype == np.uint8
    lossy = name in ("lossy.webp", "lossy.avif", "baseline.dcm") or name.endswith(".jpg")
    assert np.abs(decoded.astype(int) - chest()).mean() <= (2 if lossy else 0)


@settings(max_examples=40, deadline=None)
@given(
    seeds,
    st.integers(32, 48),
    st.sampled_from([("PNG", {}), ("TIFF", {}), ("BMP", {}), ("WEBP", {"lossless": True, "exact": True})]),
)
def test_lossless_gray_images_are_unchanged_at_their_original_size(seed, size, image_format):
    name, options = image_format
    image = random_image(seed, size, 0, 256).astype(np.uint8)
    gray = Image.fromarray(image)
    decoded = pixels(encode(gray.convert("RGB") if name == "WEBP" else gray, name, **options), size)
    assert (decoded == image).all()


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 60_000), st.integers(20, 5_000))
def test_sixteen_bit_images_are_rescaled_from_the_range_of_their_values(seed, minimum, levels):
    image = random_image(seed, 32, minimum, minimum + levels).astype(np.uint16)
    low, high = int(image.min()), int(image.max())
    expected = (image.astype(float) - low) * 255 / (high - low)
    decoded = pixels(encode(Image.fromarray(image)), 32)
    assert decoded.min() == 0
    assert decoded.max() == 255
    assert np.abs(decoded - expected).max() <= 0.5


def test_twelve_bit_images_are_not_saturated():
    ramp = np.linspace(500, 4095, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    decoded = pixels(encode(Image.fromarray(ramp)))
    assert (np.diff(decoded.ravel().astype(int)) >= 0).all()
    assert (decoded == 255).mean() < 0.01
    assert len(np.unique(decoded)) == 256


def test_transparent_palette_entries_become_black():
    indices = (np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) // 5) % 2
    image = Image.fromarray(indices)
    image.putpalette([200, 200, 200, 90, 90, 90])
    assert (pixels(encode(image)) == np.where(indices == 0, 200, 90)).all()
    assert (pixels(encode(image, transparency=0)) == np.where(indices == 0, 0, 90)).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_become_black_and_opaque_pixels_are_unchanged(mode):
    gray = chest()
    alpha = np.zeros_like(gray)
    alpha[:, 20:], alpha[:, 40:] = 128, 255
    channels = [Image.fromarray(gray)] * (len(mode) - 1) + [Image.fromarray(alpha)]
    decoded = pixels(encode(Image.merge(mode, channels)))
    assert not decoded[:, :20].any()
    assert np.abs(decoded[:, 20:40] - gray[:, 20:40] * (128 / 255)).max() <= 1
    assert (decoded[:, 40:] == gray[:, 40:]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_exif_orientation_is_applied(orientation, image_format):
    image = Image.fromarray(chest()[:48])
    inverse = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = image if inverse is None else image.transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded, shape = decode_radiograph(encode(stored, image_format, exif=exif, quality=95), 64, "stretch")
    assert shape == image.size
    assert np.abs(decoded.astype(int) - pixels(encode(image))).max() <= (0 if image_format == "PNG" else 12)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [64, 77, 200])
def test_gray_jpegs_decode_to_the_same_pixels_as_with_pillow(mode, subsampling, size):
    for options in ({}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 3}, {"comment": b"x"}):
        data = encode(Image.fromarray(noise(size, size)).convert(mode), "JPEG", subsampling=subsampling, **options)
        assert (pixels(data, size) == np.asarray(Image.open(io.BytesIO(data)).convert("L"))).all()
        assert (images._decode_gray_jpeg(data) is None) == ("progressive" in options)


@pytest.mark.parametrize("quality", [20, 75, 95, 100])
def test_jpeg_quantization_is_the_mean_of_the_images_quantization_table(quality):
    data = encode(Image.fromarray(chest()), "JPEG", quality=quality)
    expected = np.mean(Image.open(io.BytesIO(data)).quantization[0])
    exif = b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data  # a thumbnail with a table of its own
    best_quality = encode(Image.fromarray(chest()), "JPEG", quality=100)
    assert images.jpeg_quantization(data) == expected
    assert images.jpeg_quantization(best_quality[:2] + exif + best_quality[2:]) == 1
    assert images.jpeg_quantization(encode(Image.fromarray(chest()), "PNG")) == 0


def test_tinted_images_are_converted_to_luma():
    gray = Image.fromarray(chest())
    for black, white in [("#000000", "#ffe8c0"), ("#001030", "#e0f0ff")]:
        tinted = Image.merge("RGB", [gray.point(curve) for curve in tint_curves(black, white)])
        for image_format, tolerance in ("PNG", 0), ("JPEG", 12):
            options = {"quality": 95} if image_format == "JPEG" else {}
            decoded = pixels(encode(tinted, image_format, **options))
            assert np.abs(decoded.astype(int) - np.asarray(tinted.convert("L"))).max() <= tolerance


def tint_curves(black: str, white: str) -> list[list[int]]:
    """Return per channel the tone curve that maps black and white to the given colors."""
    ends = [[int(color[start : start + 2], 16) for color in (black, white)] for start in (1, 3, 5)]
    return [np.linspace(low, high, 256).round().astype(int).tolist() for low, high in ends]


def test_a_radiograph_with_a_small_colored_annotation_is_usable():
    annotated = Image.fromarray(chest(256)).convert("RGB")
    annotated.paste("red", (200, 20, 216, 36))
    for image_format in ("PNG", "JPEG"):
        pixels(encode(annotated, image_format))


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_a_color_photograph_is_unusable_but_its_gray_version_is_usable(name, image_format):
    photograph = Image.fromarray(sklearn.datasets.load_sample_image(name))
    assert reason(encode(photograph, image_format)) == "color photograph or drawing"
    pixels(encode(photograph.convert("L").convert("RGB"), image_format))


@settings(max_examples=40, deadline=None)
@given(st.integers(32, 90), st.integers(32, 90), st.integers(16, 70), st.sampled_from(["stretch", "pad"]))
def test_images_of_any_shape_become_squares_of_the_given_size(width, height, size, resize):
    decoded, shape = decode_radiograph(encode(Image.fromarray(chest(90)).resize((width, height))), size, resize)
    assert decoded.shape == (size, size)
    assert decoded.dtype == np.uint8
    assert shape == (width, height)


def test_padding_centers_the_image_between_black_bars_and_keeps_its_aspect_ratio():
    wide = Image.fromarray(chest(128) // 2 + 100).crop((0, 0, 128, 64))
    padded = decode_radiograph(encode(wide), 64, "pad")[0]
    assert not padded[:16].any()
    assert not padded[48:].any()
    assert (padded[16:48] == np.asarray(wide.resize((64, 32), Image.Resampling.BILINEAR))).all()
    tall = decode_radiograph(encode(wide.transpose(Image.Transpose.ROTATE_90)), 64, "pad")[0]
    assert not tall[:, :16].any()
    assert tall[:, 16:48].all()


def test_stretching_and_padding_give_the_same_square_image():
    for size in (32, 64, 100):
        stretched, padded = (decode_radiograph(FORMATS["gray.png"], size, resize)[0] for resize in ("stretch", "pad"))
        assert (stretched == padded).all()


def test_downsampling_is_antialiased():
    lines = np.tile(np.array([0, 255], dtype=np.uint8), (128, 64))
    resized = pixels(encode(Image.fromarray(lines)), 32)
    assert (np.abs(resized[:, 2:-2].astype(int) - 127) <= 3).all()


def flat_image(level: int, spread: int = 0) -> Image.Image:
    return Image.fromarray((level + noise(64, 64) % (spread + 1)).astype(np.uint8))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty file"),
        (b"File,Label\na.jpg,1\n", "not an image in a known format"),
        (b"\x00" * 500, "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "not an image in a known format"),
        (b"%PDF-1.7\n%%EOF\n", "not an image in a known format: PDF; convert it to PNG"),
        (b"\xff\x0a" + bytes(200), "not an image in a known format: JPEG XL; convert it to PNG"),
        (b"version https://git-lfs.github", "not an image in a known format: Git LFS pointer; run: git lfs pull"),
        (b"MM\0+" + bytes(200), "big-endian BigTIFF: it cannot be read; convert it to PNG"),
        (encode(Image.new("L", (31, 64))), "too small: 31×64 pixels"),
        (encode(Image.new("L", (64, 1)), "JPEG"), "too small: 64×1 pixels"),
        (encode(Image.new("L", (40, 401))), "too narrow: 40×401 pixels"),
        (encode(flat_image(0)), "blank or nearly blank: contrast of 0 gray levels"),
        (encode(flat_image(255).convert("RGB"), "JPEG"), "blank or nearly blank: contrast of 0 gray levels"),
        (encode(flat_image(200, 5)), "blank or nearly blank: contrast of 5 gray levels"),
        (
            encode(Image.new("RGBA", (64, 64), (255, 255, 255, 0))),
            "blank or nearly blank: contrast of 0 gray levels",
        ),
        (
            encode(Image.fromarray(noise(64, 64).astype(np.uint16) % 4 + 40000)),
            "blank or nearly blank: contrast of 3 gray levels",
        ),
        (
            dicom(noise(64, 64).astype(np.uint16) % 4 + 400, RescaleSlope=0.5, RescaleIntercept=0),
            "blank or nearly blank: contrast of 3 gray levels",
        ),
        (encode(Image.fromarray(np.full((64, 64), np.nan, np.float32)), "TIFF"), "pixel values that are not finite"),
    ],
)
def test_unusable_files_have_a_reason(data, expected):
    assert reason(data) == expected


def test_opacity_of_a_tiff_is_not_inverted():
    gray = chest().astype(np.uint16) * 257
    opaque = np.full_like(gray, 65535)
    assert (pixels(tiff(np.dstack([65535 - gray, opaque]), 0)) == chest()).all()


def test_a_heic_image_without_its_decoder_has_a_reason_that_names_what_reads_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    message = reason(b"\0\0\0\x18ftypheic" + bytes(200))
    assert message.startswith("not an image in a known format: HEIC; install pi-heif")


def test_a_jpeg_of_a_kind_that_no_decoder_reads_is_named():
    data = FORMATS["gray.jpg"].replace(b"\xff\xc0", b"\xff\xc5", 1)
    assert reason(data) == "hierarchical JPEG of 8 bits: no decoder reads it; convert it to PNG or JPEG Baseline"


def test_a_white_page_with_little_text_is_nearly_blank():
    page = Image.new("L", (512, 512), 255)
    page.paste(0, (40, 40, 80, 60))
    assert reason(encode(page)) == "blank or nearly blank: contrast of 0 gray levels"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_unusable_with_a_reason_of_one_line(name, share):
    data = FORMATS[name]
    message = reason(data[: int(len(data) * share)])
    assert re.fullmatch(r"(broken (image|DICOM): .+|not an image in a known format)", message)


def test_a_jpeg_with_trailing_bytes_is_usable():
    assert (pixels(FORMATS["rgb.jpg"] + b"\r\n-- itch") == pixels(FORMATS["rgb.jpg"])).all()


def test_images_that_are_too_large_are_rejected_before_decoding():
    small = encode(Image.new("1", (64, 64)))
    for side, message in (8_000, "too large: 8000×8000 pixels"), (20_000, "decompression bomb"):
        header = b"IHDR" + side.to_bytes(4, "big") * 2 + small[24:29]
        data = small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]
        assert message in reason(data)
    frame = FORMATS["rgb.jpg"].index(b"\xff\xc0") + 5
    data = FORMATS["rgb.jpg"][:frame] + struct.pack(">HH", 8000, 8000) + FORMATS["rgb.jpg"][frame + 4 :]
    assert reason(data) == "too large: 8000×8000 pixels"


def test_a_jpeg_with_too_many_scans_is_rejected():
    message = "broken image: JPEG with more than 200 scans"
    data = FORMATS["progressive.jpg"]
    last = data.rindex(b"\xff\xda")
    assert reason(data[:-2] + data[last:-2] * 300 + data[-2:]) == message
    chests = Image.fromarray(chest()), Image.fromarray(255 - chest())
    two_images = encode(chests[0], "MPO", save_all=True, append_images=chests[1:], progressive=True)
    pixels(two_images)
    end = two_images.index(b"\xff\xd9")
    scan = two_images[two_images.rindex(b"\xff\xda", 0, end) : end]
    assert reason(two_images[:end] + scan * 300 + two_images[end:]) == message


def test_damaged_exif_is_ignored():
    exif = Image.Exif()
    exif[0x0112], exif[0x8298], exif[0x010F] = 1, "copyright", "manufacturer"
    intact = encode(Image.fromarray(chest()), "JPEG", exif=exif)
    start = intact.index(b"Exif\0\0") + 6
    length = int.from_bytes(intact[start - 8 : start - 6], "big") - 8
    rng, expected = random.Random(1), pixels(intact)
    for _ in range(2000):
        data = bytearray(intact)
        for _ in range(rng.choice([1, 2, 8])):
            data[start + rng.randrange(length)] = rng.choice([rng.randrange(256), rng.randrange(16), 255])
        decoded = pixels(bytes(data))
        assert any((decoded == image).all() for image in orientations(expected))


def orientations(image: np.ndarray) -> list[np.ndarray]:
    return [np.rot90(mirrored, count) for mirrored in (image, image.T) for count in range(4)]


def test_rescale_slope_and_window_of_a_dicom_are_applied():
    image = chest().astype(np.uint16) * 10
    windowed = dicom(image, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=1000, WindowWidth=1000)
    expected = np.clip((image * 2.0 - 1000 - 999.5) / 999 + 0.5, 0, 1) * 255
    assert np.abs(pixels(windowed) - expected).max() <= 1
    assert (pixels(windowed) == 255).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Modality": "CT"}, "not a radiograph: DICOM modality CT"),
        ({"NumberOfFrames": 3}, "DICOM with several frames: 3"),
        ({"PhotometricInterpretation": "HSV"}, "DICOM of unknown photometric interpretation: HSV"),
        ({"PhotometricInterpretation": None}, "DICOM of unknown photometric interpretation: none"),
        ({"Rows": 9000, "Columns": 9000}, "too large: 9000×9000 pixels"),
        ({"Rows": 128}, "broken DICOM: "),
        ({"BitsAllocated": 7}, "broken DICOM: "),
    ],
)
def test_unusable_dicoms_have_a_reason(changes, message):
    assert reason(dicom(chest(), **changes)).startswith(message)


def test_a_dicom_with_an_image_of_another_size_is_unusable():
    image = chest().astype(np.uint16) * 100
    stream = bytearray(encode(Image.fromarray(image), "JPEG2000", no_jp2=True))
    size = stream.index(b"\xff\x51") + 6
    for offset in (size, size + 16):
        stream[offset : offset + 8] = struct.pack(">II", 3000, 3000)
    message = "broken DICOM: 64×64 pixels in its header, but {} in its image"
    assert reason(dicom(image, JPEG2000, bytes(stream))) == message.format("3000×3000")
    larger = encode(Image.fromarray(chest(80)), "JPEG")
    assert reason(dicom(chest(), JPEGBaseline8Bit, larger)) == message.format("80×80")


@pytest.mark.parametrize(
    "array", [noise(64, 64, 3), noise(64, 64) / 2, noise(64, 64).astype(int) - 1, noise(64, 64).astype(int) * 2]
)
def test_arrays_that_are_not_8_bit_gray_images_are_unusable(array):
    with pytest.raises(UnusableError, match="not a gray image"):
        resize_to_square(array, 64, "stretch")


def test_thousands_of_damaged_files_neither_crash_nor_hang_nor_exhaust_memory():
    completed = run(ROOT, sys.executable, "tests/fuzzing.py", "5000", "7", PYTHONPATH=str(ROOT))
    assert completed.returncode == 0, completed.stderr[-3000:]
    counts = json.loads(completed.stdout)
    assert counts["decoded"] + counts["unusable"] == 5000
    assert min(counts["decoded"], counts["unusable"]) > 1000
    assert counts["peak_mb"] < 1500


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real files are missing")
def test_unusual_real_files_are_usable_unless_they_are_broken():
    with (SHARED / "odd/NOTES.csv").open() as notes:
        names = [row["file"] for row in csv.DictReader(notes)]
    assert len(names) == 26
    reasons = {}
    for name in names:
        try:
            decoded = decode_radiograph((SHARED / "odd" / name).read_bytes(), 128, "stretch")[0]
        except UnusableError as error:
            reasons[name] = str(error)
        else:
            assert decoded.std() > 10, name
            assert (decoded == 255).mean() < 0.25, name
    assert reasons.pop("23_empty.jpg") == "empty file"
    assert {name: message[:14] for name, message in reasons.items()} == dict.fromkeys(
        ["20_jpeg_truncated.jpg", "21_png_truncated.png"], "broken image: "
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real files are missing")
def test_a_real_dicom_and_the_inverted_png_made_from_it_are_negatives_of_each_other():
    names = "18_dicom_16bit_monochrome1_j2k.dcm", "19_png_16bit_gray_inverted.png"
    radiograph, negative = (pixels(Path(SHARED, "odd", name).read_bytes()).ravel() for name in names)
    assert np.corrcoef(radiograph, negative)[0, 1] < -0.99


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real files are missing")
def test_all_real_radiographs_are_usable():
    with zipfile.ZipFile(SHARED / "cxr-real.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        assert len(names) == 953
        for name in names:
            decode_radiograph(archive.read(name), 64, "stretch")
