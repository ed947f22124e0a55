"""Gradients computed by other kernels than torch's own choice are those of the same function."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from pipeline.models import backbones
from pipeline.training.fast_gradients import FastGradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 1, 1), (3, 2, 0), (4, 2, 0), (5, 1, 2), (5, 2, 0), (5, 2, 2), (7, 1, 3), (9, 3, 4)],
)
def test_gradients_of_depthwise_convolutions(kernel, stride, padding, memory_format, dtype):
    generator = torch.Generator().manual_seed(kernel)
    images = torch.randn(2, 32, 15, 17, generator=generator).to(dtype, memory_format=memory_format).requires_grad_()
    weight = torch.randn(32, 1, kernel, kernel, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(32, generator=generator).to(dtype).requires_grad_()
    inputs = images, weight, bias
    expected = conv2d(*(value.double() for value in inputs), stride, padding, 1, 32)
    gradient = torch.randn(expected.shape, generator=generator).to(dtype)
    with FastGradients():
        output = conv2d(*inputs, (stride, stride), (padding, padding), (1, 1), 32)
    assert "_DepthwiseConv2d" in type(output.grad_fn).__name__
    slow_output = conv2d(*inputs, stride, padding, 1, 32)
    gradients = [
        torch.autograd.grad(outputs, inputs, gradient.to(outputs)) for outputs in (output, slow_output, expected)
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for computed, slow, exact in zip(*gradients, strict=True):
        # Without instructions for bfloat16, torch's own gradients are less exact.
        limit = max(tolerance * exact.abs().max(), (slow - exact).abs().max())
        assert (computed - exact).abs().max() <= limit


@pytest.mark.parametrize("name", ["mobilenet_v2", "timm/tf_efficientnet_lite0", "timm/convnext_atto"])
def test_a_network_has_the_same_loss_and_gradients(name):
    torch.manual_seed(0)
    network = backbones.build_backbone(name).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)

    def gradients() -> tuple[Tensor, list[Tensor]]:
        loss = network(images).square().mean()
        return loss.detach(), list(torch.autograd.grad(loss, list(network.parameters())))

    loss, expected = gradients()
    with FastGradients():
        fast_loss, computed = gradients()
    assert torch.equal(fast_loss, loss)
    for ours, theirs in zip(computed, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-6
