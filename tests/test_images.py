import io
import random
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pipeline.images import UnusableError, decode


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def smooth(size: int = 64) -> np.ndarray:
    row, column = np.mgrid[:size, :size]
    return (60 + row + column).astype(np.uint8)


def pixels(data: bytes, size: int = 64) -> np.ndarray:
    return decode(data, size)[0]


greys = st.integers(32, 48).flatmap(lambda size: arrays.arrays(np.uint8, (size, size)))


@settings(max_examples=40, deadline=None)
@given(greys, st.sampled_from([("PNG", {}), ("TIFF", {}), ("BMP", {}), ("WEBP", {"lossless": True, "exact": True})]))
def test_a_grey_image_saved_without_loss_comes_back_equal_at_its_own_size(image, kind):
    name, options = kind
    grey = Image.fromarray(image)
    found, shape = decode(encoded(grey.convert("RGB") if name == "WEBP" else grey, name, **options), len(image))
    assert shape == image.shape
    # WEBP holds colours, whose luma Pillow rounds.
    assert np.abs(found.astype(int) - image).max() <= (1 if name == "WEBP" else 0)


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.uint16, (32, 32)))
def test_sixteen_bits_are_scaled_by_the_range_they_use(image):
    found = pixels(encoded(Image.fromarray(image)), 32)
    low, high = int(image.min()), int(image.max())
    if low == high:
        assert not found.any()
    else:
        assert found.min() == 0
        assert found.max() == 255
        assert np.abs(found - (image.astype(float) - low) * 255 / (high - low)).max() <= 0.5


def test_a_twelve_bit_ramp_is_never_saturated_white():
    ramp = np.linspace(500, 4095, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    found = pixels(encoded(Image.fromarray(ramp)))
    assert (np.diff(found.ravel().astype(int)) >= 0).all()
    assert (found == 255).mean() < 0.01
    assert len(np.unique(found)) == 256


def test_a_float_image_is_scaled_by_the_range_it_uses():
    image = np.linspace(-3, 7, 64 * 64, dtype=np.float32).reshape(64, 64)
    found = pixels(encoded(Image.fromarray(image), "TIFF"))
    assert np.abs(found - (image + 3) * 25.5).max() <= 0.51


def test_a_palette_is_looked_up():
    indices = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 2
    image = Image.fromarray(indices)
    image.putpalette([200, 200, 200, 10, 10, 10])
    assert (pixels(encoded(image)) == np.where(indices == 0, 200, 10)).all()


def test_a_transparent_entry_of_a_palette_is_black():
    indices = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 2
    image = Image.fromarray(indices)
    image.putpalette([200, 200, 200, 10, 10, 10])
    assert (pixels(encoded(image, transparency=0)) == np.where(indices == 0, 0, 10)).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_lie_on_black_and_opaque_ones_stay(mode):
    grey = smooth()
    alpha = np.zeros_like(grey)
    alpha[:, 32:] = 255
    channels = [Image.fromarray(grey)] * (len(mode) - 1) + [Image.fromarray(alpha)]
    found = pixels(encoded(Image.merge(mode, channels)))
    assert not found[:, :32].any()
    assert (found[:, 32:] == grey[:, 32:]).all()


def test_half_transparent_white_is_mid_grey():
    found = pixels(encoded(Image.new("LA", (64, 64), (255, 128))))
    assert (found == 128).all()


def test_a_cmyk_jpeg_looks_as_it_did_in_grey():
    image = Image.fromarray(smooth()).convert("RGB").convert("CMYK")
    assert np.abs(pixels(encoded(image, "JPEG", quality=95)).astype(int) - smooth()).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_rotation_is_applied(orientation, kind):
    image = Image.fromarray(
        np.tile(np.arange(64, dtype=np.uint8) * 3, (48, 1)) + np.arange(48, dtype=np.uint8)[:, None]
    )
    undone = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = image if undone is None else image.transpose(undone)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found, shape = decode(encoded(stored, kind, exif=exif), 64)
    assert shape == stored.size
    assert np.abs(found.astype(int) - pixels(encoded(image))).max() <= (0 if kind == "PNG" else 6)


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "JPEG", "TIFF", "BMP", "GIF"])
def test_the_format_is_known_by_the_bytes_alone(kind):
    found, shape = decode(encoded(Image.fromarray(smooth()), kind), 64)
    assert shape == (64, 64)
    assert np.abs(found.astype(int) - smooth()).max() <= 6


def test_a_progressive_jpeg_is_the_same_picture_as_a_baseline_one():
    image = Image.fromarray(noise(64, 64))
    progressive = encoded(image, "JPEG", progressive=True)
    assert progressive != encoded(image, "JPEG")
    assert (pixels(progressive) == pixels(encoded(image, "JPEG"))).all()


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_a_grey_jpeg_stored_as_rgb_gives_its_luma_as_stored(subsampling):
    image = Image.fromarray(noise(64, 64))
    colour = encoded(image.convert("RGB"), "JPEG", quality=75, subsampling=subsampling)
    assert (pixels(colour) == pixels(encoded(image, "JPEG", quality=75))).all()


def test_a_colour_jpeg_gives_its_luma_as_stored():
    data = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG", quality=90)
    stored = Image.open(io.BytesIO(data))
    stored.draft("YCbCr", stored.size)
    assert (pixels(data) == np.asarray(stored)[..., 0]).all()


def test_colour_becomes_luma():
    red = pixels(encoded(Image.new("RGB", (64, 64), (255, 0, 0))))
    assert (red == 76).all()  # ITU-R 601-2


@settings(max_examples=20, deadline=None)
@given(st.integers(32, 90), st.integers(32, 90), st.integers(1, 70))
def test_any_shape_becomes_the_square_asked_for(width, height, size):
    found, shape = decode(encoded(Image.new("L", (width, height), 77)), size)
    assert found.shape == (size, size)
    assert found.dtype == np.uint8
    assert (found == 77).all()
    assert shape == (width, height)


def test_shrinking_is_antialiased():
    lines = np.tile(np.array([0, 255], dtype=np.uint8), (128, 64))
    found = pixels(encoded(Image.fromarray(lines)), 32)
    assert (np.abs(found[:, 2:-2].astype(int) - 127) <= 3).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"File,Label\na.jpg,1\n", "not an image in a known format"),
        (b"\x00" * 500, "not an image in a known format"),
        (encoded(Image.new("L", (31, 64))), "too small: 31×64 pixels"),
        (encoded(Image.new("L", (64, 1))), "too small: 64×1 pixels"),
    ],
)
def test_what_is_no_radiograph_is_unusable_with_a_reason(data, reason):
    with pytest.raises(UnusableError, match=f"^{reason}$"):
        decode(data, 64)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_unusable_with_a_reason_of_one_line(kind, share):
    data = encoded(Image.fromarray(noise(64, 64)), kind)
    with pytest.raises(UnusableError, match=r"^(broken image: .+|not an image in a known format)$"):
        decode(data[: int(len(data) * share)], 64)


def test_a_decompression_bomb_is_unusable():
    small = encoded(Image.new("1", (64, 64)))
    header = b"IHDR" + (20_000).to_bytes(4, "big") * 2 + small[24:29]
    data = small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]
    with pytest.raises(UnusableError, match=r"^broken image: .*decompression bomb"):
        decode(data, 64)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_any_damage_either_decodes_or_is_unusable_and_nothing_else(kind):
    data = encoded(Image.fromarray(noise(48, 48, 3)), kind)
    chance = random.Random(7)
    outcomes, reasons = {"decoded": 0, "unusable": 0}, set()
    for _ in range(300):
        damaged = bytearray(data)
        reach = chance.choice([40, 300, len(data)])  # headers are few bytes, so they are hit more often
        for _ in range(chance.choice([1, 2, 16])):
            damaged[chance.randrange(min(reach, len(data)))] = chance.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found, _ = decode(bytes(damaged), 32)
            except UnusableError as error:
                outcomes["unusable"] += 1
                reasons.add(str(error))
            else:
                outcomes["decoded"] += 1
                assert found.shape == (32, 32)
                assert found.dtype == np.uint8
    assert all(outcomes.values())
    assert all(len(reason) > 8 and "\n" not in reason for reason in reasons)
