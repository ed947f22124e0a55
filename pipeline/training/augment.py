"""Sampling and augmentation: the order of an epoch, flips, affine transforms, gamma and mixup, on whole batches.

The `draw_` functions draw the random numbers of a batch on the CPU; the others use them on the device of the images.
"""

from collections.abc import Mapping

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample, one_hot

from pipeline.core.config import TrainParams


def draw_epoch_order(labels: Tensor, params: TrainParams, generator: Generator) -> Tensor:
    """Draw the order of one epoch as indices (N,) into `labels`.

    `shuffle` uses every image once. `weighted` draws N with replacement, each positive with `positive_oversampling`
    times the probability of a negative.
    """
    if params.sampling == "shuffle":
        return torch.randperm(len(labels), generator=generator)
    weights = torch.where(labels == 1, params.positive_oversampling, 1.0)
    return torch.multinomial(weights, len(labels), replacement=True, generator=generator)


def draw_augmentation(count: int, params: TrainParams, generator: Generator) -> dict[str, Tensor]:
    """Draw how `augment` changes each of `count` images.

    Returns:
        `flip_index`, int64 (count,), into the images followed by their mirror images; `affine`, float32 (count, 2, 3),
        as `affine_grid` takes it; `gamma`, float32 (count,). What the parameters turn off is missing.
    """
    drawn = {}
    if params.flip:
        flipped = torch.rand(count, generator=generator) < params.flip
        drawn["flip_index"] = torch.arange(count) + count * flipped
    if params.rotation or params.zoom or params.shift:
        angle = torch.deg2rad(params.rotation * _draw_uniform(count, generator))
        zoom = (1 + params.zoom) ** _draw_uniform(count, generator)
        # In the coordinates of affine_grid an edge is 2 long.
        shift_x, shift_y = (2 * params.shift * _draw_uniform(count, generator) for _ in "xy")
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        drawn["affine"] = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(-1, 2, 3)
    if params.gamma_jitter:
        drawn["gamma"] = (1 + params.gamma_jitter) ** _draw_uniform(count, generator)
    return drawn


def augment(images: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
    """Flip, transform and adjust each image of (B, C, S, S), 0 to 255, independently; flips alone keep the dtype.

    Args:
        images: the batch.
        drawn: from `draw_augmentation`, on the device of the images.
    """
    if "flip_index" in drawn:
        # Selecting whole images is twenty times as fast on a CPU as torch.where, which selects single pixels.
        images = torch.cat([images, images.flip(-1)]).index_select(0, drawn["flip_index"])
    if "affine" in drawn:
        grid = affine_grid(drawn["affine"], list(images.shape), align_corners=False)
        images = grid_sample(images.float(), grid, align_corners=False, padding_mode="border")
    if "gamma" in drawn:
        images = 255 * (images / 255) ** drawn["gamma"].view(-1, 1, 1, 1)
    return images


def _draw_uniform(count: int, generator: Generator) -> Tensor:
    """Draw `count` numbers from [-1, 1): (count,)."""
    return 2 * torch.rand(count, generator=generator) - 1


def draw_mixup(labels: Tensor, alpha: float, generator: Generator) -> dict[str, Tensor]:
    """Draw the weights of mixup, and mix the labels with them (Zhang et al. 2018).

    Each image is mixed with its neighbor in the batch. One lambda per batch is drawn from Beta(alpha, alpha).

    Args:
        labels: int64 (B,), 0 or 1.
        alpha: the parameter of the Beta distribution, 0 or more; 0 turns mixup off.
        generator: the source of the random number.

    Returns:
        `targets`, float32 (B, 2), and, unless mixup is off, `mixup_weights`, float32 (2,), of an image's neighbor and
        of the image itself.
    """
    targets = one_hot(labels, 2).float()
    if not alpha:
        return {"targets": targets}
    # A beta distribution is a Dirichlet distribution of two; torch.distributions takes no generator.
    weight = torch._sample_dirichlet(torch.tensor([alpha, alpha]), generator=generator)[0]  # noqa: SLF001
    weights = torch.stack([1 - weight, weight])
    return {"targets": mix_neighbors(targets, weights), "mixup_weights": weights}


def mix_neighbors(values: Tensor, weights: Tensor) -> Tensor:
    """Mix each of (B, ...) with its neighbor in the batch, with the weights (2,) of the neighbor and of itself."""
    return values.roll(1, 0).mul_(weights[0]).add_(values * weights[1])
