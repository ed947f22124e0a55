"""dvc.yaml against the code: each stage depends on every module that it can reach, and on no other."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from stages import cli

BESIDE = (".css", ".html", ".md", ".py")  # files that are read, or run, by their path
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Walk everything that may run, also inside functions; blocks for type checkers never do."""
    yield node
    for child in ast.iter_child_nodes(node):
        for part in child.orelse if is_type_checking(child) else [child]:
            yield from run_time_nodes(part)


def files_of(module: str) -> set[str]:
    """Return the files of this project that importing the module runs; empty packages are nothing to depend on."""
    parts = module.split(".")
    packages = ["/".join([*parts[:end], "__init__.py"]) for end in range(1, len(parts) + 1)]
    own = "/".join(parts) + ".py"
    return {name for name in [*packages, own] if (ROOT / name).is_file() and (ROOT / name).read_text().strip()}


@cache
def reached_at_once(file: str) -> frozenset[str]:
    found: set[str] = set()
    if not file.endswith(".py"):
        return frozenset()
    for node in run_time_nodes(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                found |= files_of(name.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import, which this test does not follow"
            for name in node.names:
                found |= files_of(node.module) | files_of(f"{node.module}.{name.name}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(BESIDE):
            beside = (ROOT / file).parent / node.value
            if beside.is_file():
                found.add(str(beside.relative_to(ROOT)))
    return frozenset(found)


def reached(stage: str) -> set[str]:
    closure, todo = set(), {f"stages/{stage}.py"}
    while todo:
        file = todo.pop()
        closure.add(file)
        todo |= reached_at_once(file) - closure
    return closure


def code(stage: str) -> list[str]:
    return [dep for dep in STAGES[stage]["deps"] if dep.split("/")[0] in ("pipeline", "stages")]


def covers(dep: str, file: str) -> bool:
    return Path(file).is_relative_to(dep)


def products(stage: str) -> list[str]:
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in STAGES[stage].get(kind, [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def test_the_closure_follows_functions_packages_and_files_run_by_path_but_no_blocks_for_type_checkers():
    assert "pipeline/data/sources/__init__.py" in reached("download")  # a package that is not empty
    assert "pipeline/data/sources/phantom.py" in reached("download")  # imported inside a function
    assert "pipeline/inference/pyfunc_model.py" in reached("promote")  # run by its path
    assert "pipeline/data/images.py" in reached("promote")  # imported by a file run by its path
    assert "pipeline/models/__init__.py" not in reached("train")  # empty


def test_blocks_for_type_checkers_are_not_followed():
    text = "if TYPE_CHECKING:\n    import a\nelse:\n    import b\ndef f():\n    import c\n"
    names = {node.names[0].name for node in run_time_nodes(ast.parse(text)) if isinstance(node, ast.Import)}
    assert names == {"b", "c"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_that_a_stage_can_reach_is_among_its_dependencies(stage):
    assert [file for file in sorted(reached(stage)) if not any(covers(dep, file) for dep in code(stage))] == []


@pytest.mark.parametrize("stage", STAGES)
def test_every_dependency_on_code_is_reached(stage):
    assert [dep for dep in code(stage) if not any(covers(dep, file) for file in reached(stage))] == []


@pytest.mark.parametrize("stage", STAGES)
def test_every_dependency_on_code_exists(stage):
    assert [dep for dep in code(stage) if not (ROOT / dep).exists()] == []
    assert len(set(code(stage))) == len(code(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_every_dependency_on_data_is_the_product_of_another_stage(stage):
    made = [path for other in STAGES if other != stage for path in products(other)]
    data = [dep for dep in STAGES[stage]["deps"] if dep not in code(stage)]
    assert [dep for dep in data if not any(covers(dep, path) or covers(path, dep) for path in made)] == []


@pytest.mark.parametrize("stage", STAGES)
def test_every_section_of_the_profile_that_a_stage_names_is_among_its_parameters(stage):
    by_hand = ("pipeline/kaggle/submit.py", "pipeline/tracking/") if stage == "submit" else ()  # for --send alone
    others = ("pipeline/core/config.py", *by_hand)
    text = "".join((ROOT / file).read_text() for file in sorted(reached(stage)) if not file.startswith(others))
    named = [f"${{profile}}.{section}." for section in re.findall(r"(?:active|profile)\.(\w+)", text)]
    params = STAGES[stage]["params"]
    assert [name for name in named if not any(f"{param}.".startswith(name) for param in params)] == []
    if "matrix" not in STAGES[stage] and re.search(r"config\.(seeds|members|models|bagged)\b", text):
        assert "seeds" in params
    assert "profile" in params


def test_no_two_stages_make_the_same_path():
    made = [path for stage in STAGES for path in products(stage)]
    assert made
    assert sorted(made) == sorted(set(made))


def test_every_stage_has_a_module_of_its_name_and_is_a_command():
    assert list(STAGES) == cli.STAGES
    for stage, content in STAGES.items():
        assert (ROOT / "stages" / f"{stage}.py").is_file()
        assert content["cmd"].startswith(f"python -m stages.{stage}")
        assert cli.Stages().get_command(None, stage).name == stage


def test_every_command_is_a_stage_of_the_pipeline_or_typed_by_hand():
    assert cli.cxr.list_commands(None) == [*STAGES, *cli.COMMANDS]
    modules = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__", "cli", "common", "ray_backend"}
    assert modules == {name.replace("-", "_") for name in cli.cxr.list_commands(None)}


@pytest.mark.parametrize("section", ["demo", "competition", "local"])
def test_every_parameter_that_a_stage_names_exists_in_every_profile(section):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage in STAGES.values():
        for path in stage["params"]:
            value = params
            for part in path.replace("${profile}", section).split("."):
                value = value[part]
