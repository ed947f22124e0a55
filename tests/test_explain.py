"""Heatmaps of candidates: what they average, where they lie on the radiograph, and that threads do not disturb them."""

import io
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from fake_cuda import FakeCuda
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate
from torchvision.models import VisionTransformer

from pipeline.core.config import FindingParams
from pipeline.data import images
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference import explain
from pipeline.inference.candidate import Candidate
from pipeline.models import backbones
from pipeline.models.classifier import Architecture, Classifier
from pipeline.models.heatmaps import OPACITY, compute_heatmaps

pytestmark = pytest.mark.usefixtures("one_thread")

PIXELS = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = [0, 1, 1]
LITE = "timm/tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def model() -> Candidate:
    """An ensemble of a network and of the two networks of a cross-validated seed, at another size than the images."""
    torch.manual_seed(0)
    networks = [Classifier(Architecture("squeezenet1_1", [], 0.0, 64, "imagenet", 96, "stretch")) for _ in range(3)]
    members = {"seed-0": [networks[0].eval()], "seed-1": [one.eval() for one in networks[1:]]}
    return Candidate(members, EnsembleConfig(list(members), "mean", "mean", [0.5, 0.5], 0.5), FindingParams())


def test_a_heatmap_is_the_mean_of_the_members_and_leaves_out_those_that_do_not_count(model):
    alone = [
        interpolate(torch.from_numpy(compute_heatmaps(network, PIXELS, LABELS))[:, None], (96, 96), mode="bilinear")
        for network in (*model.members["seed-0"], *model.members["seed-1"])
    ]
    first, *folds = (maps[:, 0].numpy() for maps in alone)
    maps = explain.explain(model, PIXELS, LABELS)
    assert (maps.dtype, maps.shape) == (np.float32, (3, 96, 96))
    assert maps.min() >= 0
    assert 0.3 < maps.max() <= 1
    assert maps == pytest.approx(first / 2 + sum(folds) / 4, abs=1e-6)
    greedy = replace(model.config, method="greedy", weights=[1.0, 0.0])
    maps = explain.explain(Candidate(model.members, greedy, model.finding), PIXELS, LABELS)
    assert maps == pytest.approx(first, abs=1e-6)


def test_a_heatmap_of_feature_maps_shows_the_terms_of_the_logit():
    torch.manual_seed(0)
    network = Classifier(Architecture(LITE, [], 0.0, 160, "imagenet", 96, "stretch", feature_maps=3)).eval()
    inputs = network.normalize(network.resize(PIXELS))
    with torch.no_grad():
        network.head.scaler.mean.copy_(network.extract_features(inputs[:1])[0])
        network.head.logits.weight[:, 40:] = 0  # of the two later maps: the first, at a stride of 8, has 40 channels
        (first, *_), weight = network.compute_feature_maps(inputs), network.head.logits.weight[1, :40]
        deviation = first - network.head.scaler.mean[:40, None, None]
        expected = interpolate(torch.einsum("c,bchw->bhw", weight, deviation)[:, None], (160, 160), mode="bilinear")
    expected = expected[:, 0].relu()
    maps = compute_heatmaps(network, PIXELS, [1, 1, 1])
    assert maps == pytest.approx((expected / expected.amax(dim=(1, 2), keepdim=True)).numpy(), abs=1e-5)


def timm_transformer() -> nn.Module:
    return timm.create_model("test_vit", img_size=128, num_classes=0)


def torchvision_transformer() -> nn.Module:
    network = VisionTransformer(128, 16, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64)
    network.heads = nn.Sequential()
    return network


@pytest.mark.parametrize("build", [timm_transformer, torchvision_transformer])
def test_a_heatmap_of_a_vision_transformer_shows_what_its_attention_reads(build, monkeypatch):
    monkeypatch.setattr(backbones, "build_backbone", lambda _: build())
    torch.manual_seed(0)
    network = Classifier(Architecture("vit", [], 0.0, 128, "none", 128, "stretch")).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    pixels, region = torch.full((3, 128, 128), 60, dtype=torch.uint8), PIXELS[0, :48, :48]
    for image, row, column in ((0, 16, 16), (0, 64, 64), (1, 32, 16), (2, 48, 48)):
        pixels[image, row : row + 48, column : column + 48] = region
    twice = compute_heatmaps(network, pixels[:1], [1])[0]
    assert np.abs(twice[32:48, 32:48] - twice[80:96, 80:96]).max() > 0.05  # not only what the patches look like
    for name, parameter in network.named_parameters():
        if "pos_embed" in name:
            parameter.data.zero_()
    _, first, second = compute_heatmaps(network, pixels, [1, 1, 1])
    assert first.max() > 0.9
    assert second[32:112, 48:112] == pytest.approx(first[16:96, 16:80], abs=1e-3)


def test_heatmaps_and_predictions_at_the_same_time_do_not_disturb_each_other(model):
    expected = [explain.explain(model, PIXELS, labels) for labels in (LABELS, LABELS[::-1])]
    probabilities = model.predict(PIXELS)["probability"]

    def explain_again(run: int) -> np.ndarray:
        with torch.inference_mode():  # as a caller may be
            return explain.explain(model, PIXELS.clone(), (LABELS, LABELS[::-1])[run % 2])

    with ThreadPoolExecutor(4) as pool:
        maps = pool.map(explain_again, range(8))
        predictions = pool.map(lambda _: model.predict(PIXELS)["probability"], range(8))
        for run, found in enumerate(maps):
            assert (found == expected[run % 2]).all()
        assert all((found == probabilities).all() for found in predictions)
    assert all(parameter.grad is None for parameter in model.members["seed-0"][0].parameters())
    assert not any(module._forward_hooks for module in model.members["seed-0"][0].modules())


def test_heatmaps_of_networks_on_another_device_are_computed_on_the_cpu(model):
    (network,) = model.members["seed-0"]
    expected = compute_heatmaps(network, PIXELS, LABELS)
    with FakeCuda() as device:
        there = deepcopy(network).to("cuda")
        before = device.operators
        assert (compute_heatmaps(there, PIXELS.to("cuda"), LABELS) == expected).all()
        assert device.operators - before < 60  # which copy the 54 tensors of the network and the images
        assert there.scale.device.type == "cuda"


@pytest.mark.parametrize("resize", ["stretch", "pad"])
@pytest.mark.parametrize("shape", [(300, 120), (120, 300), (200, 200)])
def test_a_heatmap_lies_where_its_region_is_in_the_radiograph(shape, resize):
    gray = np.zeros(shape, np.uint8)
    gray[20:60, 40:100] = 255
    square = images.resize_to_square(gray, 96, resize).astype(np.float32) / 255  # as if the network saw the rectangle
    size = shape[::-1]
    drawn = Image.open(io.BytesIO(explain.heatmap_png(square, size, resize)))
    assert (drawn.mode, drawn.size) == ("RGBA", size)
    opacity = np.asarray(drawn)[..., 3]
    assert opacity.max() == round(OPACITY * 255)
    is_hot = opacity > OPACITY * 128
    assert (is_hot & (gray > 0)).sum() / (is_hot | (gray > 0)).sum() > 0.85
    laid = np.asarray(explain.overlay(gray, square, resize)).astype(int)
    assert laid.shape == (*shape, 3)
    is_colored = laid.max(axis=2) - laid.min(axis=2) > 20
    assert is_colored[25:55, 45:95].all()
    assert not is_colored[80:, 120:].any()
    untouched = explain.overlay(gray, np.zeros((96, 96), np.float32), resize)
    assert (np.asarray(untouched) == gray[..., None]).all()
