"""The classifier, a backbone and a head with their preprocessing, and its storage as safetensors."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Generator, Tensor, nn
from torch.nn.functional import interpolate

from pipeline.core.config import Resize
from pipeline.core.errors import UserError
from pipeline.core.files import atomic_path, read_json, sha256_of_file, write_json
from pipeline.models import backbones, preprocessing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Mean and standard deviation of each channel, of gray levels from 0 to 1.
NORMALIZATIONS = {
    "none": ((0.0,) * 3, (1.0,) * 3),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "torchxrayvision": ((0.5,), (1 / 2048,)),
}
WEIGHTS_FILE, DESCRIPTION_FILE = "model.safetensors", "model.json"  # in the folder of a saved model
POSITIVE_CLASS = 1  # index in the logits


@dataclass(frozen=True)
class Architecture:
    """Everything besides the weights that is needed to build a classifier and to preprocess its inputs."""

    backbone: str
    head_hidden: list[int]
    dropout: float
    size: int  # edge of the backbone's input images, pixels
    normalization: str
    packed_size: int  # edge of the images in the pack, to which a file's image is resized first, pixels
    resize: Resize  # the method that makes a file's image square
    intensity_normalization: str = "none"
    lung_crop: bool = False
    border_mask: float = 0.0  # share of the edge
    marker_mask: bool = False
    test_time_augmentation: str = "none"
    feature_maps: int = 0  # the last ones, whose means are the features; 0 for the backbone's own features


class Classifier(nn.Module):
    scale: Tensor
    shift: Tensor

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.backbone = backbones.build_backbone(architecture.backbone)
        mean, std = NORMALIZATIONS[architecture.normalization]
        self.backbone.eval()
        width = backbones.feature_count(self.extract_features, architecture.size, len(mean))
        standardize = architecture.feature_maps > 0
        self.head = Head(width, architecture.head_hidden, architecture.dropout, standardize=standardize)
        scale = 1 / (255 * torch.tensor(std).view(-1, 1, 1))
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", -255 * scale * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.lung_field = preprocessing.LungField() if architecture.lung_crop else None

    def resize(self, pixels: Tensor) -> Tensor:
        """Crop, resize, mask and adjust gray images (B, H, W), uint8, as the architecture says.

        Returns:
            (B, 1, size, size), 0 to 255: uint8 if nothing changes, else float32.
        """
        images, size = pixels.unsqueeze(1), self.architecture.size
        if self.lung_field:
            images = preprocessing.resample(images.double(), self.lung_field(images), size)
        elif images.shape[-1] != size:
            images = images.double() if self.adjusts else images.float()
            images = interpolate(images, (size, size), mode="bilinear", antialias=True)
        return self.adjust(images) if self.adjusts else images

    @property
    def adjusts(self) -> bool:
        """Whether `resize` does anything else than to resize."""
        one = self.architecture
        return one.lung_crop or one.marker_mask or one.border_mask > 0 or one.intensity_normalization != "none"

    def adjust(self, images: Tensor) -> Tensor:
        """Mask and adjust images of the backbone's size, float64 or uint8, see `preprocessing.adjust`."""
        one = self.architecture
        return preprocessing.adjust(images, one.marker_mask, one.border_mask, one.intensity_normalization)

    def normalize(self, images: Tensor) -> Tensor:
        """Convert the output of `resize` to the backbone's input: (B, 3 or 1, size, size), float32."""
        scaled = images.float() * self.scale
        return scaled if self.architecture.normalization == "none" else scaled.add_(self.shift)

    def forward(self, images: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """Compute logits (B, 2), negative class first, for images from `normalize` and masks from `dropout_masks`."""
        logits: Tensor = self.head(self.extract_features(images), masks)
        return logits

    def extract_features(self, images: Tensor) -> Tensor:
        """Compute the backbone's features (B, width) for images from `normalize`.

        With `feature_maps`, they are the means of its last feature maps; layers before the last one can transfer better
        (Evci et al. 2022, arXiv:2201.03529).
        """
        if self.architecture.feature_maps:
            return pool_feature_maps(self.compute_feature_maps(images))
        features: Tensor = self.backbone(images)
        return features.flatten(1)

    def compute_feature_maps(self, images: Tensor) -> list[Tensor]:
        """Compute the last `feature_maps` feature maps, (B, C, H, W) each, of a backbone of timm."""
        count, backbone = self.architecture.feature_maps, self.backbone
        maps: list[Tensor] = backbone.forward_intermediates(images, count, intermediates_only=True)  # type: ignore[operator]
        return maps

    def predict_proba(self, pixels: Tensor) -> Tensor:
        """Predict P(positive), float32 (B,), for gray images (B, H, W), uint8, on the model's device."""
        return predict_group([self], pixels)[:, 0]

    @torch.inference_mode()
    def predict_from_features(self, features: Tensor) -> Tensor:
        """Predict P(positive), float32 (B,), the mean of views, from the backbone's features (B, views, width)."""
        logits: Tensor = self.head(features)
        return logits.softmax(-1)[..., POSITIVE_CLASS].mean(dim=1)

    @torch.inference_mode()
    def embed(self, pixels: Tensor) -> Tensor:
        """Return the backbone's features, float32 (B, width), of gray images (B, H, W), uint8."""
        return self.extract_features(self.normalize(self.resize(pixels))).float()


@torch.inference_mode()
def predict_group(networks: Sequence[Classifier], pixels: Tensor) -> Tensor:
    """Predict as `predict_resized` does, for gray images (B, H, W), uint8, on the device of the networks."""
    return predict_resized(networks, networks[0].resize(pixels))


def predict_resized(networks: Sequence[Classifier], images: Tensor) -> Tensor:
    """Predict P(positive), the mean of the views of each image.

    Args:
        networks: of one architecture, with the same backbone, which computes the features once.
        images: from `Classifier.resize`.

    Returns:
        Float32 (B, networks).
    """
    first = networks[0]
    views = preprocessing.views(images, first.architecture.test_time_augmentation)
    features = [first.extract_features(first.normalize(view)) for view in views]
    probabilities = [
        torch.stack([network.head(one).float().softmax(1)[:, POSITIVE_CLASS] for one in features]).mean(dim=0)
        for network in networks
    ]
    return torch.stack(probabilities, dim=1)


def pool_feature_maps(maps: Sequence[Tensor]) -> Tensor:
    """Return the means of feature maps, (B, C, H, W) each, one after the other: (B, width)."""
    return torch.cat([one.mean(dim=(2, 3)) for one in maps], dim=1)


class Head(nn.Module):
    """Dropout, hidden layers, dropout and two logits.

    A ReLU follows every hidden layer except the last one of several: with hidden = [256, 128], as in the competition's
    recipe, the 128 features are a linear bottleneck.
    """

    def __init__(self, features: int, hidden: list[int], dropout: float, *, standardize: bool = False) -> None:
        super().__init__()
        self.scaler = FeatureScaler(features) if standardize else nn.Identity()
        widths = [features, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.logits = nn.Linear(widths[-1], 2)
        self._dropout = dropout
        self._dropout_widths = [features, widths[-1]] if hidden else [features]

    def dropout_masks(self, rows: int, generator: Generator) -> list[Tensor]:
        """Draw the dropout masks of a batch: 0 (dropped) or 1, uint8 (rows, width) for each dropout layer.

        They are not drawn in `forward`, so that they do not depend on how the batch is split.
        """
        keep = 1 - self._dropout
        shapes = ((rows, width) for width in self._dropout_widths)
        masks = (torch.bernoulli(torch.full(shape, keep), generator=generator) for shape in shapes)
        # NumPy converts in the calling thread, which loads batches; torch would start a thread pool for it.
        return [torch.from_numpy(mask.numpy().astype(np.uint8)) for mask in masks]

    def forward(self, features: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """Compute logits (B, 2) for features (B, width); without masks there is no dropout."""
        features = self.scaler(features)
        if masks:
            features = self._drop(features, masks[0])
        for index, layer in enumerate(self.hidden):
            features = layer(features)
            if index == 0 or index < len(self.hidden) - 1:
                features = features.relu()
        if len(masks) > 1:
            features = self._drop(features, masks[1])
        logits: Tensor = self.logits(features)
        return logits

    def _drop(self, features: Tensor, mask: Tensor) -> Tensor:
        return features * (mask.to(features) / (1 - self._dropout))


class FeatureScaler(nn.Module):
    """Subtracts the mean of each feature in the training set and divides by its standard deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def fit(self, batches: Iterable[np.ndarray]) -> None:
        """Take mean and standard deviation from features (B, width), float32; constant ones are not divided."""
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler()
        for features in batches:
            scaler.partial_fit(features)
        self.mean.copy_(torch.from_numpy(scaler.mean_))
        self.std.copy_(torch.from_numpy(scaler.scale_))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


def load_pretrained(network: Classifier, folder: Path) -> None:
    """Load the pretrained weights of the backbone that the stage `weights` wrote to `folder`.

    Raises:
        FileNotFoundError: a file is missing.
        UserError: the weights belong to another backbone.
    """
    if read_json(folder / "origin.json")["source"] == "none":
        return
    state = load_file(folder / "backbone.safetensors")
    expected = network.backbone.state_dict()
    mismatches = [name for name in expected if name not in state or state[name].shape != expected[name].shape]
    if mismatches:
        raise UserError(
            f"{folder}: not the weights of {network.architecture.backbone} ({mismatches[0]} does not fit); "
            "run: dvc repro weights"
        )
    network.backbone.load_state_dict({name: state[name] for name in expected})


def place_for_inference(network: Classifier, device: torch.device) -> Classifier:
    """Move a network to the device, in evaluation mode and in the memory format that is fastest there."""
    network = network.to(device).eval()
    return network.to(memory_format=torch.channels_last) if device.type == "cpu" else network


def save_weights(networks: Sequence[Classifier], folder: Path) -> None:
    """Write the weights to the folder, as safetensors.

    Args:
        networks: one, or in cross-validation one per fold, whose tensors get the prefix `fold-0.`, `fold-1.`, …
        folder: where the file is written.
    """
    prefixes = [f"fold-{fold}." if len(networks) > 1 else "" for fold in range(len(networks))]
    tensors = {
        prefix + name: value.contiguous()
        for prefix, network in zip(prefixes, networks, strict=True)
        for name, value in network.state_dict().items()
    }
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        # safetensors' save_file does not report a full disk.
        temporary.write_bytes(save_tensors(tensors))


def save_description(network: Classifier, folder: Path, metadata: dict[str, Any]) -> None:
    """Write the architecture, the checksum of the weights and `metadata` to the folder, as JSON."""
    digest = sha256_of_file(folder / WEIGHTS_FILE)
    write_json(folder / DESCRIPTION_FILE, {**asdict(network.architecture), "weights_sha256": digest, **metadata})


def load_networks(folder: Path, device: torch.device) -> list[Classifier]:
    """Load the networks of a saved model, one per fold, in evaluation mode; no code in the files is executed.

    Raises:
        FileNotFoundError: a file is missing.
        UserError: the checksum of the weights is not the one in the description.
    """
    description, weights = read_json(folder / DESCRIPTION_FILE), folder / WEIGHTS_FILE
    if sha256_of_file(weights) != description["weights_sha256"]:
        raise UserError(f"{weights}: not the weights that {DESCRIPTION_FILE} describes; run: dvc checkout {weights}")
    folds: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(weights).items():
        number, _, name = key.removeprefix("fold-").partition(".") if key.startswith("fold-") else ("0", "", key)
        folds.setdefault(int(number), {})[name] = tensor
    networks = []
    for fold in sorted(folds):
        fields = Architecture.__dataclass_fields__.keys() & description  # older descriptions lack the last ones
        network = Classifier(Architecture(**{name: description[name] for name in fields}))
        network.load_state_dict(folds[fold])
        networks.append(place_for_inference(network, device))
    return networks
