"""The model registry on a real MLflow store: candidates, the gate, rollback, verification and predictions."""

import errno
import json
import os
import socket
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import requests
from conftest import (
    copy_project,
    edit_params,
    error_line_of,
    invoke,
    mlflow_client,
    output_of,
    run,
    seed_runs,
    use_project,
)
from filelock import FileLock
from mlflow.exceptions import MlflowException
from scipy.special import expit, logit

from pipeline.core import config
from pipeline.evaluation import ensemble, gate
from pipeline.tracking import registry, runs
from pipeline.tracking.fingerprint import training_fingerprint
from pipeline.tracking.store import Store, connect

pytestmark = pytest.mark.slow

NAME = "covid-xray-demo"
CANDIDATES = ["seed-0", "seed-1", "bag"]


@pytest.fixture
def promoted(demo_project, tmp_path, monkeypatch) -> Path:
    """A copy of the demo project with its registry, as the working directory."""
    use_project(copy_project(demo_project, tmp_path / "project"), monkeypatch)
    return tmp_path / "project"


def aliases(project: Path) -> dict[str, str]:
    return {alias: str(version) for alias, version in mlflow_client(project).get_registered_model(NAME).aliases.items()}


def other_versions() -> list[str]:
    """Return the versions that are not champion."""
    champion = aliases(Path.cwd())["champion"]
    return [version for version in ("1", "2", "3") if version != champion]


def logged_models(project: Path) -> list[mlflow.entities.LoggedModel]:
    client = mlflow_client(project)
    return client.search_logged_models([experiment.experiment_id for experiment in client.search_experiments()])


def test_every_candidate_is_a_registered_version_of_its_run(promoted):
    versions = {version.tags["candidate"]: version for version in registry.list_versions(connect(NAME), NAME)}
    assert list(versions) == CANDIDATES
    assert [versions[f"seed-{seed}"].run_id for seed in (0, 1)] == [seed.info.run_id for seed in seed_runs(promoted)]
    assert versions["bag"].run_id == seed_runs(promoted)[0].data.tags["mlflow.parentRunId"]
    assert {model.experiment_id for model in logged_models(promoted)} == {connect(NAME).experiment_id}
    tags = {"content_hash", "data_md5", "split_md5", "mlflow.source.git.commit"}
    assert all(tags <= set(version.tags) for version in versions.values())


def test_runs_and_versions_have_the_version_of_the_package(promoted):
    tagged = [*registry.list_versions(connect(NAME), NAME), *(seed.data for seed in seed_runs(promoted))]
    assert {item.tags["covid-xray.version"] for item in tagged} == {run(promoted, "cxr", "--version").stdout.split()[1]}


def test_a_repeated_sync_changes_nothing(promoted):
    def state() -> list:
        client = mlflow_client(promoted)
        experiment = client.get_experiment_by_name(NAME)
        model = client.get_registered_model(NAME)
        versions = [(version.version, version.tags) for version in registry.list_versions(connect(NAME), NAME)]
        all_runs = client.search_runs([experiment.experiment_id])
        return [[run.to_dictionary() for run in all_runs], versions, model.aliases, model.tags]

    before = state()
    assert "is champion" in output_of("cxr sync")
    assert state() == before


def test_a_champion_of_another_training_is_evaluated_on_the_present_validation_set(promoted):
    if aliases(promoted)["champion"] != "3":
        registry.set_champion(connect(NAME), NAME, registry.get_version(connect(NAME), NAME, "3"), "test")
    bag = json.loads(Path("metrics/bag.json").read_text())["vote"]
    edit_params(promoted, lambda params: params["demo"]["bag"].update(method="mean"))  # a new candidate
    line = output_of("cxr promote")
    assert "is challenger, not champion" in line
    decision = json.loads(Path("metrics/promotion.json").read_text())
    assert decision["decisions"][-1]["reason"] in line
    assert decision["champion_f1"] == pytest.approx(bag["f1"])
    assert decision["difference"] == pytest.approx(decision["f1"] - bag["f1"])
    challenger = decision["version"]
    assert aliases(promoted) == {"champion": "3", "challenger": challenger}
    tags = mlflow_client(promoted).get_model_version(NAME, challenger).tags
    assert tags["decision"].startswith("not promoted: ")
    assert tags["previous_champion"] == "3"

    edit_params(promoted, lambda params: params["demo"]["promote"].update(false_promotion_rate=1.0))
    assert "is champion: " in output_of("cxr promote")
    assert aliases(promoted) == {"champion": challenger, "challenger": challenger}
    rows = json.loads(Path("metrics/promotion.json").read_text())["decisions"]
    assert [row["promoted"] for row in rows[-2:]] == [False, True]


def read_decision() -> dict:
    return json.loads(Path("metrics/promotion.json").read_text())


def comparison_tags(project: Path) -> dict[str, str]:
    tags = mlflow_client(project).get_registered_model(NAME).tags
    return {key: value for key, value in tags.items() if key.startswith(registry.COMPARISON_TAG)}


def test_comparisons_on_one_validation_set_are_counted_once_each(promoted):
    best, others = aliases(promoted)["challenger"], other_versions()
    assert comparison_tags(promoted) == {}
    for number, champion in enumerate(others, start=1):
        registry.set_champion(connect(NAME), NAME, registry.get_version(connect(NAME), NAME, champion), "test")
        lines = [output_of("cxr promote") for _ in range(2)]
        decision = read_decision()
        if lines[0] == lines[1]:  # not promoted
            assert decision["p_value"] > decision["level"]
        else:
            assert "already champion" in lines[1]
            decision = decision["decisions"][-2 if decision["comparison"] is None else -1]
        assert (decision["comparison"], decision["level"]) == (number, 0.05 / number)
        assert f"comparison {number} on this validation set" in lines[0]
        assert len(comparison_tags(promoted)) == number
    tags = mlflow_client(promoted).get_model_version(NAME, best).tags
    assert tags["comparison"] == "2"
    assert {"level", "p_value", "difference"} <= set(tags)
    champion = aliases(promoted)["champion"]
    output_of(f"cxr promote --model {next(one for one in ('1', '2', '3') if one != champion)} --reason 'costs nothing'")
    assert len(comparison_tags(promoted)) == 2
    mlflow_client(promoted).delete_model_version(NAME, others[0])
    split_md5 = registry.get_version(connect(NAME), NAME, best).tags["split_md5"]
    assert registry.comparison_number(connect(NAME), NAME, split_md5, "8", "9") == 3
    assert registry.comparison_number(connect(NAME), NAME, "another split", "8", "9") == 1


@pytest.fixture
def new_candidates(promoted) -> Path:
    """The champion's table of labeled images, in a project whose candidates are others that are not yet registered."""

    def edit(params: dict) -> None:
        params["demo"]["evaluate"]["operating_point"] = "best_f1"

    edit_params(promoted, edit)
    output_of("cxr bag")
    champion = mlflow_client(promoted).get_model_version(NAME, aliases(promoted)["champion"])
    source = champion.source.removeprefix("models:/")
    return next((promoted / "mlartifacts").rglob(f"*{source}/**/{registry.LABELED_IMAGES}"))


def test_a_version_lists_the_images_that_it_was_trained_on_without_names_and_patients(new_candidates):
    table = pd.read_csv(new_candidates, dtype=str)
    split = pd.read_csv("data/split.csv")
    assert table.columns.tolist() == ["checksum", "label"]
    assert table["label"].isna().sum() == (split["subset"] == "train").sum()
    assert table["label"].notna().sum() == (split["subset"] == "validation").sum()
    with zipfile.ZipFile("data/raw.zip") as archive:
        assert set(table["checksum"]) <= {f"{one.CRC:08x}{one.file_size:08x}" for one in archive.infolist()}


def test_a_champion_of_another_split_is_compared_on_images_that_neither_was_trained_on(new_candidates, monkeypatch):
    validation = pd.read_csv("predictions/validation.csv").merge(pd.read_csv("data/split.csv"), on="file")
    sizes = validation.groupby("group")["file"].transform("size")
    trained_on = validation.loc[sizes.where(validation["label"] == 0).idxmin()]  # as if the champion had been
    with zipfile.ZipFile("data/raw.zip") as archive:
        (entry,) = [one for one in archive.infolist() if Path(one.filename).name == trained_on["file"]]
    table = pd.read_csv(new_candidates, dtype={"checksum": str})
    is_entry = table["checksum"] == f"{entry.CRC:08x}{entry.file_size:08x}"
    assert table.loc[is_entry, "label"].notna().all()
    table.assign(label=table["label"].mask(is_entry)).to_csv(new_candidates, index=False)
    line = output_of("cxr promote")
    assert "cannot be compared fairly: it was trained on others of these images, and only " in line
    assert "are new to both (10 each are needed); to promote all the same: cxr promote --model " in line
    assert comparison_tags(Path.cwd()) == {}
    monkeypatch.setattr(gate, "MIN_GROUPS", 1)
    line = output_of("cxr promote")
    count = (validation["group"] != trained_on["group"]).sum()
    assert f" on {count} images that neither was trained on; difference " in line
    assert read_decision()["comparison"] == 1


def test_a_champion_whose_training_images_are_unknown_is_compared_only_on_its_own_split(new_candidates):
    new_candidates.unlink()
    client, champion = mlflow_client(Path.cwd()), aliases(Path.cwd())["champion"]
    split_md5 = client.get_model_version(NAME, champion).tags["split_md5"]
    client.set_model_version_tag(NAME, champion, "split_md5", "another")
    line = output_of("cxr promote")
    assert "is challenger, not champion" in line
    assert (
        "cannot be compared fairly: it is of another split, and its training images were not recorded; to promote all "
        "the same: cxr promote --model "
    ) in line
    client.set_model_version_tag(NAME, champion, "split_md5", split_md5)
    assert "comparison 1 on this validation set" in output_of("cxr promote")


def test_a_champion_that_cannot_be_loaded_is_replaced(promoted):
    first, (second, _) = aliases(promoted)["champion"], other_versions()
    output_of(f"cxr promote --model {second} --reason test")
    weights_file(promoted, second).unlink()
    line = output_of("cxr promote")
    assert f"version {first} (" in line
    assert "the champion cannot be loaded" in line
    assert aliases(promoted)["champion"] == first
    mlflow_client(promoted).delete_model_version(NAME, first)
    assert "is champion: " in output_of("cxr promote")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), MlflowException("the server failed"), requests.ConnectionError()],
)
def test_a_store_that_fails_does_not_count_as_one_without_files(promoted, monkeypatch, error):
    """Else a challenger would become champion without a comparison."""

    def fail(*_, **__):
        raise error

    version = registry.get_champion(connect(NAME), NAME)
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", fail)
    with pytest.raises(type(error)):
        registry.load_version(version)


@pytest.mark.parametrize(
    ("requirement", "value", "metric"),
    [
        ("min_sensitivity", 1.0, "sensitivity"),
        ("min_specificity", 1.0, "specificity"),
        ("max_calibration_error", 0.0, "calibration error"),
    ],
)
def test_a_candidate_that_fails_a_requirement_is_not_promoted_even_without_a_champion(
    promoted, requirement, value, metric
):
    name = "covid-xray-strict"
    profile = config.load_config(Path("params.yaml")).profiles["demo"]

    def edit(params: dict) -> None:
        params["profile"] = "strict"
        params["strict"] = params["demo"] | {"promote": {**profile.promote.model_dump(), requirement: value}}

    edit_params(promoted, edit)
    predictions = pd.read_csv("predictions/validation.csv")
    for label in (0, 1):  # one error per class for every model
        first = predictions.index[predictions["label"] == label][0]
        predictions.loc[first, ["seed-0", "seed-1"]] = float(1 - label)
    predictions.to_csv("predictions/validation.csv", index=False)
    assert f"{metric} " in output_of("cxr sync")
    assert set(mlflow_client(promoted).get_registered_model(name).aliases) == {"challenger"}


def test_manual_promotion_overrides_the_gate_and_repeated_rollbacks_go_back_one_champion_each(promoted):
    first, (second, third) = aliases(promoted)["champion"], other_versions()
    output_of(f'cxr promote --model {second} --reason "it is smaller"')
    output_of(f'cxr promote --model {third} --reason "it is faster [/b]"')
    assert aliases(promoted)["champion"] == third
    assert f"version {second} (" in output_of("cxr rollback")
    assert f"version {first} (" in output_of('cxr rollback --reason "it was better"')
    assert aliases(promoted)["champion"] == first
    assert error_line_of("cxr rollback") == f"Error: {NAME} has no previous champion to roll back to; see: cxr history"
    history = output_of("cxr history")
    assert f"Champion history of {NAME}" in history
    for reason in ("manual: it is smaller", "manual: it is faster [/b]", "rolled back", "it was better"):
        assert reason in history
    assert "now" in history
    champions = [record.version for record in registry.champion_history(connect(NAME), NAME)]
    assert champions == [first, second, third, second, first]
    rows = json.loads(Path("metrics/promotion.json").read_text())["decisions"]
    assert [row["version"] for row in rows] == [first, second, third, second, first]
    tags = mlflow_client(promoted).get_model_version(NAME, second).tags
    assert (tags["decision"], tags["previous_champion"]) == ("promoted: rolled back", third)


def test_a_manual_promotion_stands_until_a_newer_version_passes_the_gate(promoted):
    best, (other, _) = aliases(promoted)["challenger"], other_versions()
    output_of(f"cxr promote --model {other} --reason 'it is smaller'")
    for _ in range(2):
        assert f"version {best} (" in (line := output_of("cxr sync"))
        assert "is challenger, not champion: validation F1 " in line
        assert f"but a person chose version {other} instead" in line
        assert aliases(promoted)["champion"] == other

    def edit(params: dict) -> None:
        params["demo"]["evaluate"]["operating_point"] = "best_f1"  # new candidates
        params["demo"]["promote"]["false_promotion_rate"] = 1.0

    edit_params(promoted, edit)
    output_of("cxr bag")
    assert "is champion: " in output_of("cxr sync")
    assert int(aliases(promoted)["champion"]) > 3


def test_a_champion_that_was_rolled_back_is_not_promoted_again_by_the_gate(promoted):
    best, (other, _) = aliases(promoted)["champion"], other_versions()
    registry.set_champion(connect(NAME), NAME, registry.get_version(connect(NAME), NAME, other), "test")
    registry.set_champion(connect(NAME), NAME, registry.get_version(connect(NAME), NAME, best), "test")
    output_of("cxr rollback --reason 'it is slow'")
    assert f"but a person chose version {other} instead" in output_of("cxr sync")
    assert aliases(promoted) == {"champion": other, "challenger": best}


def test_rollback_skips_deleted_versions(promoted):
    first, (second, third) = aliases(promoted)["champion"], other_versions()
    for version in (second, third):
        output_of(f"cxr promote --model {version} --reason 'it is another'")
    mlflow_client(promoted).delete_model_version(NAME, third)
    assert f"version {first} (" in output_of("cxr rollback")


def test_a_best_candidate_that_is_already_champion_is_recorded_after_a_decision_about_another(promoted):
    best = aliases(promoted)["challenger"]
    output_of(f"cxr promote --model {other_versions()[0]} --reason 'for a while'")
    connect(NAME).client.set_registered_model_alias(NAME, "champion", best)
    registry.set_champion(connect(NAME), NAME, registry.get_version(connect(NAME), NAME, best), "by another machine")
    assert "already champion" in output_of("cxr promote")
    decision = json.loads(Path("metrics/promotion.json").read_text())
    assert (decision["version"], decision["decisions"][-1]["version"]) == (best, best)


def test_a_bag_with_other_members_than_configured_is_neither_registered_nor_used(promoted, radiographs):
    edit_params(promoted, lambda params: params["demo"]["bag"].update(members=[1]))
    for command in ("sync", f"predict {radiographs} --model bag", "submit"):
        assert error_line_of(f"cxr {command}").endswith(
            "differ from those in metrics/candidates.json; run: dvc repro bag"
        )
    assert len(registry.list_versions(connect(NAME), NAME)) == 3


def test_the_commands_in_the_documentation_work_in_order(promoted):
    if aliases(promoted)["champion"] == "3":
        output_of("cxr promote --model 1 --reason test")
    documented = 'cxr promote --model 11 --reason "the ensemble is preferred to a single seed"'
    output = output_of(documented.replace("11", "3"))  # the bag of two seeds, not of ten
    assert "version 3 (bag) is champion: manual: the ensemble is preferred" in output
    assert "version 3 is already champion" in error_line_of("cxr promote --model 3 --reason test")
    assert "the ensemble is preferred to a single seed" in " ".join(output_of("cxr history").split())
    assert "is champion: rolled back" in output_of("cxr rollback")
    with zipfile.ZipFile("data/raw.zip") as archive:
        archive.extractall("radiographs")
    command = "cxr predict radiographs/test --csv predicted.csv"
    for model in ("", " --model seed-1", " --model bag", " --model challenger"):
        assert "predicted.csv: 8 files" in output_of(command + model)


def test_simultaneous_promotions_from_many_machines_end_in_a_consistent_state(promoted, tmp_path):
    experiment = connect(NAME).experiment_id
    client = mlflow_client(promoted)
    versions = registry.list_versions(connect(NAME), NAME)

    def promote(index: int) -> None:
        # Each has its own lock, as on its own machine.
        opened = Store(client, experiment, FileLock(tmp_path / f"{index}.lock", thread_local=False))
        registry.set_champion(opened, NAME, versions[index % 3], f"promotion {index}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(promote, range(12)))
    records = registry.champion_history(connect(NAME), NAME)
    assert aliases(promoted)["champion"] == records[-1].version
    assert {record.reason for record in records[1:]} == {f"promotion {index}" for index in range(12)}


def test_a_version_with_changed_files_fails_verification_and_is_not_promoted(promoted):
    assert output_of("cxr verify").splitlines() == [f"version {number}: OK (checksums match)" for number in (1, 2, 3)]
    champion, (other, _) = aliases(promoted)["champion"], other_versions()
    path = weights_file(promoted, other)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert error_line_of("cxr verify").startswith("Error: 1 of 3 versions of covid-xray-demo failed verification")
    assert f"{NAME} version {other} is damaged" in error_line_of(f"cxr promote --model {other} --reason test")
    path.unlink()
    assert "not found" in error_line_of(f"cxr promote --model {other} --reason test")
    assert aliases(promoted)["champion"] == champion


def test_a_history_of_release_0_1_is_shown_and_its_versions_are_rejected_in_one_line(promoted):
    client, champion = mlflow_client(promoted), aliases(promoted)["champion"]
    old, _ = other_versions()
    content_hash = client.get_model_version(NAME, old).tags["content_hash"]
    client.delete_model_version_tag(NAME, old, "content_hash")
    client.set_model_version_tag(NAME, old, "identity", content_hash)
    record = {"version": old, "since": "2025-01-01T00:00:00Z", "why": "of release 0.1", "rollback": False, "over": 3}
    client.set_registered_model_tag(NAME, "champion.0000.00000000", json.dumps(record))
    assert registry.champion_history(connect(NAME), NAME)[0] == registry.ChampionRecord(
        old, "2025-01-01T00:00:00Z", "of release 0.1", overruled_up_to=3
    )
    assert "of release 0.1" in output_of("cxr history")
    for command in ("cxr rollback", f"cxr promote --model {old} --reason test", f"cxr predict data --model {old}"):
        assert f"{NAME} version {old} was registered by an earlier release" in error_line_of(command)
    assert "1 of 3 versions" in error_line_of("cxr verify")
    assert aliases(promoted)["champion"] == champion


def test_a_damaged_history_tag_is_named(promoted):
    mlflow_client(promoted).set_registered_model_tag(NAME, "champion.0000.00000000", "no JSON")
    assert "tag champion.0000.00000000 of the registered model cannot be read" in error_line_of("cxr history")


def weights_file(project: Path, version: str) -> Path:
    """Return the path of the weights of a registered version in the artifact store."""
    source = mlflow_client(project).get_model_version(NAME, version).source.removeprefix("models:/")
    return next((project / "mlartifacts").rglob(f"*{source}/**/model.safetensors"))


def test_a_model_logged_by_other_code_is_rejected(promoted):
    class Other(mlflow.pyfunc.PythonModel):
        def predict(self, context, model_input, params=None):
            return model_input

    mlflow_client(promoted)
    with mlflow.start_run(experiment_id=connect(NAME).experiment_id):
        mlflow.pyfunc.log_model(name="other", python_model=Other(), registered_model_name=NAME, pip_requirements=[])
    line = error_line_of("cxr promote --model 4 --reason test")
    assert line == f"Error: {NAME} version 4 is not a model of this pipeline; choose another"


@pytest.mark.parametrize("version", ["99", "unknown"])
def test_an_unknown_version_or_alias_is_named_with_the_existing_versions(promoted, version):
    for command in ("cxr promote --reason test --model", "cxr predict params.yaml --model"):
        assert f"{NAME} has no version or alias '{version}' (versions 1, 2, 3)" in error_line_of(f"{command} {version}")


@pytest.fixture
def radiographs(promoted) -> Path:
    with zipfile.ZipFile("data/raw.zip") as archive:
        for name in archive.namelist():
            if name.startswith("test/"):
                archive.extract(name)
    return Path("test/test")


@pytest.mark.parametrize("model", ["seed-1", "bag", "champion", "1"])
def test_predict_returns_the_probabilities_of_evaluate(radiographs, model):
    expected = pd.read_csv("predictions/test.csv").set_index("file")
    candidates = {"champion": json.loads(Path("metrics/promotion.json").read_text())["candidate"], "1": "seed-0"}
    config = json.loads(Path("metrics/candidates.json").read_text())[candidates.get(model, model)]
    scores = expected[config["members"]].mean(axis="columns")
    expected["probability"] = expit(logit(scores) / config["temperature"] + config["bias"])
    output_of(f"cxr predict {radiographs} --model {model} --csv out/table.csv")
    table = pd.read_csv("out/table.csv")
    names = [Path(file).name for file in table["file"]]
    assert names == sorted(expected.index)
    probabilities = expected.loc[names, "probability"]
    assert table["probability"].to_numpy() == pytest.approx(probabilities.to_numpy(), abs=1e-6)


def test_predict_takes_patterns_and_names_unusable_files(radiographs):
    assert "t.csv: 8 files" in output_of(f"cxr predict '{radiographs}/**.jpg' --model seed-0 --csv t.csv")
    assert "is a directory" in error_line_of(f"cxr predict {radiographs} --model seed-0 --csv {radiographs}")
    assert error_line_of(f"cxr predict {radiographs} --model seed-0 --csv params.yaml/t.csv").startswith(
        "Error: params.yaml"
    )
    (radiographs / "[copy] broken.jpg").write_bytes(b"\xff\xd8no image")
    result = invoke(f"cxr predict '{radiographs}/*.jpg' --model seed-0")
    assert result.exit_code == 2
    (line,) = [line for line in result.stdout.splitlines() if "[copy] broken.jpg" in line]
    assert "not an image in a known format" in line
    assert result.stderr.strip().endswith("1 of 9 files are not usable radiographs; the table has the reasons")
    assert error_line_of("cxr predict 'nowhere/*.png'") == (
        "Error: nowhere/*.png: no files found; give radiographs, folders or patterns"
    )


def test_a_served_model_takes_pixels_and_returns_its_version(radiographs):
    mlflow_client(Path.cwd())
    best = json.loads(Path("metrics/promotion.json").read_text())["candidate"]
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    size = config.load_config().active.prepare.image_size
    pixels = np.load("data/images.npy")[-8:]
    assert pixels.shape == (8, size, size)
    predictions = model.predict(pd.DataFrame({"image": list(pixels)}))
    ensemble_config = ensemble.load_candidate_configs(config.load_config())[best]
    expected = ensemble.predict(pd.read_csv("predictions/test.csv"), ensemble_config)
    assert predictions["probability"].to_numpy() == pytest.approx(expected["probability"].to_numpy(), abs=1e-6)
    assert set(predictions["prevalence"]) == {ensemble_config.prevalence}
    assert set(predictions["version"]) == {aliases(Path.cwd())["champion"]}


def test_only_runs_of_removed_experiments_that_do_not_train_are_pruned(promoted):
    opened = connect(NAME)
    for name, status in [
        ("removed", "FINISHED"),
        ("training", "FINISHED"),
        ("training", "RUNNING"),
        ("existing", "KILLED"),
    ]:
        tags = {runs.DVC_EXPERIMENT: name, runs.WORKSPACE: runs._workspace()}
        run = opened.client.create_run(opened.experiment_id, tags=tags)
        opened.client.update_run(run.info.run_id, status)
    assert [run.data.tags[runs.DVC_EXPERIMENT] for run in runs.runs_of_removed_experiments(opened, ["existing"])] == [
        "removed"
    ]


def test_a_run_whose_process_has_ended_is_set_to_killed_at_the_next_connection(promoted):
    opened = connect(NAME)
    dead = f"{socket.gethostname()} {os.getpid()}@1.00"  # this process id with another start time
    workers = {dead: "KILLED", runs._worker(psutil.Process()): "RUNNING", "elsewhere 1@1.00": "RUNNING"}
    expected = {
        opened.client.create_run(opened.experiment_id, tags={runs.WORKER: worker}).info.run_id: status
        for worker, status in workers.items()
    }
    loaded = config.load_config()
    runs.parent_run(opened, loaded, training_fingerprint(loaded))
    assert {run_id: opened.client.get_run(run_id).info.status for run_id in expected} == expected
