"""`split.cross_validate: true`: one network per seed and fold, every labeled image predicted out of fold."""

import json
import shlex
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import clone_project, commit_all, edit_params, error_message, mlflow_client, run, use_project

from pipeline.core.config import load_config
from pipeline.data.dataset import PackedImages
from pipeline.data.manifest import read_split
from pipeline.evaluation import ensemble, shortcuts
from pipeline.inference import candidate, dataset, files, image_files
from pipeline.models import classifier, soup
from pipeline.models.classifier import Architecture, Classifier
from pipeline.tracking import registry
from pipeline.tracking.store import connect

CPU = torch.device("cpu")
FOLDS, SEEDS = 4, ["seed-0", "seed-1"]


def predict(network, pack: PackedImages, rows: list[int]) -> np.ndarray:
    return np.concatenate([network.predict_proba(pack.read(torch.tensor([row]))).numpy() for row in rows])


# The functions


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Random networks for two seeds and three folds, and a pack with validation, test and external images."""
    monkeypatch.chdir(tmp_path)
    settings = {
        "split": {"folds": 3, "cross_validate": True}, "weights": {"source": "imagenet"}, "train": {"head_hidden": []},
        "download": {"source": "archive", "path": None}, "prepare": {}, "evaluate": {}, "bag": {}, "promote": {},
    }  # fmt: skip
    Path("params.yaml").write_text(json.dumps({"profile": "local", "seeds": [0, 1], "local": settings}))
    for number, name in enumerate(SEEDS):
        torch.manual_seed(number)
        networks = [Classifier(Architecture("resnet18", [], 0.0, 32, "none", 32, "stretch")).eval() for _ in range(3)]
        classifier.save_weights(networks, Path("models", name))
        classifier.save_description(networks[0], Path("models", name), {})
    Path("data").mkdir()
    np.save("data/images.npy", np.random.default_rng(0).integers(0, 256, (10, 32, 32)).astype(np.uint8))
    table = pd.DataFrame(
        {
            "file": [f"{index}.jpg" for index in range(10)],
            "label": pd.array([0, 1, 0, 1, None, 0, 1, 1, 0, None], dtype="Int64"),
            "fold": pd.array([2, 1, 0, 0, None, 1, 2, None, None, None], dtype="Int64"),
            "subset": [*["validation"] * 4, "test", "validation", "validation", "external", "external", "test"],
            "group": [f"p{index}" for index in range(10)],
            "source": [*["A"] * 7, "B", "B", "A"],
        }
    )
    return load_config(), table, PackedImages(Path("data/images.npy"), CPU)


def test_validation_images_are_predicted_out_of_fold_and_test_and_external_images_by_the_mean(project):
    config, table, pack = project
    returned = dataset.predict_dataset(config, table, CPU)
    written = {name: pd.read_csv(f"predictions/{name}.csv") for name in ("validation", "test", "external", "soup")}
    assert list(written["validation"]["file"]) == [f"{row}.jpg" for row in (0, 1, 2, 3, 5, 6)]
    assert list(written["test"].columns) == ["file", *SEEDS]
    assert list(written["external"].columns) == ["file", "label", *SEEDS]
    assert list(written["external"]["file"]) == ["7.jpg", "8.jpg"]
    assert list(written["external"]["label"]) == [1, 0]
    assert written["soup"]["subset"].value_counts().to_dict() == {"validation": 6, "test": 2}
    networks = {name: classifier.load_networks(Path("models", name), CPU) for name in SEEDS}
    soups = [soup.average_weights([networks[name][fold] for name in SEEDS]) for fold in range(3)]
    for row, fold in {0: 2, 1: 1, 2: 0, 3: 0, 5: 1, 6: 2}.items():
        line = written["validation"].set_index("file").loc[f"{row}.jpg"]
        for name in SEEDS:
            every = [predict(network, pack, [row])[0] for network in networks[name]]
            assert line[name] == pytest.approx(every[fold], abs=1e-6)
            assert len({round(float(value), 4) for value in every}) == 3  # the other networks predict otherwise
        averaged = written["soup"].set_index("file").loc[f"{row}.jpg", "soup"]
        assert averaged == pytest.approx(predict(soups[fold], pack, [row])[0], abs=1e-6)
    for subset, rows in {"test": [4, 9], "external": [7, 8]}.items():
        for name in SEEDS:
            mean = np.mean([predict(network, pack, rows) for network in networks[name]], axis=0)
            assert written[subset][name].to_numpy() == pytest.approx(mean, abs=1e-6)
    features = networks["seed-0"][0].embed(pack.read(torch.tensor([2, 3, 7, 8]))).detach().numpy()
    assert np.load("predictions/features.npy") == pytest.approx(features, abs=1e-5)  # of fold 0 and the external images
    assert np.load("predictions/embeddings.npy").shape == (4, 64)  # of fold 0 and the test images
    assert returned["seed-1"].to_numpy() == pytest.approx(written["validation"]["seed-1"].to_numpy(), abs=1e-8)


def test_features_are_stored_of_no_more_images_than_are_probed(project, monkeypatch):
    config, table, pack = project
    monkeypatch.setattr(shortcuts, "MAX_PROBED", 3)
    chosen = shortcuts.choose_probed(table, 0).tolist()
    assert len(set(chosen) & {2, 3, 7, 8}) == len(chosen) == 3
    dataset.predict_dataset(config, table, CPU)
    network = classifier.load_networks(Path("models/seed-0"), CPU)[0]
    features = network.embed(pack.read(torch.tensor(chosen))).detach().numpy()
    assert np.load("predictions/features.npy") == pytest.approx(features, abs=1e-5)
    assert np.load("predictions/embeddings.npy").shape == (4, 64)


def test_without_external_or_test_images_their_tables_have_no_rows(project):
    config, table, _ = project
    dataset.predict_dataset(config, table[table["subset"] == "validation"], CPU)
    assert Path("predictions/test.csv").read_text() == "file,seed-0,seed-1\n"
    assert Path("predictions/external.csv").read_text() == "file,label,seed-0,seed-1\n"
    assert len(pd.read_csv("predictions/validation.csv")) == 6


def test_a_model_of_other_folds_is_an_error(project):
    config, table, _ = project
    split = config.active.split.model_copy(update={"folds": 4})
    other = config.model_copy(update={"profiles": {"local": config.active.model_copy(update={"split": split})}})
    message = error_message(dataset.predict_dataset, other, table, CPU)
    assert message == "models/seed-0: 3 networks for 4 folds; run: dvc repro"


def test_shortcut_baselines_predict_each_fold_from_the_others():
    count, rng = 60, np.random.default_rng(1)
    labels = np.arange(count) % 2
    unknown = {"source": "", "view": "", "sex": "", "age": np.nan, "width": 64, "height": 64, "bytes": 9}
    table = pd.DataFrame({"label": pd.array(labels, dtype="Int64"), "fold": np.arange(count) // 2 % 3, **unknown})
    table["jpeg_quantization"] = rng.normal(labels, 1)
    images = (rng.integers(0, 100, (count, 16, 16)) + 40 * labels[:, None, None]).astype(np.uint8)
    cross_fitted, info = shortcuts.fit_baselines(table.assign(subset="validation"), images)
    assert list(cross_fitted.index) == list(range(count))
    assert info["thumbnail"]["threshold"] == 0.5
    for fold in range(3):
        is_fold = table["fold"] == fold
        one, _ = shortcuts.fit_baselines(table.assign(subset=np.where(is_fold, "validation", "train")), images)
        pd.testing.assert_frame_equal(cross_fitted[is_fold], one)


# The whole pipeline


@pytest.fixture(scope="module")
def trained(build_once, empty_store) -> Path:
    """A project in which a small demo has run with cross-validation; tests must not change it."""

    def edit(params: dict) -> None:
        params["demo"]["download"] |= {"train": 80, "prevalence": 0.4}
        params["demo"]["train"]["epochs"] = 1

    def run_demo(project: Path) -> None:
        edit_params(clone_project(project), edit)
        commit_all(project)
        shutil.copy(empty_store, project / "mlflow.db")
        completed = run(project, *shlex.split("dvc exp run -S demo.split.cross_validate=true"))
        assert completed.returncode == 0, completed.stdout + completed.stderr

    return build_once("cross-validated", run_demo)


@pytest.mark.slow
@pytest.mark.long
def test_every_labeled_image_is_predicted_once_by_a_network_that_has_seen_no_image_of_its_group(trained):
    table = read_split(trained / "data", range(FOLDS))
    labeled = table[table["set"] == "train"]
    predictions = pd.read_csv(trained / "predictions/validation.csv").set_index("file")
    assert list(predictions.index) == list(labeled["file"])
    pack = PackedImages(trained / "data/images.npy", CPU)
    for name in SEEDS:
        networks = classifier.load_networks(trained / "models" / name, CPU)
        in_training = pd.read_csv(trained / "models" / name / "validation.csv").set_index("file")
        assert sorted(in_training.index) == sorted(labeled["file"])
        for fold, network in enumerate(networks):
            of_fold = read_split(trained / "data", [fold])
            validation, training = (of_fold[of_fold["subset"] == subset] for subset in ("validation", "train"))
            assert len(validation) + len(training) == len(labeled)
            assert not set(validation["group"]) & set(training["group"])
            column = predictions.loc[validation["file"], name]
            assert column.to_numpy() == pytest.approx(predict(network, pack, list(validation.index)), abs=1e-5)
            # It is the network of this training: the same predictions as after its last epoch.
            assert column.to_numpy() == pytest.approx(
                in_training.loc[validation["file"], "epoch-1"].to_numpy(), abs=1e-5
            )
            assert (in_training.loc[validation["file"], "fold"] == fold).all()


@pytest.mark.slow
@pytest.mark.long
def test_a_registered_candidate_predicts_files_as_the_mean_of_its_folds(trained, tmp_path, monkeypatch):
    use_project(trained, monkeypatch)
    config, test = load_config(), pd.read_csv("predictions/test.csv")
    with zipfile.ZipFile("data/raw.zip") as archive:
        archive.extractall(tmp_path)
    paths = image_files.ImageFiles([str(tmp_path / "test/test" / name) for name in test["file"]])
    version = registry.get_version(connect(config.model_name), config.model_name, "champion")
    with registry.download_version(version) as folder:
        predictions = pd.concat(files.predict_files(candidate.load_candidate(folder, CPU), paths))
    name = version.tags["candidate"]
    expected = ensemble.predict(test, ensemble.load_candidate_configs(config)[name])
    assert predictions["probability"].to_numpy() == pytest.approx(expected["probability"].to_numpy(), abs=1e-5)
    assert list(predictions["label"]) == list(expected["label"])


@pytest.mark.slow
@pytest.mark.long
def test_one_command_ends_with_tables_report_runs_and_submissions(trained):
    count = int((read_split(trained / "data")["set"] == "train").sum())
    for path in ("predictions/validation.csv", "predictions/shortcuts.csv"):
        assert len(pd.read_csv(trained / path)) == count
    bag = pd.read_csv(trained / "predictions/bag.csv")
    assert bag["subset"].value_counts()["validation"] == count
    assert (trained / "report/index.html").stat().st_size > 0
    assert {path.stem for path in (trained / "submissions").iterdir()} >= {"best", "bag", *SEEDS}
    client = mlflow_client(trained)
    experiment = client.get_experiment_by_name("covid-xray-demo")
    runs = [run_ for run_ in client.search_runs([experiment.experiment_id]) if run_.info.run_name.startswith("seed-")]
    assert len(runs) == len(SEEDS)
    assert all(f"fold-{fold}/validation/f1" in run_.data.metrics for run_ in runs for fold in range(FOLDS))
