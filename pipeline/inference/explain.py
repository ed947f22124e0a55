"""Heatmaps of what a candidate's networks look at, and their pictures over the radiograph."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from joblib import cpu_count
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.core.config import Resize
from pipeline.core.parallel import map_in_threads
from pipeline.inference.candidate import Candidate
from pipeline.models.classifier import Classifier
from pipeline.models.heatmaps import COLORMAP, OPACITY, compute_heatmaps


def explain(candidate: Candidate, pixels: Tensor, labels: Sequence[int]) -> np.ndarray:
    """Compute the mean Grad-CAM heatmap of the members' networks for a class of each image.

    Args:
        candidate: members count as in the ensemble, where the greedy selection weights them.
        pixels: gray images (N, packed_size, packed_size), uint8.
        labels: the class to explain, 0 or 1, for each image.

    Returns:
        Heatmaps, float32 (N, packed_size, packed_size), in [0, 1]; all 0 where no region contributes.
    """
    members = zip(candidate.members.values(), candidate.config.weights, strict=True)
    weighted = [(network, weight / len(of_folds)) for of_folds, weight in members if weight for network in of_folds]
    size = (candidate.packed_size,) * 2

    def explain_by(job: tuple[Classifier, float]) -> Tensor:
        network, weight = job
        torch.set_num_threads(1)  # as in `apply_networks`: each core computes the maps of one network
        maps = torch.from_numpy(compute_heatmaps(network, pixels, labels))
        return weight * interpolate(maps[:, None], size, mode="bilinear", antialias=True)[:, 0]

    maps = torch.stack(list(map_in_threads(explain_by, weighted, cpu_count())))
    return maps.sum(dim=0).clamp(0, 1).numpy()


def overlay(gray: np.ndarray, heatmap: np.ndarray, resize: Resize) -> Image.Image:
    """Lay a heatmap over a radiograph.

    Args:
        gray: the upright radiograph, uint8 (H, W).
        heatmap: from `explain`, float32 (S, S).
        resize: how the radiograph became a square, `candidate.resize`.

    Returns:
        An RGB image of the radiograph's size.
    """
    image = Image.fromarray(gray.astype(np.uint8, copy=False)).convert("RGBA")
    image.alpha_composite(_draw(heatmap, image.size, resize))
    return image.convert("RGB")


def heatmap_png(heatmap: np.ndarray, size: tuple[int, int], resize: Resize) -> bytes:
    """Encode a heatmap as a PNG that is transparent where the value is 0, to be laid over the radiograph.

    Args:
        heatmap: from `explain`, float32 (S, S).
        size: width and height of the result, pixels, in the proportions of the upright radiograph.
        resize: how the radiograph became a square, `candidate.resize`.
    """
    stream = io.BytesIO()
    _draw(heatmap, size, resize).save(stream, "PNG")
    return stream.getvalue()


def _draw(heatmap: np.ndarray, size: tuple[int, int], resize: Resize) -> Image.Image:
    from matplotlib import colormaps

    box = _image_in_square(size, len(heatmap)) if resize == "pad" else None
    values = np.asarray(Image.fromarray(heatmap).resize(size, Image.Resampling.BILINEAR, box))
    levels = np.rint(255 * values.clip(0, 1)).astype(np.uint8)
    colors = (255 * colormaps[COLORMAP](range(256))).round().astype(np.uint8)
    colors[:, 3] = np.rint(OPACITY * np.arange(256))
    return Image.fromarray(colors[levels])


def _image_in_square(size: tuple[int, int], edge: int) -> tuple[int, int, int, int]:
    """Return the part of a square in which `ImageOps.pad` puts an image: left, top, right and bottom, pixels."""
    width, height = (max(1, round(edge * side / max(size))) for side in size)
    left, top = round((edge - width) * 0.5), round((edge - height) * 0.5)
    return left, top, left + width, top + height
