"""Heatmaps of the regions that contribute to a score: Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391).

Where the features are the means of feature maps, it is the sum of their class activation maps (Zhou et al. 2016,
arXiv:1512.04150), which show every term of the score.
"""

import copy
import re
from collections.abc import Sequence
from math import isqrt

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.models import preprocessing
from pipeline.models.classifier import Classifier, pool_feature_maps

MIN_MAP_SIZE = 4  # edge of the feature map: a coarser one cannot separate the center from the border
EPS = 1e-7
# What attention reads, in the blocks of the vision transformers of timm and torchvision.
TOKENS = re.compile(r"blocks\.\d+\.norm1|encoder\.layers\.encoder_layer_\d+\.ln_1")
COLORMAP, OPACITY = "inferno", 0.65  # of heatmaps over radiographs; the opacity is that of the highest value


def compute_heatmaps(network: Classifier, pixels: Tensor, classes: Sequence[int]) -> np.ndarray:
    """Compute heatmaps for a class of each image; other threads may use the network at the same time.

    Args:
        network: on any device; the maps are computed on the CPU, where they are deterministic.
        pixels: gray images (N, S, S), uint8.
        classes: the class to explain, 0 or 1, for each image.

    Returns:
        Heatmaps of the whole images, float32 (N, size, size) at the input size of the network, in [0, 1]; 0 outside of
        what is cropped, and everywhere if no region contributes.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with torch.inference_mode(False), torch.enable_grad():
        network = _copy_without_gradients(network)
        pixels = pixels.cpu().clone()  # a tensor of inference mode has no gradients
        inputs = network.normalize(network.resize(pixels)).requires_grad_()
        if network.architecture.feature_maps:
            maps = _class_activation_maps(network, inputs, classes)
        else:
            with GradCAM(network, [target_layer(network)], _as_feature_map) as cam:
                maps = np.asarray(cam(inputs, [ClassifierOutputTarget(label) for label in classes]))
        if network.lung_field is None:
            return maps
        boxes = network.lung_field(pixels.unsqueeze(1))
        return preprocessing.insert(torch.from_numpy(maps)[:, None], boxes)[:, 0].numpy()


def _class_activation_maps(network: Classifier, inputs: Tensor, classes: Sequence[int]) -> np.ndarray:
    """Return where the feature maps raise the logit above that of the mean image of the training set."""
    with torch.no_grad():
        maps = network.compute_feature_maps(inputs)
    features = pool_feature_maps(maps).requires_grad_()
    logits = network.head(features)[torch.arange(len(inputs)), torch.tensor(classes)]
    (gradients,) = torch.autograd.grad(logits.sum(), features)
    total, start = torch.zeros(len(inputs), 1, *inputs.shape[2:]), 0
    for one in maps:
        channels = slice(start, start := start + one.shape[1])
        deviation = one - network.head.scaler.mean[channels, None, None]  # type: ignore[index]
        terms = (gradients[:, channels, None, None] * deviation).sum(dim=1, keepdim=True)
        total += interpolate(terms, total.shape[2:], mode="bilinear")
    positive = total[:, 0].relu()
    return (positive / positive.amax(dim=(1, 2), keepdim=True).clamp(min=EPS)).numpy()


def target_layer(network: Classifier) -> nn.Module:
    """Return the last layer of the backbone whose output is a feature map with edges of at least `MIN_MAP_SIZE`.

    Of a vision transformer with a token per patch, it is what the attention of the last block reads.
    """
    has_tokens = any(hasattr(network.backbone, name) for name in ("num_prefix_tokens", "class_token"))
    layers: list[nn.Module] = [
        module for name, module in network.backbone.named_modules() if has_tokens and TOKENS.fullmatch(name)
    ]
    if layers:
        return layers[-1]

    def record_layer(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] == output.shape[-2] >= MIN_MAP_SIZE:
            layers.append(module)

    hooks = [module.register_forward_hook(record_layer) for module in network.backbone.modules()]
    size = network.architecture.size
    with torch.no_grad():
        network(network.normalize(torch.zeros(1, 1, size, size)))
    for hook in hooks:
        hook.remove()
    return layers[-1]


def _as_feature_map(output: Tensor) -> Tensor:
    """Arrange tokens (B, N, C), of which those of the patches of a square are the last, as (B, C, H, W)."""
    if output.ndim == 4:
        return output
    edge = isqrt(output.shape[1])
    maps: Tensor = output[:, -(edge**2) :].mT.unflatten(2, (edge, edge))
    return maps


def _copy_without_gradients(network: Classifier) -> Classifier:
    """Copy the modules, which get hooks, to the CPU; tensors that are there are not copied, and get no gradients."""
    shared = {id(one): one for one in network.buffers()}
    shared |= {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in network.parameters()}
    return copy.deepcopy(network, shared).cpu()
