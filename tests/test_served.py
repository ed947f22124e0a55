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

from pipeline.core.config import FindingParams, PrepareParams
from pipeline.data import manifest, packing
from pipeline.data.dataset import PackedImages
from pipeline.evaluation import ensemble
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference import apply_networks, candidate
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
    network = Classifier(Architecture("squeezenet1_1", **options, packed_size=pack.size, resize=pack.resize))
    classifier.save_weights([network], tmp_path / "seed-0")
    classifier.save_description(network, tmp_path / "seed-0", {})
    networks = {"seed-0": classifier.load_classifier(tmp_path / "seed-0", CPU)}
    config = EnsembleConfig(["seed-0"], "mean", "mean", [1.0], 0.5, 2.0, -1.0, 0.125)
    candidate.assemble_candidate(tmp_path / "candidate", tmp_path, config)
    evaluated = probability_table(networks, pack, list(rows.index[1:]))
    expected = ensemble.predict(evaluated, config)["probability"].to_numpy()  # recalibrated
    assert expected == pytest.approx(expit(logit(evaluated["seed-0"].to_numpy()) / 2 - 1))
    assert list(rows["file"][1:]) == list(files)
    assert len(set(expected.round(6))) > 3

    with zipfile.ZipFile(raw) as archive:
        archive.extractall(tmp_path)
    paths = inference_files.ImageFiles([str(tmp_path / "test" / name) for name in files])
    predictions = pd.concat(inference_files.predict_files(candidate.load_candidate(tmp_path / "candidate", CPU), paths))
    assert list(predictions["probability"]) == list(expected)

    served = ServedModel()
    served.load_context(SimpleNamespace(artifacts={"candidate": str(tmp_path / "candidate")}))
    for inputs in (
        list(files.values()),
        [base64.b64encode(data).decode() for data in files.values()],
        list(map(str, paths)),
    ):
        response = served.predict(None, pd.DataFrame({"image": inputs}))
        assert list(response["probability"]) == list(expected)
        assert list(response) == ["probability", "label", "prevalence", "version"]
        assert set(response["prevalence"]) == {0.125}


def make_candidate(members: int, precision: apply_networks.Precision = "float32") -> candidate.Candidate:
    architecture = Architecture("squeezenet1_1", [], 0.0, 32, "imagenet", 32, "stretch")
    networks = {}
    for seed in range(members):
        torch.manual_seed(seed)
        networks[f"seed-{seed}"] = classifier.place_for_inference(Classifier(architecture), CPU)
    config = EnsembleConfig(list(networks), "mean", "mean", [1 / members] * members, 0.5)
    return candidate.Candidate(networks, config, FindingParams(), precision)


PIXELS = torch.randint(0, 256, (40, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_probabilities_depend_neither_on_cores_nor_on_threads(monkeypatch):
    expected = make_candidate(3).predict(PIXELS)
    for cores, threads in ((1, 1), (3, 2)):
        monkeypatch.setattr(apply_networks, "cpu_count", lambda cores=cores: cores)
        torch.set_num_threads(threads)
        pd.testing.assert_frame_equal(make_candidate(3).predict(PIXELS), expected, check_exact=True)
    alone = make_candidate(1).members["seed-0"].predict_proba(PIXELS[:1]).item()
    methods = [make_candidate(1).members["seed-0"].predict_proba]
    (first,) = next(apply_networks.apply_networks(methods, [PIXELS[:1]], CPU))
    assert first.item() == alone


def test_few_batches_wait_for_their_networks(monkeypatch):
    monkeypatch.setattr(apply_networks, "cpu_count", lambda: 2)
    read = []
    batches = (read.append(index) or PIXELS[:1] for index in range(20))
    ahead = [len(read) - done for done, _ in enumerate(make_candidate(2).predict_batches(batches))]
    assert len(ahead) == 20
    assert max(ahead) <= 4


def test_bfloat16_moves_probabilities_little_and_is_no_default():
    expected, predicted = make_candidate(2).predict(PIXELS), make_candidate(2, "bfloat16").predict(PIXELS)
    difference = (predicted["probability"] - expected["probability"]).abs()
    assert 0 < difference.max() < 0.01


def test_an_unusable_file_changes_no_other_probability(tmp_path):
    files = [tmp_path / f"{index}.png" for index in range(5)]
    for index, file in enumerate(files):
        file.write_bytes(encode(Image.fromarray(chest(90 + index))))
    paths, model = inference_files.ImageFiles(list(map(str, files))), make_candidate(1)
    (expected,) = inference_files.predict_files(model, paths)
    files[2].write_bytes(b"")
    (predicted,) = inference_files.predict_files(model, paths)
    pd.testing.assert_frame_equal(predicted.drop(2), expected.drop(2), check_exact=True)
    assert predicted.loc[2, ["probability", "label"]].isna().all()
    assert predicted.loc[2, "reason"]
