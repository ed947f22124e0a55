"""What the benchmarks share: the same radiographs for both sides, and turns taken in one run."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from pipeline.core import config
from pipeline.core.config import PhantomParams, TrainParams
from pipeline.data.sources import phantom

DRAWN = 64  # different radiographs; the rest are copies under other names
ROOT = Path(__file__).parents[1]


def radiographs() -> list[bytes]:
    """Draw JPEGs of 512×512 pixels, as the demo does."""
    params = PhantomParams(
        source="phantom", train=DRAWN, test=1, prevalence=0.1, test_prevalence=0.5, strength=1, confounding=0, seed=1
    )
    return [phantom._jpeg(case) for case in phantom.draw_cases(params)]  # noqa: SLF001


def write_folder_and_pack(folder: Path, count: int, size: int) -> pd.DataFrame:
    """Write the images as files for ImageFolder and, at `size` pixels, as a pack; return the pack's table."""
    jpegs = radiographs()
    images = np.empty((count, size, size), np.uint8)
    for index in range(count):
        path = folder / "images" / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpegs[index % DRAWN])
        images[index] = np.asarray(Image.open(path).convert("L").resize((size, size), Image.Resampling.BILINEAR))
    np.save(folder / "images.npy", images)
    (folder / "images.json").write_text('{"resize": "stretch"}')
    (folder / "origin.json").write_text('{"source": "none"}')
    subset = ["validation"] * 8 + ["train"] * (count - 8)
    return pd.DataFrame({"label": [index % 2 for index in range(count)], "subset": subset})


def loader(folder: Path, size: int, batch_size: int, workers: int) -> DataLoader:
    """Load the plain way: a file per image, decoded and transformed one by one, as the recipe does it."""
    steps = [v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if size != 512:
        steps.insert(0, v2.Resize((size, size)))
    return DataLoader(ImageFolder(folder / "images", v2.Compose(steps)), batch_size, shuffle=True, num_workers=workers)


def recipe(**changes: object) -> TrainParams:
    """Return the training section of the competition's profile, changed."""
    shipped = config.load_config(ROOT / "params.yaml").profiles["competition"].train
    return TrainParams.model_validate({**shipped.model_dump(), **changes})


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(*sides: Callable[[], float], rounds: int = 5) -> list[float]:
    """Let the sides take turns, and return the median of what each returns."""
    figures = [[side() for side in sides] for _ in range(rounds)]
    return [statistics.median(of_one) for of_one in zip(*figures, strict=True)]
