"""Backbones by name, from torchvision and timm, without the classifier they came with."""

import difflib
import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from pipeline.core.errors import UserError, first_line
from pipeline.models.pooling import replace_adaptive_pooling

if TYPE_CHECKING:
    from collections.abc import Iterable


def build_network(name: str) -> nn.Module:
    """Build the whole network with its 1000-class classifier and random weights, as ImageNet weights expect it.

    Args:
        name: one of torchvision's classifiers, or `timm/<name>`.

    Raises:
        UserError: there is no such backbone; the nearest names are listed.
    """
    if name.startswith("timm/"):
        import timm

        if name.removeprefix("timm/") not in timm.list_models():
            raise _unknown(name, [f"timm/{known}" for known in timm.list_models()])
        return timm.create_model(name.removeprefix("timm/"))
    from torchvision import models

    if name not in models.list_models(module=models):
        raise _unknown(name, models.list_models(module=models))
    with warnings.catch_warnings():
        # GoogLeNet and Inception announce a change of their initialization, which loaded weights overwrite.
        warnings.simplefilter("ignore", FutureWarning)
        network: nn.Module = models.get_model(name, weights=None)
    return network


def build_backbone(name: str) -> nn.Module:
    """Build a backbone that maps (B, 3, S, S) to features of any shape, flattened by the head.

    Its state keeps the names of the whole network's, so that ImageNet weights load by name.

    Raises:
        UserError: there is no such backbone.
    """
    network = build_network(name)
    if name.startswith("timm/"):
        network.reset_classifier(0)  # type: ignore[operator]
    else:
        for auxiliary in ("aux1", "aux2", "AuxLogits"):  # heads of GoogLeNet and Inception for training from scratch
            if hasattr(network, auxiliary):
                setattr(network, auxiliary, None)
                network.aux_logits = False  # type: ignore[assignment]
        if hasattr(network, "transform_input"):
            network.transform_input = True  # type: ignore[assignment]  # as their ImageNet weights expect
        name_of_last, last = list(network.named_children())[-1]
        layers = list(last.children()) if isinstance(last, nn.Sequential) else [last]
        first = next(index for index, layer in enumerate(layers) if isinstance(layer, nn.Linear | nn.Conv2d))
        # What stands before the classifier's first weights, such as ConvNeXt's norm, is the backbone's.
        kept = [layer for layer in layers[:first] if not isinstance(layer, nn.Dropout)]
        if isinstance(layers[first], nn.Conv2d):
            kept.append(nn.AdaptiveAvgPool2d(1))  # SqueezeNet classifies each place of the map before it pools
        setattr(network, name_of_last, nn.Sequential(*kept))
    replace_adaptive_pooling(network)
    return network


def feature_count(network: nn.Module, size: int) -> int:
    """Return how many features per image the backbone gives for images of `size` pixels.

    Raises:
        UserError: the images are too small for it.
    """
    network.eval()
    try:
        with torch.no_grad():
            return int(network(torch.zeros(1, 3, size, size)).flatten(1).shape[1])
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"train.size = {size}: the backbone cannot take images of that size ({reason}); change it"
        ) from None


def _unknown(name: str, known: "Iterable[str]") -> UserError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"near names: {', '.join(near)}" if near else "name a torchvision classifier, or timm/<name>"
    return UserError(f"params.yaml: train.backbone: there is no {name!r}; {hint}")
