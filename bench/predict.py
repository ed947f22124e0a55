"""Radiographs per second of a bag of ten, compared with a loop that loads every member for every image.

python bench/predict.py [IMAGES] [BACKBONE] [SIZE] [ROUNDS]
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from common import UNIQUE_IMAGES, alternate, radiographs, seconds

from pipeline.data import images
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference import candidate
from pipeline.inference import files as inference_files
from pipeline.models import classifier
from pipeline.models.classifier import Architecture, Classifier

MEMBERS = 10


def main(count: int = 8, backbone: str = "alexnet", size: int = 224, rounds: int = 3) -> None:
    jpegs = radiographs()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = [f"seed-{index}" for index in range(MEMBERS)]
        models = [folder / name for name in names]
        for model in models:
            network = Classifier(Architecture(backbone, [256, 128], 0, size, "none", size, "stretch"))
            classifier.save_weights([network], model)
            classifier.save_description(network, model, {})
        config = EnsembleConfig(names, "mean", "mean", [1 / MEMBERS] * MEMBERS, 0.5)
        candidate.assemble_candidate(folder / "bag", folder, config)
        files = [folder / f"{index}.jpg" for index in range(count)]
        for index, file in enumerate(files):
            file.write_bytes(jpegs[index % UNIQUE_IMAGES])
        cpu, paths = torch.device("cpu"), inference_files.ImageFiles([str(file) for file in files])

        def ours() -> float:
            return count / seconds(
                lambda: list(inference_files.predict_files(candidate.load_candidate(folder / "bag", cpu), paths))
            )

        def plain() -> float:
            def predict(file: Path) -> None:
                pixels = torch.from_numpy(images.decode_radiograph(file.read_bytes(), size, "stretch")[0].copy())[None]
                for model in models:
                    classifier.load_classifier(model, cpu).predict_proba(pixels)

            return count / seconds(lambda: [predict(file) for file in files])

        our_rate, plain_rate = alternate(ours, plain, rounds=rounds)
    settings = {"images": count, "backbone": backbone, "size": size}
    rates = {"per_second": round(our_rate, 1), "plain": round(plain_rate, 1), "ratio": round(our_rate / plain_rate, 1)}
    print(json.dumps(settings | rates))


if __name__ == "__main__":
    main(*(int(word) if word.isdecimal() else word for word in sys.argv[1:]))
