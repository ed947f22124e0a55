"""`cxr compare`: two recipes from Git revisions, DVC experiments and folders, paired by seed and patient."""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from conftest import clean_environment, error_line_of, error_message, output_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from sklearn.metrics import f1_score, log_loss

from pipeline.core.config import Config, EvaluateParams
from pipeline.evaluation import compare_recipes as comparing
from pipeline.evaluation.calibration import fit_platt
from pipeline.evaluation.compare_recipes import BAG, METRICS, SEED_MEAN, Recipe
from pipeline.evaluation.operating_point import choose_threshold

PARAMS = {
    "profile": "demo",
    "seeds": [0, 1, 2],
    "demo": {
        "split": {"seed": 1, "held_out_source": "B"},
        "train": {"lr": 1e-3, "keep": "last"},
        "evaluate": {"resamples": 50},
        "bag": {"method": "mean"},
    },
}
STAGES = """
stages:
  split:
    cmd: python make.py
    params: [profile, "${profile}.split"]
    outs: [data/manifest.csv, data/split.csv]
  evaluate:
    cmd: python make.py seeds
    params: [profile, seeds, "${profile}.split", "${profile}.train"]
    deps: [data/split.csv]
    outs: [predictions/external.csv, predictions/validation.csv]
"""
# Stands for training: the lower the learning rate, the better the predictions. Every split.seed has other images.
MAKE = """
import json, math, pathlib, random, sys
params = json.loads(pathlib.Path("params.yaml").read_text())  # JSON is YAML
section = params["demo"]
first = 10 * section["split"]["seed"]
files = [(f"{number:03}.png", number % 3 == 0, number // 2) for number in range(first, first + 60)]
external = [(f"ext-{number:03}.png", number % 2 == 0, 100 + number // 2) for number in range(40)]
subsets = {"validation": files, "external": external}
if sys.argv[1:] != ["seeds"]:
    pathlib.Path("data").mkdir(exist_ok=True)
    images = [(subset, *image) for subset, of_subset in subsets.items() for image in of_subset]
    rows = ["file,bytes,xxh128,patient", *(f"{file},{number},0{number}e5," for _, file, _, number in images)]
    pathlib.Path("data/manifest.csv").write_text("\\n".join(rows) + "\\n")
    rows = ["file,group,subset,fold", *(f"{file},p{patient},{subset},0" for subset, file, _, patient in images)]
    pathlib.Path("data/split.csv").write_text("\\n".join(rows) + "\\n")
else:
    pathlib.Path("predictions").mkdir(exist_ok=True)
    header = ",".join(["file", "label", *(f"seed-{seed}" for seed in params["seeds"])])
    slope = 1 - math.log10(section["train"]["lr"]) / 4
    for subset in ("validation", "external"):
        images, columns = subsets[subset], []
        for seed in params["seeds"]:
            rng = random.Random(seed)
            logits = [slope * (2 * label - 1) + rng.gauss(0, 1) + rng.gauss(0, 1) for _, label, _ in images]
            columns.append([1 / (1 + math.exp(-logit)) for logit in logits])
        rows = [header]
        for number, (file, label, _) in enumerate(images):
            rows.append(",".join([file, str(int(label)), *(f"{column[number]:.9g}" for column in columns)]))
        pathlib.Path(f"predictions/{subset}.csv").write_text("\\n".join(rows) + "\\n")
"""


def git(project: Path, command: str) -> None:
    subprocess.run(["git", *shlex.split(command)], cwd=project, env=clean_environment(), check=True)


def write_params(project: Path, seeds: list[int] | None = None, **sections: dict) -> None:
    """Write params.yaml with changes, as JSON, which is YAML, and which needs no import to read."""
    content = PARAMS | {"seeds": seeds or PARAMS["seeds"]}
    content["demo"] = {name: values | sections.get(name, {}) for name, values in PARAMS["demo"].items()}
    (project / "params.yaml").write_text(json.dumps(content, indent=1))


def commit_run(project: Path, tag: str, **changes) -> None:
    """Run the pipeline with changed parameters, and tag the commit of its results."""
    from dvc.repo import Repo

    write_params(project, **changes)
    Repo(project).reproduce()
    git(project, "add -A")
    git(project, f"commit -qm {tag}")
    git(project, f"tag {tag}")


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Iterator[Path]:
    """A DVC project with tags, an experiment and a clone; tests must leave it as it is."""
    from dvc.repo import Repo

    project = tmp_path_factory.mktemp("compared") / "project"
    project.mkdir()
    with mock.patch.dict(os.environ, clean_environment()), chdir(project):
        git(project, "init -q")
        Repo.init(project, no_scm=False)
        (project / "dvc.yaml").write_text(STAGES)
        (project / "make.py").write_text(MAKE)
        (project / ".gitignore").write_text("/data\n/predictions\n")
        commit_run(project, "shuffled", seeds=[7, 1, 0], train={"keep": "best_f1"})
        commit_run(project, "other-split", split={"seed": 2})
        commit_run(project, "better", train={"lr": 1e-5}, bag={"method": "vote"})
        commit_run(project, "base")
        write_params(project, train={"lr": 1e-4})
        Repo(project).experiments.run(name="lower-rate")
        git(project, "checkout -q params.yaml dvc.lock")
        Repo(project).checkout(force=True)
        yield project


def compare(arguments: str) -> dict:
    return json.loads(output_of(f"cxr compare {arguments} --json -"))


def metric_table(content: dict, images: str = "validation") -> pd.DataFrame:
    table = pd.DataFrame(content["metrics"])
    return table[table["images"] == images].set_index(["model", "metric"])


def test_the_json_has_every_metric_of_the_seeds_and_of_the_bag(compared):
    content = compare("base better")
    assert list(content) == [
        "a", "b", "held_out_source", "images", "seeds", "caveats", "parameters", "metrics",
    ]  # fmt: skip
    assert list(content["metrics"][0]) == comparing.COLUMNS
    assert [row["images"] for row in content["metrics"]] == ["validation"] * 16 + ["external"] * 16
    table = metric_table(content)
    for images in content["images"]:
        index = metric_table(content, images).index
        assert list(index) == [(model, metric) for model in (SEED_MEAN, BAG) for metric in METRICS]
    counts = ("images", "positives", "patients", "positive_patients")
    assert [content["images"]["validation"][key] for key in counts] == [60, 20, 30, 20]
    assert [content["images"]["external"][key] for key in counts] == [40, 20, 20, 20]
    assert content["held_out_source"] == "B"
    assert content["seeds"] == ["seed-0", "seed-1", "seed-2"]
    commit = subprocess.run(["git", "rev-parse", "better"], capture_output=True, text=True, check=True).stdout.strip()
    assert content["b"] == {"name": "better", "commit": commit, "seeds_left_out": []}
    assert content["parameters"] == [
        {"parameter": "train.lr", "a": 1e-3, "b": 1e-5},
        {"parameter": "bag.method", "a": "mean", "b": "vote"},
    ]
    seeds = table.loc[SEED_MEAN]
    assert seeds.loc["auroc", "difference"] > 0 > seeds.loc["recalibrated_loss", "difference"]
    assert (seeds["b"] - seeds["a"]).to_numpy() == pytest.approx(seeds["difference"].to_numpy())
    assert seeds.loc["auroc", "seeds_better"] == seeds.loc["loss", "seeds_better"] == 3
    assert table.loc[BAG, "seeds_better"].isna().all()
    shown = table[table["reason"] == ""]
    assert (shown["low"] <= shown["difference"]).all()
    assert (shown["difference"] <= shown["high"]).all()


@pytest.mark.parametrize("images", ["validation", "external"])
def test_the_mean_of_the_seeds_is_that_of_scikit_learn(compared, images):
    from sklearn import metrics

    table = pd.read_csv(compared / f"predictions/{images}.csv")
    values = metric_table(compare("base base"), images).loc[SEED_MEAN, "a"]
    seeds = [table[f"seed-{seed}"] for seed in (0, 1, 2)]
    label = table["label"]
    expected = {
        "f1": [metrics.f1_score(label, seed >= 0.5) for seed in seeds],
        "auroc": [metrics.roc_auc_score(label, seed) for seed in seeds],
        "loss": [metrics.log_loss(label, seed) for seed in seeds],
        "brier": [metrics.brier_score_loss(label, seed) for seed in seeds],
    }
    for metric, of_seeds in expected.items():
        assert values[metric] == pytest.approx(np.mean(of_seeds)), metric


def test_a_recipe_does_not_differ_from_itself(compared):
    content = compare("base .")
    assert content["parameters"] == content["caveats"] == []
    assert content["b"]["commit"] is None
    table = metric_table(content)
    assert (table["difference"] == 0).all()
    seeds, bag = table.loc[SEED_MEAN], table.loc[BAG]
    assert seeds[["low", "high"]].isna().all(axis=None)
    assert (seeds["reason"] == "none: the same in every resample").all()
    assert (bag["low"].isna() | ((bag["low"] < 0) & (bag["high"] > 0))).all()
    assert (seeds["seeds_better"] == 0).all()
    assert "No parameter differs." in output_of("cxr compare HEAD .")


def test_swapping_the_recipes_flips_the_signs(compared):
    forward, backward = (metric_table(compare(sides)) for sides in ("base lower-rate", "lower-rate base"))
    assert forward["difference"].to_numpy() == pytest.approx(-backward["difference"].to_numpy())
    seeds, swapped = forward.loc[SEED_MEAN], backward.loc[SEED_MEAN]
    for end, other in (("low", "high"), ("high", "low")):
        assert seeds[end].to_numpy(float) == pytest.approx(-swapped[other].to_numpy(float), nan_ok=True)
    assert (seeds["seeds_better"] + swapped["seeds_better"] <= 3).all()


def test_seeds_are_paired_by_name_and_those_that_only_one_has_are_left_out_and_named(compared):
    content = compare("shuffled base")
    assert content["seeds"] == ["seed-1", "seed-0"]
    assert content["a"]["seeds_left_out"] == ["seed-7"]
    assert content["b"]["seeds_left_out"] == ["seed-2"]
    assert (metric_table(content)["difference"] == 0).all()
    assert "Only base has seed-2, left out here and in the bag." in output_of("cxr compare shuffled base")


def test_the_terminal_has_a_table_of_metrics_the_parameters_that_differ_and_caveats(compared, tmp_path):
    output = output_of(f"cxr compare shuffled better --json {tmp_path / 'c.json'} --png {tmp_path / 'c.png'}")
    assert "Validation set, better minus shuffled: 60 images of 30 patients (20 of 20 positive), 2 seeds" in output
    assert "Held-out source B, better minus shuffled: 40 images of 20 patients (20 of 20 positive), 2 seeds" in output
    rows = [line for line in output.splitlines() if "mean of the seeds" in line and "AUROC" in line]
    assert [" of 2 " in row for row in rows] == [True, True]
    assert " 2 of 2 " in rows[0]
    (row,) = [line for line in output.splitlines() if "train.keep" in line and "Caveat" not in line]
    assert row.split()[1::2] == ["train.keep", "best_f1", "last"]
    assert output.count("Caveat: shuffled chose its epochs on the validation images (train.keep: best_f1)") == 1
    assert json.loads((tmp_path / "c.json").read_text()) == compare("shuffled better")
    with Image.open(tmp_path / "c.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=100_000)) > 10  # more than an empty canvas


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("base nosuch", "nosuch: no Git revision, DVC experiment, or folder with a params.yaml has this name"),
        ("data base", "data: no Git revision, DVC experiment, or folder with a params.yaml has this name"),
        (
            "base other-split",
            "base and other-split were evaluated on different images (100 and 100, 90 of them in both)",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_line(compared, arguments, message):
    assert error_line_of(f"cxr compare {arguments}").startswith(f"Error: {message}")


def copy_of(project: Path, target: Path) -> Path:
    return Path(shutil.copytree(project, target / "copy", symlinks=True))


def test_a_folder_whose_outs_are_not_those_of_its_parameters_is_refused(compared, tmp_path):
    copy = copy_of(compared, tmp_path)
    write_params(copy, train={"lr": 0.5})
    message = f"Error: {copy}: evaluate has not run with this params.yaml (demo.train); run there: dvc repro"
    assert error_line_of(f"cxr compare base {copy}") == message
    write_params(copy)
    lock = (copy / "dvc.lock").read_text()
    (copy / "dvc.lock").unlink()
    message = f"Error: {copy}: split has not run with this params.yaml; run there: dvc repro"
    assert error_line_of(f"cxr compare base {copy}") == message
    (copy / "dvc.lock").write_text(lock)
    predictions = copy / "predictions/validation.csv"
    text = predictions.read_text()
    predictions.unlink()  # it may be a link to the cache
    predictions.write_text(text.replace("seed-0", "seed-1"))
    assert f"Error: {predictions}: not as in dvc.lock; run there: dvc" in error_line_of(f"cxr compare base {copy}")
    git(copy, "commit -qam x --allow-empty")
    (copy / "params.yaml").write_text("profile: demo\nseeds: [0]\nsize: 3\n")
    assert str(copy) in error_line_of(f"cxr compare base {copy}")


def test_outs_that_are_nowhere_are_reported_with_the_command_that_makes_them(compared, tmp_path):
    copy = copy_of(compared, tmp_path)
    shutil.rmtree(copy / ".dvc/cache")
    (copy / "predictions/validation.csv").unlink()
    line = error_line_of(f"cxr compare base {copy}")
    assert line.startswith(f"Error: {copy}: predictions/validation.csv is neither there nor in DVC's cache; run there:")
    with chdir(copy):
        line = error_line_of("cxr compare better better")
    assert line.startswith(
        "Error: better: data/manifest.csv is neither there nor in DVC's cache; run after git checkout"
    )


def test_another_project_is_refused(compared, tmp_path):
    (tmp_path / "params.yaml").write_text("lr: 1\n")
    message = (
        f"Error: {tmp_path}: not in a project with Git and DVC; run in a clone of this project, or first: git init"
    )
    assert error_line_of(f"cxr compare base {tmp_path}") == message
    with chdir(tmp_path):
        assert error_line_of("cxr compare base better").startswith("Error: base: not in a project with Git and DVC")
    copy = copy_of(compared, tmp_path)
    (copy / "dvc.yaml").write_text("stages: {other: {cmd: 'true'}}\n")
    line = error_line_of(f"cxr compare base {copy}")
    assert line.startswith(f"Error: {copy}: not a project like this one, since no stage in its dvc.yaml makes data/")


# Without DVC.


def recipe(name: str, table: pd.DataFrame, seeds: Sequence[int] = (0, 1), external: int = 0, **sections) -> Recipe:
    """Return a recipe whose held-out source has the last images of the table."""
    content = {"profile": "x", "seeds": list(seeds), "x": {"evaluate": {"resamples": 40}} | sections}
    validation, held_out = table.iloc[: len(table) - external], table.iloc[len(table) - external :]
    predictions = {"validation": validation} | ({"external": held_out} if external else {})
    return Recipe(name, Config.model_validate(content), predictions)


def random_predictions(count: int = 40, positives: int = 12, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    label = (np.arange(count) < positives).astype(int)
    seeds = {f"seed-{number}": rng.uniform(0, 1, count) * 0.6 + 0.4 * label for number in (0, 1)}
    files = pd.Index([f"{number:03}.png" for number in range(count)], name="file")
    content = {"bytes": range(count), "xxh128": files}
    return pd.DataFrame({"label": label, "group": [f"p{n // 2}" for n in range(count)]} | content | seeds, files)


@pytest.mark.parametrize(
    ("column", "meaning"), [("xxh128", "contents"), ("label", "labels"), ("group", "patient groups")]
)
def test_images_of_the_same_name_that_are_not_the_same_are_refused(column, meaning):
    table = random_predictions()
    other = table.copy()
    other.loc["003.png", column] = 0 if column == "label" else "other"
    message = error_message(comparing.compare_recipes, recipe("A", table), recipe("B", other))
    assert message.startswith(f"A and B have different {meaning} for 1 of the 40 images, such as 003.png;")


def test_recipes_with_another_image_size_are_compared_on_the_same_files():
    table, other = random_predictions(), random_predictions(seed=1).assign(xxh128="of other pixels")
    sides = recipe("A", table), recipe("B", other, prepare={"image_size": 64})
    assert comparing.compare_recipes(*sides).metrics["difference"].notna().any()
    changed = replace(sides[1], predictions={"validation": other.assign(bytes=1)})
    message = error_message(comparing.compare_recipes, sides[0], changed)
    assert message.startswith("A and B have different contents for 39 of the 40 images, such as 000.png;")


def test_the_order_of_the_images_does_not_matter(compared, tmp_path):
    shutil.copy(compared / "params.yaml", tmp_path)
    for folder in ("data", "predictions"):
        (tmp_path / folder).mkdir()
        for path in (compared / folder).glob("*.csv"):
            shuffled = pd.read_csv(path, dtype=str).sample(frac=1, random_state=0)
            shuffled.to_csv(tmp_path / folder / path.name, index=False)
    straight, mixed = (comparing.load_recipe(folder, "A").predictions for folder in (compared, tmp_path))
    for images in ("validation", "external"):
        pd.testing.assert_frame_equal(straight[images], mixed[images])


def test_on_the_held_out_source_the_threshold_and_the_recalibration_are_those_of_the_validation_set():
    table = random_predictions(80, 24).sample(frac=1, random_state=0)
    sides = (recipe(name, table, external=40, evaluate={"operating_point": "best_f1"}) for name in "AB")
    metrics = comparing.compare_recipes(*sides).metrics.set_index(["images", "model", "metric"])["a"]
    validation, external = table.iloc[:40], table.iloc[40:]
    labels, groups = validation["label"].to_numpy(), validation["group"].to_numpy()
    expected = {"f1": [], "recalibrated_loss": []}
    for seed in ("seed-0", "seed-1"):
        params = EvaluateParams(operating_point="best_f1")
        threshold = choose_threshold(labels, validation[seed].to_numpy(), groups, params)
        expected["f1"].append(f1_score(external["label"], external[seed] >= threshold))
        recalibrated = fit_platt(labels, validation[seed].to_numpy())(external[seed].to_numpy())
        expected["recalibrated_loss"].append(log_loss(external["label"], recalibrated))
    for metric, values in expected.items():
        assert metrics["external", SEED_MEAN, metric] == pytest.approx(np.mean(values)), metric


@pytest.mark.parametrize(
    ("sections", "fitted"),
    [
        ({}, {"recalibrated_loss"}),
        ({"evaluate": {"operating_point": "best_f1"}}, {"recalibrated_loss", "f1", "recall", "specificity"}),
        ({"bag": {"method": "greedy"}}, {*METRICS}),
    ],
)
def test_what_is_fitted_on_the_validation_set_has_no_interval_on_the_held_out_source(sections, fitted):
    a, b = (random_predictions(80, 24, seed).sample(frac=1, random_state=0) for seed in (0, 1))
    metrics = comparing.compare_recipes(recipe("A", a, external=40), recipe("B", b, external=40, **sections)).metrics
    of_bag = metrics[(metrics["images"] == "external") & (metrics["model"] == BAG)].set_index("metric")
    withheld = of_bag["reason"].str.startswith("none: it also varies with the validation set")
    assert set(of_bag.index[withheld]) == fitted
    assert of_bag.loc[withheld, ["low", "high"]].isna().all(axis=None)
    assert of_bag.loc[~withheld, "low"].notna().all()
    of_seeds = metrics[(metrics["images"] == "external") & (metrics["model"] == SEED_MEAN)]
    withheld = of_seeds["reason"].str.startswith("none: it also varies with the validation set")
    assert set(of_seeds["metric"][withheld]) == ({"recalibrated_loss"} if "bag" in sections else fitted)
    assert not metrics.loc[metrics["images"] == "validation", "reason"].str.startswith("none: it also varies").any()


def test_a_source_that_only_one_recipe_held_out_is_refused():
    table = random_predictions()
    sides = recipe("A", table, external=10), recipe("B", table)
    assert "were evaluated on different images" in error_message(comparing.compare_recipes, *sides)


@pytest.mark.parametrize("positives", [0, 1, 40])
def test_undefined_metrics_have_a_reason(positives):
    table, other = random_predictions(positives=positives), random_predictions(positives=positives, seed=1)
    metrics = comparing.compare_recipes(recipe("A", table), recipe("B", other)).metrics
    for _, row in metrics.iterrows():
        assert (row["reason"] == "") == (row["low"] < row["high"]), row
    undefined = metrics["difference"].isna()
    assert "recalibrated_loss" in set(metrics["metric"][undefined])
    assert metrics["reason"][undefined].str.startswith("undefined").all()


def test_recipes_compared_on_one_patient_or_with_reversed_probabilities_say_so():
    table = random_predictions()
    one_patient = recipe("A", table.assign(group="p")), recipe("B", random_predictions(seed=1).assign(group="p"))
    metrics = comparing.compare_recipes(*one_patient).metrics
    assert set(metrics["reason"][metrics["difference"].notna()]) == {"one patient only"}
    inverted = table.assign(**{seed: 1 - table[seed] for seed in ("seed-0", "seed-1")})
    metrics = comparing.compare_recipes(recipe("A", table), recipe("B", inverted)).metrics.set_index("metric")
    assert metrics.loc["recalibrated_loss", "reason"].str.contains("higher probabilities do not mean").all()


def test_the_loss_of_bags_that_err_on_no_patient_has_no_interval_and_says_why():
    table = random_predictions()
    better = table.assign(**{seed: table["label"] * 0.9 + table[seed] * 0.05 for seed in ("seed-0", "seed-1")})
    worse = table.assign(**{seed: table["label"] * 0.6 + table[seed] * 0.3 for seed in ("seed-0", "seed-1")})
    metrics = comparing.compare_recipes(recipe("A", worse), recipe("B", better)).metrics.set_index(["model", "metric"])
    assert metrics.loc[(BAG, "loss"), "difference"] < 0
    assert metrics.loc[(BAG, "loss"), "reason"].startswith("fewer than 3 patients with a probability on the wrong side")


def test_without_a_seed_of_a_bag_only_the_seeds_are_compared():
    table = random_predictions().assign(**{"seed-2": 0.5})
    other = recipe("B", table, seeds=[0, 1, 2], bag={"members": [2]})
    comparison = comparing.compare_recipes(recipe("A", table), other)
    assert comparison.left_out == {"a": [], "b": ["seed-2"]}
    assert set(comparison.metrics["model"]) == {SEED_MEAN}
    assert set(comparing.compare_recipes(other, recipe("A", table)).metrics["model"]) == {SEED_MEAN}


def test_each_recipe_that_chose_its_epochs_on_the_validation_images_has_a_caveat():
    table = random_predictions()
    sides = recipe("A", table, train={"keep": "best_f1"}), recipe("B", table, train={"keep": "best_loss"})
    starts = [text.partition(" (train.keep: ") for text in comparing.compare_recipes(*sides).caveats]
    assert [(before, after.partition(")")[0]) for before, _, after in starts] == [
        ("A chose its epochs on the validation images", "best_f1"),
        ("B chose its epochs on the validation images", "best_loss"),
    ]
    last = (recipe(name, table, train={"keep": "last"}) for name in "AB")
    assert comparing.compare_recipes(*last).caveats == []


def test_recipes_without_a_common_seed_are_refused():
    table = random_predictions()
    message = error_message(comparing.compare_recipes, recipe("A", table), recipe("B", table, seeds=[7]))
    assert message == "A and B have no seed in common (seed-0, seed-1; seed-7); train both with the same seeds"


def test_parameters_are_compared_with_their_defaults():
    table = random_predictions()
    a, b = (
        recipe("A", table, train={"lr": 1e-3}),
        recipe("B", table, split={"folds": 7}, download={"source": "phantom"}),
    )
    differing = comparing.differing_parameters(a, b).set_index("parameter")
    assert "train.lr" not in differing.index  # as by default
    assert differing.loc["split.folds"].tolist() == [5, 7]
    assert differing.loc["download.strength"].tolist() == [None, 2.0]
    assert comparing.differing_parameters(b, a).set_index("parameter").loc["download.strength"].tolist() == [2.0, None]
    seeds = comparing.differing_parameters(a, recipe("B", table, seeds=[0], train={"lr": 1e-3})).set_index("parameter")
    assert seeds.loc["seeds"].tolist() == [[0, 1], [0]]


def differences_with(means: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Return differences whose resamples have exactly this covariance matrix."""
    draws = np.random.default_rng(0).normal(size=(500, len(means)))
    draws -= draws.mean(axis=0)
    whitened = draws @ np.linalg.inv(np.linalg.cholesky(np.cov(draws, rowvar=False))).T
    return np.vstack([means, means + whitened @ np.linalg.cholesky(covariance).T])


def test_the_interval_is_that_of_obuchowski_rockette_and_hillis_on_the_van_dyke_data():
    # Five readers and two modalities, analyzed by the package MRMCaov (Smith and Hillis): difference −0.0438 with
    # standard error 0.02074862, 15.26 degrees of freedom and interval −0.08796 to 0.00036.
    readers, ms_tr, cov2, cov3 = 5, 0.0005510306, 0.0003440748, 0.0002390284
    pattern = np.array([-2.0, -1, 0, 1, 2])
    means = -0.04380032 + pattern * np.sqrt(2 * ms_tr / pattern.var(ddof=1))
    covariance = np.full((readers, readers), 2 * (cov2 - cov3)) + np.eye(readers) * 3e-4
    low, high = comparing.seed_mean_interval(differences_with(means, covariance))
    assert (low, high) == pytest.approx((-0.08796, 0.00036), abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 1000), st.floats(0.001, 1))
def test_the_interval_agrees_with_the_analysis_of_variance_of_both_recipes(seeds, number, scale):
    rng = np.random.default_rng(number)
    shared = rng.normal(size=(80, 1)) * scale
    a, b = (rng.normal(size=(80, seeds)) + factor * shared for factor in (1, -1))
    covariance = np.cov(np.hstack([a[1:], b[1:]]), rowvar=False)
    within, across = covariance[:seeds, :seeds] + covariance[seeds:, seeds:], covariance[:seeds, seeds:]
    others = ~np.eye(seeds, dtype=bool)
    values = np.array([a[0], b[0]])
    residual = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    ms_tr = (residual**2).sum() / (seeds - 1)
    error = max(seeds * (within[others].mean() / 2 - across[others].mean()), 0)
    degrees = (ms_tr + error) ** 2 / (ms_tr**2 / (seeds - 1))
    half = stats.t.ppf(0.975, degrees) * np.sqrt(2 / seeds * (ms_tr + error))
    low, high = comparing.seed_mean_interval(b - a)
    assert low + high == pytest.approx(2 * (b[0] - a[0]).mean())
    assert (high - low) / 2 == pytest.approx(half)


def test_with_one_seed_the_interval_is_that_of_the_bootstrap_over_patients():
    resampled = np.random.default_rng(0).normal(0.2, 0.1, (2000, 1))
    low, high = comparing.seed_mean_interval(np.vstack([[[0.2]], resampled]))
    assert (low, high) == pytest.approx((0.2 - 0.196, 0.2 + 0.196), abs=0.01)


@pytest.mark.parametrize(
    "differences", [np.zeros((1, 3)), np.zeros((50, 3)), np.full((50, 3), np.nan), np.zeros((50, 1)), np.zeros((2, 2))]
)
def test_there_is_no_interval_without_variation(differences):
    assert np.isnan(comparing.seed_mean_interval(differences)).all()


def test_resamples_on_which_a_metric_is_undefined_are_left_out():
    differences = np.random.default_rng(0).normal(0.2, 0.1, (50, 3))
    undefined = np.vstack([differences, [[np.nan, 0.1, 0.2], [np.nan] * 3]])
    assert comparing.seed_mean_interval(undefined) == comparing.seed_mean_interval(differences)


def test_an_interval_covers_the_true_difference_between_recipes_for_new_seeds_and_patients():
    rng, covered, bootstrap_covered = np.random.default_rng(0), 0, 0
    simulations, seeds, patients = 400, 3, 60
    for _ in range(simulations):  # the metric is a mean over patients, whose true difference is 0
        of_patients = rng.normal(0, 1, (patients, 1)) + rng.normal(0, 1, (patients, seeds))
        values = of_patients + rng.normal(0, 0.15, seeds)
        weights = rng.multinomial(patients, np.full(patients, 1 / patients), 100) / patients
        differences = np.vstack([values.mean(axis=0), weights @ values])
        low, high = comparing.seed_mean_interval(differences)
        covered += low <= 0 <= high
        ends = np.quantile(differences[1:].mean(axis=1), [0.025, 0.975])
        bootstrap_covered += ends[0] <= 0 <= ends[1]
    assert 0.92 <= covered / simulations <= 0.99
    assert bootstrap_covered / simulations < 0.9  # patients alone are not enough
