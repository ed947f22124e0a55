"""Scores on the test set: `cxr score`, and that nothing else reads the labels of the test images."""

import ast
import io
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sklearn
import yaml
from conftest import (
    ROOT,
    copy_project,
    error_line_of,
    error_message,
    invoke,
    mlflow_client,
    output_of,
    use_project,
    write_zip,
)

from pipeline.core.files import read_csv, write_csv, write_json
from pipeline.data.test_labels import TEST_LABELS, read_archived_labels, read_test_labels
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.evaluation.test_scores import EXPECTED_COLUMNS, METRICS, score_candidates

COUNT = 60
FILES = [f"{index:03}.jpg" for index in range(COUNT)]  # of 30 patients
LABELS = pd.Series(np.arange(COUNT) // 2 % 2, FILES, name="Label")
GROUPS = pd.Series([f"p{index // 2}" for index in range(COUNT)], FILES)
SUMMARY = {
    "best": {"model": "seed-1", "expected_accuracy": 0.9, "expected_accuracy_low": 0.8, "expected_accuracy_high": 0.95},
    "bag": {
        "model": "bag (mean)",
        "expected_accuracy": None,
        "expected_accuracy_low": 0.7,
        "expected_accuracy_high": 0.8,
        "expected_accuracy_reason": "cannot be estimated: no source",
    },
    "validation": {"images": 200},
}


def make_candidates() -> dict[str, EnsembleConfig]:
    members = {"seed-0": ["seed-0"], "seed-1": ["seed-1"], "bag": ["seed-0", "seed-1"]}
    return {
        name: EnsembleConfig(
            members=names, method="mean", tie="mean", weights=[1 / len(names)] * len(names), threshold=0.4
        )
        for name, names in members.items()
    }


def make_predictions() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    columns = {f"seed-{seed}": np.clip(rng.normal(0.3 + 0.3 * LABELS, 0.2), 0, 1) for seed in (0, 1)}
    return pd.DataFrame({"file": FILES, **columns})


def score(labels: pd.Series = LABELS) -> pd.DataFrame:
    return score_candidates(make_predictions(), labels, GROUPS, make_candidates(), SUMMARY)


def test_scores_are_those_of_scikit_learn_on_the_images_with_a_label():
    predictions, labels = make_predictions().set_index("file"), LABELS.iloc[10:].sample(frac=1, random_state=0)
    table = score(labels)
    assert list(table["model"].unique()) == ["seed-0", "seed-1", "bag"]
    assert (table["images"] == 50).all()
    assert (table["patients"] == 25).all()
    assert (table["positives"] == LABELS.iloc[10:].sum()).all()
    for name, members in (("seed-1", ["seed-1"]), ("bag", ["seed-0", "seed-1"])):
        rows = table[table["model"] == name].set_index("metric")
        assert list(rows.index) == METRICS
        scores = predictions.loc[labels.index, members].mean(axis="columns")
        predicted = scores >= 0.4
        assert rows.loc["accuracy", "value"] == pytest.approx(sklearn.accuracy_score(labels, predicted))
        assert rows.loc["f1", "value"] == pytest.approx(sklearn.f1_score(labels, predicted))
        assert rows.loc["recall", "value"] == pytest.approx(sklearn.recall_score(labels, predicted))
        assert rows.loc["specificity", "value"] == pytest.approx(sklearn.recall_score(labels, predicted, pos_label=0))
        assert rows.loc["auroc", "value"] == pytest.approx(sklearn.roc_auc_score(labels, scores))
        assert (rows["low"] < rows["value"]).all()
        assert (rows["value"] < rows["high"]).all()


def test_the_expected_accuracy_stands_beside_the_accuracy():
    table = score().set_index(["model", "metric"])
    assert table.loc[("seed-1", "accuracy"), EXPECTED_COLUMNS[:3]].tolist() == [0.9, 0.8, 0.95]
    assert table.loc[("bag", "accuracy"), EXPECTED_COLUMNS[:4]].tolist() == [
        None,
        0.7,
        0.8,
        "cannot be estimated: no source",
    ]
    assert table["expected_accuracy_low"].notna().sum() == 2


def test_labels_of_one_class_or_of_other_files():
    table = score(LABELS[LABELS == 1]).set_index(["model", "metric"])
    assert np.isnan(table.loc[("bag", "auroc"), "value"])
    assert table.loc[("bag", "auroc"), "reason"] == "images of one class only"
    assert error_message(score, pd.Series({"x.jpg": 1, "000.jpg": 0, "y.jpg": 1})) == (
        "the labels: x.jpg is not a test image (2 such files in total); remove these lines"
    )
    assert "no test image has a label" in error_message(score, LABELS.iloc[:0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("File,Label\n000.jpg,1\n001.jpg,2\n", "line 3: the label of 001.jpg is '2'; it must be 0 (negative) or 1"),
        ("File,Label\n000.jpg,1\n000.jpg,1\n", "line 3: 000.jpg is listed twice; keep one line"),
        ("File,Class\n000.jpg,1\n", "no column 'Label'"),
        ("", "is not a CSV table"),
    ],
)
def test_an_unusable_table_of_labels_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    assert message in error_message(read_test_labels, path)
    raw = write_zip(tmp_path / "raw.zip", {TEST_LABELS: text.encode()})
    assert message in error_message(read_archived_labels, raw)
    assert error_message(read_test_labels, raw).startswith(str(raw))  # the archive in place of the table


def test_missing_labels_say_where_they_may_come_from(tmp_path, raw_zip):
    assert error_message(read_archived_labels, raw_zip) == (
        f"{raw_zip}: has no {TEST_LABELS}; give the file with the labels: cxr score FILE"
    )
    assert "not found; give a table" in error_message(read_test_labels, tmp_path / "none.csv")


@pytest.fixture
def scored_project(tmp_path, monkeypatch) -> Path:
    """A folder with predictions and candidates, but without models."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"seeds": [0, 1]}
    params["demo"]["bag"]["method"] = "mean"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    write_csv(tmp_path / "predictions/test.csv", make_predictions())
    write_json(tmp_path / "metrics/candidates.json", {name: asdict(one) for name, one in make_candidates().items()})
    write_json(tmp_path / "metrics/summary.json", SUMMARY)
    columns = {"file": FILES, "set": "test", "label": "", "sex": "", "age": "", "patient": "", "source": ""}
    write_csv(tmp_path / "data/manifest.csv", pd.DataFrame(columns))
    write_csv(tmp_path / "data/quarantine.csv", pd.DataFrame({"file": ["x.jpg"], "reason": ["empty file"]}))
    split = pd.DataFrame({"file": FILES, "group": GROUPS, "subset": "test", "fold": ""})
    write_csv(tmp_path / "data/split.csv", split)
    text = "File,Label\n" + "".join(f"{file},{label}\n" for file, label in LABELS.items())
    write_zip(tmp_path / "data/raw.zip", {TEST_LABELS: text.encode()})
    use_project(tmp_path, monkeypatch)
    return tmp_path


def test_the_command_prints_the_scores_and_writes_them_without_mlflow(scored_project):
    output = output_of("cxr score")
    table = read_csv(scored_project / "scores/test.csv")
    accuracy = table.set_index(["model", "metric"]).loc[("seed-1", "accuracy"), "value"]
    assert f"{accuracy:.3f} (" in output
    assert "0.900 (0.800 to 0.950)" in output
    assert "accuracy of bag: cannot be estimated: no source" in output
    assert "60 of 60 test images have a label: 30 positive, of 15 of 30 patients" in output
    assert "scores/test.csv written; not logged to MLflow: dvc.yaml not found" in output
    unknown = "an image without a known patient counts as a patient: intervals may be too narrow"
    assert unknown in output
    manifest = pd.read_csv("data/manifest.csv").assign(patient=list(GROUPS))
    write_csv(Path("data/manifest.csv"), manifest)
    assert unknown not in output_of("cxr score")
    (scored_project / "mine.csv").write_text("File,Label\n003.jpg,1\n000.jpg,0\n001.jpg,\n")
    assert "2 of 60 test images have a label: 1 positive, of 1 of 2 patients" in output_of("cxr score mine.csv")
    (scored_project / "mine.csv").write_text("File,Label\n999.jpg,1\n")
    assert "999.jpg is not a test image" in error_line_of("cxr score mine.csv")


# Nothing else reads them


def python_files() -> list[str]:
    folders = (ROOT / "pipeline", ROOT / "stages")
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*.py"))


def test_only_score_reads_the_labels_of_the_test_images():
    mentioning = {file for file in python_files() if "test_labels" in (ROOT / file).read_text()}
    writer = "pipeline/data/sources/archive_writer.py"
    assert mentioning == {"pipeline/data/test_labels.py", writer, "stages/score.py"}
    imported = [
        name.name
        for node in ast.walk(ast.parse((ROOT / writer).read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "pipeline.data.test_labels"
        for name in node.names
    ]
    assert imported == ["TEST_LABELS"]  # its name, to write it
    assert "test_labels" not in (ROOT / "dvc.yaml").read_text()


def test_only_the_report_reads_the_scores():
    modules = ("pipeline/evaluation/test_scores.py", "pipeline/tracking/test_scores.py", "stages/score.py")
    texts = {file: (ROOT / file).read_text() for file in python_files()}
    named = {file for file, text in texts.items() if "scores/test" in text or "test_scores" in text}
    assert [file for file in sorted(named) if not file.startswith(("pipeline/report/", *modules))] == []
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert {name for name, stage in stages.items() if "scores" in " ".join(stage.get("deps", []))} <= {"report"}


def replace_test_labels(raw: Path, content: bytes | None) -> None:
    with zipfile.ZipFile(raw) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != TEST_LABELS}
    write_zip(raw, members | ({TEST_LABELS: content} if content is not None else {}))


def permuted_labels(raw: Path) -> bytes:
    with zipfile.ZipFile(raw) as archive:
        table = pd.read_csv(io.BytesIO(archive.read(TEST_LABELS)))
    assert set(table["Label"]) == {0, 1}
    return table.assign(Label=1 - table["Label"]).to_csv(index=False).encode()


@pytest.mark.slow
def test_no_out_depends_on_the_labels_of_the_test_images(demo_project, tmp_path, monkeypatch):
    project = copy_project(demo_project, tmp_path / "project")
    use_project(project, monkeypatch)
    folders = ("data", "predictions", "metrics", "plots", "report", "submissions")
    files = [path for folder in folders for path in sorted((project / folder).rglob("*")) if path.is_file()]
    outs = [path for path in files if path.name not in ("raw.zip", "promotion.json")]
    before = {path: path.read_bytes() for path in outs}
    raw = project / "data/raw.zip"
    for content in (permuted_labels(raw), None):
        replace_test_labels(raw, content)
        for stage in ("prepare", "split", "evaluate", "bag", "report", "submit"):
            assert invoke(f"cxr {stage}").exit_code == 0
        assert [str(path) for path in outs if path.read_bytes() != before[path]] == []


@pytest.mark.slow
def test_scores_are_logged_to_the_runs_once(demo_project, tmp_path, monkeypatch):
    project = copy_project(demo_project, tmp_path / "project")
    use_project(project, monkeypatch)
    for _ in range(2):
        assert "logged to MLflow as test/…" in output_of("cxr score")
    table = read_csv(project / "scores/test.csv").set_index(["model", "metric"])
    client = mlflow_client(project)
    experiment = client.get_experiment_by_name("covid-xray-demo").experiment_id
    logged = {run.info.run_name.split(" ")[0]: run for run in client.search_runs([experiment])}
    for candidate in ("seed-0", "seed-1"):
        run = logged[candidate]
        assert run.data.metrics["test/accuracy"] == pytest.approx(table.loc[(candidate, "accuracy"), "value"])
        row = table.loc[(candidate, "accuracy")]
        ends = {f"test/accuracy_{end}": row[end] for end in ("low", "high") if not pd.isna(row[end])}
        assert {key: run.data.metrics.get(key) for key in ends} == pytest.approx(ends)
        assert len(client.get_metric_history(run.info.run_id, "test/accuracy")) == 1
    assert sum("test/accuracy" in run.data.metrics for run in logged.values()) == 3  # the bag's is the parent run
