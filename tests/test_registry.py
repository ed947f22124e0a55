"""The registry and what serves from it, on a real MLflow store: candidates, the gate, the way back, and predictions."""

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
from conftest import copy, edit_params, enter, refused, said, seed_runs, store, typed
from filelock import FileLock

from pipeline.core import config
from pipeline.tracking import registry, runs
from pipeline.tracking.store import Store, connect

pytestmark = pytest.mark.slow

NAME = "covid-xray-demo"
CANDIDATES = ["seed-0", "seed-1", "bag"]


@pytest.fixture
def promoted(built, tmp_path, monkeypatch) -> Path:
    """A copy of the built project, with a registry of its own, as the working directory."""
    enter(copy(built, tmp_path / "project"), monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "project"


def aliases(project: Path) -> dict[str, str]:
    return {alias: str(version) for alias, version in store(project).get_registered_model(NAME).aliases.items()}


def others() -> list[str]:
    """Return the versions that are not champion."""
    champion = aliases(Path.cwd())["champion"]
    return [version for version in ("1", "2", "3") if version != champion]


def logged_models(project: Path) -> list[mlflow.entities.LoggedModel]:
    client = store(project)
    return client.search_logged_models([found.experiment_id for found in client.search_experiments()])


def test_every_seed_and_the_bag_is_a_version_that_belongs_to_its_run(promoted):
    found = {one.tags["candidate"]: one for one in registry.list_versions(connect(NAME), NAME)}
    assert list(found) == CANDIDATES
    assert [found[f"seed-{index}"].run_id for index in (0, 1)] == [run.info.run_id for run in seed_runs(promoted)]
    assert found["bag"].run_id == seed_runs(promoted)[0].data.tags["mlflow.parentRunId"]
    assert {model.experiment_id for model in logged_models(promoted)} == {connect(NAME).experiment_id}
    assert all({"data", "mlflow.source.git.commit"} <= set(one.tags) for one in found.values())


def test_sync_does_nothing_twice(promoted):
    def state() -> list:
        client = store(promoted)
        experiment = client.get_experiment_by_name(NAME)
        model = client.get_registered_model(NAME)
        versions = [(one.version, one.tags) for one in registry.list_versions(connect(NAME), NAME)]
        found = client.search_runs([experiment.experiment_id])
        return [[run.to_dictionary() for run in found], versions, model.aliases, model.tags]

    before = state()
    assert "is champion" in said("cxr sync")
    assert state() == before


def test_a_champion_of_another_training_is_scored_anew_on_the_present_validation_set(promoted):
    if aliases(promoted)["champion"] != "3":
        registry.set_champion(connect(NAME), NAME, registry.get_version(connect(NAME), NAME, "3"), "it is the bag")
    bag = json.loads(Path("metrics/bag.json").read_text())["vote"]
    edit_params(promoted, lambda params: params["demo"]["bag"].update(method="mean"))  # makes another bag
    line = said("cxr promote")
    assert "is challenger, not champion" in line
    decision = json.loads(Path("metrics/promotion.json").read_text())
    assert decision["decisions"][-1]["why"] in line
    assert decision["champion_f1"] == pytest.approx(bag["f1"])
    assert decision["difference"] == pytest.approx(decision["f1"] - bag["f1"])
    challenger = decision["version"]
    assert aliases(promoted) == {"champion": "3", "challenger": challenger}
    tags = store(promoted).get_model_version(NAME, challenger).tags
    assert tags["decision"].startswith("not promoted: ")
    assert tags["champion_then"] == "3"

    edit_params(promoted, lambda params: params["demo"]["promote"].update(min_probability=0.0))
    assert "is champion: " in said("cxr promote")
    assert aliases(promoted) == {"champion": challenger, "challenger": challenger}
    rows = json.loads(Path("metrics/promotion.json").read_text())["decisions"]
    assert [row["promoted"] for row in rows[-2:]] == [False, True]


def test_a_champion_that_cannot_be_read_any_more_stands_in_nobodys_way(promoted):
    first, (second, _) = aliases(promoted)["champion"], others()
    said(f"cxr promote --model {second} --because anyway")
    weights(promoted, second).unlink()
    line = said("cxr promote")
    assert f"version {first} (" in line
    assert "the champion cannot be used any more" in line
    assert aliases(promoted)["champion"] == first
    store(promoted).delete_model_version(NAME, first)
    assert "is champion: " in said("cxr promote")


@pytest.mark.parametrize(
    ("floor", "value", "named"),
    [
        ("min_sensitivity", 1.0, "sensitivity"),
        ("min_specificity", 1.0, "specificity"),
        ("max_calibration_error", 0.0, "calibration error"),
    ],
)
def test_what_misses_a_floor_does_not_become_champion_even_where_there_is_none(promoted, floor, value, named):
    name = "covid-xray-strict"
    profile = config.load_config(Path("params.yaml")).profiles["demo"]

    def edit(params: dict) -> None:
        params["profile"] = "strict"
        params["strict"] = params["demo"] | {"promote": {**profile.promote.model_dump(), floor: value}}

    edit_params(promoted, edit)
    predictions = pd.read_csv("predictions/validation.csv")
    for label in (0, 1):  # every model is wrong once about each class
        first = predictions.index[predictions["label"] == label][0]
        predictions.loc[first, ["seed-0", "seed-1"]] = float(1 - label)
    predictions.to_csv("predictions/validation.csv", index=False)
    assert f"{named} " in said("cxr sync")
    assert set(store(promoted).get_registered_model(name).aliases) == {"challenger"}


def test_a_person_overrules_the_gate_for_good_and_rollback_goes_back_one_champion_after_another(promoted):
    first, (second, third) = aliases(promoted)["champion"], others()
    said(f'cxr promote --model {second} --because "it is smaller"')
    said(f'cxr promote --model {third} --because "it is kinder [/b]"')
    assert aliases(promoted)["champion"] == third
    assert f"version {second} (" in said("cxr rollback")
    assert f"version {first} (" in said('cxr rollback --because "it was better"')
    assert aliases(promoted)["champion"] == first
    assert refused("cxr rollback") == "Error: there is no champion to go back to; see: cxr history"
    shown = said("cxr history")
    for reason in ("by hand: it is smaller", "by hand: it is kinder [/b]", "rolled back", "it was better"):
        assert reason in shown
    assert "now" in shown
    assert [reign.version for reign in registry.champion_history(connect(NAME), NAME)] == [
        first,
        second,
        third,
        second,
        first,
    ]
    rows = json.loads(Path("metrics/promotion.json").read_text())["decisions"]
    assert [row["version"] for row in rows] == [first, second, third, second, first]
    tags = store(promoted).get_model_version(NAME, second).tags
    assert (tags["decision"], tags["champion_then"]) == ("promoted: rolled back", third)


def test_what_a_person_decided_stands_until_a_newer_version_passes_the_gate(promoted):
    best, (other, _) = aliases(promoted)["challenger"], others()
    said(f"cxr promote --model {other} --because 'it is smaller'")
    for _ in range(2):
        assert f"version {best} (" in (line := said("cxr sync"))
        assert "is challenger, not champion: validation F1 " in line
        assert f"but a person chose version {other} over it" in line
        assert aliases(promoted)["champion"] == other

    def edit(params: dict) -> None:
        params["demo"]["evaluate"]["operating_point"] = "best_f1"  # makes candidates of their own
        params["demo"]["promote"]["min_probability"] = 0.0

    edit_params(promoted, edit)
    said("cxr bag")
    assert "is champion: " in said("cxr sync")
    assert int(aliases(promoted)["champion"]) > 3


def test_a_champion_that_was_taken_back_does_not_return_by_itself(promoted):
    best, (other, _) = aliases(promoted)["champion"], others()
    registry.set_champion(connect(NAME), NAME, registry.get_version(connect(NAME), NAME, other), "as if by the gate")
    registry.set_champion(connect(NAME), NAME, registry.get_version(connect(NAME), NAME, best), "as if by the gate")
    said("cxr rollback --because 'it is blind'")
    assert f"but a person chose version {other} over it" in said("cxr sync")
    assert aliases(promoted) == {"champion": other, "challenger": best}


def test_rollback_passes_over_versions_that_were_deleted(promoted):
    first, (second, third) = aliases(promoted)["champion"], others()
    for version in (second, third):
        said(f"cxr promote --model {version} --because 'it is another'")
    store(promoted).delete_model_version(NAME, third)
    assert f"version {first} (" in said("cxr rollback")


def test_a_best_model_that_is_champion_already_is_recorded_where_the_last_decision_was_about_another(promoted):
    best = aliases(promoted)["challenger"]
    said(f"cxr promote --model {others()[0]} --because 'for a while'")
    connect(NAME).client.set_registered_model_alias(NAME, "champion", best)
    registry.set_champion(connect(NAME), NAME, registry.get_version(connect(NAME), NAME, best), "by another machine")
    assert "it is champion already" in said("cxr promote")
    shown = json.loads(Path("metrics/promotion.json").read_text())
    assert (shown["version"], shown["decisions"][-1]["version"]) == (best, best)


def test_a_bag_of_other_members_than_are_configured_is_neither_registered_nor_judged_by(promoted, radiographs):
    edit_params(promoted, lambda params: params["demo"]["bag"].update(members=[1]))
    for command in ("sync", f"predict {radiographs} --model bag", "submit"):
        assert refused(f"cxr {command}").endswith("not those of the present bag; run: dvc repro bag")
    assert len(registry.list_versions(connect(NAME), NAME)) == 3


def test_the_commands_of_the_documents_follow_one_another(promoted):
    if aliases(promoted)["champion"] == "3":
        said("cxr promote --model 1 --because anyway")
    assert "version 3 (bag) is champion: by hand: " in said(
        'cxr promote --model 3 --because "the bag is worth its time"'
    )
    assert "version 3 is champion already" in refused("cxr promote --model 3 --because anyway")
    assert "the bag is worth its time" in " ".join(said("cxr history").split())
    assert "is champion: rolled back" in said("cxr rollback")
    with zipfile.ZipFile("data/raw.zip") as archive:
        archive.extractall("radiographs", [name for name in archive.namelist() if name.startswith("test/")])
    assert "judged.csv: 8 files" in said("cxr predict radiographs --model bag --csv judged.csv")


def test_promotions_from_many_machines_at_once_end_in_one_state(promoted, tmp_path):
    experiment = connect(NAME).experiment_id
    client = store(promoted)
    versions = registry.list_versions(connect(NAME), NAME)

    def crown(index: int) -> None:
        # A lock of its own, as on a machine of its own.
        apart = Store(client, experiment, FileLock(tmp_path / f"{index}.lock", thread_local=False))
        registry.set_champion(apart, NAME, versions[index % 3], f"promotion {index}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(crown, range(12)))
    reigns = registry.champion_history(connect(NAME), NAME)
    assert aliases(promoted)["champion"] == reigns[-1].version
    assert {reign.why for reign in reigns[1:]} == {f"promotion {index}" for index in range(12)}


def test_a_version_whose_files_are_not_what_they_were_is_found_and_never_promoted(promoted):
    assert said("cxr verify").count("as it was registered") == 3
    champion, (other, _) = aliases(promoted)["champion"], others()
    path = weights(promoted, other)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert refused("cxr verify").startswith("Error: 1 of 3 versions of covid-xray-demo cannot be trusted")
    assert f"{NAME} version {other} is damaged" in refused(f"cxr promote --model {other} --because anyway")
    path.unlink()
    assert "not found" in refused(f"cxr promote --model {other} --because anyway")
    assert aliases(promoted)["champion"] == champion


def weights(project: Path, version: str) -> Path:
    """Return a file of weights of a registered version, where the store keeps it."""
    source = store(project).get_model_version(NAME, version).source.removeprefix("models:/")
    return next((project / "mlartifacts").rglob(f"*{source}/**/model.safetensors"))


def test_a_model_that_other_code_logged_is_refused(promoted):
    class Other(mlflow.pyfunc.PythonModel):
        def predict(self, context, model_input, params=None):
            return model_input

    store(promoted)
    with mlflow.start_run(experiment_id=connect(NAME).experiment_id):
        mlflow.pyfunc.log_model(name="other", python_model=Other(), registered_model_name=NAME, pip_requirements=[])
    line = refused("cxr promote --model 4 --because anyway")
    assert line == f"Error: {NAME} version 4 is not a model of this pipeline; choose another"


@pytest.mark.parametrize("wanted", ["99", "nobody"])
def test_a_version_or_alias_that_is_not_there_is_named_beside_those_that_are(promoted, wanted):
    for command in ("cxr promote --because anyway --model", "cxr predict params.yaml --model"):
        assert f"{NAME} has no version or alias '{wanted}' (versions 1, 2, 3)" in refused(f"{command} {wanted}")


@pytest.fixture
def radiographs(promoted) -> Path:
    with zipfile.ZipFile("data/raw.zip") as archive:
        for name in archive.namelist():
            if name.startswith("test/"):
                archive.extract(name)
    return Path("test/test")


@pytest.mark.parametrize("model", ["seed-1", "bag", "champion", "1"])
def test_predict_gives_the_probabilities_of_evaluate(radiographs, model):
    expected = pd.read_csv("predictions/test.csv").set_index("file")
    named = {"champion": json.loads(Path("metrics/promotion.json").read_text())["candidate"], "1": "seed-0"}
    expected["bag"] = expected[["seed-0", "seed-1"]].mean(axis="columns")
    said(f"cxr predict {radiographs} --model {model} --csv out/table.csv")
    found = pd.read_csv("out/table.csv")
    assert [Path(file).name for file in found["file"]] == sorted(expected.index)
    wanted = expected[named.get(model, model)].loc[[Path(file).name for file in found["file"]]]
    assert found["probability"].to_numpy() == pytest.approx(wanted.to_numpy(), abs=1e-6)


def test_predict_takes_patterns_and_tells_what_is_no_radiograph(radiographs):
    assert "t.csv: 8 files" in said(f"cxr predict '{radiographs}/**.jpg' --model seed-0 --csv t.csv")
    assert "is a directory" in refused(f"cxr predict {radiographs} --model seed-0 --csv {radiographs}")
    assert refused(f"cxr predict {radiographs} --model seed-0 --csv params.yaml/t.csv").startswith("Error: params.yaml")
    (radiographs / "[copy] broken.jpg").write_bytes(b"\xff\xd8no image")
    ended = typed(f"cxr predict '{radiographs}/*.jpg' --model seed-0")
    assert ended.exit_code == 2
    assert "[copy] broken.jpg" in ended.stdout
    assert "not an image in a known format" in " ".join(ended.stdout.split())
    assert ended.stderr.strip().endswith("1 of 9 files are not usable radiographs, as the table says")
    assert refused("cxr predict 'nowhere/*.png'") == (
        "Error: nowhere/*.png: no file is there; name radiographs, folders or patterns"
    )


def test_a_served_model_takes_pixels_and_names_its_version(radiographs):
    store(Path.cwd())
    best = json.loads(Path("metrics/promotion.json").read_text())["candidate"]
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    size = config.load_config().active.prepare.size
    pixels = np.load("data/images.npy")[-8:]
    assert pixels.shape == (8, size, size)
    found = model.predict(pd.DataFrame({"image": list(pixels)}))
    expected = pd.read_csv("predictions/test.csv")
    if best != "bag":
        assert found["probability"].to_numpy() == pytest.approx(expected[best].to_numpy(), abs=1e-6)
    assert set(found["version"]) == {aliases(Path.cwd())["champion"]}


def test_what_is_pruned_is_of_experiments_that_are_gone_and_of_which_nothing_trains(promoted):
    opened = connect(NAME)
    for name, status in [("gone", "FINISHED"), ("trains", "FINISHED"), ("trains", "RUNNING"), ("there", "KILLED")]:
        tags = {runs.DVC_EXPERIMENT: name, runs.WORKSPACE: runs._workspace()}
        made = opened.client.create_run(opened.experiment_id, tags=tags)
        opened.client.update_run(made.info.run_id, status)
    assert [run.data.tags[runs.DVC_EXPERIMENT] for run in runs.orphaned_runs(opened, ["there"])] == ["gone"]


def test_a_run_whose_process_is_gone_is_marked_killed_at_the_next_contact(promoted):
    opened = connect(NAME)
    gone = f"{socket.gethostname()} {os.getpid()}@1.00"  # this process, but born long ago
    workers = {gone: "KILLED", runs._worker(psutil.Process()): "RUNNING", "elsewhere 1@1.00": "RUNNING"}
    made = {
        opened.client.create_run(opened.experiment_id, tags={runs.WORKER: worker}).info.run_id: status
        for worker, status in workers.items()
    }
    runs.parent_run(opened, config.load_config())
    assert {run_id: opened.client.get_run(run_id).info.status for run_id in made} == made
