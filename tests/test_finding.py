"""Another finding than COVID-19: its words are in everything that people read, and change no model and no metric."""

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from html import escape
from pathlib import Path

import mlflow
import pytest
import yaml
from conftest import ROOT, copy_project, edit_params, error_message, mlflow_client, output_of, run, use_project
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from mlflow.utils.validation import _validate_experiment_name, _validate_model_name
from pydantic import TypeAdapter, ValidationError

from pipeline.core import config
from pipeline.core.config import FindingParams
from pipeline.core.files import read_json
from pipeline.core.markdown import escape_markdown, markdown_table
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference import candidate
from pipeline.tracking import fingerprint

FINDING = {"name": "pneumothorax <b>", "positive": "air | *any*", "negative": "no_air & none", "model_name": "ptx"}
DOCUMENTS = ["report/index.html", "report/model-card.md", "report/table.md", "data/card.md", "data/card.json"]
WITHOUT_FINDING = ["train@0", "train@1", "evaluate", "bag", "submit"]  # stages that no name of a finding may run again

words = st.text(min_size=1, max_size=60).filter(lambda text: text.isprintable() and text == text.strip())


@pytest.fixture(scope="module")
def renamed(demo_project, tmp_path_factory) -> Iterator[Path]:
    """A copy of the demo in which the stages that read `finding` ran again with another finding."""
    project = copy_project(demo_project, tmp_path_factory.mktemp("renamed") / "project")
    edit_params(project, lambda params: params["demo"].update(finding=FINDING))
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_project(project, monkeypatch)
        for command in ("split", "report", "promote"):
            output_of(f"cxr {command}")
        yield project


def mentions_covid(text: str) -> bool:
    return "covid" in text.lower().replace("covid-xray", "")  # the name of the package


def test_no_document_speaks_of_covid(renamed):
    assert [name for name in DOCUMENTS if mentions_covid((renamed / name).read_text())] == []
    model = mlflow_client(renamed).get_registered_model("ptx")
    assert not mentions_covid(str(model))
    assert not mentions_covid(output_of("cxr history") + output_of("cxr verify"))
    (run_id,) = {version.run_id for version in model.latest_versions}
    note = mlflow_client(renamed).get_run(run_id).data.tags["mlflow.note.content"]
    assert not mentions_covid(note)


def test_every_document_has_the_names_of_the_classes_without_markup(renamed):
    html, card, data_card = ((renamed / name).read_text() for name in DOCUMENTS[:2] + DOCUMENTS[3:4])
    for name in ("positive", "negative"):
        assert f'<th scope="row">actual {escape(FINDING[name])}</th>' in html
        assert escape_markdown(FINDING[name]) in card
        assert escape_markdown(FINDING[name]) in data_card
    assert f"<dd>{escape(FINDING['name'])}</dd>" in html
    assert f"validation, {escape(FINDING['negative'])}; P(positive) " in html  # of a heatmap
    assert f"chest radiographs as {escape(FINDING['positive'])} or {escape(FINDING['negative'])}." in html
    assert f"| background | {escape_markdown(FINDING['name'])} on chest radiographs" in card
    assert "# Model card: ptx\n" in card
    description = mlflow_client(renamed).get_registered_model("ptx").description
    assert description.startswith(r"Classifies chest radiographs as air \| \*any\* or no_air \& none.")


def test_a_name_changes_no_training_and_no_metric(renamed, demo_project):
    before, after = (config.load_config(project / "params.yaml") for project in (demo_project, renamed))
    assert fingerprint.training_fingerprint(before, demo_project) == fingerprint.training_fingerprint(after, renamed)
    for name in ("data/split.csv", "metrics/bag.json"):
        assert (renamed / name).read_bytes() == (demo_project / name).read_bytes()
    status = run(renamed, "dvc", "status", "--json", *WITHOUT_FINDING)
    assert json.loads(status.stdout) == {}, status.stdout + status.stderr
    assert set(json.loads(run(renamed, "dvc", "status", "--json", "report").stdout)) >= {"report"}


def test_the_runs_of_earlier_trainings_are_in_the_experiment_of_the_new_name(renamed, demo_project):
    def metrics(project: Path, experiment: str) -> dict[tuple[str, str], float]:
        client = mlflow_client(project)
        runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
        assert [run.info.status for run in runs] == ["FINISHED"] * 3
        values = {(run.info.run_name, key): value for run in runs for key, value in run.data.metrics.items()}
        return {key: value for key, value in values.items() if not key[1].startswith(("system/", "train/images"))}

    before = metrics(demo_project, "covid-xray-demo")
    assert len(before) > 30
    assert metrics(renamed, "ptx") == pytest.approx(before, rel=1e-6)  # of the files, which are rounded


def test_a_registered_model_says_what_its_probability_is_of(renamed, tmp_path):
    mlflow_client(renamed)
    assert mlflow.models.get_model_info("models:/ptx@champion").metadata == {
        "finding": FINDING["name"], "classes": [FINDING["negative"], FINDING["positive"]]
    }  # fmt: skip
    with zipfile.ZipFile(renamed / "data/raw.zip") as archive:
        image = archive.extract(next(name for name in archive.namelist() if name.endswith(".jpg")), tmp_path)
    for model in ("champion", "seed-0"):
        output = output_of(f"cxr predict {image} --model {model}")
        assert f"probability of {FINDING['name']}; label 1 ({FINDING['positive']}) means" in output


def test_a_champion_of_another_finding_is_not_compared(renamed):
    other = FINDING | {"name": "effusion"}
    edit_params(renamed, lambda params: params["demo"].update(finding=other))
    try:
        line = output_of("cxr promote")
    finally:
        edit_params(renamed, lambda params: params["demo"].update(finding=FINDING))
    assert "is challenger, not champion" in line
    assert "cannot be compared: it predicts pneumothorax <b>, not effusion; to promote all the same" in line


# Candidates


def test_a_candidate_of_the_default_finding_is_that_of_an_earlier_release(tmp_path):
    settings = EnsembleConfig([], "mean", "mean", [], 0.5)
    for name, finding in (("default", FindingParams(model_name="ptx")), ("other", FindingParams(name="effusion"))):
        (tmp_path / name).mkdir()
        candidate.assemble_candidate(tmp_path / name, tmp_path, settings, finding)
    assert read_json(tmp_path / "default/candidate.json") == asdict(settings)  # so is its hash
    assert candidate.content_hash(tmp_path / "default") != candidate.content_hash(tmp_path / "other")
    fields = read_json(tmp_path / "other/candidate.json")
    assert candidate.read_finding(fields) == FindingParams(name="effusion")
    assert candidate.read_finding(asdict(settings)).name == "COVID-19"


# Parameters


def set_finding(tmp_path: Path, **values: object) -> Path:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["local"]["finding"] |= values
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    return tmp_path / "params.yaml"


def test_the_class_names_follow_the_finding(tmp_path):
    path = set_finding(tmp_path, name="effusion")
    assert config.load_config(path).profiles["local"].finding.class_names == ("negative", "effusion positive")
    path = set_finding(tmp_path, positive="effusion", negative="normal")
    assert config.load_config(path).profiles["local"].finding.class_names == ("normal", "effusion")


def test_the_example_in_the_documentation_is_a_finding(tmp_path):
    (text,) = re.findall(r"```yaml\n(finding:.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    path = set_finding(tmp_path, **yaml.safe_load(text)["finding"])
    assert config.load_config(path).profiles["local"].finding.class_names == ("negative", "pneumothorax positive")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("name", "", "write one line of text without blanks at its ends"),
        ("name", " ", "write one line"),
        ("name", "a ", "write one line"),
        ("name", "a\nb", "write one line"),
        ("positive", "a\u202eb", "write one line"),  # reverses the text after it
        ("negative", "a" * 61, "at most 60 characters"),
        ("negative", None, "valid string"),
        ("negative", "COVID-19 Positive", "give the classes different names"),
        ("positive", "negative", "give the classes different names"),
        ("model_name", "", "should match pattern"),
        ("model_name", "a/b", "should match pattern"),
        ("model_name", "a:b", "should match pattern"),
        ("model_name", "it's", "should match pattern"),
        ("model_name", "..", "should match pattern"),
        ("model_name", "a\n", "should match pattern"),
        ("model_name", "a" * 251, "at most 250 characters"),
        ("model_name", "default", "MLflow's own experiment"),
    ],
)
def test_a_name_that_cannot_be_used_is_an_error_of_one_line(tmp_path, key, value, reason):
    path = set_finding(tmp_path, **{key: value})
    message = error_message(config.load_config, path)
    place = "negative" if reason.startswith("give") else key
    assert message.startswith(f"{path}: local.finding.{place}: ")
    assert reason in message


@given(st.text(max_size=20) | st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True))
def test_mlflow_accepts_every_model_name_that_the_parameters_accept(name):
    try:
        TypeAdapter(config.ModelName).validate_python(name)
    except ValidationError:
        return
    _validate_model_name(name)
    _validate_experiment_name(name)
    assert "'" not in name  # it would end the text in a filter


# Markup


@given(words | st.text("\\`*_[]<>&~$|!#()ab1 ", min_size=1).filter(lambda text: text == text.strip()))
def test_escaped_text_is_shown_as_it_is(text):
    renderer = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    assert renderer.renderInline(f"P({escape_markdown(text)})") == f"P({escapeHtml(text)})"
    table = renderer.render(markdown_table([text, "n"], [[text, text]]))
    shown = escapeHtml(text)
    assert f"<th>{shown}</th>" in table.replace(' style="text-align:right"', "")
    assert table.replace(' style="text-align:right"', "").count(f"<td>{shown}</td>") == 2
