"""Open the MLflow UI, the report and the page of `cxr serve` in headless Chromium and take screenshots.

python tests/browser.py docs LINK LINK    # of the demo, as `cxr ui` prints them
python tests/browser.py report/index.html docs
python tests/browser.py http://127.0.0.1:8000 RADIOGRAPHS docs    # a folder of radiographs
"""

import json
import sys
from pathlib import Path
from urllib.parse import quote

from mlflow import MlflowClient
from playwright.sync_api import Page, sync_playwright

NAME = "covid-xray-demo"
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
# MLflow opens an assistant for new visitors.
HIDE_ASSISTANT = """localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');"""


def capture_mlflow(uri: str, links: list[str], folder: Path, chromium: str = "/usr/bin/chromium") -> dict[str, str]:
    """Save a screenshot of each page to the folder, and return the texts of the pages.

    Args:
        uri: of the server.
        links: to the saved view as a table and as charts, as `cxr ui` prints them.
        folder: for the screenshots.
        chromium: the browser.

    Returns:
        The texts by page; that of `table` is JSON, the rows of the table from top to bottom, each by column.
    """
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(NAME).experiment_id
    champion = client.get_model_version_by_alias(NAME, "champion")
    runs = client.search_runs([experiment], order_by=["metrics.f1 DESC"])
    run_ids = quote(json.dumps([run.info.run_id for run in runs]))
    training = "workflowType=machine_learning"  # MLflow's pages of training, not those of generative models
    compared = f"runs={run_ids}&experiments={quote(json.dumps([experiment]))}"
    pages = {
        "runs": (links[0], 1500, 780),
        "charts": (links[1], 1500, 1450),
        "compare": (f"{uri}/#/compare-runs?{compared}&{training}", 1500, 850),
        "models": (f"{uri}/#/experiments/{experiment}/models?{training}", 1900, 700),
        "version": (f"{uri}/#/models/{NAME}/versions/{champion.version}?{training}", 1500, 1150),
    }
    texts = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1500, "height": 850})
        page.add_init_script(HIDE_ASSISTANT)
        for name, (url, width, height) in pages.items():
            page.set_viewport_size({"width": width, "height": height})
            page.goto(url)
            texts[name] = wait_for_text(page)
            page.screenshot(path=folder / f"mlflow-{name}.png")
            if name == "runs":
                texts["table"] = json.dumps(read_table(page))
            if name == "charts":
                texts["bars"] = str(page.locator(".bars .point").count())
        browser.close()
    return texts


def read_table(page: Page) -> list[dict[str, str]]:
    """Return the rows of the table of runs; a row is in several parts of the page, one for each group of columns."""
    parts = page.eval_on_selector_all(
        ".ag-row",
        """rows => rows.map(row => [Number(row.getAttribute("row-index")), Object.fromEntries(
        [...row.querySelectorAll(".ag-cell")].map(cell => [cell.getAttribute("col-id"), cell.innerText]))])""",
    )
    rows: dict[int, dict[str, str]] = {}
    for index, cells in parts:
        rows.setdefault(index, {}).update(cells)
    return [rows[index] for index in sorted(rows)]


def capture_report(report: Path, folder: Path, chromium: str = "/usr/bin/chromium") -> None:
    """Save screenshots of the top of the report, at the widths of a desktop and a phone."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        for name, width, height in [("report", 1300, 1330), ("report-phone", 390, 844)]:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(report.resolve().as_uri())
            page.screenshot(path=folder / f"{name}.png")
        browser.close()


def capture_serving(url: str, radiographs: Path, folder: Path, chromium: str = "/usr/bin/chromium") -> None:
    """Save screenshots of the page of `cxr serve`: of results, on a phone too, and of a heatmap in dark colors."""
    views = [("serve", 1300, 1250, "light"), ("serve-phone", 390, 844, "light"), ("serve-dark", 1300, 960, "dark")]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        for name, width, height, scheme in views:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(url)
            page.wait_for_selector("#card-details", state="attached")
            page.set_input_files("#folder", radiographs)
            page.wait_for_selector("#stop", state="visible")
            page.wait_for_selector("#stop", state="hidden")
            page.get_by_label("Sort by").select_option("uncertain")
            wait_for_text(page)
            if name == "serve-phone":
                page.evaluate("document.querySelector('#results').scrollIntoView()")
            if name == "serve-dark":
                page.locator("#rows tr:has(.label.positive) button").first.click()
                page.wait_for_selector("#heatmap")
                wait_for_text(page)
            page.screenshot(path=folder / f"{name}.png")
        browser.close()


def wait_for_text(page: Page) -> str:
    """Return the text of the page when it no longer changes."""
    text = ""
    while text != (current := page.locator("body").inner_text()) or len(current) < 200:
        text = current
        page.wait_for_timeout(1500)
    return text


if __name__ == "__main__":
    if sys.argv[1].startswith("http"):
        capture_serving(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[2].startswith("http"):
        capture_mlflow(sys.argv[2].partition("/#")[0], sys.argv[2:], Path(sys.argv[1]))
    else:
        capture_report(Path(sys.argv[1]), Path(sys.argv[2]))
