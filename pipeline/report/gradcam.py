"""Where a model looks: Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391)."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pipeline.evaluation.metrics import apply_threshold
from pipeline.evaluation.shortcuts import BORDER_WIDTH, THUMBNAIL_SIZE
from pipeline.models.classifier import Classifier

MIN_MAP_SIZE = 4  # edge of the map: a coarser one cannot tell the middle from the border
MARGIN = BORDER_WIDTH / THUMBNAIL_SIZE  # of the edge, on each side: what the shortcut `border` sees
UNIFORM_BORDER_SHARE = (
    1 - (1 - 2 * MARGIN) ** 2
)  # the border's share of the area, so of a map that is the same everywhere


def most_and_least_confident(
    labels: np.ndarray, probabilities: np.ndarray, threshold: float, count: int = 4
) -> pd.DataFrame:
    """Choose the surest right images (half of each class, if there are), the surest wrong and the least sure ones.

    Args:
        labels: (N,), 0 or 1.
        probabilities: (N,), P(positive).
        threshold: from which an image is called positive.
        count: images of each kind, at most.

    Returns:
        `kind` and `row`, 0 to N − 1; no image twice.
    """
    right = apply_threshold(probabilities, threshold) == labels
    table = pd.DataFrame({"label": labels, "right": right, "sure": np.abs(probabilities - threshold)})
    surest = table.sort_values("sure", ascending=False, kind="stable")
    found = {
        "surest right": surest[surest["right"]].groupby("label").head(count // 2).sort_values("label", kind="stable"),
        "surest wrong": surest[~surest["right"]].head(count),
        "least sure": surest[::-1].head(count),
    }
    rows = pd.concat([pd.DataFrame({"kind": kind, "row": part.index}) for kind, part in found.items()])
    return rows.drop_duplicates("row").reset_index(drop=True)


def compute_heatmaps(network: Classifier, pixels: Tensor, classes: list[int]) -> np.ndarray:
    """Return where a network sees what speaks for a class.

    Args:
        network: on the CPU, where the same map comes out every time.
        pixels: gray images (N, S, S), uint8.
        classes: for each image, 0 or 1.

    Returns:
        Maps float32 (N, size, size) of the size the network sees, from 0 to 1 each; all 0 where nothing does.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    inputs = network.normalize(network.resize(pixels))
    with GradCAM(network, [target_layer(network)]) as cam:
        return np.asarray(cam(inputs, [ClassifierOutputTarget(number) for number in classes]))


def target_layer(network: Classifier) -> nn.Module:
    """Return the last part of the backbone whose output is a map that is not too coarse."""
    found: list[nn.Module] = []

    def look(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] == output.shape[-2] >= MIN_MAP_SIZE:
            found.append(module)

    hooks = [module.register_forward_hook(look) for module in network.backbone.modules()]
    size = network.architecture.size
    with torch.no_grad():
        network(network.normalize(torch.zeros(1, 1, size, size)))
    for hook in hooks:
        hook.remove()
    return found[-1]


def border_share(maps: np.ndarray) -> np.ndarray:
    """Return the share of each map's (N, S, S) mass that lies in the border; NaN where the map is empty."""
    margin = round(maps.shape[-1] * MARGIN)
    total = maps.sum(axis=(1, 2))
    inside = maps[:, margin:-margin, margin:-margin].sum(axis=(1, 2))
    share: np.ndarray = np.divide(total - inside, total, out=np.full(len(maps), np.nan), where=total > 0)
    return share
