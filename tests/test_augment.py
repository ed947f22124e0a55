import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import MixUp

from pipeline.core import config
from pipeline.training import augment as augmentation
from pipeline.training.augment import draw_epoch_order, draw_mixup, mix_neighbors
from pipeline.training.determinism import make_generator

NO_AUGMENTATION = {"flip": 0.0, "rotation": 0.0, "zoom": 0.0, "shift": 0.0, "gamma_jitter": 0.0}
SHIPPED = config.load_config(ROOT / "params.yaml").profiles["demo"].train


def params(**changes):
    return SHIPPED.model_copy(update={**NO_AUGMENTATION, "sampling": "shuffle", **changes})


def augment(images, params, generator) -> torch.Tensor:
    return augmentation.augment(images, augmentation.draw_augmentation(len(images), params, generator))


def mixup(images, labels, alpha, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = draw_mixup(labels, alpha, torch.Generator().manual_seed(seed))
    return mix_neighbors(images, drawn["mixup_weights"]) if alpha else images, drawn["targets"]


def make_images(count: int = 64, size: int = 12) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


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


def test_rotation_keeps_the_aspect_ratio():
    row, column = torch.meshgrid(torch.arange(64.0) - 31.5, torch.arange(64.0) - 31.5, indexing="ij")
    disc = ((row**2 + column**2) < 400).float().expand(8, 1, 64, 64)
    augmented = augment(disc, params(rotation=180.0), make_generator(1))
    assert (augmented - disc).abs().mean() < 0.01


def test_augmentation_depends_only_on_the_generator():
    changes = params(flip=0.5, rotation=10.0, zoom=0.2, shift=0.1, gamma_jitter=0.5)
    assert torch.equal(
        augment(make_images(), changes, make_generator(1)), augment(make_images(), changes, make_generator(1))
    )
    assert not torch.equal(
        augment(make_images(), changes, make_generator(1)), augment(make_images(), changes, make_generator(2))
    )


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


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 99))
def test_a_shuffled_epoch_uses_every_image_once(count, seed):
    order = draw_epoch_order(torch.zeros(count, dtype=torch.long), params(sampling="shuffle"), make_generator(seed))
    assert sorted(order.tolist()) == list(range(count))


def test_every_shuffled_epoch_has_its_own_order():
    labels = torch.zeros(50, dtype=torch.long)
    first, second = (draw_epoch_order(labels, params(), make_generator(1, epoch)) for epoch in (1, 2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0, 8.0])
def test_a_weighted_epoch_oversamples_positives_by_the_given_factor(factor):
    labels = (torch.arange(20_000) % 10 == 0).long()
    order = draw_epoch_order(labels, params(sampling="weighted", positive_oversampling=factor), make_generator(1))
    assert len(order) == len(labels)
    draws_per_image = torch.bincount(labels[order], minlength=2) / torch.bincount(labels)
    assert (draws_per_image[1] / draws_per_image[0]).item() == pytest.approx(factor, rel=0.1)
