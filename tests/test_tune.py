"""`cxr tune`: search spaces, paired pruning, and searches that are interrupted, resumed and run in parallel."""

import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import psutil
import pytest
from conftest import (
    clean_environment,
    commit_all,
    copy_project,
    edit_params,
    error_line_of,
    error_message,
    mlflow_client,
    output_of,
    run,
    use_project,
)
from optuna.trial import TrialState
from scipy import stats

from pipeline.core.config import load_config
from pipeline.evaluation.metric_tables import Predictions, ValidationSet
from pipeline.evaluation.metrics import apply_threshold
from pipeline.evaluation.paired_pruning import is_worse, residual_variance
from pipeline.training.search_space import parse_search_space
from stages.tune import _apply
from stages.tuner import Tuner

pytestmark = pytest.mark.slow

BEST_SEPARATION, SEEDS = 2.4, 3  # of the classes, in standard deviations


def simulate_trial(rng: np.random.Generator, validation: ValidationSet, separation: float) -> pd.DataFrame:
    """Return the AUROC of three seeds on all resamples."""
    resampled = {}
    for seed in range(SEEDS):
        logits = rng.normal(size=len(validation.labels)) + validation.labels * (separation + rng.normal() * 0.1)
        scores = 1 / (1 + np.exp(1 - logits))
        resampled[f"seed-{seed}"] = validation.bootstrap_metrics(Predictions(apply_threshold(scores), scores))["auroc"]
    return pd.DataFrame(resampled)


def test_a_worse_recipe_is_pruned_after_one_seed_and_an_equal_one_almost_never():
    rng, pruned = np.random.default_rng(0), {"equal": 0, "worse": 0}
    validation = ValidationSet(np.arange(200) < 40, np.arange(200), 100)
    for _ in range(40):
        trials = [simulate_trial(rng, validation, BEST_SEPARATION) for _ in range(4)]
        best = max(trials, key=lambda trial: trial.iloc[0].mean())
        for name, separation in (("equal", BEST_SEPARATION), ("worse", BEST_SEPARATION / 3)):
            first_seed = simulate_trial(rng, validation, separation)[["seed-0"]]
            seed_metrics = pd.DataFrame([trial.iloc[0] for trial in (*trials, first_seed)])
            pruned[name] += is_worse(first_seed, best, seed_metrics, len(trials))
            two = pd.DataFrame([best.iloc[0], first_seed.iloc[0]])
            assert not is_worse(first_seed, best, two, 1)  # one seed of one other trial never decides
    assert pruned["equal"] <= 2
    assert pruned["worse"] >= 36


def test_a_trial_is_worse_from_the_end_of_its_interval_on():
    # The resamples do not differ, so that all variance is that of one seed of each of the two trials.
    seed_metrics = pd.DataFrame(np.random.default_rng(0).normal(size=(6, 3)))
    variance, degrees = residual_variance(seed_metrics.to_numpy())
    best = pd.DataFrame({"seed-0": np.zeros(50), "seed-1": np.ones(50)})
    for comparisons in (1, 5):
        limit = stats.t.ppf(0.025 / comparisons, degrees) * np.sqrt(2 * variance)
        for factor, worse in ((1.01, True), (0.99, False), (-2, False)):
            trial = pd.DataFrame({"seed-0": np.full(50, factor * limit), "seed-2": np.zeros(50)})
            assert is_worse(trial, best, seed_metrics, comparisons) == worse


def test_the_variance_between_seeds_is_the_residual_of_a_two_way_analysis_without_repetitions():
    values = np.random.default_rng(0).normal(size=(5, 3))
    residuals = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    assert residual_variance(values) == (pytest.approx((residuals**2).sum() / 8), 8)
    pruned = np.vstack([values, [3.0, np.nan, np.nan]])  # of one seed, which says nothing of others
    assert residual_variance(pruned) == (pytest.approx((residuals**2).sum() / 8), 8)
    constant = pd.DataFrame({"seed-0": np.full(100, 0.9), "seed-1": np.full(100, 0.9)})
    assert not is_worse(constant[["seed-0"]] - 0.1, constant, constant.iloc[:3], 2)  # no variance is known


def test_a_search_space_has_the_types_of_its_keys_and_the_present_values(demo_project, monkeypatch):
    use_project(demo_project, monkeypatch)
    expressions = [
        "demo.train.lr=log(1e-4,1e-2)",
        "demo.train.dropout=interval(0.3,0.5)",
        "demo.train.epochs=range(1,6,2)",  # without the present value, 2
        "demo.train.batch_size=log(4,32)",
        "demo.train.optimizer=adamw,sgd",
        "demo.train.head_hidden=[],[256,128]",
        "demo.train.weight_decay=range(0,1,0.3)",
    ]
    space, present = parse_search_space(expressions, load_config(), _apply)
    assert list(space.values()) == [
        optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
        optuna.distributions.FloatDistribution(0.3, 0.5),
        optuna.distributions.IntDistribution(1, 5, step=2),
        optuna.distributions.IntDistribution(4, 32, log=True),
        optuna.distributions.CategoricalDistribution(["adamw", "sgd"]),
        optuna.distributions.CategoricalDistribution(["[]", "[256,128]"]),
        optuna.distributions.FloatDistribution(0, 0.9, step=0.3),
    ]
    assert present == {
        "demo.train.lr": 2e-3,
        "demo.train.batch_size": 8,
        "demo.train.optimizer": "adamw",
        "demo.train.head_hidden": "[]",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo.train.lrr=1,2", "params.yaml: demo.train.lrr: unknown key; did you mean 'lr'?"),
        ("demo.train.optimizer=adam,adamx", "params.yaml: demo.train.optimizer: input should be 'adam', 'adamw' or"),
        ("demo.train.dropout=interval(0,1.5)", "params.yaml: demo.train.dropout: input should be less than 1, but"),
        ("demo.train.epochs=interval(1.5,3)", "params.yaml: demo.train.epochs: input should be a valid integer, got"),
        ("demo.train.lr=log(1e-2,1e-4)", "demo.train.lr=log(1e-2,1e-4): `low <= high` must hold"),
        ("demo.train.lr=log(0,1e-2)", "params.yaml: demo.train.lr: input should be greater than 0, but it is 0"),
        ("demo.train.lr=log(a,b)", "demo.train.lr=log(a,b): TypeError while evaluating 'log(a,b)'"),
        ("demo.train.fused=interval(0,1)", "demo.train.fused=interval(0,1): no numbers (False); list its values"),
        ("demo.train.lr=1e-3", "demo.train.lr=1e-3: no values to choose from; write one of KEY=A,B"),
        ("~demo.train.lr", "~demo.train.lr: no values to choose from"),
        ("demo.train.lr=range(3,1)", "demo.train.lr=range(3,1): no values to choose from"),
        ("demo.train.epochs=range(1,6,0)", "demo.train.epochs=range(1,6,0): the step is 0"),
        ("demo.train.optimizer=glob(*)", "demo.train.optimizer=glob(*): ConfigLoader is not set"),
        ("demo.train.class_weights.0=1,2", "demo.train.class_weights.0: part of a list; give whole lists"),
        (
            "demo.train.lr=1,2 --seeds 1.5",
            "params.yaml: seeds.0: input should be a valid integer",
        ),
        ("demo.train.lr=1,2 --seeds range(3)", "seeds=[range(3)]: "),
        ("demo.train.lr", "demo.train.lr: missing EQUAL at '<EOF>'; write one of KEY=A,B  KEY=interval(LOW,HIGH)"),
        ("demo.train.lr=1,2 demo.train.lr=3,4", "demo.train.lr: given twice; give it once"),
        (
            "demo.split.seed=1,2",
            "demo.split.seed: not in demo.prepare, demo.train, demo.weights, or changes the images",
        ),
        (
            "demo.prepare.views=[PA],[AP]",
            "demo.prepare.views: not in demo.prepare, demo.train, demo.weights, or changes",
        ),
        ("demo.prepare.image_size=48,64 --ray auto", "demo.prepare.image_size: a Ray cluster gets prepared images"),
        ("competition.train.lr=1,2", "competition.train.lr: not in demo.prepare, demo.train, demo.weights"),
        ("demo.train.lr=1,2 --seeds 0,0", "params.yaml: seeds: a seed is listed twice"),
        ("demo.train.lr=1,2 --study a/b", "--study a/b: write letters, digits, _ and -"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(demo_project, monkeypatch, arguments, message):
    use_project(demo_project, monkeypatch)
    assert error_line_of(f"cxr tune {arguments.replace(', ', ',')}").startswith(f"Error: {message}")
    assert not Path("optuna.db.lock").exists()


def test_without_ray_a_search_on_a_cluster_does_not_start(tmp_path, monkeypatch):
    params = (Path(__file__).parents[1] / "params.yaml").read_bytes()
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_bytes(params)
    Path(".git").mkdir()
    monkeypatch.delitem(sys.modules, "stages.ray_backend", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    error = error_line_of("cxr tune demo.train.lr=1e-3,1e-2 --ray 127.0.0.1:1")
    assert error.startswith("Error: Ray is not installed; run: pip install")
    assert not Path("optuna.db.lock").exists()


def test_a_killed_and_interrupted_search_resumes_and_a_trial_that_the_workspace_has_run_trains_nothing(
    demo_project, tmp_path, monkeypatch, forked_stages
):
    project = copy_project(demo_project, tmp_path / "project")
    use_project(project, monkeypatch)
    client = mlflow_client(project)
    (champion,) = client.search_runs(["1"], "tags.candidate = 'bag'")
    command = "cxr tune 'demo.train.lr=log(1e-4,1e-2)' demo.train.optimizer=adamw,sgd"
    command += " --study present --trials 1 --seeds 0"
    log = Path("logs/present-0.log")
    for sent in (signal.SIGKILL, signal.SIGINT):
        log.unlink(missing_ok=True)
        with Path("tune.log").open("w") as out:
            tune = psutil.Popen(shlex.split(command), env=clean_environment(), stdout=out, stderr=out)
        while not log.exists() or "Running stage 'evaluate'" not in log.read_text():
            assert tune.poll() is None, Path("tune.log").read_text()
            time.sleep(0.05)
        for process in [tune, *(tune.children(recursive=True) if sent == signal.SIGKILL else [])]:
            process.send_signal(sent)
        status = tune.wait()
    assert status == 130
    assert Path("tune.log").read_text().endswith("stopped; the same command resumes\n")

    assert output_of(command).endswith("present-0 is the best of 1 trials, and has the present values.\n")
    assert "Running stage 'train" not in log.read_text()
    trials = optuna.load_study(study_name="present", storage="sqlite:///optuna.db").trials
    assert [trial.state for trial in trials] == [TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE]
    assert all(trial.params == trials[0].params for trial in trials)
    run = client.get_run(champion.info.run_id)
    assert run.data.tags["trial"] == "present-0"
    assert run.data.metrics == champion.data.metrics  # of all seeds, and the trial has one
    arguments = (load_config(), {}, {}, [0], "auroc", "present", 0)
    error = error_message(Tuner, *arguments)
    assert error == "study present in optuna.db has another search space; start a new one: --study NAME"
    Path("optuna.db").unlink()
    error = error_message(Tuner, *arguments)
    assert error == "there are DVC experiments present-…; remove them (dvc exp remove), or give --study NAME"


def test_a_search_of_two_trials_at_once_prunes_and_its_trials_are_compared_and_applied(
    demo_project, tmp_path, monkeypatch, forked_stages
):
    project = copy_project(demo_project, tmp_path / "project")
    # Enough images to tell recipes apart; without positive ones in training, F1 is 0.
    edit_params(project, lambda params: params["demo"]["download"].update(train=120, prevalence=0.4))
    commit_all(project)
    space = "demo.train.lr=3e-3,4e-3 demo.train.positive_oversampling=1e-9,2e-9,3e-9,4e-9,5e-9,6e-9,3"
    command = f"cxr tune {space} --metric f1 --trials 3 --jobs 2"
    client = mlflow_client(project)
    versions = client.search_model_versions()

    use_project(project, monkeypatch)
    output = output_of(command)
    study = optuna.load_study(study_name="tune", storage="sqlite:///optuna.db")
    trials = {trial.user_attrs["experiment"]: trial for trial in study.trials}
    names = {"tune-0": TrialState.COMPLETE, "tune-1": TrialState.COMPLETE, "tune-2": TrialState.PRUNED}
    assert {name: trial.state for name, trial in trials.items()} == names
    assert trials["tune-0"].params["demo.train.positive_oversampling"] == "3"  # the present value
    assert len(trials["tune-2"].user_attrs["seed_metrics"]) == 1
    *_, caveat, apply, compare = output.splitlines()
    assert caveat.startswith("tune-0 is the best of 3 trials on the images that selected it, so its F1 is optimistic")
    assert apply == "  dvc exp apply tune-0"
    assert compare == "  dvc exp run -n tune-0-all-seeds -S 'seeds=[0,1]' && cxr compare HEAD tune-0-all-seeds"

    assert client.search_model_versions() == versions
    experiment = client.get_experiment_by_name("covid-xray-demo")
    for name, state in (("tune-1", "complete"), ("tune-2", "pruned")):
        (parent,) = client.search_runs([experiment.experiment_id], f"tags.trial = '{name}'")
        assert parent.info.status == "FINISHED"
        assert (parent.data.tags["study"], parent.data.tags["trial_state"]) == ("tune", state)
        metrics = trials[name].user_attrs["seed_metrics"].values()
        assert parent.data.metrics["seeds/f1_mean"] == pytest.approx(np.mean(list(metrics)))
    assert "train.positive_oversampling" in output_of("cxr compare tune-0 tune-1")
    apply = "dvc exp apply tune-1"
    assert run(project, *apply.split()).returncode == 0
    assert load_config().active.train.positive_oversampling < 1
