"""Features of a frozen backbone, computed once for all seeds and folds and kept in a file."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Generator, Tensor

from pipeline.core.config import TrainParams
from pipeline.core.errors import Interrupted
from pipeline.core.files import atomic_path
from pipeline.core.progress import track_progress
from pipeline.data.dataset import PackedImages
from pipeline.models import preprocessing
from pipeline.models.classifier import Classifier
from pipeline.training import augment
from pipeline.training.determinism import describe_environment, make_generator

log = logging.getLogger(__name__)

BATCH_SIZE = 32  # the order of float sums can depend on it
MAX_FILES = 3  # in the folder, of the recipes used last
# Parameters of training that change no feature.
HEAD_ONLY = {
    "head_hidden", "dropout", "epochs", "frozen_epochs", "keep", "early_stopping_patience", "batch_size",
    "gradient_accumulation_steps", "sampling", "positive_oversampling", "class_weights", "mixup_alpha",
    "mixup_pairing", "label_smoothing", "group_dro", "optimizer", "reset_optimizer_each_epoch", "lr", "eps",
    "weight_decay", "ema_decay", "swa_epochs", "schedule", "warmup_epochs", "precision", "fused", "compile",
    "loader_threads",
}  # fmt: skip


@dataclass(frozen=True)
class FrozenFeatures:
    """The features of views of images; the first view is the image as it is."""

    rows: np.ndarray  # the images' rows in the pack, int64 (R,), ascending
    values: np.ndarray  # float32 (R, views, width): first those of prediction, then the augmented ones
    prediction_views: int  # 1, or more with test-time augmentation

    def read(self, rows: Tensor) -> Tensor:
        """Return the features by which the images at `rows` (B,) are predicted: float32 (B, views, width)."""
        return torch.from_numpy(self.values[self._find(rows), : self.prediction_views])

    def draw(self, rows: Tensor, generator: Generator) -> Tensor:
        """Return the features of one view of each image at `rows` (B,), as it is or augmented: float32 (B, width)."""
        augmented = self.values.shape[1] - self.prediction_views
        views = torch.randint(1 + augmented, rows.shape, generator=generator).numpy()
        return torch.from_numpy(self.values[self._find(rows), np.where(views, views + self.prediction_views - 1, 0)])

    def _find(self, rows: Tensor) -> np.ndarray:
        # In the calling thread; torch would start a thread pool per calling thread.
        return np.searchsorted(self.rows, rows.numpy())


def load_features(
    network: Classifier, params: TrainParams, pack: PackedImages, rows: Tensor, folder: Path, stop: Callable[[], int]
) -> FrozenFeatures:
    """Return the features of images, from the file if there is one, else computed, and then written to it.

    Nothing depends on a seed but the weights of a backbone without pretrained ones. Of several processes that need the
    same features at the same time, one computes them while the others wait. The file's name is a hash of all that the
    features depend on; only the `MAX_FILES` files that were used last are kept.

    Args:
        network: whose backbone is frozen, on the device of the pack.
        params: the hyperparameters, with `feature_views`.
        pack: the images.
        rows: the rows in the pack of the images, int64 (R,), ascending.
        folder: the folder of the file.
        stop: see `Trainer.run`.

    Raises:
        Interrupted: `stop` returned a signal.
    """
    path = folder / f"features-{_fingerprint(network, params, pack, rows)}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(lock := path.with_suffix(".lock")):
        values = _read(path)
        if values is None:
            values = _compute(network, params, pack, rows, stop)
            _write(path, values)
        lock.unlink()
    with suppress(FileNotFoundError):  # another process removes old files at the same time
        os.utime(path)
        files = sorted(folder.glob("features-*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
        for old in files[:-MAX_FILES]:
            old.unlink()
    return FrozenFeatures(rows.numpy(), values.numpy(), values.shape[1] - (params.feature_views - 1))


def _write(path: Path, values: Tensor) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as out:
        out.write(save({"features": values}))
        out.flush()
        os.fsync(out.fileno())


def _read(path: Path) -> Tensor | None:
    try:
        return load_file(path)["features"]
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        log.warning("%s cannot be read: %s; its features are computed again", path, error)
        return None


@torch.inference_mode()
def _compute(
    network: Classifier, params: TrainParams, pack: PackedImages, rows: Tensor, stop: Callable[[], int]
) -> Tensor:
    """Compute the features of all views of the images at `rows` (R,): float32 (R, views, width), on the CPU."""
    network.eval()
    batches, values = rows.split(BATCH_SIZE), []
    pixel_batches = pack.batches(batches, params.loader_threads)
    for index, pixels in enumerate(track_progress(pixel_batches, "features", len(batches))):
        images = network.resize(pixels)
        views = preprocessing.views(images, params.test_time_augmentation)
        for view in range(1, params.feature_views):
            drawn = augment.draw_augmentation(len(images), params, make_generator(0, "features", index, view))
            views.append(augment.augment(images, {name: value.to(pack.device) for name, value in drawn.items()}))
        features = [network.extract_features(network.normalize(view)).float().cpu() for view in views]
        values.append(torch.stack(features, dim=1))
        if signal := stop():
            done = min(BATCH_SIZE * (index + 1), len(rows))
            raise Interrupted(signal, f"stopped after the features of {done} images; dvc repro computes them again")
    return torch.cat(values)


def _fingerprint(network: Classifier, params: TrainParams, pack: PackedImages, rows: Tensor) -> str:
    """Hash all that the features depend on: images, augmentation, preprocessing, weights, code and environment."""
    models = [path for path in Path(preprocessing.__file__).parent.iterdir() if path.suffix == ".py"]
    content: dict[str, Any] = {
        "params": params.model_dump(exclude=HEAD_ONLY),
        "resize": pack.resize,
        "images": hashlib.sha256(pack.images).hexdigest(),
        "rows": rows.tolist(),
        "weights": {name: _sha256(value) for name, value in network.backbone.state_dict().items()},
        "code": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in [*models, Path(augment.__file__), Path(__file__)]
        },
        "environment": describe_environment(1),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.cpu().contiguous().numpy().data).hexdigest()
