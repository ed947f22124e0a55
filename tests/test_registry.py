"""The model registry on a real MLflow store: candidates, the gate, rollback, verification and predictions."""

import errno
import json
import os
import re
import shlex
import socket
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import MagicMock, patch

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import requests
from click.testing import CliRunner
from conftest import (
    copy_project,
    edit_params,
    error_line_of,
    error_message,
    invoke,
    mlflow_client,
    output_of,
    run,
    seed_runs,
    use_project,
)
from dvc.repo.experiments.executor.base import ExecutorInfo, TaskStatus
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from mlflow.cli import cli as mlflow_commands
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from scipy.special import expit, logit

from pipeline.core import config
from pipeline.core.errors import UserError
from pipeline.core.files import sha256_of_file, write_json
from pipeline.evaluation import ensemble, gate
from pipeline.evaluation.metrics import Scores
from pipeline.tracking import backfill, promotion, prune, registry, runs, version_card
from pipeline.tracking.fingerprint import training_fingerprint
from pipeline.tracking.store import Store, connect
from stages.common import list_experiments
from stages.sync import _running_experiments

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


def test_logged_models_name_their_candidate_and_version_and_have_the_metrics_of_their_run(promoted):
    models = {model.model_id: model for model in logged_models(promoted)}
    for version in registry.list_versions(connect(NAME), NAME):
        model = models.pop(registry.logged_model_id(version))
        assert model.name == version.tags["candidate"]
        assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": NAME, "version": int(version.version)}]
        digest = f"{version.tags['data_md5'][:8]}-{version.tags['split_md5'][:8]}"
        logged = {metric.key: metric.value for metric in model.metrics if metric.dataset_name == "validation"}
        assert {metric.dataset_digest for metric in model.metrics if metric.dataset_name} == {digest}
        of_run = mlflow_client(promoted).get_run(version.run_id).data.metrics
        assert set(Scores.__annotations__) <= set(logged)
        assert logged == {key: of_run[key] for key in logged}
        assert len(model.metrics) == len(logged)
    assert not models


def test_sync_completes_what_an_earlier_release_registered(promoted):
    def state() -> list:
        opened = connect(NAME)
        versions = [(version.tags, version.description) for version in registry.list_versions(opened, NAME)]
        all_runs = opened.client.search_runs([opened.experiment_id])
        description = opened.client.get_registered_model(NAME).description
        return [versions, description, {run.info.run_id: run.data.tags for run in all_runs}, model_tags(promoted)]

    client, before = mlflow_client(promoted), state()
    for version in registry.list_versions(connect(NAME), NAME):
        client.delete_logged_model_tag(registry.logged_model_id(version), "mlflow.modelVersions")
        client.delete_model_version_tag(NAME, version.version, registry.F1_TAG)
        client.update_model_version(NAME, version.version, "seed-0: promoted: validation F1 0.9; there was no champion")
        for tag in ("candidate", "version", registry.RUN_COLOR_TAG):
            client.delete_tag(version.run_id, tag)
    client.update_registered_model(NAME, "The model card. " * 300)
    output_of("cxr sync")
    assert state() == before


def model_tags(project: Path) -> dict[str, dict[str, str]]:
    return {model.model_id: model.tags for model in logged_models(project)}


def champion_runs(project: Path) -> list[str]:
    """Return the candidates and the champion's version of the runs that are marked so, by color and by tag."""
    client = mlflow_client(project)
    all_runs = client.search_runs([client.get_experiment_by_name(NAME).experiment_id])
    marked = [[run for run in all_runs if "champion" in run.data.tags]]
    marked += [[run for run in all_runs if run.data.tags[registry.RUN_COLOR_TAG] == registry.CHAMPION_COLOR]]
    assert marked[0] == marked[1]
    tags = [run.data.tags for run in marked[0]]
    return [f"{one['candidate']} {one['champion'].replace('champion', one['version'])}" for one in tags]


def shown_version(project: Path, run_id: str) -> str:
    """Return the version that a run names, after a check that the run has the metrics of its logged model."""
    client = mlflow_client(project)
    of_run = client.get_run(run_id).data
    version = client.get_model_version(NAME, of_run.tags["version"])
    of_model = client.get_logged_model(registry.logged_model_id(version)).metrics
    assert {metric.key: metric.value for metric in of_model}.items() <= of_run.metrics.items()
    return str(version.version)


def cards(project: Path) -> dict[str, str]:
    """Return what the versions' cards say first, by number."""
    versions = registry.list_versions(connect(NAME), NAME)
    return {str(version.version): version.description.partition(version_card.RULE)[0] for version in versions}


def test_runs_and_versions_have_the_version_of_the_package(promoted):
    tagged = [*registry.list_versions(connect(NAME), NAME), *(seed.data for seed in seed_runs(promoted))]
    assert {item.tags["covid-xray.version"] for item in tagged} == {run(promoted, "cxr", "--version").stdout.split()[1]}


def test_a_repeated_sync_changes_nothing(promoted):
    def state() -> list:
        client = mlflow_client(promoted)
        experiment = client.get_experiment_by_name(NAME)
        model = client.get_registered_model(NAME)
        versions = [dict(version) for version in registry.list_versions(connect(NAME), NAME)]
        all_runs = client.search_runs([experiment.experiment_id])
        models = [model.to_dictionary() for model in logged_models(promoted)]
        return [[run.to_dictionary() for run in all_runs], versions, dict(model), models]

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
    state = cards(promoted)
    assert state[challenger].startswith(f"**Version {challenger} ({decision['candidate']}): ")
    assert "; challenger, the best candidate of the last run.**" in state[challenger]
    assert "UTC: not promoted: apparent F1 " in state[challenger]
    assert f"{version_card.RULE}**Version 3 (bag): champion since " in (
        mlflow_client(promoted).get_registered_model(NAME).description
    )
    assert output_of("cxr promote") == line
    version = registry.get_version(connect(NAME), NAME, challenger)
    (rejection,) = [row for row in registry.decisions_about(version) if not row["promoted"]]
    assert (rejection["reason"], rejection["decided_by"]) == (decision["reason"], "gate")
    assert champion_runs(promoted) == ["bag 3"]

    edit_params(promoted, lambda params: params["demo"]["promote"].update(false_promotion_rate=1.0))
    assert "is champion: " in output_of("cxr promote")
    assert aliases(promoted) == {"champion": challenger, "challenger": challenger}
    rows = json.loads(Path("metrics/promotion.json").read_text())["decisions"]
    assert [row["promoted"] for row in rows[-2:]] == [False, True]
    assert champion_runs(promoted) == [f"{decision['candidate']} {challenger}"]
    state = cards(promoted)
    assert "not promoted: " in state[challenger]
    assert f"UTC, replaced by version {challenger}.**" in state["3"]
    assert f"replaced by version {challenger}, decided by gate: apparent F1 " in state["3"]
    decisions = registry.decisions_about(registry.get_version(connect(NAME), NAME, challenger))
    assert [row["promoted"] for row in decisions[-2:]] == [False, True]


def test_a_run_that_bags_share_names_the_one_whose_metrics_it_has(promoted):
    if aliases(promoted)["champion"] != "3":
        output_of("cxr promote --model 3 --reason 'the ensemble'")
    run_id = registry.get_version(connect(NAME), NAME, "3").run_id
    for method, shown, marked in (("mean", "4", "bag version 3"), ("vote", "3", "bag 3")):
        edit_params(promoted, lambda params, method=method: params["demo"]["bag"].update(method=method))
        output_of("cxr bag")
        output_of("cxr sync")
        assert shown_version(promoted, run_id) == shown
        assert champion_runs(promoted) == [marked]


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
    last = registry.decisions_about(mlflow_client(promoted).get_model_version(NAME, best))[-1]
    assert last["comparison"] == 2
    assert {"level", "p_value", "difference"} <= set(last)
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


def test_a_champion_whose_files_are_all_missing_stays_and_can_be_used_when_they_are_back(promoted):
    champion, _ = other_versions()
    output_of(f"cxr promote --model {champion} --reason test")
    source = mlflow_client(promoted).get_model_version(NAME, champion).source.removeprefix("models:/")
    (folder,) = promoted.glob(f"mlartifacts/**/{source}")
    folder.rename("moved")
    missing = (
        f"version {champion}: its files are missing at {folder}/artifacts; bring them back, or use another version"
    )
    line = output_of("cxr promote")
    assert (
        f"is challenger, not champion: apparent F1 {read_decision()['f1']:.4f}; the champion cannot be loaded: " in line
    )
    assert f"{NAME} {missing}: cxr promote --model {aliases(promoted)['challenger']} --reason TEXT" in line
    assert aliases(promoted)["champion"] == champion
    assert error_line_of("cxr predict report") == f"Error: {NAME} {missing}"
    folder.symlink_to(promoted / "moved")
    output_of("cxr verify")


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


def test_manual_promotion_overrides_the_gate_and_repeated_rollbacks_go_back_one_champion_each(promoted, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "of anna")
    first, (second, third) = aliases(promoted)["champion"], other_versions()
    output_of(f'cxr promote --model {second} --reason "it is smaller"')
    output_of(f'cxr promote --model {third} --reason "it is faster [/b]"')
    assert aliases(promoted)["champion"] == third
    assert f"version {second} (" in output_of("cxr rollback")
    assert f"version {first} (" in output_of('cxr rollback --reason "it was better"')
    assert aliases(promoted)["champion"] == first
    assert error_line_of("cxr rollback") == f"Error: {NAME} has no previous champion to roll back to; see: cxr history"
    title, *lines = output_of("cxr history").splitlines()
    assert title.strip() == f"Champion history of {NAME}"
    rows = [re.split(r" {2,}", line.strip()) for line in lines if line.strip()[:1].isdigit()]
    candidates = [CANDIDATES[int(version) - 1] for version in (first, second, third, second, first)]
    assert [row[1] for row in rows] == candidates
    intervals = pd.read_csv("metrics/intervals.csv").query("metric == 'f1'")
    intervals["model"] = intervals["model"].replace("bag (vote)", "bag")
    for row, candidate in zip(rows, candidates, strict=True):
        f1 = intervals[intervals["model"] == candidate].iloc[-1]
        interval = f" ({f1['low']:.3f} to {f1['high']:.3f})" if pd.notna(f1["low"]) else ""
        assert row[2] == f"{f1['value']:.3f}{interval}"
    assert [row[3] for row in rows[1:]] == [row[4] for row in rows[:-1]]
    assert rows[-1][4] == "now"
    assert [row[5] for row in rows] == ["gate", "anna", "anna", "anna", "anna"]
    reasons = ["manual: it is smaller", "manual: it is faster [/b]", "rolled back", "it was better"]
    assert [row[6] for row in rows[1:]] == reasons
    state = cards(promoted)
    assert state[first].startswith(f"**Version {first} ({candidates[0]}): champion since ")
    assert state[second].startswith(f"**Version {second} ({candidates[1]}): was champion until ")
    lines = [line.partition(": ")[2] for line in state[second].splitlines()[2:]]
    assert lines == [
        "promoted, decided by anna: manual: it is smaller",
        f"replaced by version {third}, decided by anna: manual: it is faster \\[/b\\]",
        "promoted, decided by anna: rolled back",
        f"replaced by version {first}, decided by anna: it was better",
    ]
    assert champion_runs(promoted) == [f"{candidates[0]} {first}"]
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
        assert "is challenger, not champion: apparent F1 " in line
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


@given(st.lists(st.sampled_from([*"ABCD", "rollback", *"abcd"])))
def test_rollbacks_after_any_promotions_rollbacks_and_deletions_visit_existing_versions_and_end(actions):
    history, existing = list[registry.ChampionRecord](), set("ABCD")

    def roll_back() -> bool:
        try:
            target = registry.rollback_target(None, NAME)
        except UserError:
            return False
        last = registry._last_record(None, NAME)
        assert target.version in existing - {last.version}
        history.append(registry.ChampionRecord(target.version, "", "", rollback=True))
        return True

    with (
        patch.object(registry, "champion_history", lambda *_: history),
        patch.object(registry, "_version_numbers", lambda *_: existing),
    ):
        for action in actions:
            if action == "rollback":
                roll_back()
            elif action in existing and action != getattr(registry._last_record(None, NAME), "version", None):
                history.append(registry.ChampionRecord(action, "", ""))
            existing.discard(action.upper() if action.islower() else "")
        assert sum(iter(roll_back, False)) < 1 + len(actions)


def test_rollback_skips_deleted_versions(promoted):
    first, (second, third) = aliases(promoted)["champion"], other_versions()
    for version in (second, third):
        output_of(f"cxr promote --model {version} --reason 'it is another'")
    mlflow_client(promoted).delete_model_version(NAME, third)
    assert output_of("cxr history").splitlines()[-1] == (
        f"{NAME} has no champion: version {third} was deleted; run: cxr sync"
    )
    assert f"version {first} (" in output_of("cxr rollback")
    assert "deleted" not in output_of("cxr history").splitlines()[-1]


def test_an_alias_that_was_changed_by_hand_is_set_back_with_a_warning_or_recorded(promoted, caplog):
    champion, (other, _) = aliases(promoted)["champion"], other_versions()
    mlflow_client(promoted).set_registered_model_alias(NAME, "champion", other)
    output_of("cxr promote")
    (warning,) = (record.getMessage() for record in caplog.records if record.name == registry.__name__)
    assert warning == (
        f"the alias champion was at version {other}, but the history is at {champion}, to which it is set back; to "
        f"change that: cxr promote --model {other} --reason TEXT"
    )
    assert aliases(promoted)["champion"] == champion
    mlflow_client(promoted).set_registered_model_alias(NAME, "champion", other)
    output_of(f"cxr promote --model {other} --reason 'für später'")
    assert aliases(promoted)["champion"] == other
    assert registry.champion_history(connect(NAME), NAME)[-1].version == other
    assert any("für später" in value for value in mlflow_client(promoted).get_registered_model(NAME).tags.values())


def test_a_damaged_file_of_decisions_is_named_before_anything_is_recorded(promoted):
    Path("metrics/promotion.json").write_text("{")
    other, before = other_versions()[0], registry.champion_history(connect(NAME), NAME)
    for command in ("cxr promote", f"cxr promote --model {other} --reason test"):
        assert error_line_of(command) == (
            "Error: metrics/promotion.json: damaged; delete it (the decisions are in the registry, too)"
        )
    assert registry.champion_history(connect(NAME), NAME) == before
    assert len(registry.decisions_about(registry.get_version(connect(NAME), NAME, other))) <= 1


def test_registration_logs_no_system_metrics_to_the_run_of_the_training(new_candidates, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setattr("mlflow.system_metrics.system_metrics_monitor.SystemMetricsMonitor", monitor := MagicMock())
    output_of("cxr sync")
    monitor.assert_not_called()


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


def test_a_model_that_was_trained_after_the_bag_is_not_registered(promoted):
    path = Path("models/seed-0/model.json")
    write_json(path, {**json.loads(path.read_text()), "weights_sha256": "a" * 64})
    assert error_line_of("cxr sync") == (
        "Error: models/seed-0: not the model that metrics/candidates.json was fitted to; run: dvc repro"
    )


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
        registry.mark_champion(opened, NAME)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(promote, range(12)))
    records = registry.champion_history(connect(NAME), NAME)
    assert aliases(promoted)["champion"] == records[-1].version
    assert {record.reason for record in records[1:]} == {f"promotion {index}" for index in range(12)}
    last = records[-1].version
    assert champion_runs(promoted) == [f"{records[-1].candidate} {last}"]
    description = client.get_registered_model(NAME).description
    assert description.endswith(client.get_model_version(NAME, last).description)
    assert f"**Version {last} ({records[-1].candidate}): champion since " in description


@pytest.mark.parametrize(("function", "calls"), [(backfill.backfill, 1), (registry.mark_champion, 2)])
def test_a_version_that_another_machine_deletes_while_it_is_read_is_left_out(promoted, monkeypatch, function, calls):
    """As a machine does that has registered what another one registered just before."""
    opened, list_versions = connect(NAME), registry.list_versions
    model_id = opened.client.create_logged_model(opened.experiment_id, "seed-0").model_id
    run_id = registry.get_version(opened, NAME, "1").run_id
    twin = opened.client.create_model_version(NAME, f"models:/{model_id}", run_id, {"candidate": "seed-0"})

    def list_and_delete(*arguments: str) -> list[ModelVersion]:
        found = list_versions(*arguments)
        lists.append(found)
        if len(lists) == calls:
            opened.client.delete_model_version(NAME, str(twin.version))
            opened.client.delete_logged_model(model_id)
        return found

    lists: list[list[ModelVersion]] = []
    monkeypatch.setattr(registry, "list_versions", list_and_delete)
    function(opened, config.load_config() if function == backfill.backfill else NAME)
    assert str(twin.version) in [str(version.version) for version in lists[calls - 1]]
    assert str(twin.version) not in [str(version.version) for version in lists[-1]]
    assert "is champion" in output_of("cxr sync")


def test_a_version_with_changed_files_fails_verification_and_is_not_promoted(promoted):
    assert output_of("cxr verify").splitlines() == [f"version {number}: OK (checksums match)" for number in (1, 2, 3)]
    champion, (other, _) = aliases(promoted)["champion"], other_versions()
    path = weights_file(promoted, other)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # it may be a hard link to the file of another version
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
    assert re.search(rf" {old} +– +– +2025-01-01 00:00 +[-\d]+ [:\d]+ +– +of release 0.1 ", output_of("cxr history"))
    registry.mark_champion(connect(NAME), NAME)
    assert "\n- 2025-01-01 00:00 UTC: promoted: of release 0.1\n" in cards(promoted)[old]
    for command in ("cxr rollback", f"cxr promote --model {old} --reason test", f"cxr predict data --model {old}"):
        assert f"{NAME} version {old} was registered by an earlier release" in error_line_of(command)
    assert "1 of 3 versions" in error_line_of("cxr verify")
    assert aliases(promoted)["champion"] == champion


def test_a_person_is_named_as_in_mlflow_or_git(promoted, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    run(promoted, "git", "config", "user.name", "Anna Müller")
    assert promotion.user_name() == "Anna Müller"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "of anna")
    assert promotion.user_name() == "anna"


def test_a_long_model_card_is_cut_and_says_what_is_left_out():
    sections = {"Limitations": "x" * 5000, "Evaluation": "y" * 50}
    text = "# Title\n\nIntroduction." + "".join(f"\n\n**{title}.** {text}" for title, text in sections.items())
    assert len(short := version_card.shorten_model_card(f"{text}\n\n## Checklist\n", 1000)) <= 1000
    assert short.startswith("**Limitations.** xxx")
    assert "xxx…\n\nLeft out of the model card: Evaluation, the checklist." in short


def test_a_damaged_history_tag_is_named(promoted):
    mlflow_client(promoted).set_registered_model_tag(NAME, "champion.0000.00000000", "no JSON")
    assert "tag champion.0000.00000000 of the registered model cannot be read" in error_line_of("cxr history")


def test_the_next_entry_of_a_history_is_the_last_one_also_after_tags_were_deleted():
    tags = dict.fromkeys(["champion.0001.ffffffff", "champion.0012.ffffffff", "decision.0031.ffffffff"])
    assert registry._next_key(registry.CHAMPION_TAG, tags).startswith("champion.0013.")
    assert registry._next_key(registry.CHAMPION_TAG, {}).startswith("champion.0001.")


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


@pytest.mark.parametrize("version", ["99", "99999999999999999999", "٣", "unknown"])
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
        "Error: nowhere/*.png: no files found; give radiographs, folders, patterns, zips or tars"
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


def test_files_of_pruned_runs_are_freed_by_the_printed_command_and_no_others(promoted):
    opened, client = connect(NAME), mlflow_client(promoted)
    old = registry.list_versions(opened, NAME)  # seed-0, seed-1 and the bag
    by_name = dict(zip(CANDIDATES, old, strict=True))
    for version in old:  # as if they had been trained in an experiment of another fingerprint
        client.set_tag(version.run_id, runs.DVC_EXPERIMENT, "removed")
        client.set_tag(version.run_id, runs.FINGERPRINT, "another")

    def set_only_champion(version: ModelVersion) -> None:
        for key in client.get_registered_model(NAME).tags:
            if key.startswith(registry.CHAMPION_TAG):
                client.delete_registered_model_tag(NAME, key)
        registry.set_champion(opened, NAME, version, "test")

    set_only_champion(by_name["bag"])
    assert prune.removable_runs(opened, NAME, [], []) == []  # its members stay with it
    set_only_champion(by_name["seed-0"])
    edit_params(promoted, lambda params: params["demo"]["evaluate"].update(operating_point="best_f1"))
    output_of("cxr bag")
    output = output_of("cxr sync --prune --yes")
    assert [line.split()[0] for line in output.splitlines() if line.endswith("(experiment removed)")] == ["seed-1"]

    def collect_garbage() -> tuple[dict[Path, str], int]:
        """Run the printed command; return the hashes of the files that it deleted, and the bytes that it freed."""
        before, free = hashes(), bytes_on_disk()
        program, *arguments = shlex.split(output.splitlines()[-1].partition("run: ")[2])
        assert (program, CliRunner().invoke(mlflow_commands, arguments).exit_code) == ("mlflow", 0)
        after = hashes()
        assert after.items() <= before.items()
        return dict(before.items() - after.items()), free - bytes_on_disk()

    def hashes() -> dict[Path, str]:
        return {path: sha256_of_file(path) for path in promoted.glob("mlartifacts/**/*") if path.is_file()}

    def bytes_on_disk() -> int:
        return sum({path.stat().st_ino: path.stat().st_size for path in hashes()}.values())

    size = Path("models/seed-1/model.safetensors").stat().st_size
    deleted, freed = collect_garbage()
    pruned = {by_name["seed-1"].run_id, registry.logged_model_id(by_name["seed-1"])}
    assert all(pruned & set(path.parts) for path in deleted)
    assert size < freed < 1.1 * size
    assert not list(promoted.glob("mlartifacts/**/checkpoint/model.safetensors"))
    # The present bag holds the weights of its members by links, which outlast their versions.
    number = str(next(v.version for v in registry.list_versions(opened, NAME)[-3:] if v.tags["candidate"] == "seed-1"))
    assert weights_file(promoted, number).stat().st_nlink == 2
    client.delete_logged_model(registry.logged_model_id(client.get_model_version(NAME, number)))
    _, freed = collect_garbage()
    assert freed < 0.1 * size
    client.delete_model_version(NAME, number)
    assert output_of("cxr verify").count("OK (checksums match)") == 4


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


@pytest.mark.parametrize("folder", ["run", "standalone/run"])
def test_dvc_experiments_that_run_are_known_before_git_has_them(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    for status in TaskStatus:
        info = ExecutorInfo("", "", "", "", "", name=status.name, status=status)
        info.dump_json(f".dvc/tmp/exps/{folder}/{status}/{status}.run")
    assert sorted(_running_experiments()) == ["RUNNING", "SUCCESS"]
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert error_message(list_experiments).startswith("git for-each-ref failed: fatal: not a git repository")


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
