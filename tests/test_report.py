"""Tests of the HTML report and the model card: content, determinism, accessibility and Grad-CAM."""

import re
import shutil
from collections import Counter
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from browser import OPTIONS
from conftest import ROOT, edit_params, make_tiny, mlflow_client
from scipy import stats

from pipeline.core import config
from pipeline.core.files import write_csv, write_json
from pipeline.data.outliers import write_contact_sheet
from pipeline.evaluation.external_validation import recipe_hash
from pipeline.evaluation.metrics import METRIC_LABELS
from pipeline.evaluation.test_scores import EXPECTED_COLUMNS, METRICS
from pipeline.models import classifier, heatmaps
from pipeline.models.classifier import Architecture, Classifier
from pipeline.report import data_card, gradcam, page, reporting_checklist, summary_text, tables
from pipeline.report.results import Estimate, Results
from pipeline.report.tables import ReportTable, format_markdown
from pipeline.tracking import registry, version_card
from stages.bag import bag
from stages.evaluate import evaluate
from stages.report import report

VOID_ELEMENTS = {"br", "img", "link", "meta", "input", "hr"}
SERIOUS_IMPACTS = ("serious", "critical")
CENTRAL = Estimate(0.1, 0.05, 0.15)  # share of heatmaps in the border


class ParsedPage(HTMLParser):
    """Records the attributes of every element, and checks that elements are closed in the order of their opening."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID_ELEMENTS:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag, f"{tag} is closed but not open"

    def values(self, attribute: str) -> list[str]:
        """Return the values of an attribute in all elements."""
        return [str(attrs[attribute]) for _, attrs in self.elements if attribute in attrs]


def write_project(
    folder: Path, labels: list[int], *, seeds: int = 2, with_metadata: bool = True, test_count: int = 4
) -> None:
    """Write the inputs of `evaluate`: training images, validation images with these labels, and untrained models."""
    rng = np.random.default_rng(0)
    shutil.copy(ROOT / "params.yaml", folder)
    edit_params(folder, make_tiny)
    edit_params(folder, lambda params: params.update(seeds=list(range(seeds))))
    edit_params(folder, lambda params: params["demo"]["evaluate"].update(resamples=20))
    all_labels = [0, 1, 0, 1, *labels, *[None] * test_count]
    subsets = ["train"] * 4 + ["validation"] * len(labels) + ["test"] * test_count
    count = len(all_labels)
    files = [f"<{number}>.jpg" for number in range(count)]
    manifest = {
        "file": files,
        "set": ["test" if subset == "test" else "train" for subset in subsets],
        "label": pd.array(all_labels, "Int64"),
        "patient": [f"p{number}" if with_metadata else "" for number in range(count)],
        "view": "",
        "source": ["AB"[number % 2] for number in range(count)] if with_metadata else "",
    }
    manifest |= {"sex": "", "age": np.nan, "license": "CC <BY>", "width": 512, "height": 512, "bytes": 9}
    manifest |= {"jpeg_quantization": 0.0, "xxh128": files, "manufacturer": "", "modality": ""}
    images = pd.DataFrame(manifest)
    write_csv(folder / "data/manifest.csv", images)
    folds = [{"train": "1", "validation": "0", "test": ""}[subset] for subset in subsets]
    split = pd.DataFrame({"file": files, "group": files, "subset": subsets, "fold": folds})
    write_csv(folder / "data/split.csv", split)
    quarantine = pd.DataFrame({"file": ["<x>.jpg"], "set": ["train"], "label": [0], "reason": ["not <an> image"]})
    write_csv(folder / "data/quarantine.csv", quarantine)
    data_card.write_data_card(
        folder / "data", data_card.describe_data(images, quarantine, split, np.arange(count) // 2)
    )
    write_json(folder / "data/images.json", {"resize": "stretch"})
    pixels = rng.integers(0, 255, (count, 48, 48), dtype=np.uint8)
    np.save(folder / "data/images.npy", pixels)
    write_contact_sheet(folder / "data/contact_sheet.jpg", pixels, files)
    for seed in range(seeds):
        torch.manual_seed(seed)
        network = Classifier(Architecture("resnet18", [], 0.0, 48, "none", 48, "stretch"))
        model = folder / f"models/seed-{seed}"
        classifier.save_weights([network], model)
        environment = {"torch": "2", "device": "cpu", "cpu_threads": 1, "processes": 1}
        classifier.save_description(network, model, {"environment": environment})
        write_json(model / "metrics.json", {"run": f"seed-{seed} · made", "epoch": 1})
        history = {"fold": 0, "epoch": [1, 2], "train_loss": [0.7, 0.6], "loss": [0.7, 0.6], "f1": [0.0, 0.5]}
        write_csv(model / "history.csv", pd.DataFrame(history))
        validation = [file for file, subset in zip(files, subsets, strict=True) if subset == "validation"]
        epochs = {f"epoch-{epoch}": rng.random(len(validation)) for epoch in (1, 2)}
        write_csv(model / "validation.csv", pd.DataFrame({"fold": 0, "file": validation, **epochs}))


@pytest.fixture
def project(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_stages() -> str:
    for stage in (evaluate, bag, report):
        stage.callback(debug=True)
    return Path("report/index.html").read_text()


@pytest.fixture(scope="module")
def html(demo_project) -> str:
    return (demo_project / "report/index.html").read_text()


def test_the_report_is_well_formed_html_without_external_resources(html):
    parsed = ParsedPage(html)
    ids = parsed.values("id")
    assert parsed.open_tags == []
    assert [count for count in Counter(ids).values() if count > 1] == []
    urls = {*parsed.values("src"), *parsed.values("href"), *parsed.values("xlink:href")}
    internal = {url for url in urls if url.startswith("data:") or url[1:] in ids}
    assert urls - internal == {"http://127.0.0.1:5000/#/models/covid-xray-demo"}  # the address of `make ui`
    assert {tag for tag, _ in parsed.elements} & {"script", "link", "iframe"} == set()
    assert "url(http" not in html
    assert "@import" not in html


def test_the_first_screen_has_the_bag_the_corrected_best_seed_and_the_limitations(html):
    first_screen = html[: html.index("<nav")]
    number = r"\d\.\d{3}"
    estimate = rf"{number}( \({number} to {number}\))?"
    assert re.search(rf"<h1>Bag of 2 seeds: F1 {estimate}</h1>", first_screen)
    assert "fixed: nothing was chosen on these images; no epoch was selected" in first_screen
    assert re.search(
        rf"seed-\d has the highest validation F1 of the seeds: {estimate} \(corrected for the choice of the seed "
        rf"on these images; apparent F1 {estimate}; no epoch was selected\)",
        first_screen,
    )
    for text in ("patients, ", "sensitivity", "95 %", "accuracy to expect on the test set", "Limitations",
                 "not for diagnosis", "Synthetic images", "No external validation"):  # fmt: skip
        assert text in first_screen


@pytest.mark.parametrize("source", config.SOURCES)
def test_the_parameters_of_every_source_are_shown_without_folders_of_this_machine(source):
    download = {"source": source}
    if source == "table":
        download |= {
            "labels": ["a.csv", "b.csv"],
            "columns": {"file": "image"},
            "join": [{"table": "c.csv", "by": ["id"]}],
        }
    if source in ("archive", "table", "folders"):
        download |= {"path": ["/home/somebody/a.zip", "b.zip"]}
    shown = dict(page._format_parameters(config.Profile.model_validate({"download": download})))
    assert shown["download.source"] == source
    if "path" in download:
        assert shown["download.path"] == '["a.zip", "b.zip"]'
    assert not [value for value in shown.values() if "somebody" in value]


def test_every_section_begins_with_an_explanation(html):
    for name in page.SECTIONS:
        section = html[html.index(f'<section id="{name}">') :]
        assert re.match(r"<section[^>]*>\s*<h2>[^<]+</h2>\s*<p>", section), name


def test_the_registered_model_is_described_by_the_model_card(demo_project):
    description = mlflow_client(demo_project).get_registered_model("covid-xray-demo").description
    card = (demo_project / "report/model-card.md").read_text()
    assert description.startswith(registry.INTRODUCTION.format(negative="negative", positive="COVID-19 positive"))
    assert len(description) <= 5000
    for title in version_card.KEPT_FIRST:
        section = card[card.index(f"**{title}.**") :]
        assert section[: section.index("\n\n**")] in description
    for text in ("teaching only", "cxr history", "not known", "no bootstrap of the data", "report/model-card.md"):
        assert text in description


def test_a_version_says_of_each_metric_what_kind_of_estimate_it_is(demo_project):
    intervals = pd.read_csv(demo_project / "metrics/intervals.csv")
    for version in mlflow_client(demo_project).search_model_versions("name='covid-xray-demo'"):
        name = version.tags["candidate"]
        types = intervals[intervals["model"].str.partition(" ")[0] == name].groupby("metric")["estimate_type"].last()
        for metric in version_card.METRICS:
            assert re.search(rf"\| {METRIC_LABELS[metric]} \| .* \| {types[metric]} \|", version.description), metric
        assert ("Model card of the bag" in version.description) == (name != "bag")


@pytest.mark.parametrize(
    ("labels", "options", "expected"),
    [
        (
            [0, 1, 0, 1, 0, 0, 1, 1],
            {"seeds": 1},
            [
                "Unavailable: no two sources, or acquisition clusters, have 5 patients each of one class.",
                "<h1>Bag of 1 seed: F1", "– (one member only)", "one seed only",
                "Only 4 positive validation images (4 patients)",
                "more positive patients for the sensitivity", "A half-width of 0.05 would take about",
            ],
        ),
        (
            [0, 0, 0, 0, 0, 0],
            {},
            [
                "– (images of one class only)", "sensitivity or specificity is undefined",
                "No positive validation images",
            ],
        ),
        (
            [0, 1, 1],
            {"with_metadata": False, "test_count": 0},
            [
                "Patient identifiers are missing", "no source is known", "Only 2 positive validation images<",
                "Confounding by source cannot be assessed", "cannot be estimated: no test images", "Not tested.",
            ],
        ),
    ],
    ids=["one seed", "one class", "three images and no source"],
)  # fmt: skip
def test_an_undefined_metric_is_a_dash_with_its_reason(project, recwarn, labels, options, expected):
    write_project(project, labels, **options)
    html = run_stages()
    text = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    assert ParsedPage(html).open_tags == []
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower()
    assert "None" not in text
    assert "(undefined" not in text
    assert [phrase for phrase in expected if phrase not in html] == []
    assert [str(warning.message) for warning in recwarn] == []


def test_the_report_is_deterministic_and_escapes_file_names_and_the_data_card(project):
    write_project(project, [0, 1, 0, 1, 0, 1])
    first = run_stages(), Path("report/model-card.md").read_bytes()
    report.callback(debug=True)
    assert first == (Path("report/index.html").read_text(), Path("report/model-card.md").read_bytes())
    assert "<5>.jpg" not in first[0]
    assert "&lt;5&gt;.jpg" in first[0]
    assert "<h3>Images by license</h3>" in first[0]
    assert '<th scope="row">CC &lt;BY&gt;</th>' in first[0]
    assert "<li>1 × not &lt;an&gt; image</li>" in first[0]
    assert "<li>&lt;0&gt;.jpg = &lt;1&gt;.jpg</li>" in first[0]


def caveats_by_title(results: Results, border: Estimate = CENTRAL) -> dict[str, str]:
    return {caveat.title: caveat.detail for caveat in summary_text.find_caveats(results, border)}


@pytest.mark.parametrize(
    ("border", "expected"),
    [
        (Estimate(0.6, 0.5, 0.7), True),
        (Estimate(0.6, 0.4, 0.8), False),  # may be a uniform map
        (Estimate(0.1, 0.05, 0.15), False),
        (Estimate(0.9), False),  # no interval
        (Estimate(np.nan), False),
    ],
)
def test_heatmaps_in_the_border_give_a_caveat_only_if_the_interval_says_so(demo_project, monkeypatch, border, expected):
    monkeypatch.chdir(demo_project)
    titles = caveats_by_title(Results(config.load_config()), border)
    assert ("Grad-CAM highlights the image border" in titles) == expected


@pytest.mark.parametrize(
    ("value", "low", "expected"), [(0.4, 0.1, True), (0.9, 0.6, False), (1.0, np.nan, False), (0.4, np.nan, False)]
)
def test_chance_level_within_a_source_gives_a_caveat(demo_project, monkeypatch, value, low, expected):
    monkeypatch.chdir(demo_project)
    results = Results(config.load_config())
    row = {"by": "source", "slice": "B", "model": results.bag, "metric": "auroc", "value": value, "low": low}
    vars(results)["slices"] = pd.DataFrame([row | {"high": low + 0.3, "reason": ""}])
    detail = caveats_by_title(results).get("Not clearly better than chance within one source")
    assert detail == (f"AUROC on the images of source B: {value:.3f} (0.100 to 0.400)." if expected else None)


@pytest.mark.parametrize(
    ("by", "low", "expected"), [("source", 0.6, True), ("acquisition", 0.6, True), ("source", 0.45, False)]
)
def test_features_that_tell_the_source_are_a_caveat_if_the_interval_is_above_chance(
    demo_project, monkeypatch, by, low, expected
):
    monkeypatch.chdir(demo_project)
    results = Results(config.load_config())
    counts = {"by": by, "labels": 2, "sources": 3, "images": 40, "patients": 30, "reason": ""}
    rows = [
        {"features": "network", "value": 0.7, "low": low, "high": 0.8},
        {"features": "thumbnail", "value": 0.9, "low": 0.8, "high": 0.95},
        {"features": "difference", "value": -0.2, "low": -0.3, "high": -0.1},
    ]
    vars(results)["source_probe"] = {row["features"]: pd.Series(row | counts) for row in rows}
    kind = {"source": "source", "acquisition": "acquisition cluster"}[by]
    assert summary_text.describe_source_probe(results) == (
        f"The features of seed-0 tell the {kind} with AUROC 0.700 ({low:.3f} to 0.800), 16×16 thumbnails with 0.900 "
        "(0.800 to 0.950): worse than a thumbnail, difference −0.200 (−0.300 to −0.100) (40 images of 30 patients, "
        f"3 {kind}s in 2 labels; the network was trained on none of them)."
    )
    table = tables.source_probe_table(results)
    assert table.header[1] == f"AUROC of telling the {kind}"
    assert [row[1].text for row in table.rows] == ["0.700", "0.900", "−0.200"]
    detail = caveats_by_title(results).get(f"The features tell the {kind} beyond the label")
    assert detail == (
        f"Given the label, a linear classifier on the features of seed-0 tells the {kind} with AUROC 0.700 (0.600 to "
        f"0.800). The model can use the {kind} in place of the disease."
        if expected
        else None
    )


@pytest.mark.parametrize(
    ("low", "title"),
    [
        (0.6, "The label is confounded with the source"),
        (0.45, ""),
        (np.nan, "Confounding by source cannot be assessed"),
    ],
)
def test_confounding_by_source_is_decided_by_the_interval_of_its_auroc(demo_project, monkeypatch, low, title):
    monkeypatch.chdir(demo_project)
    results = Results(config.load_config())
    row = {"value": 0.7, "low": low, "high": low + 0.3, "reason": "one patient only" if np.isnan(low) else ""}
    results._interval_rows["shortcut (source)", "auroc"] = [pd.Series(row)]
    titles = set(caveats_by_title(results))
    both = {"The label is confounded with the source", "Confounding by source cannot be assessed"}
    assert titles & both == ({title} if title else set())


@pytest.mark.parametrize("differs", [True, False])
def test_another_prevalence_and_distribution_shift_are_caveats_only_if_a_test_says_so(
    demo_project, monkeypatch, differs
):
    monkeypatch.chdir(demo_project)
    results = Results(config.load_config())
    results.summary["bag"] |= {
        "test_prevalence_differs": differs, "estimated_test_prevalence": 0.4,
        "estimated_test_prevalence_low": 0.3, "estimated_test_prevalence_high": 0.5,
    }  # fmt: skip
    row = {"features": "embedding", "auroc": 0.9, "p": 0.002, "adjusted_p": 0.01 if differs else 0.06}
    vars(results)["shift"] = pd.DataFrame([row | {"reason": ""}])
    caveats = caveats_by_title(results)
    assert ("Another prevalence in the test set" in caveats) == differs
    assert (
        caveats.get("Another prevalence in the test set", "40.0\u00a0% (30.0\u00a0% to 50.0\u00a0%)").find("40.0") >= 0
    )
    results.summary["bag"]["estimated_test_prevalence_low"] = None
    assert "(too few patients" in summary_text.describe_test_prevalence(results)
    assert ("The test images differ from the labeled ones" in caveats) == differs
    assert ("differ by embedding (adjusted p = 0.010" in summary_text.describe_shift(results)) == differs
    assert ("No test finds a difference" in summary_text.describe_shift(results)) != differs


def test_an_accuracy_that_cannot_be_estimated_is_a_reason_on_the_first_screen(demo_project, html, monkeypatch):
    monkeypatch.chdir(demo_project)
    results = Results(config.load_config())
    reason = results.summary["bag"]["expected_accuracy_reason"]  # there is one positive patient
    assert reason.startswith("cannot be estimated: no positive validation image is of ")
    assert escape(reason) in html[: html.index("<nav")]
    results.summary["bag"] |= {
        "expected_accuracy": None, "expected_accuracy_low": 0.6, "expected_accuracy_high": 0.9,
        "expected_accuracy_reason": "cannot be estimated: no negative validation image is of B",
    }  # fmt: skip
    assert summary_text.describe_expected_accuracy(results) == (
        "cannot be estimated: no negative validation image is of B; the range that this leaves is 0.600 to 0.900"
    )


@pytest.mark.parametrize(
    ("shares", "winner_named"), [([0.96, 0.03, 0.01], True), ([0.6, 0.3, 0.1], False), ([np.nan] * 3, False)]
)
def test_no_winner_is_named_unless_it_wins_in_95_percent_of_the_resamples(
    demo_project, monkeypatch, shares, winner_named
):
    monkeypatch.chdir(demo_project)
    results = Results(config.load_config())
    vars(results)["ranks"] = pd.Series(shares, ["seed-0", "seed-1", results.bag])
    assert not summary_text.describe_ranks(results)  # one positive patient: resamples say nothing
    results._interval_rows[results.bag, "f1"] = [pd.Series({"value": 0.8, "low": 0.6, "high": 0.9})]
    sentence = summary_text.describe_ranks(results)
    assert ("these images do not say which is the best" in sentence) == (not winner_named and not np.isnan(shares[0]))
    assert bool(sentence) == (not np.isnan(shares[0]))


def test_the_confusion_matrix_is_that_of_the_metrics_beside_it(demo_project, monkeypatch):
    monkeypatch.chdir(demo_project)
    results = Results(config.load_config())
    confusion = [[int(cell.text) for cell in row[1:]] for row in tables.confusion_table(results).rows]
    (tn, fp), (fn, tp) = confusion
    (row,) = [row for row in tables.operating_point_table(results).rows if row[0].text == results.bag]
    assert [int(cell.text) for cell in row[3:7]] == [tp, fp, fn, tn]
    assert row[7].text == f"{tp / (tp + fn):.3f}"
    assert results.estimate(results.bag, "recall").value == pytest.approx(tp / (tp + fn))
    assert row[2].text == results.estimate(results.bag, "recall").estimate_type == "fixed"


def test_cross_validated_predictions_are_called_out_of_fold(demo_project, monkeypatch):
    monkeypatch.chdir(demo_project)
    loaded = config.load_config()
    assert "out of fold" not in summary_text.describe_images(Results(loaded))
    split = loaded.active.split.model_copy(update={"cross_validate": True})
    profile = loaded.active.model_copy(update={"split": split})
    results = Results(loaded.model_copy(update={"profiles": {loaded.profile: profile}}))
    vars(results)["summary"] = results.summary | {"validation": results.counts | {"images": 33}}
    description = summary_text.describe_images(results)
    assert description.startswith("all 33 labeled images ")
    assert "each predicted out of fold by networks that were not trained on its patient" in description


def test_a_selected_model_is_called_apparent_at_its_operating_point(demo_project, monkeypatch):
    monkeypatch.chdir(demo_project)
    results = Results(config.load_config())
    types = {row[0].text: row[2].text for row in tables.operating_point_table(results).rows}
    assert types.pop(results.best) == "apparent"
    assert set(types.values()) == {"fixed"}


def test_every_figure_of_the_headline_table_has_its_estimate_type(demo_project, monkeypatch):
    monkeypatch.chdir(demo_project)
    results = Results(config.load_config())
    table = tables.headline_table(results)
    for row in table.rows:
        for value, kind in zip(row[1::2], row[2::2], strict=True):
            assert kind.text in (("",) if value.text == "–" else ("fixed", "cross-fitted", "corrected", "apparent"))
            assert kind.interval.startswith("apparent ") == (kind.text == "corrected")


def test_tables_of_commands_typed_by_hand_are_sections_of_the_report(demo_project, tmp_path, monkeypatch, one_thread):
    for name in ("data", "metrics", "models", "plots", "predictions", "params.yaml"):
        (tmp_path / name).symlink_to(demo_project / name)
    monkeypatch.chdir(tmp_path)
    results = Results(config.load_config())
    counts = {"images": 30, "positives": 12, "patients": 25, "positive_patients": 11, "negative_patients": 14}
    intervals = {"value": 0.8, "low": 0.7, "high": 0.9}
    row = {"source": "A", **counts, "role": "bag", "model": results.bag, "method": "score", "reason": ""}
    summary = {**row, "source": "summary", "metric": "auroc", "value": 0.85, "low": 0.6, "high": 0.95}
    new = {**summary, "source": "a new source", "value": np.nan, "low": 0.4, "high": 0.99}
    refused = {"source": "B", **counts, "reason": "9 positive patients, fewer than 10"}
    rows = [{**row, "metric": metric, **intervals} for metric in ("auroc", "recall", "specificity", "f1")]
    table = pd.DataFrame([*rows, refused, summary, new]).assign(recipe=recipe_hash(results.config))
    write_csv(Path("scores/external_validation.csv"), table)
    estimated = {key: results.summary["bag"][key] for key in EXPECTED_COLUMNS}
    scores = [
        {"model": model, "metric": metric, **intervals, "method": "Wilson", "reason": "", **counts, **estimated}
        for model in ("bag", results.best, "other")
        for metric in METRICS
    ]
    write_csv(Path("scores/test.csv"), pd.DataFrame(scores))
    report.callback(debug=True)
    html = Path("report/index.html").read_text()
    external = html[html.index('<section id="external">') : html.index('<section id="test">')]
    for text in ("mean of sources", "a new source (prediction interval)", "0.400 to 0.990", "fewer than 10", ">A<"):
        assert text in external
    assert "No external validation" not in html
    assert "The recipe or the data have changed" not in external
    test_set = html[html.index('<section id="test">') : html.index('<section id="bag">')]
    assert "30 test images of 25 patients" in test_set
    assert "a known patient" not in html
    assert escape(estimated["expected_accuracy_reason"]) in test_set
    assert ">other<" not in test_set
    assert "run <code>cxr score</code> again" not in test_set
    stale = [score | {"expected_accuracy": 0.123} for score in scores]
    write_csv(Path("scores/test.csv"), pd.DataFrame(stale))
    assert not Results(config.load_config()).test_scores_are_current
    write_csv(Path("scores/test.csv"), pd.DataFrame([score | {"estimated_test_prevalence": 0.123} for score in scores]))
    assert not Results(config.load_config()).test_scores_are_current
    write_csv(Path("scores/external_validation.csv"), pd.DataFrame([refused]))
    assert not Results(config.load_config()).is_externally_validated
    write_csv(Path("scores/external_validation.csv"), table)
    Path("data").unlink()
    shutil.copytree(demo_project / "data", "data")
    manifest = pd.read_csv("data/manifest.csv", dtype=str, keep_default_na=False)
    manifest.loc[manifest.index[manifest["set"] == "test"][0], "patient"] = ""
    write_csv(Path("data/manifest.csv"), manifest)
    report.callback(debug=True)
    html = Path("report/index.html").read_text()
    assert "Not every test image has a known patient" in html[html.index('<section id="shift">') :]
    assert "An image without a known patient counts as a patient" in html[html.index('<section id="test">') :]


def test_the_checklist_has_every_item_of_both_standards_once(demo_project, monkeypatch):
    monkeypatch.chdir(demo_project)
    items = reporting_checklist.fill_checklist(Results(config.load_config()), CENTRAL)
    assert [int(item.claim) for item in items if item.claim] == list(range(1, 45))  # CLAIM 2024 has 44 items
    tripod = [number for item in items for number in item.tripod.split(", ") if number]
    with_parts = {3: "abc", 5: "ab", 6: "abc", 8: "abc", 9: "abc", 12: "abcdefg", 18: "abcdef", 20: "abc", 23: "ab",
                  27: "abc"}  # fmt: skip
    expected = {f"{number}{part}" for number in range(1, 28) for part in with_parts.get(number, [""])}
    assert set(tripod) == expected
    assert all(item.name and item.entry for item in items)
    card = (demo_project / "report/model-card.md").read_text()
    assert card.count("not known, because") >= 5


def test_undefined_values_have_footnotes_and_each_reason_occurs_once():
    table = ReportTable(["", "F1", "AUROC"])
    table.add("one", Estimate(0.5, 0.4, 0.6), Estimate(np.nan, reason="one class"))
    table.add("two", Estimate(0.5, reason="all resamples have the same value"), Estimate(np.nan, reason="one class"))
    assert [[cell.note for cell in row[1:]] for row in table.rows] == [["", "a"], ["b", "a"]]
    assert table.notes == [("a", "one class"), ("b", "all resamples have the same value")]
    assert format_markdown(table).splitlines()[2] == "| one | 0.500 | – (one class) |"


def test_the_most_and_least_confident_images_are_selected_once_each():
    labels, probabilities = np.array([0, 0, 0, 1, 1, 1, 0, 1]), np.array([0.0, 0.1, 0.9, 1.0, 0.9, 0.2, 0.45, 0.55])
    examples = gradcam.most_and_least_confident(labels, probabilities, 0.5, count=2)
    assert examples.groupby("kind")["row"].agg(set).to_dict() == {
        "most confident correct": {0, 3}, "most confident wrong": {2, 5}, "least confident": {6, 7},
    }  # fmt: skip
    assert len(gradcam.most_and_least_confident(labels[:1], probabilities[:1], 0.5)) == 1


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "timm/tf_efficientnet_lite0"])
def test_every_backbone_has_heatmaps_of_the_size_of_its_input(name, one_thread):
    torch.manual_seed(0)
    network = Classifier(Architecture(name, [], 0.0, 128, "none", 128, "stretch")).eval()
    pixels = torch.zeros(2, 128, 128, dtype=torch.uint8)
    maps = heatmaps.compute_heatmaps(network, pixels, [0, 1])
    assert maps.shape == (2, 128, 128)
    assert maps.min() >= 0
    assert maps.max() <= 1


def test_mean_border_share_has_an_interval_over_patients():
    rng = np.random.default_rng(0)
    shares = rng.uniform(0.2, 0.6, 40)
    mean, low, high = gradcam.mean_border_share(shares, np.arange(40))
    expected = stats.t.interval(0.95, 39, shares.mean(), stats.sem(shares))
    assert (mean, low, high) == pytest.approx((shares.mean(), *expected))
    _, low_of_pairs, high_of_pairs = gradcam.mean_border_share(np.repeat(shares, 2), np.repeat(np.arange(40), 2))
    assert (low_of_pairs, high_of_pairs) == pytest.approx((low, high), abs=0.002)  # copies tell nothing new
    with_empty = gradcam.mean_border_share(np.append(shares, np.nan), np.arange(41))
    assert with_empty == pytest.approx((mean, low, high))
    assert np.isnan(gradcam.mean_border_share(shares, np.zeros(40))[1:]).all()
    assert np.isnan(gradcam.mean_border_share(np.full(3, np.nan), np.arange(3))).all()


def test_the_sample_of_heatmaps_is_fixed_and_without_repetition():
    assert list(gradcam.draw_sample(5)) == [0, 1, 2, 3, 4]
    sample = gradcam.draw_sample(1000)
    assert len(set(sample)) == gradcam.SAMPLE_SIZE
    assert list(sample) == list(gradcam.draw_sample(1000))


def test_the_label_depends_on_clusters_only_if_their_patients_differ():
    columns = ["positive_groups", "negative_groups"]
    assert summary_text.cluster_p(pd.DataFrame([[20, 2], [3, 30]], columns=columns)) < 0.001
    assert summary_text.cluster_p(pd.DataFrame([[10, 20], [11, 20]], columns=columns)) > 0.5
    assert np.isnan(summary_text.cluster_p(pd.DataFrame([[0, 20], [0, 20]], columns=columns)))


def test_border_share_is_the_area_for_a_uniform_heatmap_and_missing_for_an_empty_one():
    uniform, corner, center = np.ones((64, 64)), np.zeros((64, 64)), np.zeros((64, 64))
    corner[:8, :8] = center[20:30, 20:30] = 1
    shares = gradcam.border_share(np.stack([uniform, corner, center, np.zeros((64, 64))]))
    assert shares[:3] == pytest.approx([gradcam.UNIFORM_BORDER_SHARE, 1, 0])
    assert np.isnan(shares[3])


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 390])
def test_the_page_fits_any_width_requests_nothing_and_has_no_serious_axe_violation(
    demo_project, browser, width, scheme
):
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme)
    tab = context.new_page()
    requested: list[str] = []
    tab.on("request", lambda request: requested.append(request.url))
    tab.goto(f"file://{demo_project / 'report/index.html'}")
    assert [url for url in requested if not url.startswith(("file:", "data:"))] == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    violations = Axe().run(tab).response["violations"]
    serious = [one for one in violations if one["impact"] in SERIOUS_IMPACTS]
    assert [(violation["id"], violation["nodes"][0]["html"]) for violation in serious] == []
    context.close()
