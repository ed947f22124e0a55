"""dvc.yaml against the code: a stage depends on every module that can change a number in its outs, and on no other."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from stages import cli

READ_BY_PATH = (".css", ".html", ".md", ".py")  # files that are read, or run, by their path
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

# The rule: a stage depends on every module that its code reaches, except on these, which cannot change a number in its
# outs. A change of any of them causes no stage to run.
ANY_STAGE = {
    "pipeline/core/config.py": "reads params.yaml, which DVC compares itself; defaults never change (test_config)",
    "pipeline/core/errors.py": "texts of errors",
    "pipeline/core/files.py": "reads and writes files; the format of numbers is pinned (test_files)",
    "pipeline/core/memory.py": "how the C library keeps freed memory",
    "pipeline/core/parallel.py": "returns results in the order of their inputs",
    "pipeline/core/progress.py": "progress bars",
    "pipeline/core/threads.py": "how threads wait; the results are the same (test_threads)",
    "pipeline/tracking/fingerprint.py": "names runs, which no metric depends on",
    "pipeline/tracking/outbox.py": "retries calls to MLflow",
    "pipeline/tracking/store.py": "opens MLflow's store",
    "pipeline/tracking/tracking_uri.py": "finds MLflow's store",
    "stages/": "parse options, and call the library with the paths and parameters that dvc.yaml lists",
}
ONE_STAGE = {
    "download": {"pipeline/": "what arrives is the source's; what is drawn or converted here is pinned by tests, and "
                 "for drawings `download.version` says which drawing it is (test_phantom, test_sources)"},
    "weights": {
        "pipeline/models/pooling.py": "has no weights",
        "pipeline/models/weights_source.py": "what arrives is the source's; its sha256 is in data/weights/origin.json",
    },
    "prepare": {
        "pipeline/data/remote.py": "finds the files that raw.zip refers to; their size and CRC-32 are compared",
        "pipeline/data/source_folder.py": "finds the files that raw.zip refers to; their size and CRC-32 are compared",
    },
    "split": {
        "pipeline/models/weights_source.py": "finds the file of a package, whose version is pinned",
    },
    "train": {
        "pipeline/tracking/runs.py": "logs to MLflow what the outs hold",
        "pipeline/training/progress.py": "shows how far it is, and tells `cxr train-all`",
        "pipeline/training/checkpoint.py": "a resumed training ends in the same bytes (test_interruptions)",
        "pipeline/training/signals.py": "a resumed training ends in the same bytes (test_interruptions)",
    },
    "promote": {
        "pipeline/data/remote.py": "finds the files that raw.zip refers to, which promote does not read",
        "pipeline/data/source_folder.py": "finds the files that raw.zip refers to, which promote does not read",
        "pipeline/inference/pyfunc_model.py": "is logged with a model, to be run when it is served",
    },
    "submit": {
        "pipeline/data/manifest.py": "only for --send, which writes no out",
        "pipeline/evaluation/operating_point.py": "thresholds are chosen before, by evaluate and bag",
        "pipeline/kaggle/client.py": "only for --send, which writes no out",
        "pipeline/kaggle/submit.py": "only for --send, which writes no out",
        "pipeline/tracking/": "only for --send, which writes no out",
    },
}  # fmt: skip


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
    module_file = "/".join(parts) + ".py"
    return {name for name in [*packages, module_file] if (ROOT / name).is_file() and (ROOT / name).read_text().strip()}


@cache
def reached_at_once(file: str) -> frozenset[str]:
    files: set[str] = set()
    if not file.endswith(".py"):
        return frozenset()
    for node in run_time_nodes(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                files |= files_of(name.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import, which this test does not follow"
            for name in node.names:
                files |= files_of(node.module) | files_of(f"{node.module}.{name.name}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(READ_BY_PATH):
            folder = ROOT / "pipeline" if node.value.endswith(".py") else (ROOT / file).parent
            files |= {str(path.relative_to(ROOT)) for path in folder.rglob(node.value)}
    return frozenset(files)


def reached(stage: str) -> set[str]:
    closure, todo = set(), {f"stages/{stage}.py"}
    while todo:
        file = todo.pop()
        closure.add(file)
        todo |= reached_at_once(file) - closure
    return closure


def code(stage: str) -> list[str]:
    return [dep for dep in STAGES[stage].get("deps", []) if dep.split("/")[0] in ("pipeline", "stages")]


def covers(dep: str, file: str) -> bool:
    return Path(file).is_relative_to(dep)


def outputs_of(stage: str) -> list[str]:
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in STAGES[stage].get(kind, [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def test_the_closure_follows_functions_packages_and_files_run_by_path_but_no_blocks_for_type_checkers():
    assert "pipeline/data/sources/__init__.py" in reached("download")  # a package that is not empty
    assert "pipeline/training/loop.py" in reached("train")  # imported inside a function
    assert "pipeline/inference/pyfunc_model.py" in reached("promote")  # run by its path
    assert "pipeline/data/images.py" in reached("promote")  # imported by a file run by its path
    assert "pipeline/models/__init__.py" not in reached("train")  # empty


def test_blocks_for_type_checkers_are_not_followed():
    text = "if TYPE_CHECKING:\n    import a\nelse:\n    import b\ndef f():\n    import c\n"
    names = {node.names[0].name for node in run_time_nodes(ast.parse(text)) if isinstance(node, ast.Import)}
    assert names == {"b", "c"}


def without_influence(stage: str) -> dict[str, str]:
    return ANY_STAGE | ONE_STAGE.get(stage, {})


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_that_a_stage_reaches_is_a_dependency_or_cannot_change_a_number(stage):
    for file in sorted(reached(stage)):
        listed = [name for name in without_influence(stage) if file.startswith(name)]
        assert (file in code(stage)) != bool(listed), f"{file}: name it either in dvc.yaml or in the list with a reason"


@pytest.mark.parametrize("stage", STAGES)
def test_every_dependency_on_code_is_reached(stage):
    assert [dep for dep in code(stage) if dep not in reached(stage)] == []


def test_the_list_has_no_entry_that_no_stage_needs():
    for name, reason in ANY_STAGE.items():
        assert reason
        assert any(file.startswith(name) for stage in STAGES for file in reached(stage)), name
    for stage, entries in ONE_STAGE.items():
        for name, reason in entries.items():
            assert reason
            assert name not in ANY_STAGE
            assert any(file.startswith(name) for file in reached(stage)), f"{stage}: {name}"


@pytest.mark.parametrize("stage", STAGES)
def test_every_dependency_on_code_exists(stage):
    assert [dep for dep in code(stage) if not (ROOT / dep).exists()] == []
    assert len(set(code(stage))) == len(code(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_every_dependency_on_data_is_the_product_of_another_stage(stage):
    outputs = [path for other in STAGES if other != stage for path in outputs_of(other)]
    typed_by_hand = ["scores"]  # of `cxr score` and `cxr external-validation`
    data = [dep for dep in STAGES[stage].get("deps", []) if dep not in [*code(stage), *typed_by_hand]]
    assert [dep for dep in data if not any(covers(dep, path) or covers(path, dep) for path in outputs)] == []


@pytest.mark.parametrize("stage", STAGES)
def test_every_section_of_the_profile_that_a_stage_names_is_among_its_parameters(stage):
    send_only = ("pipeline/kaggle/submit.py", "pipeline/tracking/") if stage == "submit" else ()  # for --send alone
    excluded = ("pipeline/core/config.py", *send_only)
    text = "".join((ROOT / file).read_text() for file in sorted(reached(stage)) if not file.startswith(excluded))
    named = [f"${{profile}}.{section}." for section in re.findall(r"(?:active|profile)\.(\w+)", text)]
    params = STAGES[stage]["params"]
    assert [name for name in named if not any(f"{param}.".startswith(name) for param in params)] == []
    if "matrix" not in STAGES[stage] and re.search(r"config\.(seeds|members|models|bagged)\b", text):
        assert "seeds" in params
    assert "profile" in params


def test_no_two_stages_make_the_same_path():
    outputs = [path for stage in STAGES for path in outputs_of(stage)]
    assert outputs
    assert sorted(outputs) == sorted(set(outputs))


def test_every_stage_has_a_module_of_its_name_and_is_a_command():
    assert list(STAGES) == cli.STAGES
    for stage, content in STAGES.items():
        assert (ROOT / "stages" / f"{stage}.py").is_file()
        assert content["cmd"].startswith(f"python -m stages.{stage}")
        assert cli.LazyGroup().get_command(None, stage).name == stage


def test_every_command_is_a_stage_of_the_pipeline_or_typed_by_hand():
    assert cli.cxr.list_commands(None) == [*STAGES, *cli.COMMANDS]
    shared = {"__init__", "cli", "common", "fork_server", "ray_backend", "ray_predict", "tuner"}
    modules = {path.stem for path in (ROOT / "stages").glob("*.py")} - shared
    assert modules == {name.replace("-", "_") for name in cli.cxr.list_commands(None)}


@pytest.mark.parametrize("section", ["demo", "competition", "competition-strong", "local"])
def test_every_parameter_that_a_stage_names_exists_in_every_profile(section):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage in STAGES.values():
        for path in stage["params"]:
            value = params
            for part in path.replace("${profile}", section).split("."):
                value = value[part]
