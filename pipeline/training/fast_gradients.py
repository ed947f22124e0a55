"""Faster gradients on the CPU for operators for which torch chooses slow kernels."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import hardtanh, pad
from torch.overrides import TorchFunctionMode

# Widest depthwise kernel for whose weights oneDNN's gradient is fast; others take five to fifty times as long.
FAST_WIDTH = 3


class FastGradients(TorchFunctionMode):
    """While active, depthwise convolutions and in-place ReLU6 on the CPU get faster gradients of the same function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and not kwargs and len(args) == 7:
            images, weight, bias, stride, padding, dilation, groups = args
            is_depthwise = groups == len(weight) == images.shape[1] and dilation == (1, 1)
            if is_depthwise and isinstance(padding, tuple) and weight.requires_grad:
                if torch.is_autocast_enabled("cpu"):
                    images, weight = (value.to(torch.get_autocast_dtype("cpu")) for value in (images, weight))
                return _DepthwiseConv2d.apply(images, weight, bias, stride, padding)
        elif func is hardtanh and kwargs == {"min_val": 0.0, "max_val": 6.0, "inplace": True} and args[0].requires_grad:
            return _InplaceReLU6.apply(args[0])
        return func(*args, **(kwargs or {}))


class _DepthwiseConv2d(Function):
    """A depthwise convolution; the gradient of a wide kernel is computed a few columns at a time."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return torch.conv2d(images, weight, bias, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        (height_padding, width_padding), width = ctx.padding, weight.shape[-1]
        image_gradient = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            # With a stride, the kernel for float32 is twenty times as fast as the one for bfloat16.
            dtype = torch.float32 if max(ctx.stride) > 1 else images.dtype
            image_gradient = _convolution_gradient(
                0, gradient.to(dtype), images.to(dtype), weight.to(dtype), ctx.stride, ctx.padding
            ).to(images.dtype)
        if width <= FAST_WIDTH:
            weight_gradient = _convolution_gradient(1, gradient, images, weight, ctx.stride, ctx.padding)
        else:
            weight_gradient = torch.empty_like(weight)
            for start in (*range(0, width - FAST_WIDTH, FAST_WIDTH), width - FAST_WIDTH):
                end = start + FAST_WIDTH
                part = pad(images, (width_padding - start, width_padding - (width - end)))
                weight_gradient[..., start:end] = _convolution_gradient(
                    1, gradient, part, weight[..., start:end], ctx.stride, (height_padding, 0)
                )
        if ctx.needs_input_grad[2]:
            bias_gradient = gradient.sum((0, 2, 3))
        return image_gradient, weight_gradient, bias_gradient, None, None


def _convolution_gradient(
    index: int, gradient: Tensor, images: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Return the gradient of a depthwise convolution by its images (index 0) or its weight (index 1)."""
    mask = [index == 0, index == 1, False]
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        gradient, images, weight, None, stride, padding, (1, 1), False, (0, 0), len(weight), mask
    )
    return gradients[index]


class _InplaceReLU6(Function):
    """ReLU6 that saves its output; torch would copy the input, although the output has the same gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        ctx.mark_dirty(images)
        output = images.clamp_(0, 6)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, output, 0, 6)  # type: ignore[no-any-return]
