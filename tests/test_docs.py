"""The documentation: its links, navigation and names, and the site that MkDocs builds from it."""

import ast
import configparser
import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from pipeline.core import config
from stages import cli

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
MARKDOWN = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *PAGES]
BUILD = ["mkdocs", "build", "--strict"]


def text_of(path: Path) -> str:
    """Return the text without blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors_of(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def nav_files(entry: list | dict | str) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    entries = entry.values() if isinstance(entry, dict) else entry
    return [file for child in entries for file in nav_files(child)]


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_to_a_file_or_heading_resolves(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors_of(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_list_has_become_a_paragraph(page):
    assert re.findall(r"^.*(?:\w {3,}\w|\. [2-9]\. \*\*).*$", text_of(page), re.MULTILINE) == []


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_project_file_named_on_a_page_exists(page):
    if page.name == "CHANGELOG.md":
        return  # it also names files of earlier releases
    names = re.findall(r"`((?:pipeline|stages|tests|bench|docs|\.ci)/[\w./-]+)`", text_of(page))
    names += [f"tests/{name}" for name in re.findall(r"`((?:test_)?\w+\.py)`", text_of(page))]
    assert [name for name in names if "NAME" not in name and not (ROOT / name).exists()] == []


def test_the_navigation_lists_every_page_once():
    nav = nav_files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_the_api_reference_has_a_page_for_every_package():
    packages = {path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert packages == {path.stem for path in (DOCS / "reference/api").glob("*.md")} - {"index"}


def test_the_parameters_page_names_every_key_that_dvc_requires():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    keys = {key.removeprefix("${profile}.") for stage in stages for key in stage.get("params", [])}
    text = (DOCS / "reference/parameters.md").read_text()
    assert [key for key in keys - set(config.Profile.model_fields) if f"`{key}`" not in text] == []


def test_the_changelog_names_every_renamed_parameter():
    rows = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("|")]
    for old, new in config.RENAMED.items():
        assert any(re.search(rf"\b{old}`.*\b{new}`", row) for row in rows), f"{old} -> {new}"


def test_the_citation_has_the_version_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (setup["metadata"]["version"], setup["metadata"]["license"])


def test_the_package_requires_every_library_that_its_code_imports():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = f"{setup['options']['install_requires']}\n" + "\n".join(setup["options.extras_require"].values())
    required = {re.split(r"[\[\s]", line)[0].lower() for line in required.split("\n")}
    nodes = [
        node
        for package in ("pipeline", "stages")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
    ]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"pipeline", "stages"}
    providers = packages_distributions()
    assert [
        name
        for name in names & providers.keys()
        if not required & {provider.lower().replace("_", "-") for provider in providers[name]}
    ] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if not importlib.util.find_spec("mkdocs"):
        pytest.skip("MkDocs is not installed")
    assert " ".join(BUILD) in (ROOT / "Makefile").read_text()
    target = tmp_path_factory.mktemp("docs") / "site"
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [*BUILD, "--site-dir", str(target)]
    completed = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return target


def test_the_site_builds_without_a_warning_and_needs_no_other_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        urls = re.findall(r"<(?:script|img|link)[^>]*?(?:src|href)=\"(https?://[^\"]*)", page.read_text())
        assert urls == [], page


def test_the_reference_of_parameters_has_every_key_and_default(site):
    page = (site / "reference/parameters.html").read_text()
    sections = [*config.SOURCES.values(), *(field.annotation for field in config.Profile.model_fields.values())]
    for section in sections:
        for key in getattr(section, "model_fields", {}):
            assert re.search(rf"<code>{key}[.<]", page), key
    assert "{{" not in page


def test_the_reference_of_the_command_line_has_every_command(site):
    page = (site / "reference/cli.html").read_text()
    assert [name for name in (*cli.STAGES, *cli.COMMANDS) if f"cxr-{name}" not in page] == []


def test_the_api_reference_has_every_module(site):
    text = "".join(path.read_text() for path in (site / "reference/api").glob("*.html"))
    modules = [path for path in (ROOT / "pipeline").rglob("*.py") if path.name != "__init__.py"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules]
    assert [name for name in names if f'id="{name}"' not in text] == []
