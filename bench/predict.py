"""Radiographs per second of a bag of ten, from files to labels.

Compared with the arithmetic alone (`arithmetic`: decoded pixels, one member after the other, on the same threads; the
goal is 3/4 of it), with one network after the other, each spread over all cores, on contiguous batches of 32
(`sequential`), and with a loop that loads every member for every image (`plain`, on few images). `bfloat16` is
`--precision bfloat16`. With `frozen`, the members have the same backbone, as training leaves it that keeps it frozen.

python bench/predict.py [IMAGES] [BACKBONE] [SIZE] [ROUNDS] [MEMBERS] [frozen]
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from common import UNIQUE_IMAGES, alternate, radiographs, seconds
from joblib import cpu_count

from pipeline.core import memory
from pipeline.core.errors import UserError
from pipeline.core.parallel import map_in_threads
from pipeline.data import images
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference import candidate, image_files
from pipeline.inference import files as inference_files
from pipeline.inference.apply_networks import apply_networks, check_precision
from pipeline.models import classifier
from pipeline.models.classifier import Architecture, Classifier

PLAIN_IMAGES = 4
CPU = torch.device("cpu")


def main(
    count: int = 64,
    backbone: str = "alexnet",
    size: int = 224,
    rounds: int = 3,
    members: int = 10,
    backbones: str = "trained",
) -> None:
    memory.retain_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = [folder / f"seed-{index}" for index in range(members)]
        architecture = Architecture(backbone, [256, 128], 0, size, "none", size, "stretch")
        first = Classifier(architecture)
        for model in models:
            network = Classifier(architecture)
            if backbones == "frozen":
                network.backbone = first.backbone
            classifier.save_weights([network], model)
            classifier.save_description(network, model, {})
        config = EnsembleConfig([model.name for model in models], "mean", "mean", [1 / members] * members, 0.5)
        candidate.assemble_candidate(folder / "bag", folder, config)
        files, jpegs = [folder / f"{index}.jpg" for index in range(count)], radiographs(min(count, UNIQUE_IMAGES))
        for index, file in enumerate(files):
            file.write_bytes(jpegs[index % UNIQUE_IMAGES])
        bag, in_bfloat16 = (candidate.load_candidate(folder / "bag", CPU, one) for one in ("float32", "bfloat16"))
        networks = [
            classifier.load_networks(model, CPU)[0].to(memory_format=torch.contiguous_format) for model in models
        ]
        measurements = {
            "per_second": partial(predict_together, bag, files),
            "arithmetic": partial(compute_only, bag, files, size),
            "sequential": partial(predict_in_sequence, networks, files, size),
            "plain": partial(predict_plainly, models, files[:PLAIN_IMAGES], size),
        }
        try:
            check_precision("bfloat16", CPU)
            measurements["bfloat16"] = partial(predict_together, in_bfloat16, files)
        except UserError:  # this processor has no instructions for it
            pass
        for warm_up in measurements.values():
            warm_up()
        rates = dict(zip(measurements, alternate(*measurements.values(), rounds=rounds), strict=True))
    settings = {"images": count, "backbone": backbone, "size": size, "members": members, "backbones": backbones}
    ratios = {"ratio": round(rates["per_second"] / rates["sequential"], 2)}
    ratios |= {f"{name}_ratio": round(rates["per_second"] / rates[name], 2) for name in ("arithmetic", "plain")}
    if "bfloat16" in rates:
        ratios["bfloat16_ratio"] = round(rates["bfloat16"] / rates["sequential"], 2)
    print(json.dumps(settings | {name: round(rate, 1) for name, rate in rates.items()} | ratios))


def decode(file: Path, size: int) -> torch.Tensor:
    return torch.from_numpy(images.decode_radiograph(file.read_bytes(), size, "stretch")[0].copy())


def predict_together(bag: candidate.Candidate, files: list[Path]) -> float:
    paths = image_files.ImageFiles([str(file) for file in files])
    return len(files) / seconds(lambda: list(inference_files.predict_files(bag, paths)))


def compute_only(bag: candidate.Candidate, files: list[Path], size: int) -> float:
    batches = torch.stack([decode(file, size) for file in files]).split(bag.batch_size)

    def compute() -> None:
        for (network,) in bag.members.values():
            for _ in apply_networks([network.predict_proba], batches, CPU):
                pass

    return len(files) / seconds(compute)


def predict_in_sequence(networks: list[Classifier], files: list[Path], size: int) -> float:
    torch.set_num_threads(cpu_count())

    def predict() -> None:
        decoded = map_in_threads(partial(decode, size=size), files, cpu_count(), len(files))
        for batch in torch.stack(list(decoded)).split(32):
            for network in networks:
                network.predict_proba(batch)

    return len(files) / seconds(predict)


def predict_plainly(models: list[Path], files: list[Path], size: int) -> float:
    def predict() -> None:
        for file in files:
            for model in models:
                classifier.load_networks(model, CPU)[0].predict_proba(decode(file, size)[None])

    return len(files) / seconds(predict)


if __name__ == "__main__":
    main(*(int(word) if word.isdecimal() else word for word in sys.argv[1:]))
