"""Backbones by name, of torchvision, timm and torchxrayvision, without their classifier."""

import difflib
import importlib
import sys
import warnings
from threading import Lock
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.core.errors import UserError, first_line
from pipeline.models.pooling import replace_adaptive_pooling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

IMPORT_LOCK = Lock()
TORCHXRAYVISION = "torchxrayvision/"  # before the names of its networks, torchvision's for images of one channel
FIRST_LAYERS = {f"{TORCHXRAYVISION}densenet121": "features.conv0", f"{TORCHXRAYVISION}resnet50": "conv1"}


def build_network(name: str) -> nn.Module:
    """Build the whole network, with its 1000-class classifier and random weights, so that ImageNet weights fit.

    Args:
        name: a torchvision classifier, `timm/<name>`, or one of `FIRST_LAYERS`: a network of torchxrayvision (Cohen et
            al. 2022, arXiv:2111.00595).

    Raises:
        UserError: the backbone does not exist; the message lists similar names.
    """
    models = _import_without_compiler("torchvision.models")
    if name.startswith("timm/"):
        timm = _import_without_compiler("timm")
        if name.removeprefix("timm/") not in timm.list_models():
            raise _unknown_backbone_error(name, [f"timm/{known}" for known in timm.list_models()])
        timm_network: nn.Module = timm.create_model(name.removeprefix("timm/"))
        return timm_network
    if name in FIRST_LAYERS:
        return _with_one_channel(models.get_model(name.removeprefix(TORCHXRAYVISION), weights=None), FIRST_LAYERS[name])
    if name not in models.list_models(module=models):
        raise _unknown_backbone_error(name, [*models.list_models(module=models), *FIRST_LAYERS])
    with warnings.catch_warnings():
        # GoogLeNet and Inception warn that their initialization will change; loaded weights overwrite it.
        warnings.simplefilter("ignore", FutureWarning)
        network: nn.Module = models.get_model(name, weights=None)
    return network


def _with_one_channel(network: nn.Module, first: str) -> nn.Module:
    """Replace the first layer of a network, a convolution without bias, by one for gray images."""
    three: Any = network.get_submodule(first)
    one = nn.Conv2d(1, three.out_channels, three.kernel_size, three.stride, three.padding, bias=False)
    network.set_submodule(first, one)
    return network


def _import_without_compiler(module: str) -> Any:
    """Import a module of torchvision or timm without torch's compiler, which takes a second and no classifier needs.

    They import it for an operation of object detection, and to exclude a function from compilation.
    """
    compiler, disable = "torch._dynamo.utils", torch.compiler.disable
    with IMPORT_LOCK:
        if module not in sys.modules and compiler not in sys.modules:
            sys.modules[compiler] = SimpleNamespace(is_compile_supported=lambda _: False)  # type: ignore[assignment]
            torch.compiler.disable = lambda function=None, **_: function or (lambda one: one)
            try:
                return importlib.import_module(module)
            except ImportError:  # of a release that needs more of it
                pass
            finally:
                del sys.modules[compiler]
                torch.compiler.disable = disable
    return importlib.import_module(module)


def build_backbone(name: str) -> nn.Module:
    """Build a backbone that maps (B, C, S, S), C = 3 or of torchxrayvision 1, to features, which get flattened.

    Its state dict keeps the names of the whole network, so that ImageNet weights load by name.

    Raises:
        UserError: the backbone does not exist.
    """
    network = build_network(name)
    if name.startswith("timm/"):
        network.reset_classifier(0)  # type: ignore[operator]
    else:
        for auxiliary in ("aux1", "aux2", "AuxLogits"):  # GoogLeNet and Inception: only for training from scratch
            if hasattr(network, auxiliary):
                setattr(network, auxiliary, None)
                network.aux_logits = False  # type: ignore[assignment]
        if hasattr(network, "transform_input"):
            network.transform_input = True  # type: ignore[assignment]  # as their ImageNet weights expect
        classifier_name, classifier = list(network.named_children())[-1]
        layers = list(classifier.children()) if isinstance(classifier, nn.Sequential) else [classifier]
        first = next(index for index, layer in enumerate(layers) if isinstance(layer, nn.Linear | nn.Conv2d))
        # Layers before the classifier's first weights, such as ConvNeXt's norm, belong to the backbone.
        backbone_layers = [layer for layer in layers[:first] if not isinstance(layer, nn.Dropout)]
        if isinstance(layers[first], nn.Conv2d):
            backbone_layers.append(nn.AdaptiveAvgPool2d(1))  # SqueezeNet classifies every position, then pools
        setattr(network, classifier_name, nn.Sequential(*backbone_layers))
    replace_adaptive_pooling(network)
    return network


def feature_count(extract: "Callable[[Tensor], Tensor]", size: int, channels: int = 3) -> int:
    """Return the number of features for an image of `channels` and edges of `size` pixels.

    Args:
        extract: a backbone in evaluation mode, or a function that calls it.
        size: in pixels.
        channels: 3 or 1.

    Raises:
        UserError: the images are too small for the backbone.
    """
    try:
        with torch.no_grad():
            return int(extract(torch.zeros(1, channels, size, size)).flatten(1).shape[1])
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"train.image_size = {size}: the backbone does not accept images of that size ({reason}); change it"
        ) from None


def _unknown_backbone_error(name: str, names: "Iterable[str]") -> UserError:
    similar = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"similar names: {', '.join(similar)}" if similar else "use a torchvision classifier, or timm/<name>"
    return UserError(f"params.yaml: train.backbone: unknown backbone {name!r}; {hint}")
