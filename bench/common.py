"""Shared by the benchmarks: the same radiographs for all implementations, and alternating timing."""

import statistics
import time
from collections.abc import Callable, Iterable
from itertools import islice
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
from pipeline.evaluation.intervals import percentile_interval

UNIQUE_IMAGES = 64  # the other radiographs are copies with other names
ROOT = Path(__file__).parents[1]


def radiographs(count: int = UNIQUE_IMAGES) -> list[bytes]:
    """Generate the first `count` of 64 synthetic JPEGs of 512×512 pixels, as in the demo."""
    params = PhantomParams(
        source="phantom",
        train=UNIQUE_IMAGES,
        test=1,
        prevalence=0.1,
        test_prevalence=0.5,
        strength=1,
        confounding=0,
        seed=1,
    )
    return [phantom._encode_jpeg(case) for case in islice(phantom.draw_cases(params), count)]  # noqa: SLF001


def write_folder_and_pack(folder: Path, count: int, size: int) -> pd.DataFrame:
    """Write the images as files for ImageFolder and as a pack with edge `size`; return the table of the pack."""
    jpegs = radiographs(min(count, UNIQUE_IMAGES))
    images = np.empty((count, size, size), np.uint8)
    for index in range(count):
        path = folder / "images" / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpegs[index % UNIQUE_IMAGES])
        images[index] = np.asarray(Image.open(path).convert("L").resize((size, size), Image.Resampling.BILINEAR))
    np.save(folder / "images.npy", images)
    (folder / "images.json").write_text('{"resize": "stretch"}')
    (folder / "origin.json").write_text('{"source": "none"}')
    subset = ["validation"] * 8 + ["train"] * (count - 8)
    return pd.DataFrame({"label": [index % 2 for index in range(count)], "subset": subset, "source": ""})


def loader(folder: Path, size: int, batch_size: int, workers: int) -> DataLoader:
    """Return the baseline loader: one file per image, decoded and transformed one at a time."""
    transforms = [v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if size != 512:
        transforms.insert(0, v2.Resize((size, size)))
    dataset = ImageFolder(folder / "images", v2.Compose(transforms))
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers)


def recipe(**changes: object) -> TrainParams:
    """Return the training parameters of the competition profile, with changes."""
    defaults = config.load_config(ROOT / "params.yaml").profiles["competition"].train
    return TrainParams.model_validate({**defaults.model_dump(), **changes})


def compare_metrics(
    ours: pd.DataFrame, theirs: pd.DataFrame, metrics: Iterable[str] | None = None, margin: float = 0
) -> pd.DataFrame:
    """Compare two models by a paired bootstrap.

    Args:
        ours: metrics of one model on every resample, from `compute_metrics`.
        theirs: metrics of the other model, with the same weights.
        metrics: names of the metrics to compare; by default, all that both tables have.
        margin: difference above which ours counts as greater.

    Returns:
        A row per metric: `metric`, `difference` (ours minus theirs), `low` and `high` of its 95 % confidence interval,
        and `probability`, the share of resamples with a difference above the margin. NaN where no resample defines the
        metric.
    """
    rows = []
    for metric in metrics or ours.columns.intersection(theirs.columns, sort=False):
        sample = ours[metric] - theirs[metric]
        low, high = percentile_interval(sample)
        resampled = sample[1:].dropna()
        probability = float((resampled > margin).mean()) if len(resampled) else np.nan
        rows.append({"metric": metric, "difference": sample[0], "low": low, "high": high, "probability": probability})
    return pd.DataFrame(rows)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(*measurements: Callable[[], float], rounds: int = 5) -> list[float]:
    """Run the measurements alternately, and return the median of each."""
    results = [[measure() for measure in measurements] for _ in range(rounds)]
    return [statistics.median(values) for values in zip(*results, strict=True)]
