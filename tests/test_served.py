"""Evaluation, prediction of files and the served model give the same probability for the same file."""

import base64
import zipfile
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import write_zip
from odd_files import chest, encode, formats
from PIL import Image
from scipy.special import expit, logit

from pipeline.core.config import PrepareParams
from pipeline.data import manifest, packing
from pipeline.data.dataset import PackedImages
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference import candidate
from pipeline.inference import files as inference_files
from pipeline.inference.dataset import probability_table
from pipeline.models import classifier
from pipeline.models.classifier import Architecture, Classifier

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.mark.parametrize("resize", ["stretch", "pad"])
def test_evaluation_files_and_the_served_model_give_the_same_probabilities(tmp_path, resize):
    from pipeline.inference.pyfunc_model import ServedModel

    wide = {
        "wide.png": encode(Image.fromarray(chest(90)[:50])),
        "tall.jpg": encode(Image.fromarray(chest(90)[:, :40]), "JPEG"),
    }
    files = formats(72) | wide
    lines = "".join(f"{name},0\n" for name in files)
    labeled = {"train/a.png": wide["wide.png"], "train_labels.csv": b"File,Label\na.png,0\n"}
    members = {f"test/{name}": data for name, data in files.items()} | labeled
    raw = write_zip(tmp_path / "raw.zip", members | {"sample_submission.csv": f"File,Label\n{lines}".encode()})
    packing.pack_images(raw, PrepareParams(image_size=48, resize=resize, max_quarantined=0), tmp_path)
    pack, rows = PackedImages(tmp_path / "images.npy", CPU), manifest.read_manifest(tmp_path)

    torch.manual_seed(0)
    options = {"head_hidden": [], "dropout": 0.0, "size": 40, "normalization": "imagenet"}
    network = Classifier(Architecture("squeezenet1_1", **options, packed_size=pack.size, resize=pack.resize)).eval()
    classifier.save_weights([network], tmp_path / "seed-0")
    classifier.save_description(network, tmp_path / "seed-0", {})
    config = EnsembleConfig(["seed-0"], "mean", "mean", [1.0], 0.5, 2.0, -1.0, 0.125)
    candidate.assemble_candidate(tmp_path / "candidate", tmp_path, config)
    expected = probability_table({"seed-0": network}, pack, list(rows.index), batch_size=4)["seed-0"].to_numpy()[1:]
    expected = expit(logit(expected) / 2 - 1)  # recalibrated
    assert list(rows["file"][1:]) == list(files)
    assert len(set(expected.round(6))) > 3

    with zipfile.ZipFile(raw) as archive:
        archive.extractall(tmp_path)
    paths = inference_files.ImageFiles([str(tmp_path / "test" / name) for name in files])
    predictions = pd.concat(inference_files.predict_files(candidate.load_candidate(tmp_path / "candidate", CPU), paths))
    assert predictions["probability"].to_numpy() == pytest.approx(expected, abs=1e-6)

    served = ServedModel()
    served.load_context(SimpleNamespace(artifacts={"candidate": str(tmp_path / "candidate")}))
    for inputs in (
        list(files.values()),
        [base64.b64encode(data).decode() for data in files.values()],
        list(map(str, paths)),
    ):
        response = served.predict(None, pd.DataFrame({"image": inputs}))
        assert response["probability"].to_numpy() == pytest.approx(expected, abs=1e-6)
        assert list(response) == ["probability", "label", "prevalence", "version"]
        assert set(response["prevalence"]) == {0.125}
