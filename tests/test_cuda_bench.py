"""`make cuda`, as far as a machine without a GPU can tell."""

import json
import re
import sys
import zipfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT, run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.core.config import TrainParams, load_config

pytestmark = pytest.mark.slow

PRESENT = ["torch", "torchvision", "timm", "scikit-learn", "pandas", "safetensors", "rich"]  # as the README says
HIDE_AND_RUN = """
import runpy, sys
hidden, *sys.argv = sys.argv[1:]
class Hide:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *arguments):
        return None if name.partition(".")[0] in hidden.split() else self.finder.find_spec(name, *arguments)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Hide, sys.meta_path)
sys.path.insert(0, "bench")
runpy.run_path(sys.argv[0], run_name="__main__")
assert not {"mlflow", "dvc"} & {name.partition(".")[0] for name in sys.modules}
"""


def wheels() -> list[str]:
    (names,) = re.findall(r"^WHEELS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return names.split()


def with_requirements(*names: str) -> set[str]:
    """Return the canonical names of the packages and of all that they require."""
    found, left = set[str](), [canonicalize_name(name) for name in names]
    while left:
        if (name := left.pop()) not in found:
            found.add(name)
            requirements = map(Requirement, distribution(name).requires or [])
            left += [canonicalize_name(one.name) for one in requirements if not one.marker or one.marker.evaluate()]
    return found


def test_every_section_runs_with_torch_and_the_wheels_only(tmp_path):
    present = with_requirements(*PRESENT, *wheels()) | {"covid-xray"}
    hidden = [
        module
        for module, owners in packages_distributions().items()
        if not present & {canonicalize_name(owner) for owner in owners}
    ]
    assert {"mlflow", "dvc", "psutil"} <= set(hidden)
    (tmp_path / "hide.py").write_text(HIDE_AND_RUN)
    command = ["python", str(tmp_path / "hide.py"), " ".join(hidden), "bench/gpu.py", "--device", "cpu", "--quick"]
    completed = run(ROOT, *command, "--out", str(tmp_path / "results.json"), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert completed.returncode == 0, completed.stderr
    assert '"error"' not in completed.stdout, completed.stdout
    results = json.loads(completed.stdout)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert [*results] == [
        "environment", "seconds", "rates", "determinism", "agreement", "waits", "seeds", "baseline", "inference",
        "precisions",
    ]  # fmt: skip
    for equal in results["determinism"].values():
        assert equal == {"repeated": True, "resumed": True, "without graph": True, "finite": True, "captured": False}
    assert results["seeds"]["equal bytes of seed 0"] == {"float32": True}


def test_a_case_that_fails_is_recorded_and_the_others_run(tmp_path, monkeypatch):
    sys.path.append(str(ROOT / "bench"))
    import gpu
    import torch

    bench = gpu.Bench(torch.device("cpu"), True, tmp_path, tmp_path / "results.json")
    bench.run("rates", "fails", lambda: 1 / 0)
    bench.run("rates", "works", lambda: 3)
    results = json.loads((tmp_path / "results.json").read_text())["rates"]
    assert results["works"] == 3
    assert results["fails"]["error"] == "ZeroDivisionError: division by zero"


@pytest.fixture
def cases(tmp_path, monkeypatch):
    """A function that returns what a section would measure on one GPU, by name, without measuring it."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu
    import torch

    found = {}
    monkeypatch.setattr(gpu.Bench, "run", lambda _, section, name, measure: found.update({name: measure}))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    bench = gpu.Bench(torch.device("cuda"), False, tmp_path)
    return lambda section: (gpu.SECTIONS[section](bench), found)[1]


def test_the_recipes_that_are_trained_twice_have_every_lever_and_are_valid(cases):
    defaults = load_config(ROOT / "params.yaml").profiles["competition"].train.model_dump()
    recipes = [case.args[0] for case in cases("determinism").values()]
    for recipe in recipes:
        TrainParams.model_validate(defaults | recipe)
    levers = set().union(*recipes)
    assert {
        "feature_maps",
        "lung_crop",
        "histogram_exchange",
        "group_dro",
        "domain_adversarial",
        "swa_epochs",
    } <= levers


def test_torchrun_is_not_measured_on_one_gpu_where_it_needs_no_nccl(cases):
    assert [*cases("nccl")] == ["gradients in a group of one", "more processes than GPUs"]


def write_wheel(folder: Path, name: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        info = f"{name}-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_make_cuda_without_a_package_index_uses_the_downloaded_wheels(tmp_path):
    assert "$ make cuda\n" in (ROOT / "README.md").read_text()
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("wheels", "bench"):
        (tmp_path / name).mkdir()
    write_wheel(tmp_path / "wheels", "carried")
    (tmp_path / "bench/gpu.py").write_text("import sys, carried; print(sys.argv[1:])")
    completed = run(tmp_path, "make", "--silent", "cuda", "SECTIONS=rates seeds", f"PYTHON={sys.executable}")
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout == "['rates', 'seeds']\n"


def test_make_wheels_downloads_the_versions_of_the_constraints(tmp_path):
    assert "$ make wheels\n" in (ROOT / "README.md").read_text()
    completed = run(ROOT, "make", "--dry-run", "wheels")
    assert completed.returncode == 0, completed.stderr
    assert "--no-deps --only-binary=:all: --python-version 3.12" in completed.stdout
    assert f"--constraint constraints.txt {' '.join(wheels())}\n" in completed.stdout
    pinned = {line.partition("==")[0].replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {name.replace("_", "-") for name in wheels()} <= pinned
