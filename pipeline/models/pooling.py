"""Adaptive average pooling whose CUDA backward is deterministic."""

import torch
from torch import Tensor, nn


def pooling_matrix(size: int, bins: int) -> Tensor:
    """Return the (bins, size) matrix whose row i averages the pixels in bin i of adaptive pooling.

    Bin i contains the pixels from floor(i * size / bins) to ceil((i + 1) * size / bins), exclusive.
    """
    edge = torch.arange(bins)
    start, end = edge * size // bins, -((edge + 1) * size // -bins)
    pixel = torch.arange(size)
    in_bin = (pixel >= start[:, None]) & (pixel < end[:, None])
    return in_bin / in_bin.sum(1, keepdim=True)


class FixedAveragePool2d(nn.Module):
    """`nn.AdaptiveAvgPool2d` as two matrix products, whose gradients are deterministic on CUDA."""

    rows: Tensor
    columns: Tensor

    def __init__(self, bins: tuple[int, int]) -> None:
        super().__init__()
        for name, count in zip(("rows", "columns"), bins, strict=True):
            self.register_buffer(name, torch.empty(count, 0), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Pool (B, C, H, W) to (B, C, *bins)."""
        height, width = images.shape[-2:]
        if (self.rows.shape[1], self.columns.shape[1]) != (height, width):  # the first call, or another image size
            self.rows = pooling_matrix(height, len(self.rows)).to(images.device)
            self.columns = pooling_matrix(width, len(self.columns)).to(images.device)
        return self.rows.to(images.dtype) @ images @ self.columns.to(images.dtype).T


def replace_adaptive_pooling(module: nn.Module) -> None:
    """Replace every `nn.AdaptiveAvgPool2d` in `module` by `FixedAveragePool2d`.

    One that pools to a single pixel stays: it is a mean, whose gradients are deterministic.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.AdaptiveAvgPool2d):
            bins = child.output_size if isinstance(child.output_size, tuple) else (child.output_size,) * 2
            if None not in bins and bins != (1, 1):
                setattr(module, name, FixedAveragePool2d(bins))  # type: ignore[arg-type]
        else:
            replace_adaptive_pooling(child)
