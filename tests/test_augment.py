import io

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import CutMix, MixUp
from torchvision.transforms.v2.functional import adjust_contrast

from pipeline.core import config
from pipeline.training import augment as augmentation
from pipeline.training.augment import (
    STYLE_FREQUENCY,
    coarsen,
    compress_jpeg,
    draw_augmentation,
    draw_epoch_order,
    draw_jpeg_steps,
    draw_mixup,
    exchange_low_frequencies,
    match_histograms,
    mix,
)
from pipeline.training.determinism import make_generator

NO_AUGMENTATION = {"flip": 0.0, "rotation": 0.0, "zoom": 0.0, "shift": 0.0, "gamma_jitter": 0.0}
AUGMENTATION = {"flip": 0.5, "rotation": 10.0, "zoom": 0.2, "shift": 0.1, "gamma_jitter": 0.5}
STYLE_AND_ACQUISITION = {
    "histogram_exchange": 0.5, "fourier_exchange": 0.5, "contrast_jitter": 1.0, "min_resolution": 0.2, "noise": 40.0,
    "min_jpeg_quality": 10,
}  # fmt: skip
SHIPPED = config.load_config(ROOT / "params.yaml").profiles["demo"].train


def params(**changes):
    return SHIPPED.model_copy(update={**NO_AUGMENTATION, "sampling": "shuffle", **changes})


def augment(images, params, generator) -> torch.Tensor:
    return augmentation.augment(images, draw_augmentation(len(images), params, generator))


def mixup(images, labels, alpha, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    return mix_batch(images, labels, seed, mixup_alpha=alpha)


def mix_batch(images, labels, seed=0, sources=None, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    sources = torch.zeros_like(labels) if sources is None else sources
    changes = params(image_size=images.shape[-1], **changes)
    drawn = draw_mixup(labels, sources, changes, torch.Generator().manual_seed(seed))
    return mix(images, drawn), drawn["targets"]


def make_images(count: int = 64, size: int = 12) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def make_radiographs(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Make gray images (count, 1, size, size), uint8: blobs of different brightness, contrast and noise."""
    generator = make_generator(seed)
    blobs = interpolate(torch.rand(count, 1, 6, 6, generator=generator), (size, size), mode="bicubic")
    low, high = (255 * torch.rand(2, count, 1, 1, 1, generator=generator)).unbind()
    images = low + (high - low) * blobs + 4 * torch.randn(count, 1, size, size, generator=generator)
    return images.round().clamp(0, 255).byte()


def test_without_augmentation_images_are_unchanged():
    assert torch.equal(augment(make_images(), params(), make_generator(1)), make_images())


def test_flip_probability_one_mirrors_every_image_from_left_to_right():
    assert torch.equal(augment(make_images(), params(flip=1.0), make_generator(1)), make_images().flip(-1))


def test_each_image_is_flipped_independently():
    images = make_images(400)
    augmented = augment(images, params(flip=0.5), make_generator(1))
    unchanged = (augmented == images).all(dim=(1, 2, 3))
    mirrored = (augmented == images.flip(-1)).all(dim=(1, 2, 3))
    assert (unchanged ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_the_share_of_flipped_images_is_the_flip_probability():
    augmented = augment(make_images(2000, 2), params(flip=0.2), make_generator(1))
    assert (augmented != make_images(2000, 2)).any(dim=(1, 2, 3)).float().mean().item() == pytest.approx(0.2, abs=0.04)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 180), st.integers(0, 99))
def test_affine_transforms_keep_shape_dtype_and_range(degrees, seed):
    images = make_images(4)
    augmented = augment(images, params(rotation=degrees, zoom=degrees / 180, shift=degrees / 360), make_generator(seed))
    assert augmented.shape == images.shape
    assert augmented.dtype == images.dtype
    assert augmented.min() >= images.min() - 1e-6
    assert augmented.max() <= images.max() + 1e-6
    assert not torch.equal(augmented, images)


def test_each_image_is_rotated_by_its_own_angle_within_the_limit():
    bar = torch.zeros(200, 1, 65, 65)
    bar[:, :, 32, :] = 1
    augmented = augment(bar, params(rotation=20.0), make_generator(1))[:, 0]
    row = torch.arange(65.0) - 32
    column = augmented[:, :, 52]  # 20 pixels right of the center
    height = (column * row).sum(1) / column.sum(1)  # of the bar in this column
    angles = torch.rad2deg(torch.atan(height / 20))
    assert angles.abs().max() <= 21
    assert angles.max() > 15
    assert angles.min() < -15
    assert len(angles.round(decimals=3).unique()) > 150


def disc(count: int) -> torch.Tensor:
    row, column = torch.meshgrid(torch.arange(64.0) - 31.5, torch.arange(64.0) - 31.5, indexing="ij")
    return ((row**2 + column**2) < 200).float().expand(count, 1, 64, 64)


def test_each_image_is_zoomed_by_its_own_factor_within_the_limits():
    augmented = augment(disc(300), params(zoom=0.5), make_generator(1))
    scale = (disc(1).sum() / augmented.sum(dim=(1, 2, 3))).sqrt()
    assert 1 / 1.52 < scale.min() < 1 / 1.4
    assert 1.4 < scale.max() < 1.52
    assert abs(scale.log().mean()) < 0.05


def test_each_image_is_shifted_by_its_own_distance_within_the_limit():
    augmented = augment(disc(300), params(shift=0.1), make_generator(1))[:, 0]
    position = torch.arange(64.0) - 31.5
    for axis in (1, 2):
        distance = (augmented.sum(axis) * position).sum(1) / augmented.sum(dim=(1, 2))
        assert distance.abs().max() <= 6.41
        assert distance.max() > 5.5
        assert distance.min() < -5.5


def test_each_image_gets_its_own_gamma_and_black_and_white_stay():
    images = torch.tensor([0, 64, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(300, 1, 1, 3)
    black, gray, white = augment(images, params(gamma_jitter=0.5), make_generator(1)).unbind(-1)
    assert (black == 0).all()
    assert (white == 255).all()
    power = ((gray / 255).log() / torch.tensor(64 / 255).log()).flatten()
    assert 1 / 1.501 < power.min() < 1 / 1.4
    assert 1.4 < power.max() < 1.501


def test_rotation_and_zoom_together_are_the_product_of_both():
    changes = {"rotation": 90.0}, {"zoom": 0.5}, {"rotation": 90.0, "zoom": 0.5}
    rotation, zoom, both = (
        draw_augmentation(200, params(**change), make_generator(1))["affine"][:, :, :2] for change in changes
    )
    torch.testing.assert_close(both, rotation @ zoom)


def test_exchanged_amplitudes_leave_no_gray_level_outside_of_0_to_255():
    dark, bright, others = make_radiographs(4, 40) // 40, 255 - make_radiographs(4, 40) // 40, make_radiographs(4, 40)
    for partners, end in ((dark, 0), (bright, 255)):
        changed = exchange_low_frequencies(torch.cat([others, partners]), torch.arange(8).roll(4))[:4]
        assert (changed == end).any()
        assert changed.min() >= 0
        assert changed.max() <= 255


def test_rotation_keeps_the_aspect_ratio():
    row, column = torch.meshgrid(torch.arange(64.0) - 31.5, torch.arange(64.0) - 31.5, indexing="ij")
    disc = ((row**2 + column**2) < 400).float().expand(8, 1, 64, 64)
    augmented = augment(disc, params(rotation=180.0), make_generator(1))
    assert (augmented - disc).abs().mean() < 0.01


def test_augmentation_depends_only_on_the_generator():
    changes, images = params(**AUGMENTATION, **STYLE_AND_ACQUISITION, image_size=40), make_radiographs(8, 40)
    assert torch.equal(augment(images, changes, make_generator(1)), augment(images, changes, make_generator(1)))
    assert not torch.equal(augment(images, changes, make_generator(1)), augment(images, changes, make_generator(2)))


def test_what_is_off_draws_nothing_and_does_nothing():
    images, labels, generator = make_radiographs(4, 16), torch.tensor([0, 1, 1, 0]), make_generator(1)
    before = generator.get_state()
    drawn = draw_augmentation(4, params(), generator) | draw_mixup(labels, labels, params(), generator)
    assert list(drawn) == ["targets"]
    assert torch.equal(generator.get_state(), before)
    assert augmentation.augment(images, drawn) is images
    assert mix(images, drawn) is images


def test_style_and_acquisition_change_no_draw_of_flips_affine_transforms_and_gamma():
    before = draw_augmentation(8, params(**AUGMENTATION), make_generator(1))
    drawn = draw_augmentation(8, params(**AUGMENTATION, **STYLE_AND_ACQUISITION), make_generator(1))
    assert list(before) == ["flip_index", "affine", "gamma"]
    assert all(torch.equal(drawn[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", STYLE_AND_ACQUISITION)
def test_each_change_of_style_and_acquisition_acts_alone(name):
    images = make_radiographs(8, 40)
    assert not torch.equal(
        augment(images, params(image_size=40, **{name: STYLE_AND_ACQUISITION[name]}), make_generator(1)), images
    )


def test_changes_of_strength_zero_leave_the_images_as_they_are():
    images, itself, one = make_radiographs(6, 37), torch.arange(6), torch.ones(6)
    drawn = {
        "histogram_index": itself, "fourier_index": itself, "contrast": one, "resolution": one, "noise_std": 0 * one,
        "noise": torch.randn(6, 1, 37, 37, generator=make_generator(1)),
    }  # fmt: skip
    for name, value in drawn.items():
        if name != "contrast":  # whose mean is rounded
            alone = {name: value} | ({"noise_std": 0 * one} if name == "noise" else {})
            assert torch.equal(augmentation.augment(images, alone), images.float()), name
    assert torch.allclose(augmentation.augment(images, drawn), images.float(), atol=1e-3)
    assert (compress_jpeg(images, torch.ones(6, 64)) - images.float()).abs().max() <= 1


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from([16, 23, 40]),
    st.fixed_dictionaries({
        "rotation": st.sampled_from([0.0, 30.0]), "gamma_jitter": st.sampled_from([0.0, 2.0]),
        "histogram_exchange": st.floats(0, 1), "fourier_exchange": st.floats(0, 1), "contrast_jitter": st.floats(0, 3),
        "noise": st.floats(0, 100), "min_resolution": st.floats(0.01, 1),
        "min_jpeg_quality": st.none() | st.integers(1, 100),
    }),
    st.integers(0, 99),
)  # fmt: skip
def test_all_changes_together_keep_shape_and_range(count, size, changes, seed):
    images = make_radiographs(count, size, seed)
    augmented = augment(images, params(image_size=size, **changes), make_generator(seed))
    assert augmented.shape == images.shape
    assert augmented.min() >= 0
    assert augmented.max() <= 255


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999))
def test_a_matched_image_has_the_histogram_of_its_partner(seed):
    images, index = make_radiographs(4, 32, seed), torch.tensor([1, 2, 3, 0])
    matched = match_histograms(images, index)
    levels = torch.arange(256.0)
    share = (matched.flatten(1, 3)[:, None] <= levels[:, None]).float().mean(2)
    wanted = (images[index].flatten(1, 3)[:, None] <= levels[:, None]).float().mean(2)
    # A level cannot be split: half of the pixels of the most frequent one may be on the other side.
    frequent = torch.stack([image.flatten().bincount().max() for image in images]) / 32**2
    assert ((share - wanted).abs().amax(1) <= frequent / 2 + 1e-6).all()
    pixels, new = images.flatten(1).float(), matched.flatten(1)
    order = pixels.argsort(1)
    assert (new.gather(1, order).diff(dim=1) >= 0).all()  # a darker pixel does not become a brighter one


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.sampled_from([24, 33]))
def test_low_frequencies_get_the_amplitudes_of_the_partner_and_keep_their_phases(seed, size):
    images, index = 100 + make_radiographs(4, size, seed) / 16, torch.tensor([1, 2, 3, 0])  # far from black and white
    spectrum, partner = torch.fft.fft2(images.double()), torch.fft.fft2(images[index].double())
    changed = torch.fft.fft2(exchange_low_frequencies(images, index).double())
    frequency = (torch.fft.fftfreq(size) * size).round().abs()
    low = (frequency[:, None] <= STYLE_FREQUENCY) & (frequency <= STYLE_FREQUENCY)
    torch.testing.assert_close(changed[..., low].abs(), partner[..., low].abs(), rtol=1e-3, atol=0.1)
    torch.testing.assert_close(changed[..., ~low], spectrum[..., ~low], rtol=1e-3, atol=0.1)
    turned = (changed * spectrum.conj()).angle()[(changed.abs() > 2) & (spectrum.abs() > 2)]
    assert len(turned) > 100
    assert turned.abs().max() < 0.002


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 999))
def test_an_exchange_takes_another_image_of_the_batch_with_its_probability(count, probability, seed):
    for name in ("histogram", "fourier"):
        recipe = params(**{f"{name}_exchange": probability or 0.5})
        index = torch.stack([
            draw_augmentation(count, recipe, make_generator(seed, draw))[f"{name}_index"] for draw in range(40)
        ])  # fmt: skip
        assert index.min() >= 0
        assert index.max() < count
        share = (index != torch.arange(count)).float().mean().item()
        assert share == pytest.approx((probability or 0.5) * (count > 1), abs=4 * 0.5 / (40 * count) ** 0.5)


def test_contrast_is_that_of_torchvision_and_within_the_limits():
    images, recipe = make_radiographs(200, 16), params(contrast_jitter=0.5)
    factors = draw_augmentation(200, recipe, make_generator(1))["contrast"]
    assert 1 / 1.501 < factors.min() < 1 / 1.45
    assert 1.45 < factors.max() < 1.501
    augmented = augment(images, recipe, make_generator(1))
    for image, factor, result in zip(images / 255, factors, augmented / 255, strict=True):
        torch.testing.assert_close(result, adjust_contrast(image, factor.item()), rtol=0, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([16, 31, 40]), st.lists(st.floats(0.02, 1), min_size=3, max_size=3), st.integers(0, 99))
def test_coarsening_resizes_down_and_up_as_torch_does(size, scales, seed):
    images = make_radiographs(3, size, seed).float()
    for image, scale, coarse in zip(images, scales, coarsen(images, torch.tensor(scales)), strict=True):
        edge = max(1, round(size * torch.tensor(scale).item()))
        small = interpolate(image[None], (edge, edge), mode="bilinear", antialias=True)
        expected = interpolate(small, (size, size), mode="bilinear")[0]
        torch.testing.assert_close(coarse, expected, rtol=0, atol=0.01)


def test_each_image_gets_its_own_resolution_within_the_limits():
    scale = draw_augmentation(300, params(min_resolution=0.25), make_generator(1))["resolution"]
    assert 0.25 <= scale.min() < 0.27
    assert 0.98 < scale.max() <= 1


def test_each_image_gets_noise_of_its_own_standard_deviation():
    gray = torch.full((200, 1, 64, 64), 128, dtype=torch.uint8)
    difference = augment(gray, params(noise=20.0, image_size=64), make_generator(1)) - 128
    std = draw_augmentation(200, params(noise=20.0, image_size=64), make_generator(1))["noise_std"]
    assert std.min() < 0.5
    assert 19 < std.max() < 20
    assert difference.std(dim=(1, 2, 3)).numpy() == pytest.approx(std.numpy(), rel=0.05)
    assert (difference.mean(dim=(1, 2, 3)).abs() < 5 * std / 64).all()
    scaled = (difference / std.view(-1, 1, 1, 1)).flatten(1)
    assert torch.corrcoef(scaled).fill_diagonal_(0).abs().max() < 0.1  # of the images with each other
    assert (scaled**4).mean().item() == pytest.approx(3, abs=0.1)  # as a normal distribution has


@pytest.mark.parametrize("quality", [1, 10, 30, 49, 50, 75, 95, 100])
@pytest.mark.parametrize("size", [40, 37])
def test_jpeg_compression_is_that_of_pillow(quality, size):
    images = make_radiographs(4, size)
    steps = jpeg_steps(quality).expand(4, 64)
    for image, compressed in zip(images, compress_jpeg(images, steps), strict=True):
        stream = io.BytesIO()
        Image.fromarray(image[0].numpy()).save(stream, "JPEG", quality=quality)
        expected = np.asarray(Image.open(stream), np.float32)
        # libjpeg computes with whole numbers: an eighth of an amplitude may tip what is rounded to another step.
        difference, loss = (np.abs(pixels[0].numpy() - expected).mean() for pixels in (compressed, image))
        assert difference < 0.6
        assert quality > 90 or difference < 0.15 * loss


def jpeg_steps(quality: int) -> torch.Tensor:
    """Return the steps of a quality, by drawing until it is drawn."""
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "JPEG", quality=quality)
    wanted = torch.tensor(Image.open(stream).quantization[0], dtype=torch.float)
    drawn = draw_jpeg_steps(2000, quality, make_generator(quality))
    matches = drawn[(drawn == wanted).all(1)]
    assert len(matches) >= 10
    return matches[0]


def test_jpeg_qualities_are_within_the_limits():
    steps = draw_jpeg_steps(1000, 90, make_generator(1)).unique(dim=0)
    assert len(steps) == 11
    assert steps.min() == 1
    assert torch.equal(steps.amax(0), jpeg_steps(90))


def test_without_mixup_targets_are_one_hot_and_images_are_unchanged():
    images, targets = mixup(make_images(4), torch.tensor([0, 1, 1, 0]), 0.0)
    assert torch.equal(images, make_images(4))
    assert torch.equal(targets, torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=2, max_size=12), st.floats(0.05, 5), st.integers(0, 10**6))
def test_mixup_mixes_images_and_labels_with_the_same_weights(labels, alpha, seed):
    count = len(labels)
    # Image i is 1 in channel i and 0 elsewhere, so that channel i of a mixture is the weight of image i.
    images = torch.eye(count).view(count, count, 1, 1).expand(-1, -1, 4, 4)
    mixed, targets = mixup(images, torch.tensor(labels), alpha, seed)
    assert torch.allclose(targets.sum(1), torch.ones(count), atol=1e-6)
    weights = mixed[:, :, 0, 0]
    assert torch.allclose(weights.sum(1), torch.ones(count), atol=1e-6)
    assert (weights > 1e-6).sum(1).max() <= 2
    assert torch.allclose(weights.diagonal(), weights.diagonal()[0].expand(count), atol=1e-6)
    assert torch.allclose(targets[:, 1], weights @ torch.tensor(labels, dtype=torch.float), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_mixup_is_that_of_torchvision(seed):
    labels = torch.tensor([0, 1, 1, 0])
    torch.manual_seed(seed)
    images, targets = MixUp(alpha=0.5, num_classes=2)(make_images(4), labels)
    mixed, mixed_targets = mixup(make_images(4), labels, 0.5, seed)
    assert torch.equal(mixed, images)
    assert torch.equal(mixed_targets, targets)


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_is_that_of_torchvision(seed):
    labels = torch.tensor([0, 1, 1, 0])
    torch.manual_seed(seed)
    images, targets = CutMix(alpha=0.5, num_classes=2)(make_images(4), labels)
    mixed, mixed_targets = mix_batch(make_images(4), labels, seed, cutmix_alpha=0.5)
    assert torch.equal(mixed, images)
    torch.testing.assert_close(mixed_targets, targets)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=12),
    st.sampled_from([{"mixup_alpha": 0.5}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.5, "cutmix_alpha": 1.0}]),
    st.sampled_from(["any", "same_label"]),
    st.sampled_from([0.0, 0.2]),
    st.integers(0, 10**6),
)
def test_targets_are_mixed_with_the_shares_of_the_images(rows, alphas, pairing, smoothing, seed):
    labels, sources = torch.tensor(rows).unbind(1)
    count = len(labels)
    # Image i is 1 in channel i and 0 elsewhere, so that channel i of a mixture shows where image i is.
    images = torch.eye(count).view(count, count, 1, 1).expand(-1, -1, 16, 16)
    mixed, targets = mix_batch(
        images, labels, seed, sources, mixup_pairing=pairing, label_smoothing=smoothing, **alphas
    )
    shares = mixed.mean(dim=(2, 3))
    expected = (1 - smoothing) * (shares @ labels.float()) + smoothing / 2
    torch.testing.assert_close(targets[:, 1], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
    if "cutmix_alpha" not in alphas:
        assert (mixed == mixed[..., :1, :1]).all()
    elif "mixup_alpha" not in alphas:
        assert ((mixed == 0) | (mixed == 1)).all()
    if pairing == "same_label":
        for index, (label, source) in enumerate(rows):
            (partners,) = (shares[index] > 1e-6).nonzero(as_tuple=True)
            assert (labels[partners] == label).all()
            others = partners[partners != index]
            if any(other == label and elsewhere != source for other, elsewhere in rows):
                assert (sources[others] != source).all()


def test_a_partner_is_from_another_source_or_else_another_image_or_else_the_image_itself():
    labels, sources = torch.tensor([0, 0, 0, 0, 1, 1, 0]), torch.tensor([0, 0, 1, 2, 1, 1, 0])
    partners = [set() for _ in labels]
    for seed in range(60):
        drawn = draw_mixup(labels, sources, params(mixup_alpha=1.0, mixup_pairing="same_label"), make_generator(seed))
        for seen, partner in zip(partners, drawn["mix_index"].tolist(), strict=True):
            seen.add(partner)
    assert partners == [{2, 3}, {2, 3}, {0, 1, 3, 6}, {0, 1, 2, 6}, {5}, {4}, {2, 3}]
    alone = draw_mixup(
        labels[4:5], sources[4:5], params(mixup_alpha=1.0, mixup_pairing="same_label"), make_generator(0)
    )
    assert alone["mix_index"].tolist() == [0]


def test_with_mixup_and_cutmix_each_batch_gets_one_of_them():
    labels = torch.tensor([0, 1, 1, 0])
    images, alphas = make_images(4), {"mixup_alpha": 1.0, "cutmix_alpha": 1.0}
    cut = sum(bool((mix_batch(images, labels, seed, **alphas)[0] == images).any()) for seed in range(200))
    assert 60 < cut < 140


def test_label_smoothing_spreads_its_share_over_both_classes():
    targets = draw_mixup(torch.tensor([0, 1]), torch.zeros(2), params(label_smoothing=0.1), make_generator(1))[
        "targets"
    ]
    torch.testing.assert_close(targets, torch.tensor([[0.95, 0.05], [0.05, 0.95]]))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 99))
def test_a_shuffled_epoch_uses_every_image_once(count, seed):
    order = draw_epoch_order(*torch.zeros(2, count, dtype=torch.long), params(sampling="shuffle"), make_generator(seed))
    assert sorted(order.tolist()) == list(range(count))


def test_every_shuffled_epoch_has_its_own_order():
    labels = torch.zeros(50, dtype=torch.long)
    first, second = (draw_epoch_order(labels, labels, params(), make_generator(1, epoch)) for epoch in (1, 2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0, 8.0])
def test_a_weighted_epoch_oversamples_positives_by_the_given_factor(factor):
    labels = (torch.arange(20_000) % 10 == 0).long()
    recipe = params(sampling="weighted", positive_oversampling=factor)
    order = draw_epoch_order(labels, labels, recipe, make_generator(1))
    assert len(order) == len(labels)
    draws_per_image = torch.bincount(labels[order], minlength=2) / torch.bincount(labels)
    assert (draws_per_image[1] / draws_per_image[0]).item() == pytest.approx(factor, rel=0.1)


@pytest.mark.parametrize("sampling", ["source_balanced", "group_balanced"])
def test_a_balanced_epoch_draws_sources_or_groups_equally_often_and_the_images_of_each_too(sampling):
    labels, sources = torch.randint(2, (20_000,), generator=make_generator(0)), torch.arange(20_000) % 10 // 7
    labels[sources == 1] *= labels[sources == 1] * torch.arange(6000) % 4 == 0  # most positives are of source 0
    order = draw_epoch_order(labels, sources, params(sampling=sampling), make_generator(1))
    assert len(order) == 20_000
    groups = sources if sampling == "source_balanced" else 2 * sources + labels
    counts = torch.bincount(groups[order])
    assert (counts / len(order)).tolist() == pytest.approx([1 / len(counts)] * len(counts), abs=0.015)
    assert labels[order][sources[order] == 1].float().mean().item() == pytest.approx(
        labels[sources == 1].float().mean().item() if sampling == "source_balanced" else 0.5, abs=0.02
    )
