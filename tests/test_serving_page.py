"""The page of `cxr serve`, in headless Chromium."""

import csv
import io
import json
import re
import shutil
import socket
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import uvicorn
from browser import OPTIONS
from conftest import invoke, use_project, write_files, write_zip
from odd_files import chest, encode, formats
from PIL import Image

from pipeline.core.config import load_config
from pipeline.data.file_names import IMAGE_ENDING
from pipeline.data.sources.image_paths import DESCRIPTION
from pipeline.evaluation.prevalence import change_prevalence
from pipeline.serving import app, server
from pipeline.serving.decoders import DecoderPool
from pipeline.serving.limits import Limits
from pipeline.serving.predictor import Predictor
from pipeline.serving.served_model import ModelFollower, render_card

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
pytestmark = pytest.mark.usefixtures("one_thread")

PNGS = {f"{shade}.png": encode(Image.fromarray(chest(shade))) for shade in range(70, 100, 5)}
MEBIBYTE = 2**20


class Serving:
    """The model bag of a project behind HTTP, which can be stopped and started again."""

    def __init__(self) -> None:
        self.follower = ModelFollower(load_config(), "bag", torch.device("cpu"), None, 10.0)
        self._decoders, self._predictor = DecoderPool(1, 20.0), Predictor()
        self.service = app.Service(self.follower, self._decoders, self._predictor, Limits())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        handler = app.create_app(self.service, server.LOOPBACK)
        settings = uvicorn.Config(handler, port=self._port, http="h11", ws="none", lifespan="off", log_config=None)
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.05)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def close(self) -> None:
        self.stop()
        self._predictor.close()
        self._decoders.close()


@pytest.fixture(scope="module")
def serving(demo_project) -> Iterator[Serving]:
    with pytest.MonkeyPatch.context() as patch:
        use_project(demo_project, patch)
        serving = Serving()
        serving.start()
        yield serving
        serving.close()


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("Chromium is not installed")
    expect.set_options(timeout=30_000)  # on a busy machine
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, serving) -> Iterator[Callable[..., SimpleNamespace]]:
    """Returns a function that opens the page; afterwards, nothing was requested elsewhere, and no script failed."""
    contexts, requested, problems = [], [], []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        tab = contexts[-1].new_page()
        tab.on("request", lambda request: requested.append(request.url))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on(
            "console", lambda message: problems.append(message.text) if "Failed to load" not in message.text else None
        )
        tab.on("dialog", lambda dialog: dialog.accept())
        tab.goto(serving.url)
        expect(tab.locator("#facts")).to_contain_text("version")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert [url for url in requested if not url.startswith((f"{serving.url}/", "blob:", "data:"))] == []
    assert problems == []


@pytest.fixture(scope="module")
def radiographs(demo_project) -> Path:
    """A folder in the project, so that the page and the command call its files the same."""
    with zipfile.ZipFile(demo_project / "data/raw.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")][:4]
        drawn = {f"a/{Path(name).name}": archive.read(name) for name in names}
    no_images = {"notes.txt": b"no image", "a/list": b"neither\n", ".hidden.png": b"", "table.csv": PNGS["70.png"]}
    no_images["DICOMDIR"] = b"\0" * 128 + b"DICM"
    broken = {"broken.jpg": drawn[min(drawn)][:2000], "empty.dcm": b"", "b/text.png": b"no image"}
    return write_files(demo_project / "radiographs", drawn | formats(72) | no_images | broken)


def drop(tab, *paths: Path) -> None:
    """Drop files and folders as a person does."""
    where = tab.locator("#drop-heading").bounding_box()
    session = tab.context.new_cdp_session(tab)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": where["x"] + 5, "y": where["y"] + 5, "data": data})


def choose(tab, files: dict[str, bytes] | list[Path]) -> None:
    if isinstance(files, dict):
        files = [{"name": name, "mimeType": "", "buffer": data} for name, data in files.items()]
    tab.set_input_files("#files", files)


def wait_for_answers(tab, count: int) -> None:
    expect(tab.locator("#progress-text")).to_have_text(f"{count} of {count} answered")
    expect(tab.locator("#stop")).to_be_hidden()


def row(tab, name: str):
    return tab.locator("#rows tr", has=tab.get_by_text(name, exact=True))


def set_prevalence(tab, percent: str) -> None:
    tab.locator("#prevalence-number").fill(percent)
    tab.locator("#prevalence-number").press("Enter")


def ask(serving: Serving, image: bytes) -> dict:
    """Classify an image without a browser."""
    with urllib.request.urlopen(f"{serving.url}/v1/predict", image) as answer:
        return json.load(answer)


def download_csv(tab) -> str:
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Download as CSV").click()
    assert download.value.suggested_filename == "predictions.csv"
    return Path(download.value.path()).read_text(encoding="utf-8")


def test_a_dropped_folder_and_zip_give_the_table_of_cxr_predict_at_any_prevalence(
    open_page, serving, demo_project, radiographs
):
    archive = demo_project / "many.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for index, (name, data) in enumerate(PNGS.items()):
            target.writestr(f"x/ü/{name}", data, zipfile.ZIP_STORED if index % 2 else None)
        target.writestr("__MACOSX/x/._70.png", b"no image")
        target.writestr("x/readme.txt", b"no image")
    tab = open_page(accept_downloads=True)
    address = serving.url.removeprefix("http://")
    expect(tab.locator("#privacy")).to_contain_text(
        f"Files go only to {address}, which keeps no image after its answer"
    )
    drop(tab, radiographs, archive)
    command = "cxr predict radiographs many.zip --model bag"
    assert invoke(f"{command} --csv expected.csv").exit_code == 2  # some files are not usable
    expected = pd.read_csv("expected.csv")
    wait_for_answers(tab, len(expected))
    expect(tab.locator("#counts")).to_contain_text("4 skipped, no images")
    # Scores, which are recalibrated to probabilities, depend by less than this on what else is in a batch.
    atol = 1e-6 / serving.follower.current.candidate.config.temperature
    table = pd.read_csv(io.StringIO(download_csv(tab)))
    pd.testing.assert_frame_equal(table, expected, rtol=0, atol=atol)
    assert expected["reason"].notna().sum() == 3
    assert "many.zip/x/ü/70.png" in set(expected["file"])
    expect(row(tab, "radiographs/empty.dcm")).to_contain_text("Not usable: empty file")

    set_prevalence(tab, "20")
    config = serving.follower.current.candidate.config
    threshold = change_prevalence(np.array([config.threshold_probability]), config.prevalence, 0.2)[0]
    label = f"from a probability of {100 * threshold:.1f} % at a prevalence of 20 %"
    expect(tab.locator("#lead")).to_contain_text(label)
    expect(tab.locator("#facts")).to_contain_text(label)
    invoke(f"{command} --prevalence 0.2 --csv changed.csv")
    changed = pd.read_csv("changed.csv")
    assert not changed["probability"].equals(expected["probability"])
    table = pd.read_csv(io.StringIO(download_csv(tab)))
    pd.testing.assert_frame_equal(table, changed, rtol=0, atol=atol)
    for one in table[table["reason"].isna()].itertuples():
        expect(row(tab, one.file)).to_contain_text(f"{one.probability:.1%}".replace("%", " %"))


def test_the_heat_map_of_a_result_has_an_opacity_and_is_reached_by_keyboard_alone(open_page):
    tab = open_page()
    tab.on("filechooser", lambda _: None)  # long before it opens, since the browser reports it only some time later
    button = tab.get_by_role("button", name="Choose files")
    while not button.evaluate("element => element === document.activeElement"):
        tab.keyboard.press("Tab")
    with tab.expect_file_chooser() as chooser:
        tab.keyboard.press("Enter")
    chooser.value.set_files([{"name": name, "mimeType": "", "buffer": data} for name, data in PNGS.items()])
    wait_for_answers(tab, len(PNGS))
    expect(tab.locator("#announcement")).to_have_text(re.compile(rf"{len(PNGS)} of {len(PNGS)} answered: \d+ COVID-19"))
    first = tab.get_by_role("button", name="70.png")
    while not first.evaluate("element => element === document.activeElement"):
        tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    detail, image = tab.get_by_role("dialog", name="70.png"), tab.get_by_role("img", name="Radiograph 70.png")
    expect(detail).to_be_visible()
    expect(detail).to_contain_text("For research, not for diagnosis")
    expect(detail).to_contain_text(re.compile(r"odds (about|\d+\.\d times|1/\d+\.\d of) the threshold’s"))
    expect(detail).to_contain_text(re.compile(r"[12] of 2 say (COVID-19 positive|negative)"))
    heatmap = tab.locator("#heatmap")
    expect(heatmap).to_be_visible()
    size = "element => element.decode().then(() => [element.naturalWidth, element.naturalHeight])"
    assert image.evaluate(size) == heatmap.evaluate(size) == [70, 70]
    assert image.bounding_box() == heatmap.bounding_box()
    with_heatmap = tab.locator("#image").screenshot()
    slider = tab.get_by_role("slider", name="Opacity of the heatmap")
    while not slider.evaluate("element => element === document.activeElement"):
        tab.keyboard.press("Tab")
    tab.keyboard.press("Home")
    assert heatmap.evaluate("element => getComputedStyle(element).opacity") == "0"
    assert tab.locator("#image").screenshot() != with_heatmap
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("ArrowRight")
    expect(tab.get_by_role("dialog", name="75.png")).to_be_visible()
    expect(tab.get_by_role("img", name="Radiograph 75.png")).to_be_visible()
    tab.keyboard.press("Escape")
    expect(detail).to_be_hidden()
    expect(tab.get_by_role("button", name="75.png")).to_be_focused()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1300), ("dark", 1300), ("light", 390), ("dark", 320)])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_page(open_page, serving, scheme, width):
    from axe_playwright_python.sync_playwright import Axe

    def check() -> None:
        violations = Axe().run(tab).response["violations"]
        assert [(violation["id"], violation["nodes"][0]["html"]) for violation in violations] == []
        for element in ("html", "#detail"):
            assert tab.locator(element).evaluate("element => element.scrollWidth - element.clientWidth") <= 0

    wide = "| | metric |\n|---|--:|\n| " + "long" * 90 + " | 1 |"
    served = serving.follower.current
    serving.follower.current = replace(served, card_html=render_card(f"# Card\n\n{wide}\n\n## Use\n\nLimitations"))
    tab = open_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    serving.follower.current = served
    background = tab.locator("body").evaluate("element => getComputedStyle(element).backgroundColor")
    assert (int(background[4:].split(",")[0]) < 128) == (scheme == "dark")
    long_name = f"{'long' * 40}.png"
    choose(tab, {long_name: PNGS["70.png"], "95.png": PNGS["95.png"], "broken.dcm": b""})
    wait_for_answers(tab, 3)
    tab.get_by_text("Model card and limitations").click()
    expect(tab.get_by_text("Limitations", exact=True)).to_be_visible()
    check()
    tab.get_by_role("button", name=long_name).click()
    expect(tab.locator("#heatmap")).to_be_visible()
    tab.get_by_text("Probability of each member").click()
    check()


def test_what_is_too_large_or_broken_is_a_row_with_its_reason_and_is_not_sent(open_page, tmp_path):
    large, archive, fake = tmp_path / "large.dcm", tmp_path / "bad.zip", tmp_path / "fake.zip"
    with large.open("wb") as stream:
        stream.truncate(300 * MEBIBYTE)
    write_zip(archive, dict.fromkeys(("fine.png", "secret.png", "odd.png", "damaged.png"), PNGS["70.png"]))
    data = bytearray(archive.read_bytes())
    entries = {name: data.rindex(name.encode()) - 46 for name in ("secret.png", "odd.png", "damaged.png")}
    data[entries["secret.png"] + 8] |= 1  # encrypted
    data[entries["odd.png"] + 10] = 12  # bzip2
    data[entries["damaged.png"] + 16] ^= 1  # checksum
    archive.write_bytes(data)
    fake.write_bytes(b"no zip at all, but for its name")
    tab = open_page()
    sent = []
    tab.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    choose(tab, [large, archive, fake])
    wait_for_answers(tab, 6)
    reasons = {
        "large.dcm": "too large: 300 MiB; the server takes 256 MiB at most",
        "bad.zip/secret.png": "encrypted",
        "bad.zip/odd.png": "unsupported compression",
        "bad.zip/damaged.png": "broken in the zip: wrong size or checksum",
        "fake.zip": "broken zip",
    }
    for name, reason in reasons.items():
        expect(row(tab, name)).to_contain_text(f"Not usable: {reason}" if name != "bad.zip/odd.png" else reason)
    expect(row(tab, "bad.zip/fine.png")).to_contain_text("of 2 say")
    assert len(sent) == 1
    tab.get_by_label("Show").select_option("unusable")
    expect(tab.locator("#rows tr")).to_have_count(5)


def test_a_zip64_is_read(open_page, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    archive = write_zip(tmp_path / "large.zip", PNGS)
    assert zipfile.stringEndArchive64 in archive.read_bytes()
    tab = open_page()
    choose(tab, [archive])
    wait_for_answers(tab, len(PNGS))
    expect(tab.locator("#rows tr.done")).to_have_count(len(PNGS))


def test_no_name_becomes_a_formula_and_every_name_is_read_back(open_page, tmp_path):
    names = ["=1+1.png", "+1.png", "-1.png", "@x.png", "\t=1.png", 'a"b,c;d.png', "line\nbreak.png", "a\u202egnp.dcm"]
    files = [tmp_path / name for name in names]
    for file in files:
        file.write_bytes(b"")
    tab = open_page(accept_downloads=True)
    choose(tab, files)
    wait_for_answers(tab, len(names))
    assert row(tab, "agnp.dcm").count() == 1  # not shown reversed, as amcd.png
    written = [row["file"] for row in csv.DictReader(io.StringIO(download_csv(tab), newline=""))]
    assert not [name for name in written if name[0] in "=+-@\t\r"]
    assert [(tmp_path / name).resolve() for name in written] == [file.resolve() for file in files]


def test_two_users_at_once_get_their_own_results(open_page, serving):
    noise = np.random.default_rng(0).integers(0, 256, (6, 70, 70), dtype=np.uint8)
    images = {f"{index}.png": encode(Image.fromarray(np.sort(one, axis=index % 2))) for index, one in enumerate(noise)}
    names = list(images)
    alone = {name: ask(serving, data)["predictions"][0]["probability"] for name, data in images.items()}
    tabs, shares = [open_page(accept_downloads=True), open_page(accept_downloads=True)], [names[::2], names[1::2]]
    for tab, share in zip(tabs, shares, strict=True):
        choose(tab, {name: images[name] for name in share})
    for tab, share in zip(tabs, shares, strict=True):
        wait_for_answers(tab, len(share))
        table = pd.read_csv(io.StringIO(download_csv(tab)))
        assert list(table["file"]) == share
        assert list(table["probability"]) == pytest.approx([alone[name] for name in share], abs=1e-4)
    assert np.diff(sorted(alone.values())).min() > 1e-3


def test_a_server_that_stops_is_told_and_what_is_left_can_be_sent_later(open_page, serving):
    tab = open_page()
    choose(tab, {"70.png": PNGS["70.png"]})
    wait_for_answers(tab, 1)
    serving.stop()
    choose(tab, PNGS)
    expect(tab.locator("#progress-text")).to_have_text("1 of 7 answered; 1 failed: no answer from the server")
    expect(tab.locator("#rows")).to_contain_text("Not answered: no answer from the server")
    serving.start()
    tab.get_by_role("button", name="Send the remaining 6").click()
    wait_for_answers(tab, 7)
    expect(tab.locator("#rows tr.done")).to_have_count(7)


def test_the_answer_of_a_proxy_is_none_and_what_is_left_can_be_sent_later(open_page):
    tab = open_page()
    tab.route("**/v1/predict", lambda route: route.fulfill(content_type="text/html", body="<p>Log in"))
    choose(tab, PNGS)
    expect(tab.locator("#progress-text")).to_contain_text("failed: no answer from the server")
    tab.unroute("**/v1/predict")
    tab.get_by_role("button", name="Send the remaining 6").click()
    wait_for_answers(tab, 6)
    expect(tab.locator("#rows tr.done")).to_have_count(6)


def test_the_queue_waits_for_a_busy_server_and_can_be_stopped_and_cleared(open_page, serving):
    tab, in_flight, limits = open_page(), serving.service.in_flight, serving.service.limits
    in_flight.bytes += limits.bytes_in_flight
    names = [f"{index}.png" for index in range(130)]
    choose(tab, dict.fromkeys(names, b"no image") | {"99.png": PNGS["70.png"], "100.png": PNGS["75.png"]})
    expect(tab.locator("#progress-text")).to_have_text("0 of 130 answered; the server is busy, waiting")
    tab.get_by_role("button", name="Stop").click()
    expect(tab.locator("#progress-text")).to_have_text("0 of 130 answered; stopped")
    in_flight.bytes -= limits.bytes_in_flight
    tab.get_by_role("button", name="Send the remaining 130").click()
    wait_for_answers(tab, 130)
    expect(tab.locator("#rows tr")).to_have_count(100)
    tab.get_by_role("button", name="99.png").click()
    tab.get_by_role("button", name="Next").click()
    expect(tab.get_by_role("dialog", name="100.png")).to_be_visible()  # a row beyond those of the table
    tab.get_by_role("button", name="Close").click()
    expect(tab.locator("#results-heading")).to_be_focused()
    tab.get_by_role("button", name="Show 30 more of 130").click()
    expect(tab.locator("#rows .name")).to_have_text(names)
    expect(tab.locator("#announcement")).to_contain_text("130 of 130 answered")
    tab.get_by_role("button", name="Clear").click()
    expect(tab.locator("#results")).to_be_hidden()
    expect(tab.locator("#announcement")).to_be_empty()


def test_stop_also_ends_the_reading_of_a_zip(open_page, tmp_path):
    archive = write_zip(tmp_path / "slow.zip", dict.fromkeys(map(str, range(1000)), b"no image"))
    tab = open_page()
    tab.evaluate("""() => {
        const read = Blob.prototype.arrayBuffer;
        Blob.prototype.arrayBuffer = async function () {  // as of a slow disk
            await new Promise((resolve) => setTimeout(resolve, 50));
            return read.call(this);
        };
    }""")
    choose(tab, [archive])
    expect(tab.locator("#progress-text")).to_have_text("0 of 0 answered; reading files …")
    tab.get_by_role("button", name="Stop").click()
    expect(tab.locator("#progress-text")).to_have_text("0 of 0 answered")
    expect(tab.locator("#notice")).to_have_text(
        "The reading was stopped: files that had not been read are not in the table."
    )
    assert int(re.search(r"(\d+) skipped", tab.locator("#counts").inner_text() + "0 skipped")[1]) < 500


def test_no_dot_of_a_member_covers_another_at_any_prevalence(open_page):
    tab = open_page()
    distances = np.array([-9, -1, -0.5, *[0.01] * 10, 0.3, 2, 2.1])  # to the threshold, in log odds
    for threshold in (0.025, 0.263, 0.7):
        log_odds = np.log(threshold / (1 - threshold)) + distances
        members = {f"seed-{index}": float(value) for index, value in enumerate(1 / (1 + np.exp(-log_odds)))}
        prediction = {"members": members, "threshold": threshold}
        circles = tab.evaluate(
            """async (prediction) => {
                const strip = (await import("/static/results.js")).createStrip(prediction, 200, 3);
                const {y, height} = strip.viewBox.baseVal;
                return [...strip.querySelectorAll("circle")].map(({cx, cy, r, classList}) =>
                    [cx.baseVal.value, cy.baseVal.value - y, height, r.baseVal.value, classList.contains("positive")]);
            }""",
            prediction,
        )
        x, y, height, radius, is_positive = np.array(circles).T
        assert is_positive.tolist() == (distances > 0).tolist()
        assert ((x > 100) == is_positive).all()
        for places, end in ((x, 200), (y, height)):
            assert (places >= radius).all()
            assert (places <= end - radius).all()
        gaps = np.hypot(x[:, None] - x, y[:, None] - y)[~np.eye(len(x), dtype=bool)]
        assert gaps.min() >= 2 * radius.max()
        assert np.ptp(x) > 100


def test_rows_are_sorted_and_shown_by_certainty_label_and_agreement(open_page, radiographs):
    tab = open_page(accept_downloads=True)
    tab.set_input_files("#folder", str(radiographs / "a"))
    wait_for_answers(tab, 4)
    table = pd.read_csv(io.StringIO(download_csv(tab))).set_index("file")
    assert list(table.index) == [f"a/{path.name}" for path in sorted((radiographs / "a").glob("*.jpg"))]
    log_odds = np.log(table["probability"] / (1 - table["probability"]))
    threshold = float(table["threshold"].iloc[0])
    distance = (log_odds - np.log(threshold / (1 - threshold))).abs()
    orders = {"uncertain": distance, "highest": -table["probability"], "lowest": table["probability"]}
    for order, keys in orders.items():
        tab.get_by_label("Sort by").select_option(order)
        expect(tab.locator("#rows .name")).to_have_text(list(keys.sort_values(kind="stable").index))
    shown = {
        "positive": table["label"] == 1,
        "negative": table["label"] == 0,
        "disagreement": table["agreement"] < 1,
        "unusable": table["reason"].notna(),
    }
    tab.get_by_label("Sort by").select_option("added")
    for kind, selected in shown.items():
        tab.get_by_label("Show").select_option(kind)
        expect(tab.locator("#rows .name")).to_have_text(list(table.index[selected]))


def test_bayes_rule_in_the_browser_is_that_of_the_pipeline(open_page):
    tab = open_page()
    probabilities = [0.0, 1e-9, 0.1, 0.5, 0.873, 1 - 1e-9, 1.0]
    cases = [
        [probability, prior, new] for probability in probabilities for prior in (0.125, 0.5) for new in (0.001, 0.9)
    ]
    script = "cases => import('/static/probability.js').then(one => cases.map(case_ => one.changePrevalence(...case_)))"
    expected = [change_prevalence(np.array([probability]), prior, new)[0] for probability, prior, new in cases]
    assert tab.evaluate(script, cases) == pytest.approx(expected, rel=1e-14)


def test_a_model_that_is_not_calibrated_has_no_other_prevalence(open_page, serving):
    served = serving.follower.current
    loaded = served.candidate
    uncalibrated = type(loaded)(loaded.members, replace(loaded.config, prevalence=None), loaded.finding)
    serving.follower.current = replace(served, candidate=uncalibrated)
    tab = open_page(accept_downloads=True)
    expect(tab.locator("#prevalence-number")).to_be_disabled()
    expect(tab.locator("#prevalence-slider")).to_be_disabled()
    expect(tab.locator("#not-calibrated")).to_be_visible()
    expect(tab.locator("#prevalence-text")).to_be_hidden()
    choose(tab, {"70.png": PNGS["70.png"]})
    wait_for_answers(tab, 1)
    assert download_csv(tab).splitlines()[1].endswith(",")
    serving.follower.current = served


def test_a_new_version_is_told_and_rows_keep_that_which_answered_at_the_prevalence_of_the_new_one(open_page, serving):
    served, tab = serving.follower.current, open_page(accept_downloads=True)
    loaded = served.candidate
    expect(tab.locator("#model-name")).to_have_text("bag, from models/")
    choose(tab, {"70.png": PNGS["70.png"]})
    wait_for_answers(tab, 1)
    before = pd.read_csv(io.StringIO(download_csv(tab))).iloc[0]
    other = type(loaded)(loaded.members, replace(loaded.config, prevalence=0.4), loaded.finding)
    serving.follower.current = replace(served, model="demo", version="12", candidate=other)
    choose(tab, {"75.png": PNGS["75.png"]})
    wait_for_answers(tab, 2)
    expect(tab.locator("#notice")).to_contain_text("Version 12 of the model answers now; before, it was version bag")
    expect(tab.locator("#model-name")).to_have_text("demo, version 12")
    expect(row(tab, "70.png")).to_contain_text("bag, from models/")
    expect(row(tab, "75.png")).not_to_contain_text("version")
    expect(tab.locator("#prevalence-number")).to_have_value("40")
    table = pd.read_csv(io.StringIO(download_csv(tab)))
    assert list(table["version"]) == ["bag", "12"]
    assert list(table["prevalence"]) == [0.4, 0.4]
    changed = change_prevalence(np.array([before["probability"]]), before["prevalence"], 0.4)[0]
    assert table["probability"][0] == pytest.approx(changed, rel=1e-6)
    expect(row(tab, "70.png")).to_contain_text(f"{100 * changed:.1f} %")
    serving.follower.current = served


def test_the_page_takes_the_same_names_for_no_images_as_the_command():
    script = (app.PAGE / "files.js").read_text(encoding="utf-8")
    patterns = dict(re.findall(r"export const (\w+) =\s+/(.*)/;", script))
    assert patterns == {"DESCRIPTION": f"^{DESCRIPTION.pattern}$", "IMAGE_ENDING": IMAGE_ENDING.pattern}
