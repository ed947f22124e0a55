import copy
import math
import shutil
from functools import partial
from importlib.metadata import version
from itertools import chain, count, repeat
from uuid import uuid4

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy, one_hot

from pipeline.core import config
from pipeline.core.errors import Interrupted, UserError
from pipeline.data.dataset import PackedImages
from pipeline.data.manifest import read_split
from pipeline.evaluation.metrics import score_predictions
from pipeline.models.classifier import Architecture, Classifier, Head
from pipeline.training import captured_step, determinism, loop, progress
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.distributed import ProcessGroup
from pipeline.training.objective import Objective
from pipeline.training.schedule import build_optimizer, learning_rate_at

DEMO_PARAMS = config.load_config(ROOT / "params.yaml").profiles["demo"].train
SMALL, LITE = "squeezenet1_1", "timm/tf_efficientnet_lite0"


TINY = {
    "backbone": SMALL, "head_hidden": [], "dropout": 0.2, "image_size": 32, "normalization": "imagenet", "epochs": 2,
    "frozen_epochs": 0, "keep": "best_f1", "early_stopping_patience": None, "batch_size": 8, "sampling": "shuffle",
    "positive_oversampling": 1.0, "class_weights": (1.0, 1.0), "flip": 0.5, "rotation": 5.0, "zoom": 0.0, "shift": 0.0,
    "gamma_jitter": 0.0, "mixup_alpha": 0.0, "optimizer": "adamw", "reset_optimizer_each_epoch": False, "lr": 1e-3,
    "eps": 1e-8, "weight_decay": 0.01, "ema_decay": 0.0, "schedule": "cosine", "warmup_epochs": 0.0,
    "precision": "float32", "channels_last": True, "cpu_threads": 1, "gradient_accumulation_steps": 1, "fused": False,
    "compile": False, "loader_threads": 1, "swa_epochs": 0, "group_dro": 0.0, "domain_adversarial": 0.0,
}  # fmt: skip

GROUP_LEVERS = {"sampling": "group_balanced", "group_dro": 0.5, "domain_adversarial": 0.5}


def params(**changes):
    return DEMO_PARAMS.model_copy(update={**TINY, **changes})


@pytest.fixture(autouse=True, scope="module")
def _deterministic():
    threads = torch.get_num_threads()
    determinism.make_deterministic(1)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    (folder / "origin.json").write_text('{"source": "none"}')
    return folder


@pytest.fixture(autouse=True)
def _remove_checkpoints(weights):
    """Without it, they are 3 GB in the end."""
    yield
    shutil.rmtree(weights / "checkpoints", ignore_errors=True)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """24 images; every second one has a bright center."""
    rng = np.random.default_rng(0)
    images = rng.integers(40, 90, (24, 32, 32)).astype(np.uint8)
    images[1::2, 8:24, 8:24] += 120
    path = tmp_path_factory.mktemp("pack") / "images.npy"
    np.save(path, images)
    path.with_suffix(".json").write_text('{"resize": "stretch"}')
    return PackedImages(path, torch.device("cpu"))


NEGATIVE_VALIDATION = (*(0, 1) * 8, *(0,) * 8)  # F1 is always 0, so the last epoch is the best


def table(labels=(0, 1) * 12, subsets=("train",) * 16 + ("validation",) * 8) -> pd.DataFrame:
    """Describe 24 images of two sources, each with both labels."""
    sources = ["A", "A", "B", "B", "B", "A"] * 4
    return pd.DataFrame({"label": pd.array(labels, dtype="Int64"), "subset": subsets, "source": sources})


def train(pack, weights, seed=0, rows=None, **changes):
    """Return the result of a training, and what it passed to `on_epoch`."""
    calls = []
    rows = table() if rows is None else rows
    checkpoint = Checkpoint(weights / "checkpoints", uuid4().hex)
    trainer = loop.Trainer(params(**changes), seed, rows, pack, weights, ProcessGroup())
    return trainer.run(checkpoint, lambda *arguments: calls.append(arguments), lambda: 0), calls


def initial_network(seed=0, **changes) -> Classifier:
    recipe = params(**changes)
    determinism.seed_global_generators(seed, "initial weights")
    arguments = (recipe.backbone, recipe.head_hidden, recipe.dropout, recipe.image_size, recipe.normalization)
    return Classifier(Architecture(*arguments, packed_size=32, resize="stretch"))


def data(network: Classifier) -> bytes:
    return save({name: value.contiguous() for name, value in network.state_dict().items()})


# Seeds


@given(st.integers(), st.lists(st.integers() | st.text(), max_size=3), st.lists(st.integers() | st.text(), max_size=3))
def test_derived_seeds_are_stable_and_differ_by_purpose(seed, one, other):
    assert determinism.derive_seed(seed, *one) == determinism.derive_seed(seed, *one)
    assert 0 <= determinism.derive_seed(seed, *one) < 2**63
    assert (determinism.derive_seed(seed, *one) == determinism.derive_seed(seed, *other)) == (one == other)


def test_derived_seeds_never_change():
    assert determinism.derive_seed(0, "initial weights") == 3244773394241027492
    assert determinism.derive_seed(3, 1, 2, "augment") == 793560637783469253


def test_numbers_in_a_purpose_are_not_concatenated():
    assert determinism.derive_seed(1, 12, "order") != determinism.derive_seed(11, 2, "order")
    assert determinism.derive_seed(1, 1, 12, "augment") != determinism.derive_seed(1, 11, 2, "augment")


def test_generators_of_one_purpose_draw_the_same_numbers():
    draws = [torch.rand(4, generator=determinism.make_generator(1, purpose)) for purpose in ("a", "a", "b")]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_environment_describes_what_reproducibility_depends_on():
    capability = None if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    assert determinism.describe_environment(2) | {"device": "", "cuda": ""} == {
        "torch": torch.__version__, "torchvision": version("torchvision"), "timm": version("timm"), "cuda": "",
        "device": "", "cpu_capability": capability, "cpu_threads": 1, "processes": 2,
    }  # fmt: skip


# Schedule


def test_warmup_rises_linearly_from_zero_to_lr():
    recipe = params(epochs=10, warmup_epochs=2.0, schedule="constant", lr=0.1)
    rates = [learning_rate_at(done, recipe) for done in (0, 0.5, 1, 1.5, 2)]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])


@pytest.mark.parametrize("warmup", [0.0, 2.0])
def test_a_cosine_schedule_starts_at_lr_and_ends_near_zero(warmup):
    recipe = params(epochs=10, warmup_epochs=warmup, schedule="cosine", lr=0.1)
    assert learning_rate_at(warmup, recipe) == pytest.approx(0.1)
    assert learning_rate_at((10 + warmup) / 2, recipe) == pytest.approx(0.05)
    assert learning_rate_at(9.99, recipe) == pytest.approx(0, abs=1e-6)


def test_a_constant_schedule_is_lr():
    assert {learning_rate_at(done, params(schedule="constant", lr=0.3)) for done in (0, 0.1, 1, 1.99)} == {0.3}


@given(st.integers(1, 50), st.floats(0, 60), st.sampled_from(["constant", "cosine"]), st.floats(0, 1, exclude_max=True))
def test_the_learning_rate_is_between_zero_and_lr(epochs, warmup, schedule, moment):
    recipe = params(epochs=epochs, warmup_epochs=warmup, schedule=schedule, lr=0.1)
    assert 0 <= learning_rate_at(moment * epochs, recipe) <= 0.1 + 1e-12


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_and_adamw_use_lr_eps_and_weight_decay(name, kind):
    optimizer = build_optimizer(
        [torch.nn.Parameter(torch.zeros(1))], params(optimizer=name, lr=0.1, eps=0.01, weight_decay=0.2)
    )
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["eps"], group["weight_decay"]) == (0.1, 0.01, 0.2)


def test_sgd_uses_momentum_lr_and_weight_decay():
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], params(optimizer="sgd", lr=0.1, weight_decay=0.2))
    assert type(optimizer) is torch.optim.SGD
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.2)


# Training


def test_the_strong_recipe_of_the_competition_trains_on_smaller_images(pack, weights):
    recipe = config.load_config(ROOT / "params.yaml").profiles["competition-strong"].train
    changes = {"image_size": 32, "epochs": 2, "warmup_epochs": 0.0, "cpu_threads": 1}
    result, _ = train(pack, weights, **recipe.model_dump() | changes)
    assert result.network.architecture.backbone == "convnext_tiny"
    assert result.history[-1].scores["loss"] < result.history[0].scores["loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.5, "mixup_alpha": 0.5, "rotation": 10.0, "sampling": "weighted"},
        {"backbone": LITE, "epochs": 1},
    ],
)
def test_the_same_seed_gives_the_same_bytes_regardless_of_global_random_state(pack, weights, changes):
    first, _ = train(pack, weights, **changes)
    torch.rand(1000)
    np.random.default_rng().random(10)
    second, _ = train(pack, weights, **changes)
    assert data(first.network) == data(second.network)
    assert [epoch.row() for epoch in first.history] == [epoch.row() for epoch in second.history]


def test_training_changes_the_weights_and_depends_on_the_seed(pack, weights):
    first, other = train(pack, weights)[0], train(pack, weights, seed=1)[0]
    assert data(first.network) != data(other.network)
    assert data(first.network) != data(initial_network())


def test_training_learns_to_detect_a_bright_center(pack, weights):
    trained, _ = train(pack, weights, epochs=4)
    assert trained.kept.scores["auroc"] == 1
    assert trained.history[-1].train_loss < trained.history[0].train_loss


def test_frozen_epochs_train_only_the_head(pack, weights):
    changes = {"backbone": LITE, "epochs": 2, "frozen_epochs": 2, "optimizer": "adamw", "weight_decay": 0.1}
    after, before = train(pack, weights, **changes)[0].network.state_dict(), initial_network(**changes).state_dict()
    assert any("running_mean" in name for name in after)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name


def test_after_the_frozen_epochs_the_backbone_and_its_batch_norm_statistics_change(pack, weights):
    rows = table(NEGATIVE_VALIDATION)
    changes = {"backbone": LITE, "epochs": 2, "frozen_epochs": 1}
    after = train(pack, weights, rows=rows, **changes)[0].network.state_dict()
    before = initial_network(**changes).state_dict()
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    for kind in ("conv_stem.weight", "running_mean", "running_var"):
        assert any(name.startswith("backbone.") and name.endswith(kind) for name in changed)


def test_a_fused_sgd_trains_an_unfrozen_backbone_too(pack, weights):
    changes = {"backbone": LITE, "frozen_epochs": 1, "optimizer": "sgd"}
    fused, plain = (train(pack, weights, fused=fused, **changes)[0].network.state_dict() for fused in (True, False))
    for name, value in fused.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-4)


def test_training_follows_the_learning_rate_schedule(pack, weights):
    changes = {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.0, "schedule": "constant", "warmup_epochs": 1e9}
    trained, _ = train(pack, weights, **changes)
    after, before = trained.network.state_dict(), initial_network().state_dict()
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    assert [entry.lr for entry in trained.history] == [
        learning_rate_at(done, params(**changes)) for done in (0.75, 1.75)
    ]


def test_an_optimizer_reset_each_epoch_loses_its_moments(pack, weights):
    rows = table(NEGATIVE_VALIDATION)
    for epochs, is_equal in ((1, True), (2, False)):
        changes = {"epochs": epochs, "schedule": "constant"}
        reset, kept = (
            data(train(pack, weights, rows=rows, **changes, reset_optimizer_each_epoch=flag)[0].network)
            for flag in (True, False)
        )
        assert (reset == kept) == is_equal


def test_the_final_weights_are_a_moving_average_over_the_steps(pack, weights):
    changes = params(ema_decay=0.75, epochs=1, batch_size=8)
    first, whole = (loop.Trainer(changes, 0, table(), pack, weights, ProcessGroup()) for _ in range(2))
    with pytest.raises(Interrupted):
        first.run(Checkpoint(weights / "checkpoints", uuid4().hex), lambda *_: None, lambda: 15)
    averaged = whole.run(Checkpoint(weights / "checkpoints", uuid4().hex), lambda *_: None, lambda: 0).network
    assert whole.steps_per_epoch == 2
    networks = first.network, whole.network, averaged
    for step_1, step_2, average in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.allclose(average, 0.75 * step_1 + 0.25 * step_2, atol=1e-7)
    assert averaged is not whole.network


def test_swa_evaluates_and_keeps_the_mean_of_the_last_epochs_weights_and_batch_statistics(pack, weights):
    states = {}
    for swa_epochs in (0, 2):
        changes = params(swa_epochs=swa_epochs, epochs=3, keep="last", backbone="mnasnet0_5", batch_size=16)
        trainer, kept = loop.Trainer(changes, 0, table(), pack, weights, ProcessGroup()), []

        def copy_weights(_, network, kept=kept):
            kept.append(copy.deepcopy(network.state_dict()))

        result = trainer.run(Checkpoint(weights / "checkpoints", uuid4().hex), copy_weights, lambda: 0)
        states[swa_epochs] = kept
    for name, average in result.network.state_dict().items():
        first, second, third = (state[name] for state in states[0])
        assert torch.equal(states[2][0][name], first)
        assert torch.equal(states[2][1][name], second)
        if average.is_floating_point():
            torch.testing.assert_close(average, (second + third) / 2)
            torch.testing.assert_close(trainer.network.state_dict()[name], third)
    assert torch.equal(result.network.predict_proba(pack.read(torch.arange(16, 24))), result.predictions[:, -1])
    assert data(result.network) != data(trainer.network)


# Against shortcuts


def make_objective(**changes) -> Objective:
    """Its groups are the negatives of A, 3, and of B, 5, and the positives of A, 5, and of B, 3 images."""
    rows, recipe = table(), params(class_weights=(1.0, 2.0), **changes)
    labels, sources = torch.tensor(rows["label"].to_list()), torch.tensor([*map("AB".index, rows["source"])])
    torch.manual_seed(0)
    return Objective(initial_network(), recipe, labels, sources, torch.arange(16))


@pytest.mark.parametrize("parts", [1, 3])
def test_group_dro_weights_the_mean_losses_of_the_groups_and_raises_the_weight_of_the_worst(parts):
    objective, weights = make_objective(group_dro=0.5), np.full(4, 0.25)
    for step, rows in enumerate([torch.arange(16), torch.arange(1, 16, 2), torch.arange(5, 16)]):  # once no negatives
        is_positive, is_b = rows % 2, (rows % 6 >= 2) & (rows % 6 <= 4)
        groups = 2 * is_positive + is_b
        targets = torch.stack([1 - 0.8 * is_positive, 0.8 * is_positive], dim=1)  # mixed with negatives
        logits = torch.randn(len(rows), 2, generator=determinism.make_generator(step))
        logits[groups == 3] = torch.tensor([4.0, -4.0])
        losses = cross_entropy(logits, targets, objective.class_weights, reduction="none").numpy()
        means = np.array([losses[groups == group].sum() / max(1, (groups == group).sum()) for group in range(4)])

        inputs = {"images": logits, "targets": targets, **objective.draw_inputs(rows, 0.0)}
        split = zip(*(value.tensor_split(parts) for value in inputs.values()), strict=True)
        loss = sum(objective(lambda images, _: images, dict(zip(inputs, part, strict=True)), None) for part in split)
        assert loss.item() / len(rows) == pytest.approx(weights @ means, rel=1e-5)
        objective.update_weights(len(rows), ProcessGroup())
        before, weights = weights, weights * np.exp(0.5 * means) / (weights @ np.exp(0.5 * means))
        assert objective.log_weights.exp().numpy() == pytest.approx(weights, rel=1e-4)
        assert np.argmax(weights / before) == 3


class ToyNetwork(torch.nn.Module):
    """A backbone of two numbers per image, and a real head."""

    def __init__(self):
        super().__init__()
        layers = torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32), torch.nn.ReLU()
        self.backbone, self.head = torch.nn.Sequential(*layers), Head(32, [], 0.0)

    def forward(self, images, masks=()):
        return self.head(self.extract_features(images), masks)

    def extract_features(self, images):
        return self.backbone(images)


def train_toy(strength: float, seed: int) -> tuple[float, float]:
    """Train where the source tells the label, in 90 % of the images, and is easier to see.

    Returns:
        Where the source does not tell the label: the accuracy, and the AUROC with which the prediction tells the source
        of images of one label.
    """
    torch.manual_seed(seed)
    labels, is_training = torch.arange(900) % 2, torch.arange(900) < 300
    sources = torch.where(torch.rand(900) < torch.where(is_training, 0.9, 0.5), labels, 1 - labels)
    images = 2.0 * torch.stack([labels, sources], dim=1) - 1 + torch.tensor([0.8, 0.3]) * torch.randn(900, 2)
    network = ToyNetwork()
    objective = Objective(network, params(domain_adversarial=strength), labels, sources, torch.arange(300))
    trained = objective.trained_network(network)
    optimizer = torch.optim.AdamW([*network.parameters(), *objective.parameters()])
    for step in range(400):
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, params(epochs=400, lr=3e-3))
        rows = torch.randint(300, (64,))
        inputs = {"images": images[rows], "targets": one_hot(labels[rows], 2).float()}
        inputs |= objective.draw_inputs(rows, step / 400)
        optimizer.zero_grad()
        (objective(trained, inputs, inputs.pop("reversal", None)) / 64).backward()
        optimizer.step()
    with torch.no_grad():
        scores = network(images[300:]).diff(dim=1)[:, 0].numpy()
    label, source = labels[300:].numpy(), sources[300:].numpy()
    aurocs = [roc_auc_score(source[label == value], scores[label == value]) for value in (0, 1)]
    return float(np.mean((scores > 0) == label)), float(np.mean(aurocs))


def test_an_adversary_lets_predictions_follow_the_label_instead_of_the_source():
    (plain_accuracy, plain_source), (accuracy, source) = (
        np.mean([train_toy(strength, seed) for seed in range(2)], axis=0) for strength in (0.0, 10.0)
    )
    assert accuracy > plain_accuracy + 0.03
    assert source < plain_source - 0.1


def test_the_backbone_gets_the_reversed_gradient_of_the_adversary_which_grows_with_training():
    rows, network = torch.arange(16), ToyNetwork()
    gradients = []
    for done in (0.0, 0.1, 1.0):
        torch.manual_seed(0)
        objective = Objective(network, params(domain_adversarial=2.0), rows % 2, rows // 2 % 3, rows)
        images = torch.ones(16, 2, requires_grad=True)
        inputs = objective.draw_inputs(rows, done)
        _, group_logits = objective.trained_network(network)(images, (), inputs["reversal"])
        (group_logits * torch.arange(6.0)).sum().backward()
        gradients.append(images.grad)
    direct = torch.ones(16, 2, requires_grad=True)
    (objective.adversary(network.backbone(direct)) * torch.arange(6.0)).sum().backward()
    for gradient, factor in zip(gradients, (0.0, 2 * math.tanh(0.5), 2 * math.tanh(5.0)), strict=True):
        torch.testing.assert_close(gradient, -factor * direct.grad)


def test_images_of_a_label_with_one_source_do_not_count_for_the_adversary_and_without_others_there_is_none(caplog):
    rows, network, recipe = torch.arange(16), ToyNetwork(), params(domain_adversarial=1.0)
    objective = Objective(network, recipe, rows % 2, (rows % 4 == 3).long(), rows)  # negatives are of source 0
    inputs = {"images": torch.randn(16, 2), "targets": one_hot(rows % 2, 2).float(), **objective.draw_inputs(rows, 1.0)}
    negatives = {name: value[::2] for name, value in inputs.items() if name != "reversal"}
    plain = cross_entropy(network(negatives["images"]), negatives["targets"], reduction="sum")
    loss = objective(objective.trained_network(network), negatives, inputs["reversal"])
    assert loss.item() == pytest.approx(plain.item())
    assert caplog.messages == []
    objective = Objective(network, recipe, rows % 2, rows % 2, rows)
    assert objective.trained_network(network) is network
    assert [*objective.parameters()] == []
    assert objective.draw_inputs(rows, 0.5) == {}
    (message,) = caplog.messages
    assert message.startswith("train.domain_adversarial cannot tell source from label: ")


def test_a_last_batch_of_one_image_does_not_break_batch_norm(pack, weights):
    trained, _ = train(pack, weights, backbone=LITE, batch_size=5)
    assert all(math.isfinite(entry.train_loss) for entry in trained.history)


def test_batch_size_one_trains_on_every_image(pack, weights):
    trained, _ = train(pack, weights, batch_size=1, schedule="cosine")
    assert [entry.lr for entry in trained.history] == [
        learning_rate_at(epoch + 15.5 / 16, params(schedule="cosine")) for epoch in (0, 1)
    ]


def test_the_last_of_equally_good_epochs_is_kept(pack, weights):
    trained, calls = train(pack, weights, epochs=3, optimizer="sgd", lr=1e-12)
    assert len({entry.scores["f1"] for entry in trained.history}) == 1
    assert trained.kept is trained.history[-1]
    assert all(best is not None for _, best in calls)


@pytest.fixture(scope="module")
def overfitting_run(pack, weights):
    """A seed whose F1 is best before the last epochs, its result and its calls of `on_epoch`."""
    for seed in range(20):
        trained, calls = train(pack, weights, seed, epochs=5, optimizer="sgd", lr=0.02, schedule="constant")
        if trained.kept.epoch < 4:
            return seed, trained, calls
    raise AssertionError("for every seed the last epoch is the best")


def test_the_result_is_the_best_epoch_and_on_epoch_gets_only_improved_models(overfitting_run, pack):
    _, trained, calls = overfitting_run
    f1 = [entry.scores["f1"] for entry in trained.history]
    assert trained.kept.epoch == max(range(1, 6), key=lambda epoch: (f1[epoch - 1], epoch))
    rows = torch.arange(16, 24)
    probabilities = trained.network.predict_proba(pack.read(rows))
    assert score_predictions(np.array([0, 1] * 4), probabilities.numpy()) == trained.kept.scores
    assert [entry for entry, _ in calls] == trained.history
    has_model = [best is not None for _, best in calls]
    assert has_model == [value == max(f1[: index + 1]) for index, value in enumerate(f1)]
    assert not all(has_model)


@pytest.mark.parametrize("keep", ["best_f1", "best_loss", "last"])
def test_the_weights_of_the_epoch_that_keep_selects_are_the_result(overfitting_run, pack, weights, keep):
    seed, whole, _ = overfitting_run
    trained, calls = train(pack, weights, seed, epochs=5, optimizer="sgd", lr=0.02, schedule="constant", keep=keep)
    scores = [entry.scores for entry in trained.history]
    assert scores == [entry.scores for entry in whole.history]
    expected = {
        "best_f1": whole.kept.epoch,
        "best_loss": 1 + int(np.argmin([entry["loss"] for entry in scores])),
        "last": 5,
    }[keep]
    assert trained.kept.epoch == expected
    kept = trained.predictions[:, expected - 1]
    assert torch.equal(trained.network.predict_proba(pack.read(torch.arange(16, 24))), kept)
    assert [call[0].epoch for call in calls if call[1] is not None][-1] == expected


def test_the_predictions_of_every_epoch_reproduce_its_scores(overfitting_run):
    _, trained, _ = overfitting_run
    assert trained.predictions.shape == (8, 5)
    labels = np.array([0, 1] * 4)
    for entry, predictions in zip(trained.history, trained.predictions.T, strict=True):
        assert score_predictions(labels, predictions.numpy()) == entry.scores


@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping_after_patience_epochs_without_improvement(overfitting_run, pack, weights, patience):
    seed, whole, _ = overfitting_run
    f1 = [entry.scores["f1"] for entry in whole.history]
    best = [max(range(end), key=lambda index: (f1[index], index)) for end in range(1, 6)]
    ends = [index + 1 for index in range(5) if index - best[index] >= patience]
    stopped, _ = train(
        pack, weights, seed, epochs=5, optimizer="sgd", lr=0.02, schedule="constant", early_stopping_patience=patience
    )
    assert [entry.row() for entry in stopped.history] == [entry.row() for entry in whole.history[: min([*ends, 5])]]
    if patience == 1:
        assert len(stopped.history) < 5


@pytest.mark.parametrize(
    ("batch_size", "location"),
    [(4, "epoch 1, batch 2: the loss is "), (16, "epoch 1: not all predictions are finite")],
    ids=["in the middle of an epoch", "in its last step"],
)  # fmt: skip
def test_divergence_is_an_error_that_names_epoch_batch_and_parameters(pack, weights, batch_size, location):
    with pytest.raises(UserError) as caught:
        train(pack, weights, seed=7, optimizer="sgd", lr=1e20, schedule="constant", batch_size=batch_size)
    message = str(caught.value)
    assert message.startswith(f"seed 7, {location}")
    for parameter in ("train.lr = 1e+20", "train.precision = float32", "train.normalization"):
        assert parameter in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "weighted", "positive_oversampling": 3.0},
        {"sampling": "source_balanced"},
        {"sampling": "group_balanced"},
        {"group_dro": 0.5},
        {"domain_adversarial": 0.5},
        {"swa_epochs": 2},
        {"class_weights": (1.0, 5.0)},
        {"rotation": 20.0, "flip": 0.0},
        {"zoom": 0.2},
        {"shift": 0.1},
        {"gamma_jitter": 0.5},
        {"mixup_alpha": 0.4},
        {"ema_decay": 0.9},
        {"optimizer": "sgd"},
        {"optimizer": "adam", "reset_optimizer_each_epoch": True},
        {"precision": "bfloat16"},
        {"channels_last": False},
        {"head_hidden": [16, 8]},
        {"normalization": "none"},
        {"image_size": 40},
        {"gradient_accumulation_steps": 3},
        {"fused": True, "lr": 2e-3},
    ],
    ids=", ".join,
)
def test_every_parameter_changes_the_trained_weights(pack, weights, plain, changes):
    trained, calls = train(pack, weights, **changes)
    assert len(calls) == 2
    assert all(math.isfinite(entry.train_loss) for entry in trained.history)
    assert all(value.dtype == torch.float32 for value in trained.network.state_dict().values())
    if changes != {"channels_last": False}:  # the order of summation may or may not change
        assert data(trained.network) != plain


@pytest.fixture(scope="module")
def plain(pack, weights):
    return data(train(pack, weights)[0].network)


def test_unlabeled_test_images_are_not_used_for_training_or_validation(pack, weights, plain):
    subsets = ("train",) * 16 + ("validation",) * 4 + ("test",) * 4
    trained, _ = train(pack, weights, rows=table((*(0, 1) * 10, *[None] * 4), subsets))
    reference, _ = train(pack, weights, rows=table((0, 1) * 12, subsets))
    assert data(trained.network) == data(reference.network)
    assert len(trained.history) == 2


# Interrupting and resuming


def train_with_interruptions(pack, weights, interruptions: list[int], **changes):
    """Interrupt the training once per number n, at the n-th call of `stop`, then finish it."""
    checkpoint, epochs = Checkpoint(weights / "checkpoints", uuid4().hex), []

    def run(signals):
        trainer = loop.Trainer(params(**changes), 0, table(), pack, weights, ProcessGroup())
        return trainer.run(checkpoint, lambda epoch, _: epochs.append(epoch.epoch), partial(next, signals))

    for call in interruptions:
        with pytest.raises(Interrupted, match=r"^seed 0 stopped in epoch \d+ after step \d+; dvc repro") as caught:
            run(iter([0] * (call - 1) + [15]))
        assert caught.value.signal == 15
    return run(repeat(0)), epochs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backbone": LITE, "frozen_epochs": 1, "ema_decay": 0.9, "zoom": 0.2, "gamma_jitter": 0.5},
        {"optimizer": "sgd", "mixup_alpha": 0.4, "head_hidden": [8], "swa_epochs": 2, **GROUP_LEVERS},
        {"optimizer": "adam", "reset_optimizer_each_epoch": True, "sampling": "weighted", "early_stopping_patience": 1},
        {"precision": "bfloat16", "gradient_accumulation_steps": 2, "fused": True, "loader_threads": 3},
    ],
    ids=", ".join,
)
@pytest.mark.parametrize(
    "interruptions", [[1], [2], [3], [4], [5, 1], [2, 2, 2, 2]],
    ids=["step", "last step", "validation", "second epoch", "twice", "four times"],
)  # fmt: skip
def test_an_interrupted_and_resumed_training_ends_in_the_same_bytes(pack, weights, interruptions, changes):
    changes = {"epochs": 3, **changes}
    whole, _ = train(pack, weights, **changes)
    result, epochs = train_with_interruptions(pack, weights, interruptions, **changes)
    assert data(result.network) == data(whole.network)
    assert [entry.row() for entry in result.history] == [entry.row() for entry in whole.history]
    assert torch.equal(result.predictions, whole.predictions)
    assert sorted(set(epochs)) == [entry.epoch for entry in whole.history]


def test_on_epoch_is_called_again_for_past_epochs_on_resuming(pack, weights):
    _, epochs = train_with_interruptions(pack, weights, [4], epochs=3)
    assert epochs == [1, 1, 2, 3]


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_loader_threads_does_not_change_the_result(pack, weights, plain, threads):
    assert data(train(pack, weights, loader_threads=threads)[0].network) == plain


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.5, "mixup_alpha": 0.4, "class_weights": (1.0, 3.0)}])
def test_gradient_accumulation_takes_the_step_of_the_whole_batch(pack, weights, changes):
    whole, accumulated = (
        train(pack, weights, gradient_accumulation_steps=steps, optimizer="sgd", **changes)[0].network.state_dict()
        for steps in (1, 3)
    )
    for name, value in whole.items():
        torch.testing.assert_close(accumulated[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_trains_like_an_uncompiled_one(pack, weights):
    eager, compiled = (
        train(pack, weights, backbone="alexnet", image_size=64, epochs=1, frozen_epochs=1, compile=flag)[0]
        for flag in (False, True)
    )
    for first, second in zip(eager.history, compiled.history, strict=True):
        assert first.train_loss == pytest.approx(second.train_loss, rel=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("backbone", ["alexnet", "convnext_tiny", LITE])
def test_on_cuda_training_gives_equal_bytes_and_is_close_to_the_cpu(pack, weights, monkeypatch, backbone, precision):
    cuda_pack = PackedImages(pack._path, torch.device("cuda"))
    changes = {"backbone": backbone, "image_size": 64, "batch_size": 4, "mixup_alpha": 0.4, **GROUP_LEVERS}
    on_cuda = changes | {"precision": precision}
    first = train(cuda_pack, weights, **on_cuda)[0]
    again = train(cuda_pack, weights, **on_cuda)[0]
    resumed, _ = train_with_interruptions(cuda_pack, weights, [2], **on_cuda)
    monkeypatch.setattr(captured_step, "EAGER_STEPS", 10**6)
    without_graph = train(cuda_pack, weights, **on_cuda)[0]
    assert len({data(result.network.cpu()) for result in (first, again, resumed, without_graph)}) == 1
    if backbone != "convnext_tiny":  # its stochastic depth draws other numbers on another device
        # Hardly trained: rounding grows with every step, and float16 skips the first ones.
        hardly = {"lr": 1e-6, "epochs": 1}
        there = train(cuda_pack, weights, **on_cuda | hardly)[0]
        on_cpu = train(pack, weights, **changes | hardly)[0]
        assert there.history[0].train_loss == pytest.approx(on_cpu.history[0].train_loss, rel=0.05)


@pytest.mark.cuda
@pytest.mark.parametrize("backbone", ["alexnet", "convnext_tiny", LITE])
def test_on_cuda_probabilities_are_those_of_the_cpu(pack, backbone):
    network, pixels = initial_network(backbone=backbone, image_size=64).eval(), torch.from_numpy(pack.images[:8])
    on_cpu = network.predict_proba(pixels)
    assert (network.cuda().predict_proba(pixels.cuda()).cpu() - on_cpu).abs().max() < 1e-6


# The progress file


def train_with_progress(pack, weights, path, stop=lambda: 0, **changes):
    trainer = loop.Trainer(params(**changes), 4, table(), pack, weights, ProcessGroup())
    checkpoint = Checkpoint(weights / "checkpoints", uuid4().hex)
    return trainer.run(checkpoint, lambda *_: None, stop, path)


@pytest.fixture
def written(monkeypatch):
    """The contents of the progress file, in the order in which they are written."""
    contents = []
    monkeypatch.setattr(progress, "write_json", lambda _, content: contents.append(content))
    return contents


def test_a_training_writes_its_progress_at_the_start_after_each_epoch_and_at_the_end(pack, weights, written, tmp_path):
    result = train_with_progress(pack, weights, tmp_path / "seed-4.json")
    assert [(entry["epoch"], entry["state"]) for entry in written] == [
        (1, "training"), (1, "training"), (2, "training"), (2, "finished"),
    ]  # fmt: skip
    assert written[0] == {
        "seed": 4, "epoch": 1, "epochs": 2, "f1": None, "loss": None, "images_per_second": None, "state": "training",
        "fold": None,
    }  # fmt: skip
    for entry, metrics in zip(written[1:3], result.history, strict=True):
        assert (entry["f1"], entry["loss"]) == (metrics.scores["f1"], metrics.train_loss)
        assert entry["images_per_second"] == metrics.images_per_second


def test_within_an_epoch_progress_is_written_at_most_once_a_second(pack, weights, written, monkeypatch, tmp_path):
    monkeypatch.setattr(loop.time, "perf_counter", partial(next, count(0.0, 0.3)))  # 0.3 s per step, or a little more
    train_with_progress(pack, weights, tmp_path / "seed-4.json", batch_size=1)
    within_epochs = 2 * (16 // 4)
    assert len(written) == 1 + within_epochs + 2 + 1
    assert all(entry["loss"] is not None for entry in written[1:])


def test_the_rate_counts_the_images_and_is_missing_if_all_were_trained_on_before(pack, weights, monkeypatch):
    resumed, _ = train_with_interruptions(pack, weights, [3])  # in the validation of the first epoch
    assert [entry.images_per_second is None for entry in resumed.history] == [True, False]
    monkeypatch.setattr(loop.time, "perf_counter", partial(next, chain([0.0], repeat(1.0))))
    result, _ = train(pack, weights, epochs=1, batch_size=10)
    assert result.history[0].images_per_second == 16


def test_the_progress_file_tells_how_a_training_ended(pack, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = progress.progress_path(4)
    assert progress.read_progress(4) is None
    with pytest.raises(Interrupted):
        train_with_progress(pack, weights, path, stop=lambda: 15)
    assert progress.read_progress(4).state == "interrupted"
    with pytest.raises(UserError):
        train_with_progress(pack, weights, path, optimizer="sgd", lr=1e20, schedule="constant")
    assert progress.read_progress(4).state == "failed"
    result = train_with_progress(pack, weights, path)
    assert progress.read_progress(4) == progress.TrainingProgress(
        4, 2, 2, result.history[-1].scores["f1"], result.history[-1].train_loss,
        result.history[-1].images_per_second, "finished",
    )  # fmt: skip
    assert [file.name for file in path.parent.iterdir()] == ["seed-4.json"]


def test_a_progress_file_that_cannot_be_written_does_not_stop_the_training(pack, weights, tmp_path):
    (tmp_path / "logs").write_text("not a folder")
    result = train_with_progress(pack, weights, tmp_path / "logs/seed-4.json")
    assert len(result.history) == 2


# The pack and its table


def write_tables(folder, split: str) -> None:
    (folder / "manifest.csv").write_text(
        "file,set,label,patient,source,view,license,width,height,bytes,jpeg_quantization,xxh128,phash\n"
        "a.jpg,train,1,NA,,PA,,64,64,9,16.5,aa,00\nb.jpg,train,0,,,,,64,64,9,16.5,bb,00\nt.jpg,test,,,,,,64,64,9,0,cc,00\n"
    )
    (folder / "split.csv").write_text(split)


def test_read_split_joins_manifest_and_split(tmp_path):
    rows = "a.jpg,NA,train,1\nb.jpg,image:b.jpg,validation,0\nt.jpg,image:t.jpg,test,\n"
    write_tables(tmp_path, f"file,group,subset,fold\n{rows}")
    split = read_split(tmp_path)
    assert list(read_split(tmp_path, [0, 1])["subset"]) == ["validation", "validation", "test"]
    assert list(split["fold"].isna()) == [False, False, True]
    assert list(read_split(tmp_path, [1])["subset"]) == ["validation", "train", "test"]
    assert list(split["subset"]) == ["train", "validation", "test"]
    assert list(split["patient"]) == ["NA", "", ""]
    assert list(split["group"]) == ["NA", "image:b.jpg", "image:t.jpg"]
    assert split["label"].tolist() == [1, 0, pd.NA]


def test_images_of_a_held_out_source_are_external_whatever_validates(tmp_path):
    write_tables(tmp_path, "file,group,subset,fold\na.jpg,1,external,\nb.jpg,2,validation,0\nt.jpg,3,test,\n")
    for folds in ([0], [1], [0, 1]):
        subset = list(read_split(tmp_path, folds)["subset"])
        assert subset == ["external", "validation" if 0 in folds else "train", "test"]
    assert list(read_split(tmp_path)["group"]) == ["1", "2", "3"]


def test_a_split_of_other_images_is_an_error(tmp_path):
    write_tables(tmp_path, "file,group,subset,fold\nb.jpg,b,train,1\na.jpg,a,validation,0\nt.jpg,t,test,\n")
    with pytest.raises(UserError, match=r"manifest.csv and split.csv list different images; run: dvc repro split$"):
        read_split(tmp_path)


def test_batches_contain_the_given_rows_in_order(pack):
    rows = torch.tensor([5, 0, 23, 7, 7])
    for threads in (1, 3):
        batches = list(pack.batches(rows.split(2), threads))
        assert [len(pixels) for pixels in batches] == [2, 2, 1]
        assert np.array_equal(torch.cat(batches).numpy(), pack.images[rows.numpy()])
    assert pack.size == 32
