import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_files import chest
from PIL import Image, ImageDraw

from pipeline.data.gray_levels import find_percentiles, find_range, rescale_to_uint8, scale_to_uint8
from pipeline.data.image_checks import UnusableError

RADIOGRAPH = chest(256).astype(np.uint16) * 12 + 400  # 12 bits
PLAIN = rescale_to_uint8(RADIOGRAPH).astype(int)


def difference(image: np.ndarray, unchanged: np.ndarray) -> int:
    """Return the largest difference, gray levels, to the picture without outliers, where the image shows it."""
    return int(np.abs(rescale_to_uint8(image).astype(int) - PLAIN)[unchanged].max())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([0, 4095, 10_000, 65_535]),
    st.floats(0, 0.029),
    st.sampled_from([np.uint16, np.int32, np.float32]),
    st.integers(0, 2**32),
)
def test_hot_pixels_and_a_burned_in_marker_change_no_other_pixel(level, share, dtype, seed):
    rng, image = np.random.default_rng(seed), RADIOGRAPH.copy()
    side = int((share * image.size) ** 0.5)
    row, column = rng.integers(256 - side, size=2)
    image[row : row + side, column : column + side] = level
    image[rng.integers(256), rng.integers(256)] = level
    assert difference(image.astype(dtype), image == RADIOGRAPH) <= 3


def test_a_marker_with_smooth_edges_changes_no_other_pixel():
    marker = Image.new("L", (256, 256))
    ImageDraw.Draw(marker).text((10, 10), "L  PORTABLE AP 12:30", fill=255, font_size=20)
    opacity = np.asarray(marker) / 255
    image = (RADIOGRAPH * (1 - opacity) + 65535 * opacity).astype(np.uint16)
    assert difference(image, opacity == 0) <= 3


@pytest.mark.parametrize("level", [0, 4095, 65535])
@pytest.mark.parametrize("width", [1, 20, 60, 95])
def test_a_constant_border_changes_no_other_pixel(level, width):
    image = RADIOGRAPH.copy()
    inside = np.zeros(image.shape, dtype=bool)
    inside[width:-width, width:-width] = True
    image[~inside] = level
    expected = rescale_to_uint8(RADIOGRAPH[width:-width, width:-width])
    scaled = rescale_to_uint8(image)[width:-width, width:-width].astype(int)
    assert np.abs(scaled - expected).max() <= 3


@settings(max_examples=60, deadline=None)
@given(st.floats(0.3, 3), st.integers(0, 2**32), st.integers(1, 64))
def test_at_most_a_thousandth_of_an_image_without_outliers_is_clipped(gamma, seed, noise):
    image = 400 + 3000 * (chest(128) / 255) ** gamma + np.random.default_rng(seed).normal(0, noise, (128, 128))
    levels, counts = np.unique(image.round(), return_counts=True)
    low, high = find_range(levels, counts)
    assert counts[(levels < low) | (levels > high)].sum() <= 0.001 * image.size


@pytest.mark.parametrize("steps", [2, 3, 4, 8, 16, 32])
def test_a_picture_of_few_levels_keeps_them(steps):
    scaled = rescale_to_uint8((chest(256).astype(int) * steps // 256 * 2000).astype(np.uint16))
    assert len(np.unique(scaled)) == steps
    assert scaled.max() == 255


@pytest.mark.parametrize("noise", [1, 4])
def test_a_blank_image_with_one_hot_pixel_is_blank(noise):
    image = (1000 + np.random.default_rng(0).integers(0, noise, (64, 64))).astype(np.uint16)
    image[5, 5] = 65535
    with pytest.raises(UnusableError, match=f"blank or nearly blank: contrast of {noise - 1} gray levels"):
        rescale_to_uint8(image)


def test_what_is_not_finite_is_background():
    image = RADIOGRAPH.astype(np.float32)
    image[:10], image[10:20], image[20:30] = np.nan, np.inf, -np.inf
    scaled = rescale_to_uint8(image)
    assert not scaled[:30].any()
    assert (scaled[30:] == rescale_to_uint8(RADIOGRAPH[30:])).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=200), st.floats(0, 0.5))
def test_percentiles_leave_at_most_the_share_on_either_side(values, share):
    levels, counts = np.unique(values, return_counts=True)
    low, high = find_percentiles(levels, counts, share)
    assert low <= high
    assert np.mean(np.array(values) < low) <= share + 1e-9
    assert np.mean(np.array(values) > high) <= share + 1e-9


def test_levels_that_no_gap_divides_from_the_picture_are_kept():
    levels, counts = np.arange(100, 201), np.full(101, 1000)
    assert find_range(np.concatenate([[95], levels, [205]]), np.concatenate([[1], counts, [1]])) == (95, 205)
    assert find_range(np.concatenate([[80], levels, [220]]), np.concatenate([[1], counts, [1]])) == (100, 200)


@pytest.mark.parametrize(("in_gap", "low"), [(1, 2000), (2, 1950)])
def test_one_pixel_of_10000_in_a_gap_does_not_close_it(in_gap, low):
    levels = np.array([1950, *range(1951, 2000, 7), *range(2000, 2100)])
    counts = np.array([100 - 7 * in_gap, *[in_gap] * 7, *[99] * 100])
    assert find_range(levels, counts) == (low, 2099)


@pytest.mark.parametrize(("share", "high"), [(0.025, 199), (0.035, 60_009)])
def test_a_marker_of_several_levels_is_an_outlier_up_to_three_percent_of_the_pixels(share, high):
    counts = np.repeat([1000 * (1 - share), 10_000 * share], [100, 10]).round()
    assert find_range(np.array([*range(100, 200), *range(60_000, 60_010)]), counts) == (100, high)


def test_borders_within_borders_change_no_other_pixel():
    image = RADIOGRAPH.copy()
    for width, level in ((40, 10_000), (30, 20_000), (20, 40_000), (10, 65_535)):
        image[:width], image[-width:], image[:, :width], image[:, -width:] = [level] * 4
    inside = np.zeros(image.shape, dtype=bool)
    inside[40:-40, 40:-40] = True
    expected = rescale_to_uint8(RADIOGRAPH[40:-40, 40:-40]).astype(int)
    assert np.abs(rescale_to_uint8(image)[40:-40, 40:-40] - expected).max() <= 3


def test_negative_levels_are_scaled_as_positive_ones_and_blank_ones_are_refused():
    assert (rescale_to_uint8(RADIOGRAPH.astype(np.int16) - 2000) == PLAIN).all()
    with pytest.raises(UnusableError, match="blank or nearly blank: contrast of 0 gray levels"):
        rescale_to_uint8(np.full((64, 64), -1000, np.int16))


def test_floats_may_be_constant_or_of_any_size_and_are_rounded():
    assert not rescale_to_uint8(np.full((64, 64), 0.5, np.float32)).any()
    assert list(scale_to_uint8(np.array([-9, 0, 1.4, 1.6, 255, 999, np.nan]), 0, 255)) == [0, 0, 1, 2, 255, 255, 0]
