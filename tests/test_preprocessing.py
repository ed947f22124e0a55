"""Crops to the lungs, masks, normalization of gray levels and views, and that every way to predict applies them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.functional import interpolate

from pipeline.core.config import FindingParams
from pipeline.data.sources.phantom import PhantomCase, draw_radiograph
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference.candidate import Candidate
from pipeline.inference.export_onnx import CandidateGraph
from pipeline.models import preprocessing
from pipeline.models.classifier import Architecture, Classifier, Head, predict_resized
from pipeline.models.heatmaps import compute_heatmaps

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = Architecture("squeezenet1_1", [], 0.0, 64, "imagenet", 96, "stretch")
OPTIONS = {
    "lung_crop": {"lung_crop": True},
    "border_mask": {"border_mask": 0.1},
    "marker_mask": {"marker_mask": True},
    "standardize": {"intensity_normalization": "standardize"},
    "equalize": {"intensity_normalization": "equalize"},
    "flip": {"test_time_augmentation": "flip"},
    "crops": {"test_time_augmentation": "crops"},
}
ALL = {name: value for option in OPTIONS.values() for name, value in option.items()}
NOISE = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def chest(left: float, top: float, right: float, bottom: float, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Draw two dark lungs that fill a box, shares of the edge, and return the image and where the lungs are."""
    lungs = Image.new("L", (size, size))
    pen, width, height = ImageDraw.Draw(lungs), right - left, bottom - top
    for start, end, aside in ((left, left + 0.42 * width, 0.05), (left + 0.58 * width, right, -0.05)):
        pen.ellipse([start * size, top * size, end * size, (bottom + height) * size], fill=255)
        dome = start + aside * width, bottom - 0.18 * height, end + aside * width, bottom + 0.3 * height
        pen.ellipse([size * side for side in dome], fill=0)
    is_lung = np.array(lungs) > 0
    is_lung[round(bottom * size) :] = False
    noise = np.random.default_rng(0).normal(0, 5, (size, size))
    return (np.where(is_lung, 80, 170) + noise).astype(np.uint8), is_lung


def boxes_of(*pictures: np.ndarray) -> np.ndarray:
    return preprocessing.LungField()(torch.from_numpy(np.stack(pictures))[:, None]).numpy()


def inside(box: np.ndarray, size: int) -> np.ndarray:
    across, down = (np.arange(size) + 0.5) / size, (np.arange(size) + 0.5)[:, None] / size
    return (across > box[0]) & (across < box[2]) & (down > box[1]) & (down < box[3])


# Lungs


@settings(max_examples=10, deadline=None)
@given(st.floats(0.03, 0.15), st.floats(0.03, 0.2), st.floats(0.85, 0.97), st.floats(0.75, 0.95))
def test_the_box_holds_the_lungs_and_little_else_and_mirrors_with_the_image(left, top, right, bottom):
    image, is_lung = chest(left, top, right, bottom)
    box, mirrored = boxes_of(image, np.ascontiguousarray(image[:, ::-1]))
    assert is_lung[inside(box, 96)].sum() >= 0.95 * is_lung.sum()
    edges = box[2:] - box[:2]
    assert (edges >= 0.5).all()
    assert (edges <= np.array([right - left, bottom - top]) + 0.25).all()
    assert mirrored == pytest.approx([1 - box[2], box[1], 1 - box[0], box[3]], abs=1 / 30)


def test_the_box_of_a_phantom_holds_its_lungs_whatever_borders_it():
    pictures = [draw_radiograph(PhantomCase(0, number, number, "train", 0, "AB"[number % 2])) for number in range(4)]
    framed = np.stack(pictures)
    framed[:, :60] = framed[:, :, :90] = 0
    boxes, framed_boxes = boxes_of(*pictures), boxes_of(*framed)
    assert (boxes[:, :2] < 0.25).all()
    assert (boxes[:, 2:] > 0.75).all()
    assert ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) < 0.9).all()
    assert framed_boxes[:, 2:] == pytest.approx(boxes[:, 2:], abs=0.1)


@pytest.mark.parametrize("image", [np.full((40, 40), level, np.uint8) for level in (0, 17, 200, 255)])
def test_an_image_without_lungs_is_not_cropped(image):
    assert (boxes_of(image) == [[0, 0, 1, 1]]).all()


def test_no_image_depends_on_the_others_of_its_batch():
    pictures = [chest(0.1, 0.1, 0.9, 0.8)[0], *NOISE.numpy(), np.zeros((96, 96), np.uint8)]
    assert np.array_equal(boxes_of(*pictures), np.concatenate([boxes_of(one) for one in pictures]))
    network = Classifier(replace(PLAIN, **ALL))
    pixels = torch.from_numpy(np.stack(pictures))
    assert torch.equal(network.resize(pixels), torch.cat([network.resize(one[None]) for one in pixels]))


# Resampling


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 40), st.integers(3, 60))
def test_resampling_the_whole_image_is_interpolation(length, size):
    images = torch.rand(2, 1, length, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = torch.tensor([[0, 0, 1, 1]] * 2, dtype=torch.float64)
    expected = interpolate(images, (size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(preprocessing.resample(images, whole, size), expected)


def test_a_part_that_is_inserted_lies_where_it_was_cut_out():
    images = interpolate(torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0)), (60, 60), mode="bilinear")
    boxes = torch.tensor([[0, 0, 1, 1], [0.1, 0.2, 0.7, 0.9], [0.3, 0.4, 1, 1]], dtype=torch.float64)
    found = preprocessing.insert(preprocessing.resample(images, boxes, 60), boxes)
    for box, image, other in zip(boxes.numpy(), images[:, 0], found[:, 0], strict=True):
        is_inside = inside(box, 60)
        assert other[~is_inside].count_nonzero() == 0
        assert (other - image).abs().numpy()[is_inside].mean() < 0.01


def test_a_heatmap_lies_in_the_whole_image_where_the_crop_sees_something():
    image, _ = chest(0.25, 0.3, 0.95, 0.9, 128)
    image[60:76, 84:100] = 255
    network = Classifier(replace(PLAIN, size=64, packed_size=128, normalization="none", lung_crop=True))
    bright = nn.Conv2d(3, 1, 1)
    nn.init.constant_(bright.weight, 1.0)
    nn.init.constant_(bright.bias, -2.7)
    network.backbone = nn.Sequential(nn.AvgPool2d(4), bright, nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    network.head = Head(1, [], 0.0)
    nn.init.constant_(network.head.logits.weight, 1.0)
    pixels = torch.from_numpy(image)[None]
    (box,) = network.lung_field(pixels[:, None]).numpy()
    assert (box[:2] > 0.1).all()
    (heatmap,) = compute_heatmaps(network.eval(), pixels, [1])
    down, across = (np.average(np.arange(64) + 0.5, weights=heatmap.sum(axis=axis)) for axis in (1, 0))
    assert heatmap.max() > 0.5
    assert (2 * down, 2 * across) == pytest.approx((68, 92), abs=3)


# Gray levels


def levels_of(network: Classifier, pixels: torch.Tensor) -> torch.Tensor:
    images = network.resize(pixels)
    assert images.dtype == torch.float32
    assert images.shape[1:] == (1, 64, 64)
    assert 0 <= images.min() <= images.max() <= 255
    return images


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 255), st.integers(0, 2**32 - 1))
def test_equalized_levels_are_ranks_from_0_to_255(edge, highest, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, highest + 1, (2, 1, edge, edge), generator=generator).float()
    equalized = preprocessing.equalize(images)
    assert equalized.mean(dim=(1, 2, 3)).numpy() == pytest.approx([127.5, 127.5], abs=1e-3)
    torch.testing.assert_close(preprocessing.equalize(255 - images), 255 - equalized, rtol=0, atol=1e-3)
    for image, ranks in zip(images.flatten(1), equalized.flatten(1), strict=True):
        order = image.argsort()
        assert ((ranks[order].diff() > 0) == (image[order].diff() > 0)).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 127), st.integers(0, 255))
def test_standardized_images_do_not_depend_on_brightness_and_contrast(contrast, level):
    image = torch.tensor([[level - contrast, level + contrast] * 8] * 16)[None, None].clamp(0, 255).float()
    standardized = preprocessing.standardize(image)
    if image.std() > 1:
        assert standardized.mean().item() == pytest.approx(114.5, abs=0.01)
        assert standardized.std(correction=0).item() == pytest.approx(57.6, abs=0.01)


@pytest.mark.parametrize("normalization", ["none", "standardize", "equalize"])
def test_nothing_of_a_masked_border_remains(normalization):
    network = Classifier(replace(PLAIN, border_mask=0.125, packed_size=64, intensity_normalization=normalization))
    pixels = NOISE[:, :64, :64].clone()
    images = levels_of(network, pixels)
    border = torch.ones(64, 64, dtype=torch.bool)
    border[8:-8, 8:-8] = False
    for image in images[:, 0]:
        assert len(image[border].unique()) == 1
        assert image[border][0].item() == pytest.approx(image[~border].mean().item(), abs=0.01)
    pixels[:, border] = 255 - pixels[:, border]
    assert torch.equal(levels_of(network, pixels), images)
    inner = Classifier(replace(PLAIN, size=48, packed_size=48, intensity_normalization=normalization))
    torch.testing.assert_close(images[..., 8:-8, 8:-8], inner.resize(NOISE[:, 8:56, 8:56]).float())


def test_markers_lose_most_of_their_contrast_and_hardly_anything_else_changes():
    for number, marker in enumerate(("L", "R", "AP"), start=1):
        case = PhantomCase(0, number, number, "train", 0, "B")
        before, after = (
            interpolate(torch.tensor(draw_radiograph(one))[None, None].float(), (224, 224), mode="area")
            for one in (case, replace(case, marker=marker))
        )
        is_letter = after - before > 25
        masked, without = preprocessing.mask_markers(after), preprocessing.mask_markers(before)
        assert is_letter.sum() > 5
        assert (masked - without).abs()[is_letter].mean() < 0.4 * (after - before).abs()[is_letter].mean()
        assert torch.equal(masked[..., 70:-70, 70:-70], after[..., 70:-70, 70:-70])
        assert (without - before).abs().mean() < 0.5


# Views, and all of it together


def make_network(**options) -> Classifier:
    torch.manual_seed(0)
    network, plain = Classifier(replace(PLAIN, **options)).eval(), Classifier(PLAIN)
    with torch.no_grad():
        network.head.logits.weight *= 100  # so that small changes can be seen, near P = 0.5
        network.head.logits.bias -= Classifier.forward(network, plain.normalize(plain.resize(NOISE[:1])))[0]
    return network


def test_the_prediction_is_the_mean_of_the_views():
    plain, flip, crops = (make_network(test_time_augmentation=kind) for kind in ("none", "flip", "crops"))
    whole = interpolate(NOISE[:, None].float(), (64, 64), mode="bilinear", antialias=True)
    center = interpolate(whole[..., 3:-3, 3:-3], (64, 64), mode="bilinear")
    with torch.inference_mode():
        views = (whole, whole.flip(-1), center, center.flip(-1))
        of_views = [predict_resized([plain], view)[:, 0] for view in views]
    assert torch.stack(of_views).std(dim=0).min() > 1e-3
    torch.testing.assert_close(plain.predict_proba(NOISE), of_views[0])
    torch.testing.assert_close(flip.predict_proba(NOISE), torch.stack(of_views[:2]).mean(dim=0))
    torch.testing.assert_close(crops.predict_proba(NOISE), torch.stack(of_views).mean(dim=0))
    torch.testing.assert_close(crops.predict_proba(NOISE.flip(-1)), crops.predict_proba(NOISE))


@pytest.mark.parametrize("options", [*OPTIONS.values(), ALL], ids=[*OPTIONS, "all"])
def test_every_option_changes_the_prediction_and_an_exported_graph_does_the_same(options):
    pixels = torch.from_numpy(np.stack([chest(0.1, 0.15, 0.8, 0.8)[0], *NOISE.numpy()]))
    pixels[0, 4:9, 4:7] = 255
    network = make_network(**options)
    config = EnsembleConfig(["a"], "mean", "mean", [1.0], 0.5)
    candidate = Candidate({"a": [network]}, config, FindingParams())
    with torch.inference_mode():
        graph = CandidateGraph(candidate)(pixels)
    expected = candidate.predict(pixels)["probability"].to_numpy()
    assert graph[1].numpy() == pytest.approx(expected, abs=1e-5)
    assert np.abs(make_network().predict_proba(pixels).numpy() - expected).max() > 1e-3
