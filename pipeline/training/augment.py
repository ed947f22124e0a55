"""What training does to a batch: which images are drawn, and how they are flipped, moved, lit and mixed.

Everything here works on whole batches on the device.
"""

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample, one_hot

from pipeline.core.config import TrainParams


def draw_epoch_order(labels: Tensor, params: TrainParams, generator: Generator) -> Tensor:
    """Draw the order of one epoch as positions (N,) in `labels`.

    `shuffle` takes every image once. `weighted` draws N with replacement, a positive `positive_oversampling` times as
    likely as a negative.
    """
    if params.sampling == "shuffle":
        return torch.randperm(len(labels), generator=generator)
    weights = torch.where(labels == 1, params.positive_oversampling, 1.0)
    return torch.multinomial(weights, len(labels), replacement=True, generator=generator)


def augment(images: Tensor, params: TrainParams, generator: Generator) -> Tensor:
    """Flip, move and light each of the images (B, C, S, S), 0 to 255, by itself; only flipped, they keep their type."""
    if params.flip:
        flipped = torch.rand(len(images), generator=generator) < params.flip
        # Whole images are chosen, which on a CPU is twenty times as fast as torch.where's choice of single pixels.
        chosen = torch.arange(len(images)) + len(images) * flipped
        images = torch.cat([images, images.flip(-1)]).index_select(0, chosen.to(images.device))
    if params.rotation or params.zoom or params.shift:
        angle = torch.deg2rad(params.rotation * _between(images, generator))
        zoom = (1 + params.zoom) ** _between(images, generator)
        right, down = (2 * params.shift * _between(images, generator) for _ in "xy")  # of an edge that is 2 long
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        placed = torch.stack([cos, -sin, right, sin, cos, down], dim=1).view(-1, 2, 3)
        grid = affine_grid(placed.to(images.device), list(images.shape), align_corners=False)
        images = grid_sample(images.float(), grid, align_corners=False, padding_mode="border")
    if params.gamma_jitter:
        gamma = (1 + params.gamma_jitter) ** _between(images, generator)
        images = 255 * (images / 255) ** gamma.view(-1, 1, 1, 1).to(images.device)
    return images


def _between(images: Tensor, generator: Generator) -> Tensor:
    """Draw from -1 to 1 for each of the images: (B,)."""
    return 2 * torch.rand(len(images), generator=generator) - 1


def mixup(images: Tensor, labels: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Blend each image with its neighbor in the batch, and their labels alike, after Zhang et al. 2018.

    One share lambda, drawn by torch's global generator from Beta(alpha, alpha), serves the whole batch; alpha 0
    blends nothing.

    Args:
        images: float (B, C, S, S).
        labels: int64 (B,), 0 or 1.
        alpha: of the Beta distribution, 0 or more.

    Returns:
        Images as given, and labels as float (B, 2).
    """
    if not alpha:
        return images, one_hot(labels, 2).to(images.dtype)
    from torchvision.transforms.v2 import MixUp

    mixed: tuple[Tensor, Tensor] = MixUp(alpha=alpha, num_classes=2)(images, labels)
    return mixed
