"""External validation: metrics on a held-out source, their summary, and the command for every source."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import (
    clean_environment,
    clone_project,
    commit_all,
    edit_params,
    encode_jpeg,
    error_message,
    mlflow_client,
    run,
    stage_server,
    write_zip,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import norm, t
from sklearn.metrics import roc_auc_score

from pipeline.core.config import load_config
from pipeline.core.files import read_json, write_csv, write_json
from pipeline.evaluation import ensemble, external_validation
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.evaluation.external_validation import pool_effects, prediction_interval
from pipeline.evaluation.metrics import Scores
from pipeline.report.results import Results
from pipeline.tracking.runs import FINGERPRINT, SEED_STATISTICS
from pipeline.tracking.store import connect
from stages.external_validation import _finish_parent_run

# BCG vaccine against tuberculosis, 13 trials (Colditz et al. 1994; dat.bcg in the R package metafor): cases and healthy
# people among the vaccinated, then among the others.
BCG = np.array([
    [4, 119, 11, 128], [6, 300, 29, 274], [3, 228, 11, 209], [62, 13536, 248, 12619], [33, 5036, 47, 5761],
    [180, 1361, 372, 1079], [8, 2537, 10, 619], [505, 87886, 499, 87892], [29, 7470, 45, 7232], [17, 1699, 65, 1600],
    [186, 50448, 141, 27197], [5, 2493, 3, 2338], [27, 16886, 29, 17825],
])  # fmt: skip


# Systolic blood pressure in 10 trials (Riley, Higgins and Deeks 2011, doi:10.1136/bmj.d549; sbp in R's pimeta)
PRESSURE = np.array([0, 0.1, -0.4, -0.8, -0.63, 0.22, -0.34, -0.51, 0.03, -0.81])
PRESSURE_ERRORS = np.array([
    0.4234772, 0.2193918, 0.0255107, 0.1989833, 0.3010259, 0.3010259, 0.0714299, 0.1020427, 0.1224512, 0.3010259,
])  # fmt: skip

# The summary


def test_the_pooled_effect_is_that_of_a_published_meta_analysis():
    vaccinated, others = BCG[:, :2].sum(axis=1), BCG[:, 2:].sum(axis=1)
    effects = np.log(BCG[:, 0] / vaccinated) - np.log(BCG[:, 2] / others)
    variances = 1 / BCG[:, 0] - 1 / vaccinated + 1 / BCG[:, 2] - 1 / others
    pooled = pool_effects(effects, variances)
    # metafor: rma(yi, vi, method = "DL"), whose documentation gives these two
    assert pooled.tau**2 == pytest.approx(0.3088, abs=5e-5)
    assert pooled.mean == pytest.approx(-0.7141, abs=5e-5)


def test_the_prediction_interval_is_that_of_a_published_meta_analysis():
    pooled = pool_effects(PRESSURE, PRESSURE_ERRORS**2)
    assert [pooled.mean, pooled.tau**2] == pytest.approx([-0.3340597, 0.02824971], abs=1e-5)
    # pimeta 1.1.3: pima(sbp$y, sbp$sigmak), from 25,000 draws
    assert prediction_interval(PRESSURE, PRESSURE_ERRORS**2) == pytest.approx((-0.8807, 0.2240), abs=0.02)


def test_the_prediction_interval_covers_a_new_source_with_few_sources(monkeypatch):
    monkeypatch.setattr(external_validation, "DRAWS", 400)
    rng, variances, covered = np.random.default_rng(0), np.array([0.05, 0.15, 0.4]), []
    for tau in (0.0, 0.6):
        for _ in range(200):
            low, high = prediction_interval(rng.normal(2, np.sqrt(variances + tau**2)), variances)
            covered.append(low <= rng.normal(2, tau) <= high)
    assert 0.92 <= np.mean(covered) <= 0.99


effects_and_errors = st.lists(st.tuples(st.floats(-3, 3), st.floats(0.05, 2)), min_size=2, max_size=12)


@given(effects_and_errors)
def test_the_interval_is_that_of_a_weighted_regression_on_a_constant(studies):
    effects, errors = np.array(studies).T
    pooled = pool_effects(effects, errors**2)
    weights = 1 / (errors**2 + pooled.tau**2)
    # polyfit scales the covariance by the weighted residuals, as Hartung and Knapp do.
    if len(effects) > 2:
        (mean,), ((variance,),) = np.polyfit(np.zeros(len(effects)), effects, 0, w=np.sqrt(weights), cov=True)
        assert pooled.mean == pytest.approx(mean, abs=1e-9)
        half_width = t.ppf(0.975, len(effects) - 1) * np.sqrt(variance)
        assert pooled.high - pooled.mean == pytest.approx(half_width, rel=1e-6, abs=1e-6)
    assert min(effects) - 1e-9 <= pooled.mean <= max(effects) + 1e-9
    assert pooled.low <= pooled.mean <= pooled.high


def test_the_interval_of_the_mean_covers_with_few_sources_of_different_sizes():
    rng, count = np.random.default_rng(0), 3
    variances, covered = np.array([0.05, 0.15, 0.4]), []
    for tau in (0.0, 0.6):
        for _ in range(1500):
            effects = rng.normal(2, np.sqrt(variances + tau**2), count)
            pooled = pool_effects(effects, variances)
            covered.append(pooled.low <= 2 <= pooled.high)
    assert 0.92 <= np.mean(covered) <= 0.97


def auroc_row(source: str, value: float, low: float, high: float, role: str = "bag", model: str = "bag (mean)") -> dict:
    counts = dict.fromkeys(external_validation.COUNTS, 10)
    row = {"source": source, **counts, "role": role, "model": model, "metric": "auroc"}
    return row | {"value": value, "low": low, "high": high}


def test_the_summary_pools_logits_of_the_auroc_with_the_standard_errors_of_the_intervals():
    errors, logits = np.array([0.3, 0.4, 0.2]), logit([0.8, 0.9, 0.7])
    half_widths = norm.ppf(0.975) * errors
    rows = [
        auroc_row(source, *expit([middle, middle - half_width, middle + half_width]))
        for source, middle, half_width in zip("abc", logits, half_widths, strict=True)
    ]
    summary = external_validation.summarize_sources(pd.DataFrame(rows)).set_index(["source", "metric"])
    pooled = pool_effects(logits, errors**2)
    expected = [expit(pooled.mean), expit(pooled.low), expit(pooled.high)]
    assert summary.loc[("summary", "auroc"), ["value", "low", "high"]].to_list() == pytest.approx(expected)
    assert summary.loc[("summary", "tau"), "value"] == pytest.approx(pooled.tau)
    assert summary.loc[("summary", "auroc"), "images"] == 30
    new = summary.loc[("a new source", "auroc")]
    assert np.isnan(new["value"])
    assert [new["low"], new["high"]] == pytest.approx(expit(prediction_interval(logits, errors**2)))
    assert new["low"] < expected[1] < expected[2] < new["high"]


def test_there_is_no_summary_of_fewer_than_two_sources_that_have_a_standard_error():
    rows = [auroc_row("a", 0.8, 0.7, 0.9), auroc_row("b", 1.0, 0.9, 1.0)]
    (row,) = external_validation.summarize_sources(pd.DataFrame(rows)).to_dict("records")
    assert np.isnan(row["value"])
    assert row["reason"] == "1 source(s) with a standard error; a summary needs two"
    rows.append(auroc_row("c", 0.7, 0.6, 0.8))
    summary = external_validation.summarize_sources(pd.DataFrame(rows))
    assert set(summary["reason"]) == {"without b: no standard error"}
    assert 0.7 < summary["value"].iloc[0] < 0.8
    reasons_only = pd.DataFrame([{"source": "a", "reason": "too few"}], columns=external_validation.COLUMNS)
    assert external_validation.summarize_sources(reasons_only).empty


def test_the_best_seeds_of_the_sources_are_pooled_under_their_role():
    rows = [auroc_row(source, 0.8, 0.7, 0.9, "best", f"seed-{source}") for source in "12"]
    summary = external_validation.summarize_sources(pd.DataFrame(rows))
    assert set(summary["role"]) == {"best"}
    assert set(summary["model"]) == {""}


# Sources and their metrics


def labeled_table(sources: dict[str, tuple[int, int]]) -> pd.DataFrame:
    """Return a table with so many negative and positive images of each source, each of a patient of its own."""
    rows = [(source, label) for source, counts in sources.items() for label in (0, 1) for _ in range(counts[label])]
    table = pd.DataFrame(rows, columns=["source", "label"]).assign(set="train")
    return table.assign(group=[f"p{index}" for index in range(len(table))])


def test_sources_without_both_classes_in_enough_patients_have_a_reason():
    table = labeled_table({"b": (12, 10), "a": (10, 10), "few": (30, 9), "negative": (40, 0), "": (5, 5)})
    sources = external_validation.list_sources(table).set_index("source")
    assert list(sources.index) == ["a", "b", "few", "negative"]
    assert list(sources.loc["b"])[:5] == [22, 10, 22, 10, 12]
    assert sources["reason"].to_dict() == {
        "a": "", "b": "", "few": "9 positive patients, fewer than 10",
        "negative": "0 positive patients, fewer than 10",
    }  # fmt: skip


def test_a_source_that_leaves_too_few_patients_for_training_has_a_reason():
    sources = external_validation.list_sources(labeled_table({"a": (20, 20), "b": (20, 3)})).set_index("source")
    assert sources.loc["a", "reason"] == "leaves for training: 3 positive patients, fewer than 10"


def test_images_of_one_patient_in_two_sources_leave_training_together():
    table = labeled_table({"a": (12, 12), "b": (12, 12)})
    table.loc[30, "group"] = "p0"  # an image of b, of a patient of a
    sources = external_validation.list_sources(table).set_index("source")
    assert list(sources["images"]) == [25, 25]
    assert list(sources["patients"]) == [24, 24]


def test_no_known_source_is_an_error():
    message = error_message(external_validation.list_sources, labeled_table({"": (3, 3)}))
    assert message.startswith("no source of the labeled images is known; give the archive a metadata.csv")


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
    params["seeds"] = [0, 1]
    params["demo"]["split"]["held_out_source"] = "here"
    params["demo"]["evaluate"]["resamples"] = 200
    Path("params.yaml").write_text(yaml.safe_dump(params))
    return load_config()


def test_a_held_out_source_is_evaluated_with_what_was_chosen_without_it(config):
    rng, labels = np.random.default_rng(0), np.arange(60) % 3 // 2
    external = pd.DataFrame({"file": [f"{index}.jpg" for index in range(60)], "label": labels})
    for seed in (0, 1):
        external[f"seed-{seed}"] = expit(rng.normal(2 * labels - 1, 1))
    groups = pd.Series([f"p{index // 2}" for index in range(60)], index=external["file"])[::-1]
    groups = pd.concat([pd.Series("trained on", [f"training-{index}.jpg" for index in range(60)]), groups])
    # The configurations are those of the bag stage; labels are by their threshold.
    fit = {"members": ["seed-0", "seed-1"], "method": "mean", "tie": "mean", "weights": [0.5, 0.5], "threshold": 0.8}
    configs = {
        "bag (mean)": EnsembleConfig(**fit),
        "seed-1": EnsembleConfig(**{**fit, "members": ["seed-1"], "weights": [1.0]}),
    }
    table = external_validation.external_table(
        config, external, groups, configs, {"best": "seed-1", "bag": "bag (mean)"}
    )
    assert list(table.columns) == external_validation.COLUMNS
    assert set(table["source"]) == {"here"}
    by_metric = table.set_index(["role", "metric"])
    for role, score in {"best": external["seed-1"], "bag": external[["seed-0", "seed-1"]].mean(axis="columns")}.items():
        assert by_metric.loc[(role, "auroc"), "value"] == pytest.approx(roc_auc_score(labels, score))
        assert by_metric.loc[(role, "recall"), "value"] == pytest.approx((score >= 0.8)[labels == 1].mean())
    row = by_metric.loc[("bag", "recall")]
    assert row["model"] == "bag (mean)"
    assert [row["images"], row["positives"], row["patients"]] == [60, 20, 30]
    assert row["low"] < row["value"] < row["high"]


def test_without_a_held_out_source_there_are_no_rows(config):
    external = pd.DataFrame(columns=["file", "label", "seed-0", "seed-1"])
    table = external_validation.external_table(config, external, pd.Series(dtype=str), {}, {"best": "x", "bag": "y"})
    assert list(table.columns) == external_validation.COLUMNS
    assert table.empty


def test_an_external_validation_of_another_recipe_or_other_data_does_not_count(config):
    write_csv(Path("data/manifest.csv"), pd.DataFrame({"file": ["a.jpg"]}))
    current = external_validation.recipe_hash(config)
    table = pd.DataFrame([auroc_row("001", 0.8, 0.7, 0.9)])
    for recipe, is_current in ((current, True), ("other", False)):
        write_csv(external_file := Path("scores/external_validation.csv"), table.assign(recipe=recipe))
        results = Results(config)
        assert results.external_is_current == results.is_externally_validated == is_current
        assert list(results.external["source"]) == ["001"]
    write_csv(external_file, table)  # of an earlier release
    assert not Results(config).is_externally_validated
    write_csv(Path("metrics/external.csv"), table.assign(source="here"))
    assert list(Results(config).external["source"]) == ["here"]
    assert Results(config).is_externally_validated

    edit_params(Path(), lambda params: params["demo"]["split"].update(held_out_source=None))
    assert external_validation.recipe_hash(load_config()) == current
    edit_params(Path(), lambda params: params["demo"]["train"].update(loader_threads=7))  # changes no result
    assert external_validation.recipe_hash(load_config()) == current
    edit_params(Path(), lambda params: params["demo"]["train"].update(lr=0.5))
    changed = external_validation.recipe_hash(load_config())
    write_csv(Path("data/manifest.csv"), pd.DataFrame({"file": ["b.jpg"]}))
    assert len({current, changed, external_validation.recipe_hash(load_config())}) == 3


# The command


def test_the_parent_run_of_a_source_gets_the_metrics_of_its_bag_and_is_closed(config, empty_store):
    shutil.copy(empty_store, "mlflow.db")
    store, copy = connect(config.model_name), Path("copy")
    run_ = store.client.create_run(store.experiment_id, tags={FINGERPRINT: "f" * 64})
    store.client.update_run(run_.info.run_id, status="SCHEDULED")
    write_json(copy / "models/seed-0/model.json", {"parent_fingerprint": "f" * 64})
    write_json(copy / "metrics/bag.json", {config.active.bag.method: {"f1": 0.75, "auroc": None}})
    seeds = pd.DataFrame({"metric": list(Scores.__annotations__), **dict.fromkeys(SEED_STATISTICS, 0.5)})
    write_csv(copy / "metrics/seeds.csv", seeds)
    for _ in range(2):
        _finish_parent_run(config, "here", copy)
        finished = store.client.get_run(run_.info.run_id)
        assert finished.info.status == "FINISHED"
        assert (finished.data.metrics["f1"], finished.data.metrics["seeds/f1_mean"]) == (0.75, 0.5)
        assert "auroc" not in finished.data.metrics


def make_archive(path: Path) -> Path:
    """Write 22 radiographs each of A and B, half positive and four hard to tell, and three positive ones of C."""
    rng, images, labels, metadata = np.random.default_rng(0), {}, "File,Label\n", "File,patient,source,view\n"
    for source, count in {"A": 22, "B": 22, "C": 3}.items():
        for index in range(count):
            label = int(source == "C" or index % 2)
            name = f"{source}{index:02}.jpg"
            images[f"train/{name}"] = encode_jpeg(rng, bright=bool(label) != (index in (0, 3, 8, 13)))
            labels += f"{name},{label}\n"
            metadata += f"{name},{name},{source},\n"
    images |= {f"test/t{index}.jpg": encode_jpeg(rng) for index in range(2)}
    tables = {
        "train_labels.csv": labels,
        "metadata.csv": metadata,
        "sample_submission.csv": "File,Label\nt0.jpg,0\nt1.jpg,0\n",
    }
    return write_zip(path, images | {name: text.encode() for name, text in tables.items()})


@pytest.mark.slow
@pytest.mark.long
def test_every_source_is_held_out_in_turn_and_an_interrupted_command_resumes(tmp_path, empty_store):
    project = clone_project(tmp_path / "project")
    shutil.copy(empty_store, project / "mlflow.db")

    def edit(params: dict) -> None:
        params |= {"profile": "local", "seeds": [0]}
        params["local"]["download"]["path"] = str(make_archive(tmp_path / "archive.zip"))
        params["local"]["train"]["epochs"] = 1
        params["local"]["evaluate"] |= {"operating_point": "best_f1", "resamples": 200}

    edit_params(project, edit)
    commit_all(project)
    with (project / "first.log").open("w") as log:
        environment = clean_environment(**stage_server())
        process = subprocess.Popen(["cxr", "external-validation"], cwd=project, env=environment, stdout=log, stderr=log)
    while "B (2 of 2)" not in (first := (project / "first.log").read_text()):
        assert process.poll() is None, first
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    first = (project / "first.log").read_text()
    assert "the same command resumes" in first
    assert "A (1 of 2): 22 images of 22 patients, 11 of them positive; training without it" in first

    second = run(project, *shlex.split("cxr external-validation --jobs 2"))
    assert second.returncode == 0, second.stdout + second.stderr
    of_a, of_b = second.stdout.split("B (2 of 2)")
    assert "stages.train" not in of_a.split("A (1 of 2)")[1]
    assert "C: no external validation: 3 positive patients, fewer than 10" in of_b

    table = pd.read_csv(project / "scores/external_validation.csv")
    assert list(table.columns) == [*external_validation.COLUMNS, "recipe"]
    assert list(dict.fromkeys(table["source"])) == ["A", "B", "C", "summary", "a new source"]
    auroc = table[table["metric"] == "auroc"].set_index(["source", "role"])
    assert auroc.loc[("summary", "bag"), "images"] == 44
    assert 0.5 < auroc.loc[("summary", "bag"), "value"] < 1
    copies = {path.name.split("-")[1]: path for path in (project / ".dvc/tmp/external-validation").iterdir()}
    assert set(copies) == {"A", "B"}
    for source, folder in copies.items():
        split = pd.read_csv(folder / "data/split.csv").set_index("file")
        assert (split["subset"] == "external").sum() == 22
        external, chosen = (pd.read_csv(folder / f"predictions/{name}.csv") for name in ("external", "validation"))
        assert set(external["file"]) == set(split.index[split["subset"] == "external"])
        assert all(name.startswith(source) for name in external["file"])
        assert not any(name.startswith(source) for name in chosen["file"])
        assert auroc.loc[(source, "best"), "value"] == pytest.approx(
            roc_auc_score(external["label"], external["seed-0"])
        )
        fitted = EnsembleConfig(**read_json(folder / "metrics/candidates.json")["seed-0"])
        predicted = ensemble.predict(external, fitted)["label"]
        recall = table.query("source == @source and role == 'best' and metric == 'recall'")["value"].item()
        assert recall == pytest.approx(predicted[external["label"] == 1].mean())
        assert not (folder / "mlflow.db").exists()

    # The workspace has the data, but no model, and MLflow has a run of each held-out source.
    assert not any((project / name).exists() for name in ("models", "predictions", "metrics", "report"))
    changed = run(project, "git", "status", "--porcelain", "-uall").stdout.split()[1::2]
    assert set(changed) == {"dvc.lock", "first.log", "scores/external_validation.csv"}
    client = mlflow_client(project)
    experiment = client.get_experiment_by_name("covid-xray-local")
    runs = client.search_runs([experiment.experiment_id])
    seeds = [run_ for run_ in runs if run_.info.run_name.startswith("seed-0")]
    assert sorted(run_.data.params["held_out_source"] for run_ in seeds) == ["A", "B"]
    assert [run_.info.status for run_ in runs] == ["FINISHED"] * 4  # of the seeds and their parents
