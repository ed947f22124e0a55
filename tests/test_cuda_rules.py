"""The rules of CUDA, on a fake device: devices and generators, determinism, host waits, streams and graphs."""

from collections import Counter
from functools import partial
from itertools import pairwise
from uuid import uuid4

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda, FakeCudaTensor
from test_training import GROUP_LEVERS, LITE, params, table
from torch import nn
from torch.nn.functional import cross_entropy, dropout
from torchvision.models.squeezenet import Fire

from pipeline.core.config import FindingParams
from pipeline.core.errors import Interrupted
from pipeline.data.dataset import PackedImages
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference.candidate import Candidate
from pipeline.inference.dataset import probability_table
from pipeline.models.classifier import Architecture, Classifier
from pipeline.training import captured_step, determinism, loop
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.distributed import ProcessGroup

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the rules of a real device hold"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True, scope="module")
def _deterministic():
    determinism.make_deterministic(1)
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pack of 24 images, every second one with a bright center, and no pretrained weights."""
    images = np.random.default_rng(0).integers(40, 90, (24, 32, 32)).astype(np.uint8)
    images[1::2, 8:24, 8:24] += 120
    folder = tmp_path_factory.mktemp("pack")
    np.save(folder / "images.npy", images)
    (folder / "images.json").write_text('{"resize": "stretch"}')
    (folder / "origin.json").write_text('{"source": "none"}')
    return folder


@pytest.fixture
def device():
    with FakeCuda() as device:
        yield device


# The device


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + torch.ones(2),
        lambda x: torch.ones(2) * x,
        lambda x: torch.cat([x, torch.ones(2)]),
        lambda x: torch.ones(2).add_(x),
        lambda x: nn.functional.linear(torch.ones(2, 2), x),
        lambda x: torch.index_select(x, 0, torch.tensor([0])),
        lambda x: torch.tensor(1.0).add_(x[0]),
    ],
)
def test_tensors_of_two_devices_in_an_operator_raise(device, operation):
    with pytest.raises(RuntimeError, match=r"^Expected all tensors to be on the same device"):
        operation(torch.ones(2, device="cuda"))


@pytest.mark.parametrize(
    "draw",
    [partial(torch.rand, 2, device="cuda"), lambda **generator: torch.ones(2, device="cuda").bernoulli_(**generator)],
)
def test_a_generator_of_the_cpu_raises_and_the_device_has_its_own(device, draw):
    with pytest.raises(RuntimeError, match=r"^Expected a 'cuda' device type for generator"):
        draw(generator=torch.Generator())
    torch.manual_seed(1)
    first, on_cpu = draw().cpu(), torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), on_cpu)
    assert torch.equal(draw().cpu(), first)


@pytest.mark.parametrize(
    "layer",
    [
        nn.AdaptiveAvgPool2d(2),
        nn.AdaptiveMaxPool2d(2),
        nn.ReflectionPad2d(1),
        partial(nn.functional.interpolate, size=(3, 3), mode="bicubic", antialias=True),
        lambda x: nn.functional.grid_sample(x, torch.zeros(1, 2, 2, 2, device="cuda"), align_corners=False),
    ],
)
def test_operators_without_a_deterministic_kernel_raise(device, layer):
    images = torch.ones(1, 1, 5, 5, device="cuda", requires_grad=True)
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        layer(images).sum().backward()
    torch.set_deterministic_debug_mode("default")
    layer(images).sum().backward()
    determinism.make_deterministic(1)
    assert isinstance(images.grad, FakeCudaTensor)


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda x: x[0].item(), "_local_scalar_dense"),
        (lambda x: bool(x.any()), "_local_scalar_dense"),
        (lambda x: x.cpu(), "copy to the host"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "boolean index"),
        (lambda x: x[torch.tensor([0])], "index on the CPU"),
        (lambda x: torch.ones(1).to("cuda"), "copy to the device"),
        (lambda x: torch.tensor(1.0, device="cuda"), "copy to the device"),
        (
            lambda x: torch.ones(1).to("cuda", non_blocking=True),
            "copy to the device, not pinned",
        ),
        (lambda x: torch.cuda.synchronize(), "synchronize"),
    ],
)
def test_what_waits_is_counted_with_its_line(device, operation, reason):
    x = torch.ones(2, device="cuda")
    operation(x)
    assert device.waits == {f"{reason}, tests/test_cuda_rules.py:{operation.__code__.co_firstlineno}": 1}
    with (
        pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        operation(x)


def test_copies_of_pinned_memory_do_not_wait_and_are_finished_by_an_event(device):
    pinned, result = torch.ones(2, pin_memory=True), torch.zeros(2, pin_memory=True)
    x = pinned.to("cuda", non_blocking=True)
    result.copy_(x, non_blocking=True)
    assert result.tolist() == [0, 0]
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    assert result.tolist() == [1, 1]
    assert sum(device.copies.values()) == 2
    assert [wait.split(",")[0] for wait in device.waits] == ["Event.synchronize"]


def test_pinned_memory_must_not_change_before_it_is_copied(device):
    pinned = torch.ones(2, pin_memory=True)
    pinned.to("cuda", non_blocking=True)
    pinned.zero_()
    with pytest.raises(RuntimeError, match="pinned memory was changed"):
        torch.cuda.synchronize()


def test_a_stream_must_wait_for_the_one_that_wrote_its_input(device):
    x, default, other = torch.ones(2, device="cuda"), torch.cuda.current_stream(), torch.cuda.Stream()
    with torch.cuda.stream(other):
        with pytest.raises(RuntimeError, match="without waiting for it"):
            x + 1
        other.wait_stream(default)
        y = x + 1
    with pytest.raises(RuntimeError, match="without waiting for it"):
        y + 1
    event = torch.cuda.Event()
    event.record(other)
    event.synchronize()
    assert (y + 1).cpu().tolist() == [3, 3]


def test_a_graph_computes_with_what_its_inputs_hold_when_it_is_replayed(device):
    x, total, graph = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total += x
        doubled = 2 * x
        noise = torch.rand(2, device="cuda")
    assert total.cpu().tolist() == [0, 0]
    for value in (3, 4):
        x.fill_(value)
        torch.manual_seed(value)
        graph.replay()
        assert doubled.cpu().tolist() == [2 * value] * 2
        torch.manual_seed(value)
        assert torch.equal(noise, torch.rand(2, device="cuda"))
    assert total.cpu().tolist() == [7, 7]


def test_nothing_of_the_device_remains():
    with FakeCuda():
        tensor = torch.ones(1, device="cuda")
    assert not torch.cuda.is_available()
    with pytest.raises(RuntimeError, match="after its device is gone"):
        tensor + 1
    tensor = torch.ones(1, requires_grad=True)
    tensor.sum().backward()
    assert type(tensor.grad) is torch.Tensor


# Backbones


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("alexnet", 64), ("squeezenet1_1", 32), ("vgg16", 32), ("googlenet", 32), ("resnet18", 32), ("densenet121", 32),
        ("convnext_tiny", 32), ("efficientnet_b0", 32), (LITE, 32), ("timm/vit_tiny_patch16_224", 224),
    ],
)  # fmt: skip
def test_a_training_step_of_a_backbone_is_deterministic_and_does_not_wait(device, backbone, size):
    pixels = torch.zeros(2, size + 8, size + 8, dtype=torch.uint8, device="cuda")
    network = Classifier(Architecture(backbone, [], 0.0, size, "imagenet", size + 8, "stretch")).to("cuda").train()
    with torch.no_grad():
        network(network.normalize(network.resize(pixels)))  # makes the pooling matrices
    device.waits.clear()
    logits = network(network.normalize(network.resize(pixels)))
    cross_entropy(logits, torch.zeros_like(logits)).backward()
    assert device.waits == {}
    assert all(weight.grad is not None for weight in network.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"lung_crop": True}, {"marker_mask": True}, {"border_mask": 0.1}, {"intensity_normalization": "standardize"},
        {"intensity_normalization": "equalize"}, {"test_time_augmentation": "crops"},
    ],
)  # fmt: skip
def test_preprocessing_agrees_with_the_cpu_and_does_not_wait(device, options):
    pixels = torch.randint(0, 256, (2, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = Classifier(Architecture("squeezenet1_1", [], 0.0, 40, "imagenet", 48, "stretch", **options)).eval()
    expected, there = network.predict_proba(pixels), pixels.to("cuda")
    network = network.to("cuda")
    device.waits.clear()
    found = network.predict_proba(there)
    assert device.waits == {}
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6)


# Training

ALEXNET = {
    "backbone": "alexnet", "image_size": 64, "head_hidden": [16, 8], "dropout": 0.3, "mixup_alpha": 0.5,
    "optimizer": "adam", "normalization": "none", "reset_optimizer_each_epoch": True,
}  # fmt: skip
VARIANTS = {
    "alexnet": ALEXNET,
    "augmentations": {"rotation": 10.0, "zoom": 0.2, "shift": 0.1, "gamma_jitter": 0.5, "mixup_alpha": 0.4},
    "style": {
        "histogram_exchange": 0.5, "fourier_exchange": 0.5, "contrast_jitter": 0.5, "min_resolution": 0.5,
        "noise": 10.0, "min_jpeg_quality": 50, "mixup_alpha": 0.4, "cutmix_alpha": 1.0, "mixup_pairing": "same_label",
        "label_smoothing": 0.1,
    },
    "ema": {"ema_decay": 0.9, "optimizer": "sgd", "image_size": 40},
    "groups": {**GROUP_LEVERS, "swa_epochs": 1, "gradient_accumulation_steps": 2},
    "features": {"feature_views": 3, "frozen_epochs": 1, "mixup_alpha": 0.4, "test_time_augmentation": "flip"},
    "feature maps": {
        "backbone": LITE, "image_size": 64, "feature_maps": 3, "feature_views": 2, "frozen_epochs": 1,
    },
    "preprocessing": {
        "lung_crop": True, "marker_mask": True, "border_mask": 0.1, "intensity_normalization": "equalize",
        "test_time_augmentation": "crops",
    },
    "float16": {"precision": "float16", "gradient_accumulation_steps": 2},
}  # fmt: skip


def train(folder, device, *, graphs=True, stop_calls=(), **changes):
    """Train with interruptions at the given calls of `stop`.

    Returns:
        The weights, on the CPU; the result; and what waits and what is copied in every step after the first one,
        without line numbers.
    """
    checkpoint, steps = Checkpoint(folder / "checkpoints", uuid4().hex), []

    def run(stop_call=None):
        calls, counts = 0, []

        def stop():
            nonlocal calls
            calls += 1
            counts.append((trainer.epoch, trainer.step, fake.waits + fake.copies))
            return 15 if calls == stop_call else 0

        pack = PackedImages(folder / "images.npy", torch.device(device))
        recipe = params(**{"batch_size": 2, "epochs": 1, "rotation": 0.0, **changes})
        trainer = loop.Trainer(recipe, 0, table(), pack, folder, ProcessGroup())
        result = trainer.run(checkpoint, lambda *_: None, stop)
        for (epoch, step, before), (next_epoch, next_step, after) in pairwise(counts):
            if step and (next_epoch, next_step) == (epoch, step + 1):
                steps.append(Counter(key.rpartition(":")[0] for key in (after - before).elements()))
        return result

    with FakeCuda(graphs=graphs) as fake:
        for call in stop_calls:
            with pytest.raises(Interrupted):
                run(call)
            lr = checkpoint.load()["optimizer"]["param_groups"][0]["lr"]
            assert isinstance(lr, float)  # no view of a block, with which a whole batch would be saved
        result = run()
        return {name: value.cpu() for name, value in result.network.state_dict().items()}, result, steps


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_training_agrees_with_the_cpu_and_a_step_waits_for_nothing(folder, changes, monkeypatch):
    monkeypatch.setattr(captured_step, "QUEUED_STEPS", 5)
    weights, result, steps = train(folder, "cuda", **changes)
    on_cpu, cpu_result, _ = train(folder, "cpu", **changes)
    torch.testing.assert_close(weights, on_cpu, rtol=1e-3, atol=1e-3 if "precision" in changes else 1e-4)
    torch.testing.assert_close(result.predictions, cpu_result.predictions, rtol=0, atol=1e-3)

    copies = {f"copy to the {there}, pipeline/training/captured_step.py": 1 for there in ("device", "host")}
    capture = copies | {"capture, pipeline/training/captured_step.py": 1}
    queue_is_full = copies | {"Event.synchronize, pipeline/training/captured_step.py": 1}  # of five steps before
    assert steps == [copies, copies, capture, copies, *[queue_is_full] * 3]


def test_graphs_and_interruptions_do_not_change_the_weights(folder, monkeypatch):
    forward = Fire.forward  # of SqueezeNet, which gets random numbers of the device, as stochastic depth takes them
    monkeypatch.setattr(Fire, "forward", lambda fire, images: dropout(forward(fire, images), 0.1, fire.training))
    changes = {"epochs": 3, "batch_size": 4, "frozen_epochs": 1, "ema_decay": 0.9, "reset_optimizer_each_epoch": True}
    whole, result, _ = train(folder, "cuda", **changes)
    # An epoch has four steps and two batches of validation images. The fourth step is captured; the first epoch, which
    # trains the head alone, has a graph of its own.
    for options in ({"graphs": False}, {"stop_calls": [2, 8]}, {"stop_calls": [4, 3]}):
        other, other_result, _ = train(folder, "cuda", **options, **changes)
        assert all(torch.equal(other[name], value) for name, value in whole.items()), options
        assert [entry.row() for entry in other_result.history] == [entry.row() for entry in result.history]


def test_evaluation_and_prediction_on_the_device_agree_with_the_cpu(folder):
    torch.manual_seed(0)
    network = Classifier(Architecture("resnet18", [8], 0.2, 40, "imagenet", 32, "stretch")).eval()

    def predict(device):
        pack = PackedImages(folder / "images.npy", torch.device(device))
        evaluated = probability_table({"a": [network.to(device)]}, pack, list(range(24)))["a"]
        config = EnsembleConfig(["a"], "mean", "mean", [1.0], 0.5)
        candidate = Candidate({"a": [network]}, config, FindingParams())
        return evaluated.to_numpy(), candidate.predict(torch.from_numpy(np.load(folder / "images.npy")))[
            "score"
        ].to_numpy()

    expected = predict("cpu")[0]
    with FakeCuda() as fake:
        for probabilities in predict("cuda"):
            assert probabilities == pytest.approx(expected, abs=1e-6)
    assert not [wait for wait in fake.waits if "not pinned, pipeline/data" in wait]
