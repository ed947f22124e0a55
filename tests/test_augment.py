import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import config
from pipeline.training.augment import augment, draw_epoch_order, mixup
from pipeline.training.determinism import make_generator

STILL = {"flip": 0.0, "rotation": 0.0, "zoom": 0.0, "shift": 0.0, "gamma_jitter": 0.0}
SHIPPED = config.load_config(ROOT / "params.yaml").profiles["demo"].train


def params(**changes):
    return SHIPPED.model_copy(update={**STILL, "sampling": "shuffle", **changes})


def pictures(count: int = 64, size: int = 12) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_nothing_asked_for_leaves_images_as_they_are():
    assert torch.equal(augment(pictures(), params(), make_generator(1)), pictures())


def test_a_sure_flip_mirrors_every_image_from_left_to_right():
    assert torch.equal(augment(pictures(), params(flip=1.0), make_generator(1)), pictures().flip(-1))


def test_each_image_is_flipped_by_itself():
    images = pictures(400)
    found = augment(images, params(flip=0.5), make_generator(1))
    same = (found == images).all(dim=(1, 2, 3))
    mirrored = (found == images.flip(-1)).all(dim=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_the_share_of_flips_is_the_one_asked_for():
    found = augment(pictures(2000, 2), params(flip=0.2), make_generator(1))
    assert (found != pictures(2000, 2)).any(dim=(1, 2, 3)).float().mean().item() == pytest.approx(0.2, abs=0.04)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 180), st.integers(0, 99))
def test_moved_images_keep_shape_and_range(degrees, seed):
    images = pictures(4)
    found = augment(images, params(rotation=degrees, zoom=degrees / 180, shift=degrees / 360), make_generator(seed))
    assert found.shape == images.shape
    assert found.dtype == images.dtype
    assert found.min() >= images.min() - 1e-6
    assert found.max() <= images.max() + 1e-6
    assert not torch.equal(found, images)


def test_rotation_turns_each_image_by_an_angle_of_its_own_within_the_limit():
    bar = torch.zeros(200, 1, 65, 65)
    bar[:, :, 32, :] = 1
    found = augment(bar, params(rotation=20.0), make_generator(1))[:, 0]
    row = torch.arange(65.0) - 32
    right = (found[:, :, 52] * row).sum(1) / found[:, :, 52].sum(1)
    angles = torch.rad2deg(torch.atan(right / 20))
    assert angles.abs().max() <= 21
    assert angles.max() > 15
    assert angles.min() < -15
    assert len(angles.round(decimals=3).unique()) > 150


def disc(count: int) -> torch.Tensor:
    row, column = torch.meshgrid(torch.arange(64.0) - 31.5, torch.arange(64.0) - 31.5, indexing="ij")
    return ((row**2 + column**2) < 200).float().expand(count, 1, 64, 64)


def test_zoom_shows_between_less_and_more_of_each_image_by_itself():
    found = augment(disc(300), params(zoom=0.5), make_generator(1))
    scale = (disc(1).sum() / found.sum(dim=(1, 2, 3))).sqrt()
    assert 1 / 1.52 < scale.min() < 1 / 1.4
    assert 1.4 < scale.max() < 1.52
    assert abs(scale.log().mean()) < 0.05


def test_shift_moves_each_image_by_itself_at_most_as_far_as_asked_for():
    found = augment(disc(300), params(shift=0.1), make_generator(1))[:, 0]
    place = torch.arange(64.0) - 31.5
    for axis in (1, 2):
        moved = (found.sum(axis) * place).sum(1) / found.sum(dim=(1, 2))
        assert moved.abs().max() <= 6.41
        assert moved.max() > 5.5
        assert moved.min() < -5.5


def test_gamma_lights_each_image_by_itself_and_leaves_black_and_white():
    images = torch.tensor([0, 64, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(300, 1, 1, 3)
    black, gray, white = augment(images, params(gamma_jitter=0.5), make_generator(1)).unbind(-1)
    assert (black == 0).all()
    assert (white == 255).all()
    power = ((gray / 255).log() / torch.tensor(64 / 255).log()).flatten()
    assert 1 / 1.501 < power.min() < 1 / 1.4
    assert 1.4 < power.max() < 1.501


def test_rotation_does_not_squeeze_the_picture():
    row, column = torch.meshgrid(torch.arange(64.0) - 31.5, torch.arange(64.0) - 31.5, indexing="ij")
    disc = ((row**2 + column**2) < 400).float().expand(8, 1, 64, 64)
    found = augment(disc, params(rotation=180.0), make_generator(1))
    assert (found - disc).abs().mean() < 0.01


def test_the_same_generator_gives_the_same_augmentation_and_another_another():
    changes = params(flip=0.5, rotation=10.0, zoom=0.2, shift=0.1, gamma_jitter=0.5)
    assert torch.equal(augment(pictures(), changes, make_generator(1)), augment(pictures(), changes, make_generator(1)))
    assert not torch.equal(
        augment(pictures(), changes, make_generator(1)), augment(pictures(), changes, make_generator(2))
    )


def test_no_mixup_gives_one_hot_targets_and_the_images_themselves():
    images, targets = mixup(pictures(4), torch.tensor([0, 1, 1, 0]), 0.0)
    assert torch.equal(images, pictures(4))
    assert torch.equal(targets, torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=2, max_size=12), st.floats(0.05, 5), st.integers(0, 10**6))
def test_mixup_blends_images_and_labels_with_the_same_share(labels, alpha, seed):
    count = len(labels)
    # Image i is 1 in channel i alone, so that the share of each image can be read in the mixture.
    images = torch.eye(count).view(count, count, 1, 1).expand(-1, -1, 4, 4)
    torch.manual_seed(seed)
    mixed, targets = mixup(images, torch.tensor(labels), alpha)
    assert torch.allclose(targets.sum(1), torch.ones(count), atol=1e-6)
    shares = mixed[:, :, 0, 0]
    assert torch.allclose(shares.sum(1), torch.ones(count), atol=1e-6)
    assert (shares > 1e-6).sum(1).max() <= 2
    assert torch.allclose(shares.diagonal(), shares.diagonal()[0].expand(count), atol=1e-6)
    assert torch.allclose(targets[:, 1], shares @ torch.tensor(labels, dtype=torch.float), atol=1e-6)


def test_mixup_draws_from_the_global_generator():
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(mixup(pictures(4), torch.tensor([0, 1, 1, 0]), 0.5)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 99))
def test_a_shuffled_epoch_takes_every_image_once(count, seed):
    order = draw_epoch_order(torch.zeros(count, dtype=torch.long), params(sampling="shuffle"), make_generator(seed))
    assert sorted(order.tolist()) == list(range(count))


def test_a_shuffled_epoch_has_an_order_of_its_own():
    labels = torch.zeros(50, dtype=torch.long)
    first, second = (draw_epoch_order(labels, params(), make_generator(1, epoch)) for epoch in (1, 2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("weight", [0.5, 1.0, 4.0, 8.0])
def test_a_weighted_epoch_draws_a_positive_that_many_times_as_often(weight):
    labels = (torch.arange(20_000) % 10 == 0).long()
    order = draw_epoch_order(labels, params(sampling="weighted", positive_oversampling=weight), make_generator(1))
    assert len(order) == len(labels)
    drawn = torch.bincount(labels[order], minlength=2) / torch.bincount(labels)
    assert (drawn[1] / drawn[0]).item() == pytest.approx(weight, rel=0.1)
