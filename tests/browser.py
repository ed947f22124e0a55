"""Opens MLflow's UI and the report in headless Chromium and takes pictures of them.

python tests/browser.py http://127.0.0.1:5000 docs    # of the demo, while `make ui` runs
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
# A new visitor is greeted by an assistant.
SEEN = """localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');"""


def look(uri: str, folder: Path, chromium: str = "/usr/bin/chromium") -> dict[str, str]:
    """Save a picture per page to the folder, and return the pages' texts."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(NAME).experiment_id
    found = client.search_runs([experiment], order_by=["tags.`mlflow.runName`"])
    seeds = json.dumps([run.info.run_id for run in found if run.info.run_name.startswith("seed-")])
    (parent,) = [run for run in found if "bag/f1" in run.data.metrics]
    of_seeds = f"runs={quote(seeds)}&experiments={quote(json.dumps([experiment]))}"
    pages = {
        "runs": f"experiments/{experiment}/runs",
        "f1-by-epoch": f"metric?{of_seeds}&metric={quote(json.dumps('validation/f1'))}&plot_metric_keys="
        f"{quote(json.dumps(['validation/f1']))}&x_axis=step",
        "compare": f"compare-runs?{of_seeds}",
        "model": f"models/{NAME}",
    }
    texts = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1500, "height": 850})
        page.add_init_script(SEEN)
        for name, path in pages.items():
            page.set_viewport_size({"width": 1500, "height": 2250 if name == "model" else 850})  # its card is long
            page.goto(f"{uri}/#/{path}")
            expand = page.locator(".ag-row button").first
            if name == "runs":
                expand.wait_for()
                expand.click()
            texts[name] = settled(page)
            page.screenshot(path=folder / f"mlflow-{name}.png")
        browser.close()
    assert parent.info.run_name in texts["runs"]
    return texts


def look_at_report(page: Path, folder: Path, chromium: str = "/usr/bin/chromium") -> None:
    """Save the first screens of the report, as on a desk and on a phone."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        for name, width, height in [("report", 1300, 1330), ("report-phone", 390, 844)]:
            shown = browser.new_page(viewport={"width": width, "height": height})
            shown.goto(page.resolve().as_uri())
            shown.screenshot(path=folder / f"{name}.png")
        browser.close()


def settled(page: Page) -> str:
    """Return the page's text when it does not change any more."""
    text = ""
    while text != (now := page.locator("body").inner_text()) or len(now) < 200:
        text = now
        page.wait_for_timeout(1500)
    return text


if __name__ == "__main__":
    if sys.argv[1].startswith("http"):
        look(sys.argv[1], Path(sys.argv[2]))
    else:
        look_at_report(Path(sys.argv[1]), Path(sys.argv[2]))
