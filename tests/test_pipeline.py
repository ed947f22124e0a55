"""The whole pipeline, run by DVC in a clone of the project, on few and small phantoms."""

import base64
import json
import re
import shutil
import socket
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import yaml
from conftest import copy_project, mlflow_client, run, run_server, seed_runs
from scipy.special import expit, logit

from pipeline.tracking import registry

pytestmark = pytest.mark.slow

NAME = "covid-xray-demo"


def repro(project: Path, *arguments: str, **changes: str) -> str:
    completed = run(project, "dvc", "repro", *arguments, **changes)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


def lock_hashes(project: Path) -> dict[str, str]:
    """Return the hash of every dep and out in dvc.lock."""
    stages = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    return {
        f"{name}: {file['path']}": file["md5"]
        for name, stage in stages.items()
        for file in stage.get("deps", []) + stage["outs"]
    }


def test_every_stage_writes_its_tables_with_the_documented_columns(demo_project):
    best = json.loads((demo_project / "metrics/summary.json").read_text())["best"]["model"]
    columns = {
        "data/manifest.csv": [
            *("file", "set", "label", "patient", "source", "view", "sex", "age", "license"),
            *("manufacturer", "modality", "width", "height", "bytes", "jpeg_quantization", "xxh128", "phash"),
        ],
        "data/quarantine.csv": ["file", "set", "label", "reason"],
        "data/split.csv": ["file", "group", "subset", "fold"],
        "predictions/validation.csv": ["file", "label", "seed-0", "seed-1"],
        "predictions/test.csv": ["file", "seed-0", "seed-1"],
        "predictions/soup.csv": ["subset", "file", "label", "soup"],
        "predictions/external.csv": ["file", "label", "seed-0", "seed-1"],
        "metrics/external.csv": [
            *("source", "images", "positives", "patients", "positive_patients", "negative_patients", "role", "model"),
            *("metric", "value", "low", "high", "method", "reason"),
        ],
        "predictions/shortcuts.csv": [
            "file",
            "label",
            "source",
            "view",
            "demographics",
            "file_metadata",
            "thumbnail",
            "border",
        ],
        "models/seed-1/validation.csv": ["file", "fold", "epoch-1", "epoch-2"],
        "predictions/bag.csv": [
            *("subset", "file", "label", "votes", "vote", "mean", "logits", "greedy", "score", "probability"),
            "predicted",
        ],
        "predictions/adapted.csv": ["file", "bag", "best"],
        "metrics/intervals.csv": ["model", "estimate_type", "metric", "value", "low", "high", "method", "reason"],
        "metrics/ranks.csv": ["model", "probability"],
        "metrics/shift.csv": [
            *("features", "labeled_images", "positive_groups", "negative_groups", "images", "prevalence", "auroc"),
            *("distance", "p", "adjusted_p", "reason"),
        ],
        "metrics/source_probe.csv": [
            *("features", "by", "labels", "sources", "images", "patients", "value", "low", "high", "reason"),
        ],
        "report/table.csv": [
            *("metric", f"{best}, corrected", "seed-0", "seed-1", "bag (vote)", "bag (mean)"),
        ],
        "submissions/best.csv": ["File", "Label"],
        "submissions/bag.csv": ["File", "Label"],
        "submissions/seed-1.csv": ["File", "Label"],
    }
    assert {path: list(pd.read_csv(demo_project / path)) for path in columns} == columns


def test_submissions_list_the_files_of_the_sample_in_its_order(demo_project):
    with zipfile.ZipFile(demo_project / "data/raw.zip") as archive, archive.open("sample_submission.csv") as stream:
        sample = pd.read_csv(stream)
    for path in (demo_project / "submissions").iterdir():
        submission = pd.read_csv(path)
        assert submission["File"].equals(sample["File"])
        assert submission["Label"].isin([0, 1]).all()


def test_no_out_contains_a_run_id_a_host_name_or_an_absolute_path(demo_project, tmp_path_factory):
    names = [run.info.run_id for run in seed_runs(demo_project)]
    names += [socket.gethostname(), str(tmp_path_factory.getbasetemp().parent)]
    for folder in ("models", "metrics", "predictions", "report", "plots", "submissions"):
        for path in (demo_project / folder).rglob("*"):
            content = path.read_bytes() if path.suffix in (".json", ".csv", ".md", ".html") else b""
            content = re.sub(rb'base64,[^"]*', b"", content)  # encoded images may contain any text by chance
            assert not [name for name in names if name.encode() in content], path


def test_a_second_repro_has_nothing_to_do(demo_project):
    assert "Data and pipelines are up to date." in repro(demo_project)


def test_mlflow_has_one_parent_run_and_a_child_run_per_seed(demo_project):
    client = mlflow_client(demo_project)
    children = seed_runs(demo_project)
    assert [run.data.params["seed"] for run in children] == ["0", "1"]
    (parent_id,) = {run.data.tags["mlflow.parentRunId"] for run in children}
    parent = client.get_run(parent_id)
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    assert children[0].info.end_time < children[1].info.start_time  # registering its model does not prolong a run
    assert parent.data.tags["mlflow.note.content"] == (demo_project / "report/table.md").read_text()
    bag, seeds = (json.loads((demo_project / f"metrics/{name}.json").read_text()) for name in ("bag", "evaluate"))
    for run_, scores in zip([parent, *children], [bag["vote"], *seeds.values()], strict=True):
        assert {key: run_.data.metrics.get(key) for key in scores} == pytest.approx(scores)
        assert next(iter(run_.data.metrics)) == "f1"  # MLflow compares runs by the first one
        assert parent.data.params.items() <= run_.data.params.items()
    f1 = [run_.data.metrics["f1"] for run_ in children]
    assert parent.data.metrics["seeds/f1_min"] == pytest.approx(min(f1))
    assert parent.data.metrics["seeds/f1_mean"] == pytest.approx(sum(f1) / len(f1))
    assert children[0].data.params.keys() - parent.data.params.keys() == {"seed"}
    assert {"report/index.html", "report/table.png"} <= {
        file.path for file in client.list_artifacts(parent_id, "report")
    }
    assert [file.path for file in client.list_artifacts(parent_id, "data")] == ["data/card.json", "data/card.md"]


def test_the_metrics_of_a_child_run_equal_its_history_file(demo_project):
    client = mlflow_client(demo_project)
    for run_ in seed_runs(demo_project):
        history = pd.read_csv(demo_project / f"models/seed-{run_.data.params['seed']}/history.csv")
        logged = client.get_metric_history(run_.info.run_id, "validation/f1")
        assert [metric.step for metric in logged] == list(history["epoch"])
        assert [metric.value for metric in logged] == pytest.approx(list(history["f1"]))


def test_a_child_run_has_its_parameters_dataset_and_checkpoint(demo_project):
    client = mlflow_client(demo_project)
    run_ = seed_runs(demo_project)[1]
    assert run_.data.params["lr"] == "0.002"
    (data,) = run_.inputs.dataset_inputs
    assert data.dataset.digest == lock_hashes(demo_project)["prepare: data/manifest.csv"]
    files = [Path(file.path).name for file in client.list_artifacts(run_.info.run_id, "checkpoint")]
    assert files == ["history.csv", "metrics.json", "model.json", "validation.csv"]
    (version,) = client.search_model_versions(f"run_id = '{run_.info.run_id}'")
    folder = mlflow.artifacts.download_artifacts(f"models:/{NAME}/{version.version}")
    (stored,) = Path(folder).rglob("model.safetensors")  # the one copy of the weights
    assert stored.read_bytes() == (demo_project / "models/seed-1/model.safetensors").read_bytes()


def test_the_best_seed_is_champion_and_challenger(demo_project):
    client = mlflow_client(demo_project)
    metrics = json.loads((demo_project / "metrics/evaluate.json").read_text())
    version = client.get_model_version_by_alias(NAME, "champion")
    assert version.version == client.get_model_version_by_alias(NAME, "challenger").version
    (decision,) = registry.decisions_about(version)
    assert decision["f1"] == max(scores["f1"] for scores in metrics.values())
    assert "there was no champion" in version.tags["decision"]


def champion_predictions(project: Path) -> pd.DataFrame:
    """Return the score of the champion for the test images, the mean of its members, and its recalibrated score."""
    candidate = json.loads((project / "metrics/promotion.json").read_text())["candidate"]
    config = json.loads((project / "metrics/candidates.json").read_text())[candidate]
    test = pd.read_csv(project / "predictions/test.csv")
    test["score"] = test[config["members"]].mean(axis="columns")
    test["probability"] = expit(logit(test["score"]) / config["temperature"] + config["bias"])
    return test


def test_the_champion_gives_the_predictions_of_evaluate_for_bytes_base64_and_paths(demo_project, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    mlflow_client(demo_project)
    expected = champion_predictions(demo_project)
    with zipfile.ZipFile(demo_project / "data/raw.zip") as archive:
        images = [archive.read(f"test/test/{name}") for name in expected["file"]]
    for name, image in zip(expected["file"], images, strict=True):
        (tmp_path / name).write_bytes(image)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    for encoded in (
        images,
        [base64.b64encode(i).decode() for i in images],
        [tmp_path / n for n in expected["file"]],
    ):
        predictions = model.predict(pd.DataFrame({"image": encoded}))
        assert predictions["probability"].to_numpy() == pytest.approx(expected["probability"].to_numpy(), abs=1e-6)
        assert list(predictions["label"]) == list((expected["score"] >= 0.5).astype(int))


def test_the_logged_model_contains_no_pickle_and_lists_its_requirements(demo_project):
    client = mlflow_client(demo_project)
    version = client.get_model_version_by_alias(NAME, "champion")
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}/{version.version}"))
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle", ".pth", ".pt")]
    assert f"torch=={__import__('torch').__version__.split('+')[0]}" in (folder / "requirements.txt").read_text()


def test_a_served_champion_predicts_and_rejects_an_unusable_image(demo_project, port):
    def post(image: str) -> dict:
        body = json.dumps({"dataframe_records": [{"image": image}]}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["predictions"][0]

    expected = champion_predictions(demo_project).iloc[0]
    with zipfile.ZipFile(demo_project / "data/raw.zip") as archive:
        content = archive.read(f"test/test/{expected['file']}")
    command = "mlflow models serve -m models:/covid-xray-demo@champion --env-manager local --port 5001"
    command = command.replace("5001", str(port))
    with run_server(demo_project, *command.split(), health_url=f"http://127.0.0.1:{port}/ping"):
        with pytest.raises(urllib.error.HTTPError) as error:
            post(base64.b64encode(b"no radiograph").decode())
        assert error.value.code == 400
        assert "not a usable radiograph" in error.value.read().decode()
        assert post(base64.b64encode(content).decode())["probability"] == pytest.approx(
            expected["probability"], abs=1e-6
        )


def test_promoting_again_changes_nothing(demo_project):
    def state() -> list:
        client = mlflow_client(demo_project)
        runs = client.search_runs([client.get_experiment_by_name(NAME).experiment_id])
        point_counts = [
            len(client.get_metric_history(run_.info.run_id, key)) for run_ in runs for key in run_.data.metrics
        ]
        versions = client.search_model_versions(f"name = '{NAME}'")
        return [
            [run_.to_dictionary() for run_ in runs],
            point_counts,
            [(version.version, version.tags) for version in versions],
            client.get_registered_model(NAME).aliases,
            client.get_experiment_by_name(NAME).tags,
            (demo_project / "metrics/promotion.json").read_text(),
        ]

    before = state()
    repro(demo_project, "-f", "-s", "promote")
    assert state() == before


def test_a_lost_tracking_store_is_recreated_from_the_outs_without_training(demo_project, tmp_path):
    before = {run_.data.params["seed"]: run_ for run_ in seed_runs(demo_project)}
    version = mlflow_client(demo_project).get_model_version_by_alias(NAME, "champion")
    project = copy_project(demo_project, tmp_path / "project")
    shutil.rmtree(project / "mlartifacts")
    for path in project.glob("mlflow.db*"):
        path.unlink()

    repro(project, "-f", "-s", "promote")

    client = mlflow_client(project)
    restored = seed_runs(project)
    assert len(restored) == len(before)
    for run_ in restored:
        old = before[run_.data.params["seed"]]
        assert run_.data.params == old.data.params
        assert run_.data.tags["fingerprint"] == old.data.tags["fingerprint"]
        for key in ("f1", "validation/loss", "train/loss"):
            assert run_.data.metrics[key] == pytest.approx(old.data.metrics[key], rel=1e-6)
    assert client.get_model_version_by_alias(NAME, "champion").tags["content_hash"] == version.tags["content_hash"]


def test_a_clone_with_the_outs_but_no_tracking_store_fills_its_own(demo_project, tmp_path):
    clone = copy_project(demo_project, tmp_path / "clone")
    shutil.rmtree(clone / "mlartifacts")
    for path in [*clone.glob("mlflow.db*"), clone / "metrics/promotion.json"]:
        path.unlink()
    output = repro(clone)
    assert "Running stage 'promote'" in output
    assert "stages.train" not in output
    assert len(seed_runs(clone)) == 2
