"""Tests of the HTML report and the model card: content, determinism, accessibility and Grad-CAM."""

import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from browser import OPTIONS
from conftest import ROOT, edit_params, make_tiny, mlflow_client

from pipeline.core import config
from pipeline.core.files import write_csv, write_json
from pipeline.models import classifier
from pipeline.models.classifier import Architecture, Classifier
from pipeline.report import data_card, gradcam, page, summary_text
from pipeline.report.results import Estimate, Results
from pipeline.report.tables import ReportTable, format_markdown
from pipeline.tracking import registry
from stages.bag import bag
from stages.evaluate import evaluate
from stages.report import report

VOID_ELEMENTS = {"br", "img", "link", "meta", "input", "hr"}
SERIOUS_IMPACTS = ("serious", "critical")


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
    edit_params(folder, lambda params: params["demo"]["evaluate"].update(cpu_threads=1, resamples=20))
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
    manifest |= {"license": "CC <BY>", "width": 512, "height": 512, "bytes": 9, "xxh128": files}
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
    np.save(folder / "data/images.npy", rng.integers(0, 255, (count, 48, 48), dtype=np.uint8))
    for seed in range(seeds):
        torch.manual_seed(seed)
        network = Classifier(Architecture("resnet18", [], 0.0, 48, "none", 48, "stretch"))
        model = folder / f"models/seed-{seed}"
        classifier.save_weights(network, model)
        environment = {"torch": "2", "device": "cpu", "cpu_threads": 1, "processes": 1}
        classifier.save_description(network, model, {"environment": environment})
        write_json(model / "metrics.json", {"run": f"seed-{seed} · made", "epoch": 1})
        history = {"epoch": [1, 2], "train_loss": [0.7, 0.6], "loss": [0.7, 0.6], "f1": [0.0, 0.5]}
        write_csv(model / "history.csv", pd.DataFrame(history))


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


def test_the_first_screen_has_the_best_model_its_metrics_and_the_limitations(html):
    first_screen = html[: html.index("<nav")]
    assert re.search(r"<h1>seed-\d: highest validation F1 of 2 seeds</h1>", first_screen)
    for text in ("F1", "sensitivity", "95 %", "expected accuracy at 50 % prevalence", "Limitations",
                 "not for diagnosis", "Synthetic images"):  # fmt: skip
        assert text in first_screen


def test_every_section_begins_with_an_explanation(html):
    for name in page.SECTIONS:
        section = html[html.index(f'<section id="{name}">') :]
        assert re.match(r"<section[^>]*>\s*<h2>[^<]+</h2>\s*<p>", section), name


def test_the_registered_model_is_described_by_the_model_card(demo_project):
    description = mlflow_client(demo_project).get_registered_model("covid-xray-demo").description
    card = (demo_project / "report/model-card.md").read_text()
    assert description == f"{registry.DESCRIPTION}\n{card}"
    assert len(description) < registry.MAX_DESCRIPTION
    for text in ("not for diagnosis", "cxr history", "Intended use", "Training data", "Limitations", "not known",
                 "no bootstrap of the data"):  # fmt: skip
        assert text in description


@pytest.mark.parametrize(
    ("labels", "options", "expected"),
    [
        (
            [0, 1, 0, 1, 0, 0, 1, 1],
            {"seeds": 1},
            [
                "F1 of 1 seed<", "– (one member only)", "one seed only", "The label is confounded with the source",
                "Only 4 positive validation images (4 patients)", "One error changes sensitivity by 25.0 points",
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
                "Confounding by source cannot be assessed",
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


def test_heatmaps_in_the_border_give_a_caveat(demo_project, monkeypatch):
    monkeypatch.chdir(demo_project)
    for share, expected in {0.9: True, 0.1: False, np.nan: False}.items():
        caveats = summary_text.find_caveats(Results(config.load_config()), np.array([share, share]))
        assert ("Grad-CAM highlights the image border" in [caveat.title for caveat in caveats]) == expected


@pytest.mark.parametrize(("value", "low", "expected"), [(0.4, 0.1, True), (0.9, 0.6, False), (1.0, np.nan, False)])
def test_chance_level_within_a_source_gives_a_caveat(demo_project, monkeypatch, value, low, expected):
    monkeypatch.chdir(demo_project)
    results = Results(config.load_config())
    row = {"by": "source", "slice": "B", "model": results.best, "metric": "auroc", "value": value, "low": low}
    vars(results)["slices"] = pd.DataFrame([row | {"high": low + 0.3, "reason": ""}])
    details = [
        caveat.detail
        for caveat in summary_text.find_caveats(results, np.array([0.1]))
        if caveat.title == "Not clearly better than chance within one source"
    ]
    assert details == ([f"AUROC on the images of source B: {value:.3f} (0.100 to 0.400)."] if expected else [])


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
    heatmaps = gradcam.compute_heatmaps(network, pixels, [0, 1])
    assert heatmaps.shape == (2, 128, 128)
    assert heatmaps.min() >= 0
    assert heatmaps.max() <= 1


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
