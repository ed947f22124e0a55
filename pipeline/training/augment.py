"""Sampling and augmentation: the order of an epoch, flips, affine transforms, gamma and mixup, on whole batches."""

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


def augment(images: Tensor, params: TrainParams, generator: Generator) -> Tensor:
    """Flip, transform and adjust each image of (B, C, S, S), 0 to 255, independently; flips alone keep the dtype."""
    if params.flip:
        flipped = torch.rand(len(images), generator=generator) < params.flip
        # Selecting whole images is twenty times as fast on a CPU as torch.where, which selects single pixels.
        indices = torch.arange(len(images)) + len(images) * flipped
        images = torch.cat([images, images.flip(-1)]).index_select(0, indices.to(images.device))
    if params.rotation or params.zoom or params.shift:
        angle = torch.deg2rad(params.rotation * _draw_uniform(images, generator))
        zoom = (1 + params.zoom) ** _draw_uniform(images, generator)
        # In the coordinates of affine_grid an edge is 2 long.
        shift_x, shift_y = (2 * params.shift * _draw_uniform(images, generator) for _ in "xy")
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        theta = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(-1, 2, 3)
        grid = affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
        images = grid_sample(images.float(), grid, align_corners=False, padding_mode="border")
    if params.gamma_jitter:
        gamma = (1 + params.gamma_jitter) ** _draw_uniform(images, generator)
        images = 255 * (images / 255) ** gamma.view(-1, 1, 1, 1).to(images.device)
    return images


def _draw_uniform(images: Tensor, generator: Generator) -> Tensor:
    """Draw a number from [-1, 1) for each image: (B,)."""
    return 2 * torch.rand(len(images), generator=generator) - 1


def mixup(images: Tensor, labels: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Mix each image with its neighbor in the batch, and their labels in the same way (Zhang et al. 2018).

    One lambda per batch is drawn from Beta(alpha, alpha) with torch's global generator.

    Args:
        images: float (B, C, S, S).
        labels: int64 (B,), 0 or 1.
        alpha: the parameter of the Beta distribution, 0 or more; 0 turns mixup off.

    Returns:
        The images, in the same shape and dtype, and the targets, float (B, 2).
    """
    if not alpha:
        return images, one_hot(labels, 2).to(images.dtype)
    from torchvision.transforms.v2 import MixUp

    mixed: tuple[Tensor, Tensor] = MixUp(alpha=alpha, num_classes=2)(images, labels)
    return mixed
