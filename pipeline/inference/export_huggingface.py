"""A candidate as a folder in the format of the Hugging Face Hub: safetensors, config.json and a model card."""

import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from string import Template
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import nn

from pipeline.core.errors import UserError
from pipeline.core.files import make_folder, resolve_target, write_json
from pipeline.core.markdown import escape_markdown
from pipeline.evaluation import ensemble
from pipeline.evaluation.calibration import PROBABILITY_EPS
from pipeline.inference.candidate import Candidate
from pipeline.inference.export_metadata import describe_ensemble
from pipeline.models import preprocessing
from pipeline.models.backbones import FIRST_LAYERS, TORCHXRAYVISION
from pipeline.models.classifier import NORMALIZATIONS, Architecture, Classifier

TIMM = "timm/"  # prefix of the backbones that are timm's
PREPROCESSING_FILE = "preprocessing.py"  # in the folder, where it is needed
CROP_MODES = {"stretch": "squash", "pad": "border"}  # timm's names
SCORES = {  # by the method, and for votes by what decides a tie
    "mean": "members.mean()",
    "logits": f"torch.logit(members, eps={PROBABILITY_EPS}).mean().sigmoid()",
    "greedy": 'members @ torch.tensor(config["weights"], dtype=torch.float64)',
    "vote, positive": "members.sort().values[len(members) // 2]",
    "vote, negative": "members.sort().values[(len(members) - 1) // 2]",
    "vote, mean": "members.mean().clamp(*members.sort().values[[(len(members) - 1) // 2, len(members) // 2]])",
}
CODE_OF_TIMM = "import timm", 'network = timm.create_model(f"local-dir:{folder}", pretrained=True)'
MODEL_CARD = """\
---
license: apache-2.0
library_name: $library
pipeline_tag: image-classification
tags: [image-classification, chest-x-ray, radiology, research-only, $library]
---

# $title

Classifies chest radiographs as $negative or $positive. Exported from $title, content hash
`$content_hash`.

**For research and teaching only. Not a medical device; not for diagnosis.**

## Files

Networks of `$architecture` are in these folders, of which `.` is this one: $folders.
`$loader` loads one.
`config.json` here says under `ensemble` how their probabilities are combined.$preprocessing_file

## From an image to a probability

Run in this folder, for an upright gray image in which bone is bright:

```python
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
$imports


def load(folder):
    $network
    return network.eval(), json.loads(Path(folder, "config.json").read_text())["pretrained_cfg"]


def predict(folder, pixels):
    network, expected = load(folder)
    size = expected["input_size"][1:]
    $preprocess
    mean, std = (torch.tensor(expected[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        of_views = [network((view / 255 - mean) / std).softmax(1)[0, 1] for view in $views]
    return torch.stack(of_views).mean().double()


config = json.loads(Path("config.json").read_text())["ensemble"]
image = Image.open("radiograph.png").convert("L")
image = $square
pixels = torch.from_numpy(np.array(image, dtype=np.float32))[None, None]
members = torch.stack([
    torch.stack([predict(folder, pixels) for folder in folders]).mean() for folders in config["folders"].values()
])
score = $score
probability = (torch.logit(score, eps=$eps) / config["temperature"] + config["bias"]).sigmoid().item()
print(probability, config["classes"][int(probability >= config["threshold"])])
```

Images of more than 8 bits and DICOM files must be converted to gray levels from 0 to 255 before, a DICOM as its VOI
LUT or window says. timm's own transforms for a `config.json` $transforms.

Output: $output.

## Evaluation and limitations

$card
"""


def check_target(folder: Path) -> Path:
    """Return the folder to write, behind symbolic links.

    Raises:
        UserError: it is not empty.
    """
    target = resolve_target(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{folder}: not an empty folder; give a new one, or delete it")
    return target


def write_huggingface(candidate: Candidate, folder: Path, origin: Mapping[str, str], title: str, card: str) -> None:
    """Write a candidate as a folder that can be uploaded to the Hub; its model card says what loads it.

    Args:
        candidate: on the CPU.
        folder: from `check_target`.
        origin: `model`, `version` and `content_hash`.
        title: of the model card.
        card: Markdown for the model card, such as the description of the registered version.
    """
    # Inside of the folder, which may be a mounted disk or the current one, and then cannot be replaced.
    with make_folder(folder), tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch:
        _write(candidate, Path(scratch), origin, title, card)
        for one in Path(scratch).iterdir():
            one.rename(folder / one.name)


def _write(candidate: Candidate, folder: Path, origin: Mapping[str, str], title: str, card: str) -> None:
    folders, networks = dict[str, list[str]](), dict[str, Classifier]()
    is_single = sum(map(len, candidate.members.values())) == 1
    for name, of_folds in candidate.members.items():
        folds = [f"{name}/fold-{fold}" for fold in range(len(of_folds))]
        folders[name] = ["."] if is_single else [name] if len(folds) == 1 else folds
        networks |= zip(folders[name], of_folds, strict=True)
    first, config, classes = next(iter(networks.values())), candidate.config, list(candidate.finding.class_names)
    if first.architecture.feature_maps:
        raise UserError("train.feature_maps: timm loads no such model by name; run: cxr export MODEL --onnx FILE")
    own = {path: _to_timm(network) for path, network in networks.items()}
    is_timm = None not in own.values()
    description = describe_ensemble(candidate, origin) | {"folders": folders}
    for path, network in networks.items():
        fields = {"label_names": classes} | ({"ensemble": description} if path == "." else {})
        _write_network(own[path] if is_timm else _to_sequential(network), network.architecture, folder / path, fields)
    if "." not in networks:
        write_json(folder / "config.json", {"ensemble": description})
    imports, network_code = CODE_OF_TIMM if is_timm else _code_of_sequential(first)
    preprocess, views = _code_of_preprocessing(first)
    is_plain = "preprocessing." not in preprocess + views
    if not is_plain:
        (folder / PREPROCESSING_FILE).write_bytes(Path(preprocessing.__file__).read_bytes())
        imports += "\n\nimport preprocessing"
    text = Template(MODEL_CARD).substitute(
        library="timm" if is_timm else "pytorch",
        title=escape_markdown(title),
        negative=escape_markdown(classes[0]),
        positive=escape_markdown(classes[1]),
        content_hash=origin["content_hash"],
        architecture=first.architecture.backbone,
        folders=", ".join(f"`{path}`" for path in networks),
        loader='timm.create_model("local-dir:FOLDER", pretrained=True)' if is_timm else "load(FOLDER)",
        imports=imports,
        network=network_code,
        preprocess=preprocess,
        views=views,
        preprocessing_file="" if is_plain else f"\n`{PREPROCESSING_FILE}` prepares the images; it needs only torch.",
        transforms="are near: they resize once" if is_plain else f"lack what `{PREPROCESSING_FILE}` does",
        square=description["square"],
        score=SCORES[f"vote, {config.tie}" if config.method == "vote" else config.method],
        eps=PROBABILITY_EPS,
        output=ensemble.describe_output(config, candidate.finding),
        card=card.strip(),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _to_timm(network: Classifier) -> Any:
    """Return timm's own network with these weights, or None if it has none that computes the same."""
    import timm

    name = network.architecture.backbone
    if not name.startswith(TIMM) or network.architecture.head_hidden:
        return None
    own: Any = timm.create_model(name.removeprefix(TIMM), num_classes=2).eval()
    classifier = own.get_classifier()
    if not isinstance(classifier, nn.Linear) or classifier.weight.shape != network.head.logits.weight.shape:
        return None
    own.load_state_dict(network.backbone.state_dict(), strict=False)
    classifier.load_state_dict(network.head.logits.state_dict())
    size = network.architecture.size
    inputs = torch.rand(1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():  # in float64, so that rounding decides nothing
        is_same = torch.allclose(deepcopy(own).double()(inputs), deepcopy(network).double()(inputs))
    return own if is_same else None


def _to_sequential(network: Classifier) -> nn.Module:
    """Return backbone and head as a module of torch's own layers, whose tensors have the names of those layers."""
    layers = list[nn.Module]()
    for index, layer in enumerate(hidden := network.head.hidden):
        layers += [layer, nn.ReLU()] if index == 0 or index < len(hidden) - 1 else [layer]
    head = nn.Sequential(*layers, network.head.logits)
    return nn.Sequential(OrderedDict(backbone=network.backbone, flatten=nn.Flatten(), head=head)).eval()


def _write_network(network: Any, architecture: Architecture, folder: Path, fields: dict[str, Any]) -> None:
    """Write the weights and config.json of a network from `_to_timm` or `_to_sequential`."""
    from timm.models import save_for_hf

    mean, std = NORMALIZATIONS[architecture.normalization]
    inputs = {
        "input_size": (len(mean), architecture.size, architecture.size),
        "mean": mean,
        "std": std,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": CROP_MODES[architecture.resize],
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    if type(network) is nn.Sequential:
        name = architecture.backbone
        shape = {"architecture": name.removeprefix(TIMM), "head_hidden": architecture.head_hidden, "num_classes": 2}
        library = "timm" if name.startswith(TIMM) else "torchvision"
        write_json(folder / "config.json", {"library": library, **shape, "pretrained_cfg": inputs, **fields})
    else:
        save_for_hf(network, str(folder), fields, safe_serialization=True, data_config=inputs)
        weights.unlink()  # timm's, which nobody else can read
    weights.write_bytes(save_tensors({name: tensor.contiguous() for name, tensor in network.state_dict().items()}))


def _code_of_preprocessing(network: Classifier) -> tuple[str, str]:
    """Return Python code that makes `images` from `pixels`, and an expression for the views to predict."""
    one, pixels = network.architecture, "pixels.double()" if network.adjusts else "pixels"
    lines = [f'images = torch.nn.functional.interpolate({pixels}, size, mode="bilinear", antialias=True)']
    if one.lung_crop:
        lines = [f"images = preprocessing.resample({pixels}, preprocessing.LungField()(pixels), {one.size})"]
    if network.adjusts:
        options = f"{one.marker_mask}, {one.border_mask}, {one.intensity_normalization!r}"
        lines.append(f"images = preprocessing.adjust(images, {options})")
    augmentation = one.test_time_augmentation
    views = "[images]" if augmentation == "none" else f"preprocessing.views(images, {augmentation!r})"
    return "\n    ".join(lines), views


def _code_of_sequential(network: Classifier) -> tuple[str, str]:
    """Return Python code that imports what is needed, and that builds and loads a network from `_to_sequential`."""
    name, backbone = network.architecture.backbone, network.backbone
    if name.startswith(TIMM):
        library, whole = "import timm", f'timm.create_model("{name.removeprefix(TIMM)}")'
        without_classifier = "backbone.reset_classifier(0)"
    else:
        options = ", aux_logits=False, transform_input=True" if hasattr(backbone, "transform_input") else ""
        own_name = name.removeprefix(TORCHXRAYVISION)
        library, whole = "from torchvision import models", f'models.get_model("{own_name}", weights=None{options})'
        child, kept = list(backbone.named_children())[-1]  # `build_backbone` left what comes before the classifier
        layers = list(kept.children())
        part = f"backbone.{child}[:{len(layers)}]" if layers else "torch.nn.Identity()"
        if layers and all(isinstance(layer, nn.AdaptiveAvgPool2d) for layer in layers):
            part = "torch.nn.AdaptiveAvgPool2d(1)"
        without_classifier = f"backbone.{child} = {part}"
    head = ", ".join(
        f"torch.nn.Linear({layer.in_features}, {layer.out_features})"
        if isinstance(layer, nn.Linear)
        else "torch.nn.ReLU()"
        for layer in _to_sequential(network).get_submodule("head").children()
    )
    layer = FIRST_LAYERS.get(name)
    first = [f'backbone.set_submodule("{layer}", torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False))'] if layer else []
    lines = [
        f"backbone = {whole}",
        *first,
        without_classifier,
        f"head = torch.nn.Sequential({head})",
        "network = torch.nn.Sequential(OrderedDict(backbone=backbone, flatten=torch.nn.Flatten(), head=head))",
        'network.load_state_dict(load_file(Path(folder, "model.safetensors")))',
    ]
    imports = ["from collections import OrderedDict", "from safetensors.torch import load_file", library]
    return "\n".join(imports), "\n    ".join(lines)
