"""Pretrained weights of a backbone, converted to safetensors with the parameter names of the backbone."""

import re
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.serialization import safe_globals

from pipeline.core.errors import UserError, first_line
from pipeline.core.files import atomic_path, check_zip, detect_damage, write_json
from pipeline.core.memory import is_out_of_memory
from pipeline.models import backbones, weights_source
from pipeline.models.huggingface_weights import to_timm
from pipeline.models.pickled_network import PICKLED_CLASSES, PickledModule, inline_classes, state_of

ZIP_SIGNATURE = b"PK\x03\x04"  # the first bytes of a file that torch.save wrote


def write_pretrained_weights(backbone: str, source: str, folder: Path) -> None:
    """Write `backbone.safetensors` and `origin.json` into `folder`.

    Args:
        backbone: the name of the backbone, as in `train.backbone`.
        source: `imagenet`, `none` (random weights: only `origin.json` is written), a name of torchxrayvision's weights,
            or the path or URL of a state dict saved by torch or as safetensors, for a ViT of timm also in the format of
            transformers, of a model of this pipeline, or of a pickled network of torchxrayvision; with `#sha256=` and
            64 digits at its end, the file's hash is checked.
        folder: the folder to write to.

    Raises:
        UserError: the weights are not available, are damaged, or belong to another backbone.
    """
    expected = backbones.build_backbone(backbone).state_dict()
    origin: dict[str, Any] = {"backbone": backbone, "source": source}
    if source != "none":
        with tempfile.TemporaryDirectory() as scratch:
            location, _, digest = source.partition("#sha256=")
            file = weights_source.find_file(backbone, location, Path(scratch))
            origin |= {"file": file.name, "sha256": weights_source.verified_sha256(file, digest)}
            # A model of this pipeline has a head beside its backbone.
            state = {name.removeprefix("backbone."): tensor for name, tensor in to_timm(_load_state(file)).items()}
        if weights_source.is_packaged(backbone, location):
            state = _rename_packaged(state, expected)
        # DenseNet's files use older names than torchvision's modules; torchvision renames them in the same way.
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1", name): state[name] for name in state}
        for name, tensor in expected.items():
            if name.endswith("num_batches_tracked"):
                state.setdefault(name, torch.zeros((), dtype=torch.int64))  # missing in older files
            if name not in state or state[name].shape != tensor.shape:
                raise UserError(f"{source}: not the weights of {backbone} ({name} does not fit); change weights.source")
        with atomic_path(folder / "backbone.safetensors") as temporary:
            temporary.write_bytes(save({name: state[name].contiguous() for name in expected}))
    write_json(folder / "origin.json", origin)


def load_packaged_backbone() -> nn.Module:
    """Build EfficientNet-Lite0 with the ImageNet weights that come in a package, for use without a workspace."""
    network = backbones.build_backbone(weights_source.DEFAULT_BACKBONE)
    state = _load_state(weights_source.find_file(weights_source.DEFAULT_BACKBONE, "imagenet", Path()))
    network.load_state_dict(_rename_packaged(state, network.state_dict()))
    return network.eval()


def _rename_packaged(state: dict[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    # The package's names are older than timm's; the order is the same, with the classifier at the end.
    return dict(zip(expected, state.values(), strict=False))


def _load_state(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with file.open("rb") as stream:
            is_zip = stream.read(len(ZIP_SIGNATURE)) == ZIP_SIGNATURE  # older versions of torch wrote bare pickles
        if is_zip:
            check_zip(file)  # torch.load does not compare the checksums
        with detect_damage(), safe_globals(PICKLED_CLASSES):
            content = file if is_zip else inline_classes(file.read_bytes())
            state: Any = torch.load(content, map_location="cpu", weights_only=True)
        if isinstance(state, PickledModule):
            state = state_of(state)
    except Exception as error:  # a damaged byte can lead to any exception in torch
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        raise UserError(f"{file}: not a state dict of plain tensors: {first_line(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: not a state dict of plain tensors; save only the network's state_dict()")
    return dict(state)
