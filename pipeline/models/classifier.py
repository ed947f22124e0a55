"""Backbone and head in one module that owns its preprocessing, and its way to disk and back without pickles."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Generator, Tensor, nn
from torch.nn.functional import interpolate

from pipeline.core.config import Resize
from pipeline.core.errors import UserError
from pipeline.core.files import atomic_path, read_json, sha256_of_file, write_json
from pipeline.models import backbones

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHTS_FILE, DESCRIPTION_FILE = "model.safetensors", "model.json"  # what a saved model's folder holds
POSITIVE_CLASS = 1  # index of the COVID-19 class in the logits


@dataclass(frozen=True)
class Architecture:
    """What it takes, beside the weights, to build a classifier and to feed it."""

    backbone: str
    head_hidden: list[int]
    dropout: float
    size: int  # edge of the images the backbone sees, pixels
    normalization: str
    packed_size: int  # edge of the images in the pack, which come first when a file is read
    resize: Resize  # how a file's image becomes as square as they are


class Classifier(nn.Module):
    scale: Tensor
    shift: Tensor

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.backbone = backbones.build_backbone(architecture.backbone)
        self.head = Head(
            backbones.feature_count(self.backbone, architecture.size), architecture.head_hidden, architecture.dropout
        )
        imagenet = architecture.normalization == "imagenet"
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else ((0.0,) * 3, (1.0,) * 3)
        scale = 1 / (255 * torch.tensor(std).view(3, 1, 1))
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", -255 * scale * torch.tensor(mean).view(3, 1, 1), persistent=False)

    def resize(self, pixels: Tensor) -> Tensor:
        """Bring gray images (B, H, W), uint8, to the backbone's size: (B, 1, size, size), 0 to 255.

        They stay uint8 where they have that size, and become float32 where not.
        """
        images, size = pixels.unsqueeze(1), self.architecture.size
        if images.shape[-1] == size:
            return images
        return interpolate(images.float(), (size, size), mode="bilinear", antialias=True)

    def normalize(self, images: Tensor) -> Tensor:
        """Turn what `resize` gives into what the backbone takes: (B, 3, size, size), float32."""
        scaled = images.float() * self.scale
        return scaled if self.architecture.normalization == "none" else scaled.add_(self.shift)

    def forward(self, images: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """Give logits (B, 2), negative first, for images from `normalize` and masks from the head."""
        logits: Tensor = self.head(self.backbone(images).flatten(1), masks)
        return logits

    @torch.inference_mode()
    def predict_proba(self, pixels: Tensor) -> Tensor:
        """Give P(positive), float32 of shape (B,), for gray images (B, H, W), uint8, on the model's device."""
        logits: Tensor = self(self.normalize(self.resize(pixels)))
        return logits.float().softmax(1)[:, POSITIVE_CLASS]


class Head(nn.Module):
    """Dropout, the hidden layers, dropout and two logits.

    A ReLU follows the first hidden layer and every further one but the last, which is how the recipe with
    hidden = [256, 128] is drawn: the 128 are a linear bottleneck.
    """

    def __init__(self, features: int, hidden: list[int], dropout: float) -> None:
        super().__init__()
        widths = [features, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.logits = nn.Linear(widths[-1], 2)
        self._dropout = dropout
        self._dropped = [features, widths[-1]] if hidden else [features]

    def dropout_masks(self, rows: int, generator: Generator) -> list[Tensor]:
        """Draw what dropout does to a batch: factors of 0 or 1 / (1 - dropout), (rows, width) per dropout layer.

        They are drawn apart from `forward`, so that a part of a batch gets the masks it would have in the whole.
        """
        keep = 1 - self._dropout
        return [torch.bernoulli(torch.full((rows, width), keep), generator=generator) / keep for width in self._dropped]

    def forward(self, features: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """Give logits (B, 2) for features (B, width); without masks nothing is dropped."""
        if masks:
            features = features * masks[0].to(features)
        for index, layer in enumerate(self.hidden):
            features = layer(features)
            if index == 0 or index < len(self.hidden) - 1:
                features = features.relu()
        if len(masks) > 1:
            features = features * masks[1].to(features)
        logits: Tensor = self.logits(features)
        return logits


def load_pretrained(network: Classifier, folder: Path) -> None:
    """Load the backbone's first weights as the weights stage left them in `folder`.

    Raises:
        FileNotFoundError: they are missing.
        UserError: they are another backbone's.
    """
    if read_json(folder / "origin.json")["source"] == "none":
        return
    state = load_file(folder / "backbone.safetensors")
    wanted = network.backbone.state_dict()
    foreign = [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]
    if foreign:
        raise UserError(
            f"{folder}: the weights are not those of {network.architecture.backbone} ({foreign[0]} does not fit); "
            "run: dvc repro weights"
        )
    network.backbone.load_state_dict({name: state[name] for name in wanted})


def save_weights(network: Classifier, folder: Path) -> None:
    """Write the weights alone, as safetensors, into the folder."""
    with atomic_path(folder / WEIGHTS_FILE) as aside:
        # Writing by ourselves says so when the disk is full.
        aside.write_bytes(save_tensors({name: value.contiguous() for name, value in network.state_dict().items()}))


def save_description(network: Classifier, folder: Path, facts: dict[str, Any]) -> None:
    """Write, as JSON, what `load` needs beside the weights, and `facts` about the model."""
    digest = sha256_of_file(folder / WEIGHTS_FILE)
    write_json(folder / DESCRIPTION_FILE, {**asdict(network.architecture), "weights_sha256": digest, **facts})


def load_classifier(folder: Path, device: torch.device) -> Classifier:
    """Load a model that was saved and described in the folder, ready to predict; nothing in the files is executed.

    Raises:
        FileNotFoundError: a file is missing.
        UserError: the weights are not the ones the description names.
    """
    facts, weights = read_json(folder / DESCRIPTION_FILE), folder / WEIGHTS_FILE
    if sha256_of_file(weights) != facts["weights_sha256"]:
        raise UserError(f"{weights}: not the weights that {DESCRIPTION_FILE} describes; run: dvc checkout {weights}")
    network = Classifier(Architecture(**{name: facts[name] for name in Architecture.__dataclass_fields__}))
    network.load_state_dict(load_file(weights))
    return network.to(device).eval()
