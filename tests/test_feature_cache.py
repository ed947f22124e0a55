"""Training on the features of a frozen backbone, which are computed once."""

from uuid import uuid4

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.preprocessing import StandardScaler
from test_training import LITE, SMALL, data, params, table
from test_training import pack as pack  # noqa: PLC0414 - a fixture
from test_training import train as train_once

from pipeline.core.config import TrainParams
from pipeline.core.errors import Interrupted
from pipeline.data.dataset import PackedImages
from pipeline.models import backbones
from pipeline.models.classifier import load_networks, save_description, save_weights
from pipeline.training import determinism, feature_cache, loop
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.distributed import ProcessGroup

pytestmark = pytest.mark.usefixtures("one_thread")
FROZEN = {"frozen_epochs": 2, "feature_views": 3}


@pytest.fixture(autouse=True, scope="module")
def _deterministic():
    determinism.make_deterministic(1)
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    save_file(backbones.build_backbone(SMALL).state_dict(), tmp_path / "backbone.safetensors")
    (tmp_path / "origin.json").write_text('{"source": "somewhere"}')
    return tmp_path


def train(pack, weights, seed=0, **changes):
    return train_once(pack, weights, seed, **{**FROZEN, **changes})[0]


def cache_files(weights):
    return sorted((weights / "checkpoints").glob("features-*.safetensors"))


def remove_cache(weights):
    for file in cache_files(weights):
        file.unlink()


def test_without_augmentation_it_is_the_same_training(pack, weights):
    changes = {"flip": 0.0, "rotation": 0.0, "dropout": 0.5, "head_hidden": [8]}
    cached, plain = (train(pack, weights, feature_views=views, **changes) for views in (1, 0))
    torch.testing.assert_close(cached.network.state_dict(), plain.network.state_dict(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cached.predictions, plain.predictions, rtol=1e-4, atol=1e-5)


def test_all_seeds_share_a_file_and_bytes_do_not_depend_on_it_or_on_who_computes_it(pack, weights):
    results = [data(train(pack, weights, seed).network) for seed in (0, 1)]
    (file,) = cache_files(weights)
    content = load_file(file)["features"]
    assert content.shape[:2] == (24, 3)
    for seed in (1, 0):
        remove_cache(weights)
        assert data(train(pack, weights, seed).network) == results[seed]
        assert torch.equal(load_file(file)["features"], content)
    assert cache_files(weights) == [file]
    assert results[0] != results[1]


def test_other_folds_and_heads_share_the_file_and_other_images_views_and_weights_do_not(pack, weights):
    train(pack, weights)
    (file,) = cache_files(weights)
    rows = table(subsets=("validation",) * 8 + ("train",) * 16)
    train_once(pack, weights, rows=rows, **FROZEN)
    train(pack, weights, lr=0.1, batch_size=4, sampling="group_balanced", head_hidden=[4], label_smoothing=0.1)
    assert cache_files(weights) == [file]
    train(pack, weights, rotation=9.0)
    train_once(pack, weights, rows=rows.iloc[:20], **FROZEN)
    assert len(cache_files(weights)) == 3
    state = load_file(weights / "backbone.safetensors")
    save_file({name: 2 * value for name, value in state.items()}, weights / "backbone.safetensors")
    train(pack, weights)
    assert len(cache_files(weights)) == feature_cache.MAX_FILES
    assert file not in cache_files(weights)  # the one that was not used for the longest time


def test_a_changed_pixel_changes_the_features_of_its_image(pack, weights, tmp_path):
    images = pack.images.copy()
    images[3, 16, 16] += 1
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "images.json").write_text('{"resize": "stretch"}')
    train(pack, weights)
    train(PackedImages(tmp_path / "images.npy", pack.device), weights)
    before, after = (load_file(file)["features"] for file in cache_files(weights))
    assert (before != after).any(dim=2).any(dim=1).nonzero().tolist() == [[3]]


def test_a_view_is_augmented_and_drawn_anew_in_every_epoch(pack, weights):
    trainer = loop.Trainer(params(**FROZEN), 0, table(), pack, weights, ProcessGroup())
    trainer.run(Checkpoint(weights / "checkpoints", uuid4().hex), lambda *_: None, lambda: 0)
    features, rows = trainer.features, torch.tensor([5, 2, 5])
    assert features.read(rows).shape == (3, 1, 512)
    views = features.values[[5, 2, 5]]
    assert all((views[:, 0] != views[:, other]).any() for other in (1, 2))
    drawn = [features.draw(rows, determinism.make_generator(0, step)).numpy() for step in range(30)]
    picked = {
        (row, view) for one in drawn for row in range(3) for view in range(3) if (one[row] == views[row, view]).all()
    }
    assert len(picked) == 9
    embedded = trainer.network.embed(pack.read(rows))
    torch.testing.assert_close(features.read(rows)[:, 0], embedded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("augmentation", ["flip", "crops"])
def test_the_views_of_prediction_are_those_of_the_whole_network(pack, weights, augmentation):
    result = train(pack, weights, test_time_augmentation=augmentation, epochs=1, frozen_epochs=1)
    expected = result.network.predict_proba(pack.read(torch.arange(16, 24)))
    torch.testing.assert_close(result.predictions[:, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop_call", [1, 4])
def test_an_interrupted_training_ends_in_the_same_bytes(pack, weights, stop_call):
    whole = train(pack, weights)
    remove_cache(weights)
    checkpoint, calls = Checkpoint(weights / "checkpoints", uuid4().hex), iter(range(1, 100))

    def run(stop):
        trainer = loop.Trainer(params(**FROZEN), 0, table(), pack, weights, ProcessGroup())
        return trainer.run(checkpoint, lambda *_: None, stop)

    message = "24 images; dvc repro computes them again" if stop_call == 1 else "step 1; dvc repro resumes from there"
    with pytest.raises(Interrupted, match=f"{message}$"):
        run(lambda: 15 if next(calls) == stop_call else 0)
    assert len(cache_files(weights)) == (stop_call > 1)
    resumed = run(lambda: 0)
    assert data(resumed.network) == data(whole.network)
    assert torch.equal(resumed.predictions, whole.predictions)


def test_a_damaged_file_is_replaced_with_a_warning(pack, weights, caplog):
    whole = data(train(pack, weights).network)
    (file,) = cache_files(weights)
    content = file.read_bytes()
    file.write_bytes(content[:100])
    assert data(train(pack, weights).network) == whole
    assert "its features are computed again" in caplog.text
    assert file.read_bytes() == content


@pytest.mark.parametrize("averages", [{}, {"ema_decay": 0.9}])
def test_means_of_feature_maps_are_standardized_by_the_training_images(pack, weights, averages):
    torch.manual_seed(0)
    save_file(backbones.build_backbone(LITE).state_dict(), weights / "backbone.safetensors")
    result = train(pack, weights, backbone=LITE, feature_maps=3, image_size=64, **averages)
    (file,) = cache_files(weights)
    as_they_are = load_file(file)["features"][:, 0].numpy()
    scaler = StandardScaler().fit(as_they_are[:16])
    assert result.network.head.scaler.mean.numpy() == pytest.approx(scaler.mean_, rel=1e-5, abs=1e-6)
    assert result.network.head.scaler.std.numpy() == pytest.approx(scaler.scale_, rel=1e-4, abs=1e-7)
    logits = result.network.head.logits
    with torch.no_grad():
        expected = logits(torch.from_numpy(scaler.transform(as_they_are[16:])).float()).softmax(1)[:, 1]
    torch.testing.assert_close(result.predictions[:, -1], expected, rtol=1e-4, atol=1e-4)
    save_weights([result.network], weights)
    save_description(result.network, weights, {})
    (loaded,) = load_networks(weights, pack.device)
    probabilities = loaded.predict_proba(pack.read(torch.arange(16, 24)))
    torch.testing.assert_close(probabilities, expected, rtol=1e-3, atol=1e-4)


def test_the_parameters_that_change_no_feature_exist():
    assert set(TrainParams.model_fields) >= feature_cache.HEAD_ONLY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frozen_epochs": 1, "epochs": 2}, "the backbone must stay frozen; set frozen_epochs to epochs, or this to 0"),
        *(
            ({name: 0.5}, f"features are computed once, and {name} joins images anew; set one of them to 0")
            for name in ("cutmix_alpha", "fourier_exchange", "histogram_exchange")
        ),
        (
            {"backbone": "torchxrayvision/densenet121"},
            "torchxrayvision and a backbone of torchxrayvision/ need each other",
        ),
        ({"normalization": "torchxrayvision"}, "torchxrayvision and a backbone of torchxrayvision/ need each other"),
    ],
)
def test_what_does_not_go_together_is_an_error_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainParams(**{"frozen_epochs": 8, "epochs": 8, "feature_views": 2, **changes})
