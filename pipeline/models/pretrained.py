"""Pretrained weights of a backbone, converted to safetensors with the parameter names of the backbone."""

import re
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipeline.core.errors import UserError, first_line
from pipeline.core.files import atomic_path, check_zip, detect_damage, write_json
from pipeline.core.memory import is_out_of_memory
from pipeline.models import backbones, weights_source

ZIP_SIGNATURE = b"PK\x03\x04"  # the first bytes of a file that torch.save wrote


def write_pretrained_weights(backbone: str, source: str, folder: Path) -> None:
    """Write `backbone.safetensors` and `origin.json` into `folder`.

    Args:
        backbone: the name of the backbone, as in `train.backbone`.
        source: `imagenet`, `none` (random weights: only `origin.json` is written), or the path or URL of a state dict
            saved by torch or as safetensors.
        folder: the folder to write to.

    Raises:
        UserError: the weights are not available, are damaged, or belong to another backbone.
    """
    expected = backbones.build_backbone(backbone).state_dict()
    origin: dict[str, Any] = {"backbone": backbone, "source": source}
    if source != "none":
        with tempfile.TemporaryDirectory() as scratch:
            file = weights_source.find_file(backbone, source, Path(scratch))
            origin |= {"file": file.name, "sha256": weights_source.verified_sha256(file)}
            state = _load_state(file)
        if weights_source.is_packaged(backbone, source):
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
    network = backbones.build_backbone(weights_source.PACKAGED_BACKBONE)
    state = _load_state(weights_source.find_file(weights_source.PACKAGED_BACKBONE, "imagenet", Path()))
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
        with detect_damage():
            state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged byte can lead to any exception in torch
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        raise UserError(f"{file}: not a state dict of plain tensors: {first_line(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: not a state dict of plain tensors; save only the network's state_dict()")
    return state
