"""The report and the model card: that they say what was estimate_type, everywhere and to everybody."""

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
from conftest import ROOT, edit_params, make_tiny, store

from pipeline.core import config
from pipeline.core.files import write_csv, write_json
from pipeline.models import classifier
from pipeline.models.classifier import Architecture, Classifier
from pipeline.report import gradcam, page, summary_text
from pipeline.report.results import Estimate, Results
from pipeline.report.tables import ReportTable, format_markdown
from pipeline.tracking import registry
from stages.bag import bag
from stages.evaluate import evaluate
from stages.report import report

VOID = {"br", "img", "link", "meta", "input", "hr"}
SERIOUS = ("serious", "critical")


class Page(HTMLParser):
    """Notes the attributes of every element, and what is not closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes what it did not open"

    def all(self, attribute: str) -> list[str]:
        return [str(attrs[attribute]) for _, attrs in self.found if attribute in attrs]


def made(folder: Path, labels: list[int], *, seeds: int = 2, known: bool = True, test: int = 4) -> Path:
    """Make what evaluate needs: images of a training set and a validation set with these labels, and networks."""
    rng = np.random.default_rng(0)
    shutil.copy(ROOT / "params.yaml", folder)
    edit_params(folder, make_tiny)
    edit_params(folder, lambda params: params.update(seeds=list(range(seeds))))
    edit_params(folder, lambda params: params["demo"]["evaluate"].update(cpu_threads=1, resamples=20))
    every = [0, 1, 0, 1, *labels, *[None] * test]
    subsets = ["train"] * 4 + ["validation"] * len(labels) + ["test"] * test
    files = [f"<{number}>.jpg" for number in range(len(every))]
    patients = [f"p{number}" if known else "" for number in range(len(every))]
    sets = ["test" if subset == "test" else "train" for subset in subsets]
    facts = {"file": files, "set": sets, "label": pd.array(every, "Int64"), "patient": patients, "view": ""}
    facts |= {"source": ["A", "B"] * (len(every) // 2) + ["A"] * (len(every) % 2) if known else ""}
    table = pd.DataFrame({**facts, "license": "", "width": 512, "height": 512, "bytes": 9, "xxh128": files})
    write_csv(folder / "data/manifest.csv", table)
    folds = [{"train": "1", "validation": "0", "test": ""}[subset] for subset in subsets]
    split = {"file": files, "group": files, "subset": subsets, "fold": folds}
    write_csv(folder / "data/split.csv", pd.DataFrame(split))
    (folder / "data/card.md").write_text("# Drawn <by> hand\n")
    write_json(folder / "data/images.json", {"resize": "stretch"})
    write_csv(folder / "data/quarantine.csv", pd.DataFrame(columns=["file", "set", "label", "reason"]))
    np.save(folder / "data/images.npy", rng.integers(0, 255, (len(every), 48, 48), dtype=np.uint8))
    for seed in range(seeds):
        torch.manual_seed(seed)
        network, own = (
            Classifier(Architecture("resnet18", [], 0.0, 48, "none", 48, "stretch")),
            folder / f"models/seed-{seed}",
        )
        classifier.save_weights(network, own)
        place = {"torch": "2", "device": "cpu", "cpu_threads": 1, "processes": 1}
        classifier.save_description(network, own, {"environment": place})
        write_json(own / "metrics.json", {"run": f"seed-{seed} · made", "epoch": 1})
        history = {"epoch": [1, 2], "train_loss": [0.7, 0.6], "loss": [0.7, 0.6], "f1": [0.0, 0.5]}
        write_csv(own / "history.csv", pd.DataFrame(history))
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_stages() -> str:
    for stage in (evaluate, bag, report):
        stage.callback(debug=True)
    return Path("report/index.html").read_text()


@pytest.fixture(scope="module")
def html(built) -> str:
    return (built / "report/index.html").read_text()


def test_the_report_is_one_well_formed_page_that_loads_nothing(html):
    found = Page(html)
    assert found.open == []
    assert [count for count in Counter(found.all("id")).values() if count > 1] == []
    addresses = {*found.all("src"), *found.all("href"), *found.all("xlink:href")}
    inside = {address for address in addresses if address.startswith("data:") or address[1:] in found.all("id")}
    assert addresses - inside == {"http://127.0.0.1:5000/#/models/covid-xray-demo"}  # where `make ui` shows it
    assert {tag for tag, _ in found.found} & {"script", "link", "iframe"} == set()
    assert "url(http" not in html
    assert "@import" not in html


def test_the_first_screen_names_the_model_its_worth_what_to_expect_and_what_to_beware_of(html):
    first = html[: html.index("<nav")]
    assert re.search(r"<h1>seed-\d is the best of 2 models</h1>", first)
    for told in ("F1", "sensitivity", "95 %", "accuracy to expect at 50 % positives", "What to beware of",
                  "not for diagnosis", "The radiographs are drawings"):  # fmt: skip
        assert told in first


def test_every_section_says_how_to_read_it(html):
    for name in page.SECTIONS:
        body = html[html.index(f'<section id="{name}">') :]
        assert re.match(r"<section[^>]*>\s*<h2>[^<]+</h2>\s*<p>", body), name


def test_the_registered_model_is_described_by_its_card_and_the_run_holds_the_report(built):
    described = store(built).get_registered_model("covid-xray-demo").description
    card = (built / "report/model-card.md").read_text()
    assert described == f"{registry.DESCRIPTION}\n{card}"
    assert len(described) < registry.MAX_DESCRIPTION
    for told in ("no diagnosis", "cxr history", "Intended use", "Training data", "Caveats", "not known"):
        assert told in described


@pytest.mark.parametrize(
    ("labels", "options", "says"),
    [
        (
            [0, 1, 0, 1, 0, 0, 1, 1],
            {"seeds": 1},
            ["best of 1 model<", "– (one member only)", "one seed only", "The source gives labels away"],
        ),
        ([0, 0, 0, 0, 0, 0], {}, ["– (images of one class only)", "sensitivity or specificity is missing"]),
        ([0, 1, 1], {"known": False, "test": 0}, ["Patients are not known", "no source is known"]),
    ],
    ids=["one seed", "one class", "three images and no source"],
)  # fmt: skip
def test_a_figure_that_cannot_be_had_is_a_dash_with_its_reason(project, recwarn, labels, options, says):
    made(project, labels, **options)
    html = run_stages()
    text = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    assert Page(html).open == []
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower()
    assert "None" not in text
    assert [told for told in says if told not in html] == []
    assert [str(warning.message) for warning in recwarn] == []


def test_the_report_is_the_same_bytes_each_time_and_neither_a_files_name_nor_a_data_card_is_markup(project):
    made(project, [0, 1, 0, 1, 0, 1])
    once = run_stages(), Path("report/model-card.md").read_bytes()
    report.callback(debug=True)
    assert once == (Path("report/index.html").read_text(), Path("report/model-card.md").read_bytes())
    assert "<5>.jpg" not in once[0]
    assert "&lt;5&gt;.jpg" in once[0]
    assert "# Drawn &lt;by&gt; hand" in once[0]


def test_a_model_that_looks_at_the_border_puts_a_warning_light_on(built, monkeypatch):
    monkeypatch.chdir(built)
    for share, said in {0.9: True, 0.1: False, np.nan: False}.items():
        found = summary_text.find_caveats(Results(config.load_config()), np.array([share, share]))
        assert ("It looks at the border" in [caution.what for caution in found]) == said


@pytest.mark.parametrize(("value", "low", "warned"), [(0.4, 0.1, True), (0.9, 0.6, False), (1.0, np.nan, False)])
def test_a_source_within_which_the_model_may_know_nothing_is_named(built, monkeypatch, value, low, warned):
    monkeypatch.chdir(built)
    results = Results(config.load_config())
    row = {"by": "source", "slice": "B", "model": results.best, "metric": "auroc", "value": value, "low": low}
    vars(results)["slices"] = pd.DataFrame([row | {"high": low + 0.3, "reason": ""}])
    why = [
        one.why
        for one in summary_text.find_caveats(results, np.array([0.1]))
        if one.what.startswith("On images of one source")
    ]
    assert why == ([f"Among those of B it has AUROC {value:.3f} (0.100 to 0.400)."] if warned else [])


def test_a_missing_figure_of_a_table_has_a_letter_and_each_reason_is_given_once():
    grid = ReportTable(["", "F1", "AUROC"])
    grid.add("one", Estimate(0.5, 0.4, 0.6), Estimate(np.nan, reason="one class"))
    grid.add("two", Estimate(0.5, reason="no resample differs"), Estimate(np.nan, reason="one class"))
    assert [[cell.note for cell in row[1:]] for row in grid.rows] == [["", "a"], ["b", "a"]]
    assert grid.notes == [("a", "one class"), ("b", "no resample differs")]
    assert format_markdown(grid).splitlines()[2] == "| one | 0.500 | – (one class) |"


def test_the_surest_and_the_least_sure_images_are_chosen_once_each():
    labels, given = np.array([0, 0, 0, 1, 1, 1, 0, 1]), np.array([0.0, 0.1, 0.9, 1.0, 0.9, 0.2, 0.45, 0.55])
    chosen = gradcam.most_and_least_confident(labels, given, 0.5, count=2)
    assert chosen.groupby("kind")["row"].agg(set).to_dict() == {
        "surest right": {0, 3}, "surest wrong": {2, 5}, "least sure": {6, 7},
    }  # fmt: skip
    assert len(gradcam.most_and_least_confident(labels[:1], given[:1], 0.5)) == 1


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "timm/tf_efficientnet_lite0"])
def test_every_backbone_is_explained_by_maps_of_the_size_of_its_images(name, one_thread):
    torch.manual_seed(0)
    network = Classifier(Architecture(name, [], 0.0, 128, "none", 128, "stretch")).eval()
    pixels = torch.zeros(2, 128, 128, dtype=torch.uint8)
    maps = gradcam.compute_heatmaps(network, pixels, [0, 1])
    assert maps.shape == (2, 128, 128)
    assert maps.min() >= 0
    assert maps.max() <= 1


def test_the_share_in_the_border_is_that_of_the_area_for_an_even_map_and_missing_for_an_empty_one():
    even, corner, middle = np.ones((64, 64)), np.zeros((64, 64)), np.zeros((64, 64))
    corner[:8, :8] = middle[20:30, 20:30] = 1
    found = gradcam.border_share(np.stack([even, corner, middle, np.zeros((64, 64))]))
    assert found[:3] == pytest.approx([gradcam.UNIFORM_BORDER_SHARE, 1, 0])
    assert np.isnan(found[3])


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
def test_a_browser_shows_it_at_any_width_without_scripts_and_axe_finds_no_serious_fault(built, browser, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme)
    shown = context.new_page()
    asked: list[str] = []
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(f"file://{built / 'report/index.html'}")
    assert [address for address in asked if not address.startswith(("file:", "data:"))] == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(shown).response["violations"]
    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in found if fault["impact"] in SERIOUS] == []
    context.close()
