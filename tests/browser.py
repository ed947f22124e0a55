"""Open the MLflow UI and the report in headless Chromium and take screenshots.

python tests/browser.py http://127.0.0.1:5000 docs    # for the demo, while `make ui` runs
python tests/browser.py report/index.html docs
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


def capture_mlflow(uri: str, folder: Path, chromium: str = "/usr/bin/chromium") -> dict[str, str]:
    """Save a screenshot of each page to the folder, and return the texts of the pages."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(NAME).experiment_id
    runs = client.search_runs([experiment], order_by=["tags.`mlflow.runName`"])
    seeds = json.dumps([run.info.run_id for run in runs if run.info.run_name.startswith("seed-")])
    (parent,) = [run for run in runs if "bag/f1" in run.data.metrics]
    query = f"runs={quote(seeds)}&experiments={quote(json.dumps([experiment]))}"
    pages = {
        "runs": f"experiments/{experiment}/runs",
        "f1-by-epoch": f"metric?{query}&metric={quote(json.dumps('validation/f1'))}&plot_metric_keys="
        f"{quote(json.dumps(['validation/f1']))}&x_axis=step",
        "compare": f"compare-runs?{query}",
        "model": f"models/{NAME}",
    }
    texts = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1500, "height": 850})
        page.add_init_script(HIDE_ASSISTANT)
        for name, path in pages.items():
            page.set_viewport_size(
                {"width": 1500, "height": 2250 if name == "model" else 850}
            )  # its model card is long
            page.goto(f"{uri}/#/{path}")
            expand = page.locator(".ag-row button").first
            if name == "runs":
                expand.wait_for()
                expand.click()
            texts[name] = wait_for_text(page)
            page.screenshot(path=folder / f"mlflow-{name}.png")
        browser.close()
    assert parent.info.run_name in texts["runs"]
    return texts


def capture_report(report: Path, folder: Path, chromium: str = "/usr/bin/chromium") -> None:
    """Save screenshots of the top of the report, at the widths of a desktop and a phone."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        for name, width, height in [("report", 1300, 1330), ("report-phone", 390, 844)]:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(report.resolve().as_uri())
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
        capture_mlflow(sys.argv[1], Path(sys.argv[2]))
    else:
        capture_report(Path(sys.argv[1]), Path(sys.argv[2]))
