"""How well a linear classifier on frozen features of a timm backbone does on a source that it was not trained on.

PROJECT is a folder whose data/ is prepared and split; SOURCE is left out of training and predicted. The features are
those of an image with equalized gray levels and of its mirror image: the feature maps at strides 8, 16 and 32, and all
three together, pooled to 1, 2 × 2 or 4 × 4 means. Each is classified by logistic regression, less regularized with a
greater C. Each line gives the AUROC, with its 95 % interval over patients. The last line is chosen by folds, as in
bench/shortcuts.py: its AUROC does not profit from the choice by the same patients.

python bench/frozen_features.py PROJECT SOURCE BACKBONE IMAGE_SIZE
"""

import json
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import torch
from shortcuts import auroc, choose_by_folds, read_project
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from pipeline.data.dataset import PackedImages
from pipeline.models.classifier import Architecture, Classifier, load_pretrained, place_for_inference
from pipeline.models.pretrained import write_pretrained_weights

GRIDS = (1, 2, 4)
STRIDES = (8, 16, 32)
REGULARIZATIONS = (0.01, 0.1, 1.0)


@torch.inference_mode()
def extract(network: Classifier, pixels: Tensor) -> dict[int, list[Tensor]]:
    """Return, by grid, the features of each stride: float32 (B, 2, width), of the images and their mirror images."""
    views = [network.normalize(network.resize(one)) for one in (pixels, pixels.flip(-1))]
    maps = [torch.stack(of_views, dim=1) for of_views in zip(*map(network.compute_feature_maps, views), strict=True)]
    return {
        grid: [adaptive_avg_pool2d(one.flatten(0, 1), grid).reshape(len(pixels), 2, -1) for one in maps]
        for grid in GRIDS
    }


def main(project: Path, source: str, backbone: str, size: int) -> None:
    table, recipe = read_project(project, source)
    pack = PackedImages(project / "data/images.npy", torch.device("cpu"))
    architecture = Architecture(
        backbone, [], 0.0, size, recipe.normalization, pack.size, pack.resize, "equalize", feature_maps=len(STRIDES)
    )
    with tempfile.TemporaryDirectory() as weights:
        write_pretrained_weights(backbone, "imagenet", Path(weights))
        network = place_for_inference(Classifier(architecture), pack.device)
        load_pretrained(network, Path(weights))
    is_external = (table["subset"] == "external").to_numpy()
    rows = np.flatnonzero(table["subset"].isin(["train", "validation", "external"]))
    batches = [extract(network, pack.read(batch)) for batch in torch.from_numpy(rows).split(32)]
    table, is_external = table.iloc[rows], is_external[rows]
    labels, groups, scores = table["label"].to_numpy(int), table["group"].to_numpy()[is_external], {}
    for grid, regularization in product(GRIDS, REGULARIZATIONS):
        of_strides = [torch.cat(batch) for batch in zip(*(batch[grid] for batch in batches), strict=True)]
        by_stride = dict(zip(map(str, STRIDES), of_strides, strict=True)) | {"all": torch.cat(of_strides, dim=2)}
        for stride, features in by_stride.items():
            of_training, of_external = features[~is_external].numpy(), features[is_external].numpy()
            model = make_pipeline(
                StandardScaler(), LogisticRegression(C=regularization, class_weight="balanced", max_iter=1000)
            )
            model.fit(of_training.reshape(-1, of_training.shape[2]), labels[~is_external].repeat(2))
            name = f"stride {stride}, grid {grid}, C {regularization:g}"
            scores[name] = np.mean([model.predict_proba(of_external[:, view])[:, 1] for view in (0, 1)], axis=0)
            print(json.dumps({"features": name, "auroc": auroc(labels[is_external], groups, scores[name])}), flush=True)
    chosen, value = choose_by_folds(labels[is_external], groups, scores)
    print(json.dumps({"features": "chosen by folds", "auroc": value, "chosen": chosen}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4]))
