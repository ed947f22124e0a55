"""Evaluation, prediction of files and the served model give the same probability for the same file."""

import base64
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
import requests
import torch
import uvicorn
from conftest import free_port, write_zip
from odd_files import chest, encode, formats
from PIL import Image
from scipy.special import expit, logit

from pipeline.core.config import FindingParams, PrepareParams
from pipeline.data import image_checks, manifest, packing
from pipeline.data.dataset import PackedImages
from pipeline.evaluation import ensemble
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference import apply_networks, candidate, image_files, pyfunc_model
from pipeline.inference import files as inference_files
from pipeline.inference.dataset import probability_table
from pipeline.models import classifier
from pipeline.models.classifier import Architecture, Classifier
from pipeline.tracking.registry import SIGNATURE

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.mark.parametrize("resize", ["stretch", "pad"])
def test_evaluation_files_and_the_served_model_give_the_same_probabilities(tmp_path, resize):
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
    networks = {"seed-0": classifier.load_networks(tmp_path / "seed-0", CPU)}
    config = EnsembleConfig(["seed-0"], "mean", "mean", [1.0], 0.5, 2.0, -1.0, 0.125)
    candidate.assemble_candidate(tmp_path / "candidate", tmp_path, config)
    evaluated = probability_table(networks, pack, list(rows.index[1:]))
    expected = ensemble.predict(evaluated, config)["probability"].to_numpy()  # recalibrated
    assert expected == pytest.approx(expit(logit(evaluated["seed-0"].to_numpy()) / 2 - 1))
    assert list(rows["file"][1:]) == list(files)
    assert len(set(expected.round(6))) > 3

    with zipfile.ZipFile(raw) as archive:
        archive.extractall(tmp_path)
    paths = image_files.ImageFiles([str(tmp_path / "test" / name) for name in files])
    predictions = pd.concat(inference_files.predict_files(candidate.load_candidate(tmp_path / "candidate", CPU), paths))
    assert list(predictions["probability"]) == list(expected)

    served = pyfunc_model.ServedModel()
    served.load_context(SimpleNamespace(artifacts={"candidate": str(tmp_path / "candidate")}))
    for inputs in (
        list(files.values()),
        list(map(bytearray, files.values())),
        list(map(memoryview, files.values())),
        [base64.b64encode(data).decode() for data in files.values()],
        [tmp_path / "test" / name for name in files],
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
        networks[f"seed-{seed}"] = [classifier.place_for_inference(Classifier(architecture), CPU)]
    config = EnsembleConfig(list(networks), "mean", "mean", [1 / members] * members, 0.5)
    return candidate.Candidate(networks, config, FindingParams(), precision)


PIXELS = torch.randint(0, 256, (40, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_probabilities_depend_neither_on_cores_nor_on_threads(monkeypatch):
    expected = make_candidate(3).predict(PIXELS)
    for cores, threads in ((1, 1), (3, 2)):
        monkeypatch.setattr(apply_networks, "cpu_count", lambda cores=cores: cores)
        torch.set_num_threads(threads)
        pd.testing.assert_frame_equal(make_candidate(3).predict(PIXELS), expected, check_exact=True)
    members = make_candidate(1).members
    (first,) = next(apply_networks.predict_members(members.values(), [PIXELS[:1]], CPU))
    assert first.item() == members["seed-0"][0].predict_proba(PIXELS[:1]).item()


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
    paths, model = image_files.ImageFiles(list(map(str, files))), make_candidate(1)
    (expected,) = inference_files.predict_files(model, paths)
    files[2].write_bytes(b"")
    (predicted,) = inference_files.predict_files(model, paths)
    pd.testing.assert_frame_equal(predicted.drop(2), expected.drop(2), check_exact=True)
    assert predicted.loc[2, ["probability", "label"]].isna().all()
    assert predicted.loc[2, "reason"]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory) -> mlflow.pyfunc.PyFuncModel:
    """A small model, saved and loaded as those of the registry."""
    folder = tmp_path_factory.mktemp("model")
    model = make_candidate(2)
    for name, network in model.members.items():
        classifier.save_weights(network, folder / name)
        classifier.save_description(network[0], folder / name, {})
    candidate.assemble_candidate(folder / "candidate", folder, model.config)
    mlflow.pyfunc.save_model(
        folder / "saved",
        python_model=pyfunc_model.__file__,
        artifacts={"candidate": str(folder / "candidate")},
        signature=SIGNATURE,
        pip_requirements=[],
    )
    return mlflow.pyfunc.load_model(str(folder / "saved"))


@pytest.fixture(scope="module")
def url(saved_model) -> Iterator[str]:
    """The address of MLflow's scoring server."""
    from mlflow.pyfunc import scoring_server

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")  # as the server sets it, without an end
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(scoring_server.init(saved_model), port=port, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/invocations"
        server.should_exit = True
        thread.join()


def post(url: str, *images: object) -> requests.Response:
    return requests.post(url, json={"dataframe_records": [{"image": image} for image in images]}, timeout=60)


def refusal(response: requests.Response) -> str:
    """Return the reason of an answer that must be HTTP 400; it has no trace."""
    assert response.status_code == 400, response.text
    body = json.loads(response.text)
    assert "stack_trace" not in body
    assert ".py" not in body["message"]
    return body["message"].partition("Error: ")[2]  # MLflow repeats the request before it


def test_a_client_opens_no_file_and_does_not_learn_which_exist(url, tmp_path):
    existing = tmp_path / "radiograph.png"
    existing.write_bytes(encode(Image.fromarray(chest(90))))
    names = ["/etc/passwd", str(existing), str(tmp_path / "absent.png"), existing.as_uri(), "~", "."]
    reasons = {refusal(post(url, name)) for name in names}
    assert reasons == {
        "image 1: not a usable radiograph: text that is not base64; send a file's content (in Python, a pathlib.Path)"
    }
    for table in (pd.DataFrame({"image": names[1:2]}), pd.DataFrame({"image": [{"path": names[1]}]})):
        stream = table.to_parquet()
        assert refusal(requests.post(url, stream, headers={"Content-Type": "application/vnd.apache.parquet"}))


def test_a_server_answers_as_predict_does_and_refuses_what_is_no_radiograph(url, saved_model, monkeypatch, tmp_path):
    files = [tmp_path / f"{index}.png" for index in range(3)]
    for index, file in enumerate(files):
        file.write_bytes(encode(Image.fromarray(chest(90 + index))))
    model = make_candidate(2)
    (expected,) = inference_files.predict_files(model, image_files.ImageFiles(list(map(str, files))))
    answer = post(url, *(base64.b64encode(file.read_bytes()).decode() for file in files)).json()
    assert [one["probability"] for one in answer["predictions"]] == list(expected["probability"])
    in_process = saved_model.predict(pd.DataFrame({"image": files}))  # as paths, which MLflow's schema lets through
    assert list(in_process["probability"]) == list(expected["probability"])
    pixels = PIXELS[0].tolist()
    (one,) = post(url, pixels).json()["predictions"]
    assert one["probability"] == model.predict(PIXELS[:1])["probability"].item()
    assert saved_model.predict(pd.DataFrame({"image": np.empty(0, object)})).empty

    row = [0] * 40
    for image in (
        None, 5, 1.5, True, {}, {"bytes": "x"}, "", "AAAA", "é", [], [[]], [1, 2], row, [row, [1]], [row] * 8,
        [row] * 40, [["9" * 100_000, *row]] * 40, [[0.5] * 40] * 40, [[300] * 40] * 40, [[-1] * 40] * 40,
        [[[1]] * 40] * 40,
    ):  # fmt: skip
        assert refusal(post(url, image)).startswith("image 1: not a usable radiograph: ")
    assert refusal(post(url, pixels, [[]])).startswith("image 2: ")
    assert refusal(post(url, *[""] * 257)) == "257 images: more than the 256 of a call; split them"
    monkeypatch.setattr(image_checks, "MAX_BYTES", 2999)
    monkeypatch.setattr(image_checks, "MAX_PIXELS", 1599)
    assert refusal(post(url, "A" * 4000)).endswith("too large: more than 2,999 bytes")
    assert refusal(post(url, [row] * 40)).endswith("too large: 40×40 pixels")
    monkeypatch.setattr(pyfunc_model.candidate.Candidate, "predict", None)
    broken = post(url, [row[:32]] * 31 + [[255] * 32])
    assert (broken.status_code, "stack_trace" in broken.text) == (500, False)
