"""The most unusual images of a data set, for a person to look at: CT slices, lateral views, rotated images and so on.

An image is described by the mean activations of the first blocks of EfficientNet-Lite0 with ImageNet weights, and is
unusual if its Mahalanobis distance from most images is large. docs/data.md says how well this works; unusual is not
wrong. The last blocks, which ImageNet's classes need most, find fewer of the wrong images.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import cpu_count
from PIL import Image, ImageDraw, ImageFont
from sklearn.covariance import ledoit_wolf
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.core.files import atomic_path, write_csv
from pipeline.core.progress import track_progress
from pipeline.models.classifier import IMAGENET_MEAN, IMAGENET_STD
from pipeline.models.pretrained import load_packaged_backbone

SHEET_IMAGES = 48  # on the contact sheet
SIZE = 64  # edge of the images that the network sees, pixels
BLOCKS = 5  # of the network's seven
BATCH_SIZE = 64
MAX_WAITING = 256  # batches whose features may be in memory
MAX_SAMPLE = 20_000  # images that say what is usual, a random sample of more
MIN_SAMPLE = 20  # images without which there is no covariance, and only differences from the mean count
USUAL_SHARE = 0.8  # of the sample; the others may be outliers, and do not say what is usual
CONCENTRATION_STEPS = 2
MIN_STD = 1e-6

COLUMNS, TILE, CAPTION = 8, 144, 16  # of the contact sheet: images in a row, edge and height of the caption, pixels


def rank_outliers(images: np.ndarray) -> np.ndarray:
    """Compute how unusual each image is.

    Mean and covariance are those of the most usual share of a sample, found by concentration steps (Rousseeuw and Van
    Driessen 1999) with the shrinkage of Ledoit and Wolf (2004); otherwise several outliers of one kind would hide each
    other. The network runs on the CPU, one thread per batch, so that the result does not depend on their number.

    Args:
        images: gray images, uint8 (N, S, S), of which a batch is read at a time.

    Returns:
        Mahalanobis distances, float64 (N,).
    """
    count = len(images)
    sample = np.arange(count)
    if count > MAX_SAMPLE:
        sample = np.sort(np.random.default_rng(0).choice(count, MAX_SAMPLE, replace=False))
    features = np.concatenate(list(_embed(images, sample)))
    center, whitening = _fit(features)
    if count == len(sample):
        return _distances(features, center, whitening)
    return np.concatenate([_distances(batch, center, whitening) for batch in _embed(images, np.arange(count))])


def write_outliers(folder: Path, manifest: pd.DataFrame, images: np.ndarray) -> pd.DataFrame:
    """Write `outliers.csv`, all images, the most unusual first, and `contact_sheet.jpg` with the first ones.

    The labels are on neither: images must be left out for what they show, not for their class.

    Args:
        folder: of the two files.
        manifest: N rows with the columns file and set.
        images: the pack, uint8 (N, S, S).

    Returns:
        The table: file, set and distance, see `rank_outliers`.
    """
    distances = rank_outliers(images)
    order = np.argsort(-distances, kind="stable")
    table = manifest[["file", "set"]].assign(distance=distances).iloc[order].reset_index(drop=True)
    # Fewer digits than the last ones, in which processors differ
    write_csv(folder / "outliers.csv", table.assign(distance=table["distance"].map("{:.4g}".format)))
    first = table.head(SHEET_IMAGES)
    titles = [f"{rank}. {row.file} ({row.set})" for rank, row in enumerate(first.itertuples(), start=1)]
    write_contact_sheet(folder / "contact_sheet.jpg", images[order[:SHEET_IMAGES]], titles)
    return table


def write_contact_sheet(path: Path, images: np.ndarray, titles: Sequence[str]) -> None:
    """Write a JPEG of the first 48 images in rows of eight, with a title below each, shortened in the middle if long.

    Args:
        path: of the JPEG.
        images: gray images, uint8 (K, S, S), at least one.
        titles: K.
    """
    images, titles = images[:SHEET_IMAGES], titles[:SHEET_IMAGES]
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("L", (min(len(images), COLUMNS) * TILE, rows * (TILE + CAPTION)))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for index, (pixels, title) in enumerate(zip(images, titles, strict=True)):
        left, top = index % COLUMNS * TILE, index // COLUMNS * (TILE + CAPTION)
        sheet.paste(Image.fromarray(pixels).resize((TILE - 2, TILE - 2), Image.Resampling.BILINEAR), (left, top))
        draw.text((left, top + TILE - 1), shorten(title, font), fill=255, font=font)
    with atomic_path(path) as temporary:
        sheet.save(temporary, "JPEG", quality=85)


def shorten(title: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Leave out as much in the middle of the title as its tile has no room for."""
    kept, short = len(title), title
    while font.getlength(short) > TILE - 4:
        kept -= 1
        short = f"{title[: (kept + 1) // 2]}…{title[len(title) - kept // 2 :]}"
    return short


def _embed(images: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the features, float32 (B, width), of the images at `rows`, batch by batch."""
    network = _BlockMeans()
    batches = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    with ThreadPoolExecutor(cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        features = (
            means
            for start in range(0, len(batches), MAX_WAITING)
            for means in pool.map(lambda batch: network.embed(images[batch]), batches[start : start + MAX_WAITING])
        )
        yield from track_progress(features, "looking for unusual images", len(batches))


class _BlockMeans(nn.Module):
    """The mean activations of every channel of the first blocks."""

    def __init__(self) -> None:
        super().__init__()
        backbone = load_packaged_backbone()
        layers = dict(backbone.named_children())
        self.stem = nn.Sequential(layers["conv_stem"], layers["bn1"])
        self.blocks = list(layers["blocks"].children())[:BLOCKS]
        self.to(memory_format=torch.channels_last)
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    @torch.inference_mode()
    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Return features, float32 (B, width), of gray images, uint8 (B, S, S)."""
        values = interpolate(torch.from_numpy(pixels)[:, None].float(), (SIZE, SIZE), mode="bilinear", antialias=True)
        activations: Tensor = self.stem((values / 255 - self.mean) / self.std)
        means = []
        for block in self.blocks:
            activations = block(activations)
            means.append(activations.mean((2, 3)))
        return torch.cat(means, dim=1).numpy()


def _fit(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the center of the usual images, (width,), and a matrix, (width, width), that makes their covariance 1."""
    center, whitening = features.mean(axis=0, dtype=float), np.diag(1 / (features.std(axis=0, dtype=float) + MIN_STD))
    for _ in range(CONCENTRATION_STEPS if len(features) >= MIN_SAMPLE else 0):
        order = np.argsort(_distances(features, center, whitening), kind="stable")
        usual = features[np.sort(order[: int(USUAL_SHARE * len(features))])]
        center, scale = usual.mean(axis=0, dtype=float), usual.std(axis=0, dtype=float) + MIN_STD
        covariance, _ = ledoit_wolf((usual - center) / scale, assume_centered=True)
        values, vectors = np.linalg.eigh(covariance)
        whitening = vectors / np.sqrt(values.clip(MIN_STD)) / scale[:, None]
    return center, whitening


def _distances(features: np.ndarray, center: np.ndarray, whitening: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.norm((features - center) @ whitening, axis=1))
