"""Exported models, loaded by the other library, give the probabilities of `cxr predict`."""

import contextlib
import io
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import timm
import torch
from conftest import copy_project, error_line_of, error_message, output_of, use_project
from huggingface_hub import ModelCard
from mlflow import MlflowClient
from odd_files import chest, encode
from PIL import Image
from safetensors import safe_open

from pipeline.core.config import FindingParams, load_config
from pipeline.core.files import read_csv
from pipeline.data import images
from pipeline.evaluation import ensemble
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference import export_huggingface, export_onnx
from pipeline.inference.candidate import Candidate
from pipeline.models.classifier import Architecture, Classifier, place_for_inference

pytestmark = pytest.mark.usefixtures("one_thread")

ORIGIN = {"model": "covid-xray-demo", "version": "3", "content_hash": "a1" * 32}
CPU = torch.device("cpu")
SQUEEZENET = Architecture("squeezenet1_1", [], 0.0, 32, "none", 32, "stretch")
ALL_PREPROCESSING = {
    "lung_crop": True, "marker_mask": True, "border_mask": 0.1, "intensity_normalization": "equalize",
    "test_time_augmentation": "crops",
}  # fmt: skip


def make_candidate(architecture: Architecture, networks: list[int], **fields) -> Candidate:
    """Make a candidate of untrained networks: each number is a member with as many folds."""
    torch.manual_seed(0)
    members = {}
    for seed, count in enumerate(networks):
        members[f"seed-{seed}"] = [place_for_inference(Classifier(architecture), CPU) for _ in range(count)]
    values = {"method": "mean", "tie": "mean", "weights": [1 / len(members)] * len(members), "threshold": 0.5} | fields
    finding = FindingParams(name="pneumonia", positive="ill", negative="not *ill*")
    return Candidate(members, EnsembleConfig(list(members), **values), finding)


def random_pixels(count: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_onnx_runtime_gives_the_probabilities_of_predict_for_any_number_of_images(tmp_path):
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # as every training and prediction sets it
    # AlexNet pools to 6 × 6.
    architecture = Architecture("alexnet", [8], 0.5, 80, "imagenet", 96, "pad", **ALL_PREPROCESSING)
    fields = {"threshold": 0.51, "temperature": 1.5, "bias": -0.25, "prevalence": 0.125}
    model = make_candidate(architecture, [2], **fields)
    export_onnx.write_onnx(model, tmp_path / "new" / "model.onnx", ORIGIN)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "new/model.onnx", providers=["CPUExecutionProvider"])
    pixels = random_pixels(10, 96)
    expected = model.predict(pixels)
    for count in (1, 10):
        score, probability, label, members = session.run(None, {"images": pixels[:count].numpy()})
        assert score == pytest.approx(expected["score"].to_numpy()[:count], abs=1e-6)
        assert probability == pytest.approx(expected["probability"].to_numpy()[:count], abs=1e-6)
        assert list(label) == list(expected["label"][:count])
        assert members == pytest.approx(expected[model.config.members].to_numpy()[:count], abs=1e-6)
    metadata = session.get_modelmeta().custom_metadata_map
    assert ORIGIN.items() <= metadata.items()
    assert float(metadata["threshold"]) == model.config.threshold_probability
    assert (float(metadata["score_threshold"]), metadata["prevalence"]) == (0.51, "0.125")
    assert json.loads(metadata["classes"]) == ["not *ill*", "ill"]
    assert (metadata["method"], metadata["tie"], json.loads(metadata["weights"])) == ("mean", "mean", [1.0])
    assert "ImageOps.pad(image, (96, 96)" in metadata["square"]
    (dimension, *edges) = onnx.load(tmp_path / "new/model.onnx").graph.input[0].type.tensor_type.shape.dim
    assert (dimension.dim_param, [edge.dim_value for edge in edges]) == ("N", [96, 96])


@pytest.mark.parametrize(
    ("size", "changes"),  # smaller than the images, equal, and larger
    [(32, {}), (48, {}), (64, {}), (64, {"backbone": "timm/tf_efficientnet_lite0", "feature_maps": 3})],
)
def test_the_graph_resizes_as_predict_does(size, changes):
    architecture = replace(SQUEEZENET, size=size, packed_size=48, **changes)
    model = make_candidate(architecture, [2, 1], method="vote")
    pixels = random_pixels(3, 48)
    with torch.inference_mode():
        score, _, _, members = export_onnx.CandidateGraph(model)(pixels)
    expected = model.predict(pixels)
    assert score.numpy() == pytest.approx(expected["score"].to_numpy(), abs=1e-6)
    assert members.numpy() == pytest.approx(expected[model.config.members].to_numpy(), abs=1e-6)


def test_every_combination_of_members_is_the_same_in_onnx(tmp_path):
    names, weights, threshold = ["a", "b", "c", "d"], [0.0, 0.5, 0.25, 0.25], 0.300000013
    votes = [("vote", "positive"), ("vote", "negative"), ("vote", "mean")]
    configs = [
        EnsembleConfig(names, method, tie, weights, threshold, *recalibration)
        for (method, tie), recalibration in zip(
            [*votes, ("mean", "mean"), ("logits", "mean"), ("greedy", "mean")], 3 * [[], [1.7, -0.8]], strict=True
        )
    ]
    graphs = torch.nn.ModuleList(map(export_onnx.Combination, configs))

    class All(torch.nn.Module):
        def forward(self, members: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
            return [graph(members) for graph in graphs]

    probabilities = np.random.default_rng(0).random((200, 4), np.float32)
    probabilities[:4] = np.eye(4)
    probabilities[4] = 0.3  # in float32 it is the threshold, in float64 below it
    example, path = (torch.from_numpy(probabilities[:2]),), tmp_path / "all.onnx"
    with export_onnx.default_convolution_precision():
        torch.onnx.export(All().eval(), example, path, dynamic_shapes=({0: torch.export.Dim("N")},), verbose=False)
    session = onnxruntime.InferenceSession(path)
    outputs = session.run(None, {session.get_inputs()[0].name: probabilities})
    for number, config in enumerate(configs):
        expected = ensemble.predict(pd.DataFrame(probabilities, columns=config.members), config)
        score, probability, label = outputs[3 * number : 3 * number + 3]
        assert score == pytest.approx(expected["score"].to_numpy(), abs=1e-6)
        assert probability == pytest.approx(expected["probability"].to_numpy(), abs=1e-6)
        assert (label == expected["label"]).all()


def test_onnx_writes_nothing_if_the_weights_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "MAX_WEIGHTS", 1_000_000)
    path = tmp_path / "new/model.onnx"
    message = error_message(export_onnx.write_onnx, make_candidate(SQUEEZENET, [1]), path, ORIGIN)
    assert "the weights have 0.0 GB" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("output", "wrong"), [("probability", lambda one: one + 3e-5), ("label", lambda one: 1 - one)])
def test_onnx_writes_nothing_if_it_does_not_predict_the_same(tmp_path, monkeypatch, output, wrong):
    combine, position = export_onnx.Combination.forward, ["score", "probability", "label"].index(output)

    def combine_wrongly(self, members):
        outputs = list(combine(self, members))
        outputs[position] = wrong(outputs[position])
        return tuple(outputs)

    monkeypatch.setattr(export_onnx.Combination, "forward", combine_wrongly)
    model, path = make_candidate(SQUEEZENET, [1], threshold=0.1), tmp_path / "new/folder/model.onnx"
    message = error_message(export_onnx.write_onnx, model, path, ORIGIN)
    assert message.endswith("nothing is written; try other versions of torch and onnxscript")
    assert list(tmp_path.iterdir()) == []  # and no new folder


def test_onnx_replaces_nothing_but_its_own_exports(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(encode(Image.fromarray(chest(90))))
    other = onnx.helper.make_model(onnx.helper.make_graph([], "other", [], []), producer_name="pytorch")
    onnx.save(other, tmp_path / "other.onnx")
    (tmp_path / "link").symlink_to("x.png")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in before:
        message = error_message(export_onnx.check_target, tmp_path / name)
        assert message.endswith("not written by cxr export, and is not replaced; give another name")
    for path in (Path("/dev/null"), Path("/dev/stdout"), tmp_path):
        assert error_message(export_onnx.check_target, path).endswith(
            "not a file, and is not replaced; give another name"
        )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        assert error_message(export_onnx.check_target, tmp_path / "new.onnx") == (
            "--onnx needs onnxscript, which is not installed; run: pip install -c constraints.txt -e '.[onnx]'"
        )
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "own.onnx").symlink_to("empty.onnx")
    for number in (1, 2):  # an empty file, and then an export
        model = make_candidate(SQUEEZENET, [1], threshold=number / 4)
        export_onnx.write_onnx(model, export_onnx.check_target(tmp_path / "own.onnx"), ORIGIN)
        assert (tmp_path / "own.onnx").is_symlink()
        properties = onnx.load(tmp_path / "empty.onnx").metadata_props
        assert {one.key: one.value for one in properties}["threshold"] == str(number / 4)


def run_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[float, str]:
    """Run the Python code of the model card in its folder, and return the probability and the class that it prints."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code, {})
    probability, _, label = output.getvalue().strip().partition(" ")
    return float(probability), label


@pytest.mark.parametrize(
    ("backbone", "hidden", "size", "resize", "networks", "fields"),
    [
        ("timm/tf_efficientnet_lite0", [], 64, "stretch", [1], {"temperature": 1.5, "bias": -0.25}),
        ("timm/tf_efficientnet_lite0", [], 40, "pad", [2, 1], {"method": "vote"}),
        ("timm/tf_efficientnet_lite0", [8, 4], 64, "stretch", [1], {"threshold": 0.1}),
        ("shufflenet_v2_x0_5", [8], 80, "stretch", [1, 1], {"method": "logits"}),
        ("squeezenet1_1", [], 40, "stretch", [1, 1], {"method": "greedy", "weights": [0.25, 0.75]}),
        ("convnext_tiny", [], 64, "pad", [1], {}),
        ("torchxrayvision/densenet121", [], 64, "stretch", [1], {}),
    ],
)
def test_the_code_of_the_model_card_gives_the_probability_of_predict(
    tmp_path, monkeypatch, backbone, hidden, size, resize, networks, fields
):
    normalization = "torchxrayvision" if backbone.startswith("torchxrayvision/") else "imagenet"
    model = make_candidate(Architecture(backbone, hidden, 0.0, size, normalization, 64, resize), networks, **fields)
    export_huggingface.write_huggingface(model, tmp_path / "hub", ORIGIN, "demo 3", "What **else** is known.")
    radiograph = Image.fromarray(chest(90)[:70])
    radiograph.save(tmp_path / "hub/radiograph.png")
    square = images.resize_to_square(np.array(radiograph), 64, resize)
    (expected,) = model.predict(torch.tensor(square)[None]).to_dict("records")
    probability, label = run_example(tmp_path / "hub", monkeypatch)
    assert probability == pytest.approx(expected["probability"], abs=1e-6)
    assert label == ["not *ill*", "ill"][expected["label"]]
    card = ModelCard.load(tmp_path / "hub/README.md")
    is_timm = backbone.startswith("timm/") and not hidden
    assert card.data.pipeline_tag == "image-classification"
    assert (card.data.library_name, "timm" in card.data.tags) == (("timm", True) if is_timm else ("pytorch", False))
    assert "or ill." in card.text
    assert r"not \*ill\*" in card.text
    assert "not for diagnosis" in " ".join(card.text.lower().split())
    assert "What **else** is known." in card.text
    description = json.loads((tmp_path / "hub/config.json").read_text())["ensemble"]
    assert description.items() >= (ORIGIN | asdict(replace(model.config, threshold=description["threshold"]))).items()


@pytest.mark.parametrize(
    "options", [ALL_PREPROCESSING, {"marker_mask": True, "intensity_normalization": "standardize"}]
)
def test_a_folder_for_the_hub_brings_the_code_of_its_preprocessing(tmp_path, monkeypatch, options):
    architecture = Architecture("timm/tf_efficientnet_lite0", [], 0.0, 64, "imagenet", 96, "stretch", **options)
    model = make_candidate(architecture, [1])
    export_huggingface.write_huggingface(model, tmp_path / "hub", ORIGIN, "demo 3", "")
    Image.fromarray(chest(120)[:100]).save(tmp_path / "hub/radiograph.png")
    square = images.resize_to_square(chest(120)[:100], 96, "stretch")
    monkeypatch.syspath_prepend(tmp_path / "hub")
    probability, _ = run_example(tmp_path / "hub", monkeypatch)
    assert sys.modules.pop("preprocessing").__file__ == str(tmp_path / "hub/preprocessing.py")
    assert probability == pytest.approx(model.predict(torch.tensor(square)[None])["probability"][0], abs=1e-6)
    assert "lack what `preprocessing.py` does" in (tmp_path / "hub/README.md").read_text()


def test_timm_loads_every_network_with_its_labels_and_its_preprocessing(tmp_path):
    architecture = Architecture("timm/tf_efficientnet_lite0", [], 0.2, 64, "imagenet", 80, "pad")
    model = make_candidate(architecture, [2, 1])
    with torch.no_grad():
        model.members["seed-1"][0].head.logits.weight *= 1e5  # rounding of large logits
    (tmp_path / "empty").mkdir()  # an empty folder is as good as a new one, and stays the same one
    (tmp_path / "hub").symlink_to("empty")
    inode = (tmp_path / "empty").stat().st_ino
    target = export_huggingface.check_target(tmp_path / "hub")
    export_huggingface.write_huggingface(model, target, ORIGIN, "demo 3", "")
    assert (tmp_path / "hub").is_symlink()
    assert (tmp_path / "empty").stat().st_ino == inode
    ours = dict(zip(["seed-0/fold-0", "seed-0/fold-1"], model.members["seed-0"], strict=True))
    (ours["seed-1"],) = model.members["seed-1"]
    inputs = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for folder, network in ours.items():
        theirs = timm.create_model(f"local-dir:{tmp_path / 'hub' / folder}", pretrained=True).eval()
        with torch.inference_mode():
            assert theirs(inputs).numpy() == pytest.approx(network(inputs).numpy(), rel=1e-5, abs=1e-6)
        config = timm.data.resolve_data_config({}, model=theirs)
        assert (config["input_size"], config["interpolation"]) == ((3, 64, 64), "bilinear")
        assert [*config["mean"], *config["std"]] == [0.485, 0.456, 0.406, 0.229, 0.224, 0.225]
        assert (config["crop_pct"], config["crop_mode"]) == (1.0, "border")
        assert list(theirs.pretrained_cfg["label_names"]) == ["not *ill*", "ill"]
        assert theirs.num_classes == 2
        with safe_open(tmp_path / "hub" / folder / "model.safetensors", "pt") as tensors:
            assert set(tensors.keys()) == set(theirs.state_dict())
    before = sorted(tmp_path.rglob("*"))
    refused = error_message(export_huggingface.check_target, tmp_path / "hub")
    assert refused == f"{tmp_path / 'hub'}: not an empty folder; give a new one, or delete it"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_for_the_hub_is_complete_or_not_there(tmp_path, monkeypatch):
    def write(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_huggingface, "write_json", write)
    with pytest.raises(KeyboardInterrupt):
        export_huggingface.write_huggingface(make_candidate(SQUEEZENET, [1]), tmp_path / "new/hub", ORIGIN, "demo", "")
    assert list(tmp_path.iterdir()) == []


def test_means_of_feature_maps_are_not_exported_for_the_hub(tmp_path):
    model = make_candidate(replace(SQUEEZENET, backbone="timm/tf_efficientnet_lite0", feature_maps=3), [1])
    message = error_message(export_huggingface.write_huggingface, model, tmp_path / "hub", ORIGIN, "demo", "")
    assert message.startswith("train.feature_maps: timm loads no such model by name; run: cxr export")
    assert not (tmp_path / "hub").exists()


@pytest.mark.slow
def test_cxr_exports_the_champion_with_its_card(demo_project, tmp_path, monkeypatch):
    use_project(copy_project(demo_project, tmp_path / "project"), monkeypatch)
    config = load_config()
    (seed,) = MlflowClient().search_model_versions(f"name='{config.model_name}' and tags.candidate='seed-0'")
    MlflowClient().set_registered_model_alias(config.model_name, "champion", seed.version)  # exported faster than a bag
    assert error_line_of("cxr export champion") == (
        "Error: nothing to export to; give --onnx FILE or --huggingface FOLDER"
    )
    assert "has no version or alias 'nobody'" in error_line_of("cxr export nobody --onnx new/model.onnx")
    assert "is a directory" in error_line_of("cxr export champion --onnx models")
    assert error_line_of("cxr export champion --onnx m --huggingface ./m") == (
        "Error: m: given for both exports; give two names"
    )
    before = sorted(Path().rglob("*"))
    for command in ("--huggingface hub --onnx params.yaml", "--onnx new/model.onnx --huggingface models"):
        assert "Error: " in error_line_of(f"cxr export champion {command}")
        assert sorted(Path().rglob("*")) == before
    output_of("cxr export champion --huggingface champion")
    assert output_of("cxr export champion --onnx champion.onnx").splitlines()[-1] == (
        f"champion.onnx: {config.model_name} version {seed.version}"
    )
    seed_config = ensemble.load_candidate_configs(config)["seed-0"]
    expected = ensemble.predict(read_csv(Path("predictions/test.csv")), seed_config)["probability"]
    session = onnxruntime.InferenceSession("champion.onnx")
    (found,) = session.run(["probability"], {"images": np.load("data/images.npy")[-8:]})
    assert found == pytest.approx(expected.to_numpy(), abs=1e-5)
    card, origin = ModelCard.load("champion/README.md").text, session.get_modelmeta().custom_metadata_map
    assert f"# {config.model_name} version {seed.version}" in card
    assert "**Limitations.**" in card
    assert origin["content_hash"] in card
    assert origin["model"] == config.model_name
    output_of("cxr export seed-0 --huggingface seed")
    card = Path("seed/README.md").read_text()
    assert origin["content_hash"] in card
    assert "# models/seed-0" in card
    assert card.endswith("## Evaluation and limitations\n\nNo evaluation is known for this model.\n")
    output_of("cxr export bag --huggingface bag")
    assert "# Model card: covid-xray-demo" in Path("bag/README.md").read_text()
