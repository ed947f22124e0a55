"""What each lever against shortcuts does: AUROC where the source of an image does not tell its label.

`phantom` draws synthetic radiographs. In training every positive is of source A and every negative of source B; in the
test set source and label are independent, so that a network that tells the sources has an AUROC of 0.5 there. Otherwise
PROJECT is a folder whose data/ is prepared and split, and SOURCE is left out of its training set and predicted.

Each RECIPE is a list of changes to the profile `local`, or to the project's recipe, such as
intensity_normalization=equalize,noise=10; `plain` changes nothing. For each, a line tells the AUROC of the bag with its
95 % interval over patients, that of each seed, and how well the features of the first seed tell the source, given the
label (the source probe). The last line is for the best recipe, chosen five times, for a fifth of the patients by the
others: its AUROC does not profit from the choice by the same patients, but patients of the same source chose it.

python bench/shortcuts.py phantom IMAGES SEEDS RECIPE …
python bench/shortcuts.py PROJECT SOURCE SEEDS RECIPE …
"""

import json
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from common import ROOT
from PIL import Image
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from pipeline.core import config
from pipeline.core.config import PhantomParams, TrainParams
from pipeline.data.dataset import PackedImages
from pipeline.data.manifest import read_split
from pipeline.data.sources import phantom
from pipeline.evaluation import intervals, shortcuts, source_probe
from pipeline.models import classifier
from pipeline.models.pretrained import write_pretrained_weights
from pipeline.training import determinism
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.distributed import ProcessGroup
from pipeline.training.loop import Trainer

SIZE = 96  # edge of the phantoms, pixels


def draw_phantoms(folder: Path, images: int) -> tuple[pd.DataFrame, TrainParams]:
    """Write a pack of phantoms and the backbone's weights to the folder; return the pack's table, and the recipe."""
    params = PhantomParams(train=images, test=images // 2, prevalence=0.25, strength=1.5, confounding=1.0)
    cases = phantom.draw_cases(params)
    with ProcessPoolExecutor() as pool:
        np.save(folder / "images.npy", np.stack(list(pool.map(draw_small, cases, chunksize=16))))
    (folder / "images.json").write_text('{"resize": "stretch"}')
    table = pd.DataFrame({
        "label": [case.label for case in cases], "source": [case.source for case in cases], "acquisition": "",
        "group": [f"p{case.patient}" for case in cases],
        "subset": ["external" if case.split == "test" else "train" for case in cases],
    })  # fmt: skip
    patients = table.loc[table["subset"] == "train", "group"].unique()
    table.loc[table["group"].isin(patients[::5]), "subset"] = "validation"
    recipe = config.load_config(ROOT / "params.yaml").profiles["local"].train
    write_pretrained_weights(recipe.backbone, "imagenet", folder / "weights")
    return table, recipe.model_copy(update={"image_size": SIZE, "cpu_threads": 1})


def draw_small(case: phantom.PhantomCase) -> np.ndarray:
    image = Image.fromarray(phantom.draw_radiograph(case))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def read_project(project: Path, source: str) -> tuple[pd.DataFrame, TrainParams]:
    """Return the table of a project's pack with a source left out of training, and its recipe."""
    table = read_split(project / "data").assign(acquisition="")
    is_external = (table["set"] == "train") & (table["source"] == source)
    if not is_external.any():
        raise SystemExit(
            f"{project}: no labeled image of {source}; its sources: {', '.join(sorted(set(table['source'])))}"
        )
    table["subset"] = table["subset"].replace("external", "unused").where(~is_external, "external")
    return table, config.load_config(project / "params.yaml").active.train.model_copy(update={"cpu_threads": 1})


def change_recipe(recipe: TrainParams, changes: str) -> TrainParams:
    """Apply `key=value,key=value`, or nothing if it is `plain`."""
    pairs = (change.split("=") for change in changes.split(",") if change != "plain")
    return TrainParams.model_validate(recipe.model_dump() | {key: yaml.safe_load(value) for key, value in pairs})


def train_seed(seed: int, recipe: TrainParams, table: pd.DataFrame, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return P(positive) of the external images, and the features of the validation and external images."""
    determinism.make_deterministic(recipe.cpu_threads)
    pack = PackedImages(data / "images.npy", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, seed, table, pack, data / "weights", ProcessGroup())
        result = trainer.run(Checkpoint(Path(folder), "bench"), lambda *_: None, lambda: 0)
    network = classifier.place_for_inference(result.network, pack.device)
    external, probed = (
        [pack.read(rows) for rows in torch.tensor(np.flatnonzero(table["subset"].isin(subsets))).split(32)]
        for subsets in (["external"], ["validation", "external"])
    )
    probabilities = torch.cat([network.predict_proba(pixels) for pixels in external])
    return probabilities.numpy(), torch.cat([network.embed(pixels) for pixels in probed]).numpy()


def estimate(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def auroc(labels: np.ndarray, groups: np.ndarray, scores: np.ndarray) -> str:
    table = intervals.confidence_intervals(labels, scores > 0.5, groups, scores).set_index("metric")
    return estimate(*table.loc["auroc", ["value", "low", "high"]])


def choose_by_folds(labels: np.ndarray, groups: np.ndarray, bags: dict[str, np.ndarray]) -> tuple[list[str], str]:
    """Return the recipe chosen for each of five folds on the others, and the AUROC of all images by the chosen ones.

    Scores of different recipes are compared as ranks among all images.
    """
    chosen, scores = [], np.empty(len(labels))
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(labels, labels, groups)
    for others, fold in folds:
        chosen.append(max(bags, key=lambda recipe: roc_auc_score(labels[others], bags[recipe][others])))
        scores[fold] = rankdata(bags[chosen[-1]])[fold] / len(labels)
    return chosen, auroc(labels, groups, scores)


def main(table: pd.DataFrame, recipe: TrainParams, data: Path, seeds: int, changes: Iterable[str]) -> None:
    external = table[table["subset"] == "external"]
    labels, groups, bags = external["label"].to_numpy(int), external["group"].to_numpy(), {}
    probed = table[table["subset"].isin(["validation", "external"])]
    pixels = np.load(data / "images.npy", mmap_mode="r")
    thumbnails = shortcuts.make_thumbnails(pixels, probed.index.to_numpy()).reshape(len(probed), -1)
    with ProcessPoolExecutor() as pool:
        for change in changes:
            recipes = [change_recipe(recipe, change)] * seeds
            results = list(pool.map(train_seed, range(seeds), recipes, [table] * seeds, [data] * seeds))
            scores = np.stack([probabilities for probabilities, _ in results])
            bags[change] = scores.mean(axis=0)
            probe = source_probe.probe_sources(probed, results[0][1], thumbnails).iloc[0]
            line = {
                "recipe": change, "auroc": auroc(labels, groups, bags[change]),
                "seeds": [round(roc_auc_score(labels, one), 3) for one in scores],
                "source probe": estimate(*probe[["value", "low", "high"]]),
            }  # fmt: skip
            print(json.dumps(line), flush=True)
    chosen, value = choose_by_folds(labels, groups, bags)
    print(json.dumps({"recipe": "chosen by folds", "auroc": value, "chosen": chosen}))


if __name__ == "__main__":
    first, *rest = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        if first == "phantom":
            data, read = Path(scratch), draw_phantoms(Path(scratch), int(rest[0]))
        else:
            data, read = Path(first, "data"), read_project(Path(first), rest[0])
        main(*read, data, int(rest[1]), rest[2:])
