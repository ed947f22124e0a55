import math
import shutil
from functools import partial
from itertools import repeat
from uuid import uuid4

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from pipeline.core import config
from pipeline.core.errors import Interrupted, UserError
from pipeline.data.dataset import PackedImages
from pipeline.data.manifest import read_split
from pipeline.evaluation.metrics import score_predictions
from pipeline.models.classifier import Architecture, Classifier
from pipeline.training import determinism, loop
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.distributed import ProcessGroup
from pipeline.training.schedule import build_optimizer, learning_rate_at

SHIPPED = config.load_config(ROOT / "params.yaml").profiles["demo"].train
SMALL, LITE = "squeezenet1_1", "timm/tf_efficientnet_lite0"


TINY = {
    "backbone": SMALL, "head_hidden": [], "dropout": 0.2, "size": 32, "normalization": "imagenet", "epochs": 2,
    "frozen_epochs": 0, "early_stopping_patience": None, "batch_size": 8, "sampling": "shuffle", "positive_oversampling": 1.0,
    "class_weights": (1.0, 1.0), "flip": 0.5, "rotation": 5.0, "zoom": 0.0, "shift": 0.0, "gamma_jitter": 0.0,
    "mixup_alpha": 0.0, "optimizer": "adamw",
    "reset_optimizer_each_epoch": False, "lr": 1e-3, "eps": 1e-8, "weight_decay": 0.01, "ema_decay": 0.0,
    "schedule": "cosine", "warmup_epochs": 0.0, "precision": "float32", "channels_last": True, "cpu_threads": 1,
    "gradient_accumulation_steps": 1, "fused": False, "compile": False, "loader_threads": 1,
}  # fmt: skip


def params(**changes):
    return SHIPPED.model_copy(update={**TINY, **changes})


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


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Of 24 images every second one has a bright middle."""
    rng = np.random.default_rng(0)
    images = rng.integers(40, 90, (24, 32, 32)).astype(np.uint8)
    images[1::2, 8:24, 8:24] += 120
    path = tmp_path_factory.mktemp("pack") / "images.npy"
    np.save(path, images)
    path.with_suffix(".json").write_text('{"resize": "stretch"}')
    return PackedImages(path, torch.device("cpu"))


NEGATIVE_VALIDATION = (*(0, 1) * 8, *(0,) * 8)  # F1 stays 0, so the last epoch is the best


def table(labels=(0, 1) * 12, subsets=("train",) * 16 + ("validation",) * 8) -> pd.DataFrame:
    return pd.DataFrame({"label": pd.array(labels, dtype="Int64"), "subset": subsets})


def train(pack, weights, seed=0, rows=None, **changes):
    seen = []
    rows = table() if rows is None else rows
    checkpoint = Checkpoint(weights / "checkpoints", uuid4().hex)
    on_epoch = lambda epoch, best: seen.append((epoch, best))  # noqa: E731
    training = loop.Trainer(params(**changes), seed, rows, pack, weights, ProcessGroup())
    return training.run(checkpoint, on_epoch, lambda: 0), seen


def initial(seed=0, **changes) -> Classifier:
    recipe = params(**changes)
    determinism.seed_global_generators(seed, "initial weights")
    facts = (recipe.backbone, recipe.head_hidden, recipe.dropout, recipe.size, recipe.normalization)
    return Classifier(Architecture(*facts, packed_size=32, resize="stretch"))


def data(network: Classifier) -> bytes:
    return save({name: value.contiguous() for name, value in network.state_dict().items()})


# Seeds


@given(st.integers(), st.lists(st.integers() | st.text(), max_size=3), st.lists(st.integers() | st.text(), max_size=3))
def test_seeds_differ_by_purpose_and_are_stable(seed, one, other):
    assert determinism.derive_seed(seed, *one) == determinism.derive_seed(seed, *one)
    assert 0 <= determinism.derive_seed(seed, *one) < 2**63
    assert (determinism.derive_seed(seed, *one) == determinism.derive_seed(seed, *other)) == (one == other)


def test_a_seed_is_the_same_on_every_machine_and_in_every_release():
    assert determinism.derive_seed(0, "initial weights") == 3244773394241027492
    assert determinism.derive_seed(3, 1, 2, "augment") == 793560637783469253


def test_seed_epoch_and_step_do_not_run_into_each_other():
    assert determinism.derive_seed(1, 12, "order") != determinism.derive_seed(11, 2, "order")
    assert determinism.derive_seed(1, 1, 12, "augment") != determinism.derive_seed(1, 11, 2, "augment")


def test_generators_repeat_what_they_draw():
    draws = [torch.rand(4, generator=determinism.make_generator(1, purpose)) for purpose in ("a", "a", "b")]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_environment_names_what_equal_bytes_rest_on():
    assert determinism.describe_environment(2) | {"device": "", "cuda": ""} == {
        "torch": torch.__version__, "cuda": "", "device": "", "cpu_threads": 1, "processes": 2,
    }  # fmt: skip


# Schedule


def test_warm_up_rises_from_zero_to_the_rate_asked_for():
    recipe = params(epochs=10, warmup_epochs=2.0, schedule="constant", lr=0.1)
    rates = [learning_rate_at(done, recipe) for done in (0, 0.5, 1, 1.5, 2)]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])


@pytest.mark.parametrize("warmup", [0.0, 2.0])
def test_a_cosine_starts_at_the_rate_asked_for_and_ends_near_zero(warmup):
    recipe = params(epochs=10, warmup_epochs=warmup, schedule="cosine", lr=0.1)
    assert learning_rate_at(warmup, recipe) == pytest.approx(0.1)
    assert learning_rate_at((10 + warmup) / 2, recipe) == pytest.approx(0.05)
    assert learning_rate_at(9.99, recipe) == pytest.approx(0, abs=1e-6)


def test_a_constant_rate_stays():
    assert {learning_rate_at(done, params(schedule="constant", lr=0.3)) for done in (0, 0.1, 1, 1.99)} == {0.3}


@given(st.integers(1, 50), st.floats(0, 60), st.sampled_from(["constant", "cosine"]), st.floats(0, 1, exclude_max=True))
def test_the_rate_is_never_negative_nor_above_the_one_asked_for(epochs, warmup, schedule, moment):
    recipe = params(epochs=epochs, warmup_epochs=warmup, schedule=schedule, lr=0.1)
    assert 0 <= learning_rate_at(moment * epochs, recipe) <= 0.1 + 1e-12


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_and_adamw_take_rate_eps_and_decay(name, kind):
    made = build_optimizer(
        [torch.nn.Parameter(torch.zeros(1))], params(optimizer=name, lr=0.1, eps=0.01, weight_decay=0.2)
    )
    assert type(made) is kind
    group = made.param_groups[0]
    assert (group["lr"], group["eps"], group["weight_decay"]) == (0.1, 0.01, 0.2)


def test_sgd_has_momentum_rate_and_decay():
    made = build_optimizer([torch.nn.Parameter(torch.zeros(1))], params(optimizer="sgd", lr=0.1, weight_decay=0.2))
    assert type(made) is torch.optim.SGD
    group = made.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.2)


# Training


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.5, "mixup_alpha": 0.5, "rotation": 10.0, "sampling": "weighted"},
        {"backbone": LITE, "epochs": 1},
    ],
)
def test_the_same_seed_gives_the_same_bytes_whatever_was_drawn_before(pack, weights, changes):
    first, _ = train(pack, weights, **changes)
    torch.rand(1000)
    np.random.default_rng().random(10)
    second, _ = train(pack, weights, **changes)
    assert data(first.network) == data(second.network)
    assert [epoch.row() for epoch in first.history] == [epoch.row() for epoch in second.history]


def test_training_changes_the_weights_and_another_seed_gives_others(pack, weights):
    first, other = train(pack, weights)[0], train(pack, weights, seed=1)[0]
    assert data(first.network) != data(other.network)
    assert data(first.network) != data(initial())


def test_training_learns_a_bright_middle(pack, weights):
    trained, _ = train(pack, weights, epochs=4)
    assert trained.best.scores["auroc"] == 1
    assert trained.history[-1].train_loss < trained.history[0].train_loss


def test_frozen_epochs_leave_the_backbone_bit_equal_and_change_the_head(pack, weights):
    changes = {"backbone": LITE, "epochs": 2, "frozen_epochs": 2, "optimizer": "adamw", "weight_decay": 0.1}
    trained, before = train(pack, weights, **changes)[0].network.state_dict(), initial(**changes).state_dict()
    assert any("running_mean" in name for name in trained)
    for name, value in trained.items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name


def test_the_epoch_after_the_frozen_ones_changes_the_backbone_and_its_batch_statistics(pack, weights):
    rows = table(NEGATIVE_VALIDATION)
    changes = {"backbone": LITE, "epochs": 2, "frozen_epochs": 1}
    trained, before = (
        train(pack, weights, rows=rows, **changes)[0].network.state_dict(),
        initial(**changes).state_dict(),
    )
    moved = [name for name in trained if not torch.equal(trained[name], before[name])]
    for kind in ("conv_stem.weight", "running_mean", "running_var"):
        assert any(name.startswith("backbone.") and name.endswith(kind) for name in moved)


def test_training_follows_the_schedule(pack, weights):
    changes = {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.0, "schedule": "constant", "warmup_epochs": 1e9}
    trained, _ = train(pack, weights, **changes)
    after, before = trained.network.state_dict(), initial().state_dict()
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    assert [entry.lr for entry in trained.history] == [
        learning_rate_at(done, params(**changes)) for done in (0.75, 1.75)
    ]


def test_a_fresh_optimizer_forgets_its_moments(pack, weights):
    rows = table(NEGATIVE_VALIDATION)
    for epochs, same in ((1, True), (2, False)):
        fresh, kept = (
            data(
                train(pack, weights, rows=rows, epochs=epochs, schedule="constant", reset_optimizer_each_epoch=new)[
                    0
                ].network
            )
            for new in (True, False)
        )
        assert (fresh == kept) == same


def test_the_weights_that_are_kept_are_averaged_over_the_steps(pack, weights):
    changes = params(ema_decay=0.75, epochs=1, batch_size=8)
    first, whole = (loop.Trainer(changes, 0, table(), pack, weights, ProcessGroup()) for _ in range(2))
    with pytest.raises(Interrupted):
        first.run(Checkpoint(weights / "checkpoints", uuid4().hex), lambda *_: None, lambda: 15)
    kept = whole.run(Checkpoint(weights / "checkpoints", uuid4().hex), lambda *_: None, lambda: 0).network
    assert whole.steps == 2
    for one, two, average in zip(*(net.parameters() for net in (first.network, whole.network, kept)), strict=True):
        assert torch.allclose(average, 0.75 * one + 0.25 * two, atol=1e-7)
    assert kept is not whole.network


def test_a_leftover_of_one_image_does_not_stop_batch_norm(pack, weights):
    trained, _ = train(pack, weights, backbone=LITE, batch_size=5)
    assert all(math.isfinite(entry.train_loss) for entry in trained.history)


def test_batches_of_one_image_train_on_every_image(pack, weights):
    trained, _ = train(pack, weights, batch_size=1, schedule="cosine")
    assert [entry.lr for entry in trained.history] == [
        learning_rate_at(epoch + 15.5 / 16, params(schedule="cosine")) for epoch in (0, 1)
    ]


def test_of_equal_epochs_the_last_is_the_best(pack, weights):
    trained, seen = train(pack, weights, epochs=3, optimizer="sgd", lr=1e-12)
    assert len({entry.scores["f1"] for entry in trained.history}) == 1
    assert trained.best is trained.history[-1]
    assert all(best is not None for _, best in seen)


@pytest.fixture(scope="module")
def unsteady(pack, weights):
    """A seed whose F1 falls in the end, and its whole training."""
    for seed in range(20):
        trained, seen = train(pack, weights, seed, epochs=5, optimizer="sgd", lr=0.02, schedule="constant")
        if trained.best.epoch < 4:
            return seed, trained, seen
    raise AssertionError("every seed ends at its best")


def test_the_model_is_the_one_of_the_best_epoch_and_only_better_ones_are_handed_out(unsteady, pack):
    _, trained, seen = unsteady
    figures = [entry.scores["f1"] for entry in trained.history]
    assert trained.best.epoch == max(range(1, 6), key=lambda epoch: (figures[epoch - 1], epoch))
    rows = torch.arange(16, 24)
    found = trained.network.predict_proba(pack.pixels(rows))
    assert score_predictions(np.array([0, 1] * 4), found.numpy()) == trained.best.scores
    assert [entry for entry, _ in seen] == trained.history
    handed = [best is not None for _, best in seen]
    assert handed == [figure == max(figures[: index + 1]) for index, figure in enumerate(figures)]
    assert not all(handed)


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_stops_after_so_many_epochs_without_a_better_one(unsteady, pack, weights, patience):
    seed, whole, _ = unsteady
    figures = [entry.scores["f1"] for entry in whole.history]
    best = [max(range(end), key=lambda index: (figures[index], index)) for end in range(1, 6)]
    ends = [index + 1 for index in range(5) if index - best[index] >= patience]
    stopped, _ = train(
        pack, weights, seed, epochs=5, optimizer="sgd", lr=0.02, schedule="constant", early_stopping_patience=patience
    )
    assert [entry.row() for entry in stopped.history] == [entry.row() for entry in whole.history[: min([*ends, 5])]]
    if patience == 1:
        assert len(stopped.history) < 5


@pytest.mark.parametrize(
    ("batch_size", "where"), [(4, "epoch 1, batch 2: the loss is "), (16, "epoch 1: not all predictions are finite")],
    ids=["in the middle of an epoch", "in its last step"],
)  # fmt: skip
def test_a_diverging_run_is_refused_with_epoch_batch_and_parameters_named(pack, weights, batch_size, where):
    with pytest.raises(UserError) as caught:
        train(pack, weights, seed=7, optimizer="sgd", lr=1e20, schedule="constant", batch_size=batch_size)
    message = str(caught.value)
    assert message.startswith(f"seed 7, {where}")
    for named in ("train.lr = 1e+20", "train.precision = float32", "train.normalization"):
        assert named in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "weighted", "positive_oversampling": 3.0},
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
        {"size": 40},
        {"gradient_accumulation_steps": 3},
        {"fused": True, "lr": 2e-3},
    ],
    ids=", ".join,
)
def test_every_variant_of_the_recipe_trains_and_differs_from_the_plain_one(pack, weights, plain, changes):
    trained, seen = train(pack, weights, **changes)
    assert len(seen) == 2
    assert all(math.isfinite(entry.train_loss) for entry in trained.history)
    assert all(value.dtype == torch.float32 for value in trained.network.state_dict().values())
    if changes != {"channels_last": False}:  # which may or may not sum in another order
        assert data(trained.network) != plain


@pytest.fixture(scope="module")
def plain(pack, weights):
    return data(train(pack, weights)[0].network)


def test_test_images_without_labels_are_neither_trained_nor_validated_on(pack, weights, plain):
    subsets = ("train",) * 16 + ("validation",) * 4 + ("test",) * 4
    trained, _ = train(pack, weights, rows=table((*(0, 1) * 10, *[None] * 4), subsets))
    reference, _ = train(pack, weights, rows=table((0, 1) * 12, subsets))
    assert data(trained.network) == data(reference.network)
    assert len(trained.history) == 2


# Stopping and going on


def resumed(pack, weights, calls: list[int], **changes):
    """Train, stopped as often as there are numbers in `calls`, each time when asked for the so-manieth time."""
    checkpoint, seen = Checkpoint(weights / "checkpoints", uuid4().hex), []

    def go_on(answers):
        training = loop.Trainer(params(**changes), 0, table(), pack, weights, ProcessGroup())
        return training.run(checkpoint, lambda epoch, _: seen.append(epoch.epoch), partial(next, answers))

    for asked in calls:
        with pytest.raises(Interrupted, match=r"^seed 0 stopped in epoch \d+ after step \d+$") as caught:
            go_on(iter([0] * (asked - 1) + [15]))
        assert caught.value.signal == 15
    return go_on(repeat(0)), seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backbone": LITE, "frozen_epochs": 1, "ema_decay": 0.9, "zoom": 0.2, "gamma_jitter": 0.5},
        {"optimizer": "sgd", "mixup_alpha": 0.4, "head_hidden": [8]},
        {"optimizer": "adam", "reset_optimizer_each_epoch": True, "sampling": "weighted", "early_stopping_patience": 1},
        {"precision": "bfloat16", "gradient_accumulation_steps": 2, "fused": True, "loader_threads": 3},
    ],
    ids=", ".join,
)
@pytest.mark.parametrize(
    "calls", [[1], [2], [3], [4], [5, 1], [2, 2, 2, 2]],
    ids=["step", "last step", "validation", "second epoch", "twice", "again and again"],
)  # fmt: skip
def test_stopped_anywhere_training_ends_in_the_same_bytes(pack, weights, calls, changes):
    changes = {"epochs": 3, **changes}
    whole, _ = train(pack, weights, **changes)
    parts, seen = resumed(pack, weights, calls, **changes)
    assert data(parts.network) == data(whole.network)
    assert [entry.row() for entry in parts.history] == [entry.row() for entry in whole.history]
    assert sorted(set(seen)) == [entry.epoch for entry in whole.history]


def test_what_was_told_of_an_epoch_is_told_again_after_a_stop(pack, weights):
    _, seen = resumed(pack, weights, [4], epochs=3)
    assert seen == [1, 1, 2, 3]


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_loader_threads_changes_no_byte(pack, weights, plain, threads):
    assert data(train(pack, weights, loader_threads=threads)[0].network) == plain


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.5, "mixup_alpha": 0.4, "class_weights": (1.0, 3.0)}])
def test_a_batch_in_parts_takes_the_step_of_the_whole_batch(pack, weights, changes):
    whole, parts = (
        train(pack, weights, gradient_accumulation_steps=pieces, optimizer="sgd", **changes)[0].network.state_dict()
        for pieces in (1, 3)
    )
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_trains_as_the_plain_one(pack, weights):
    plainly, compiled = (
        train(pack, weights, backbone="alexnet", size=64, epochs=1, frozen_epochs=1, compile=flag)[0]
        for flag in (False, True)
    )
    for one, other in zip(plainly.history, compiled.history, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_on_cuda_a_seed_repeats_its_bytes_and_is_near_the_cpu(pack, weights, tmp_path, precision):
    np.save(tmp_path / "images.npy", pack.images.numpy())
    there = PackedImages(tmp_path / "images.npy", torch.device("cuda"))
    first, second = (train(there, weights, backbone="alexnet", size=64, precision=precision)[0] for _ in range(2))
    here, _ = train(pack, weights, backbone="alexnet", size=64)
    assert data(first.network.cpu()) == data(second.network.cpu())
    assert first.history[0].train_loss == pytest.approx(here.history[0].train_loss, rel=0.05)


# The pack and its table


def write_tables(folder, split: str) -> None:
    (folder / "manifest.csv").write_text(
        "file,set,label,patient,source,view,license,width,height,bytes,jpeg_quantization,xxh128,phash\n"
        "a.jpg,train,1,NA,,PA,,64,64,9,16.5,aa,00\nb.jpg,train,0,,,,,64,64,9,16.5,bb,00\nt.jpg,test,,,,,,64,64,9,0,cc,00\n"
    )
    (folder / "split.csv").write_text(split)


def test_the_table_joins_manifest_and_split(tmp_path):
    rows = "a.jpg,NA,train,1\nb.jpg,image:b.jpg,validation,0\nt.jpg,image:t.jpg,test,\n"
    write_tables(tmp_path, f"file,group,subset,fold\n{rows}")
    found = read_split(tmp_path)
    assert list(read_split(tmp_path, fold=1)["subset"]) == ["validation", "train", "test"]
    assert list(found["subset"]) == ["train", "validation", "test"]
    assert list(found["patient"]) == ["NA", "", ""]
    assert list(found["group"]) == ["NA", "image:b.jpg", "image:t.jpg"]
    assert found["label"].tolist() == [1, 0, pd.NA]


def test_a_split_of_other_images_is_refused(tmp_path):
    write_tables(tmp_path, "file,group,subset,fold\nb.jpg,b,train,1\na.jpg,a,validation,0\nt.jpg,t,test,\n")
    with pytest.raises(UserError, match=r"manifest.csv and split.csv list different images; run: dvc repro split$"):
        read_split(tmp_path)


def test_batches_are_the_rows_asked_for_in_order(pack):
    rows = torch.tensor([5, 0, 23, 7, 7])
    for threads in (1, 3):
        batches = list(pack.batches(rows.split(2), threads))
        assert [found.tolist() for found, _ in batches] == [[5, 0], [23, 7], [7]]
        assert torch.equal(torch.cat([pixels for _, pixels in batches]), pack.images[rows])
    assert pack.size == 32
