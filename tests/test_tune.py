"""`cxr tune`: search spaces, paired pruning, and a search that is killed and resumed."""

import shlex
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
    error_line_of,
    mlflow_client,
    output_of,
    run,
    use_project,
)
from optuna.trial import TrialState

from pipeline.core.config import load_config
from pipeline.evaluation.metric_tables import Predictions, ValidationSet
from pipeline.evaluation.metrics import apply_threshold
from pipeline.evaluation.paired_pruning import paired_difference
from pipeline.training.search_space import parse_search_space
from stages.tune import _apply

pytestmark = pytest.mark.slow

BEST_SEPARATION, SEEDS = 2.4, 3  # of the classes, in standard deviations


def simulate_trial(rng: np.random.Generator, validation: ValidationSet, separation: float) -> pd.DataFrame:
    """Return the AUROC of three seeds on all resamples."""
    samples = {}
    for seed in range(SEEDS):
        logits = rng.normal(size=len(validation.labels)) + validation.labels * (separation + rng.normal() * 0.1)
        scores = 1 / (1 + np.exp(1 - logits))
        samples[f"seed-{seed}"] = validation.bootstrap_metrics(Predictions(apply_threshold(scores), scores))["auroc"]
    return pd.DataFrame(samples)


def test_a_worse_recipe_is_pruned_after_one_seed_and_an_equal_one_almost_never():
    rng, pruned = np.random.default_rng(0), {"equal": 0, "worse": 0}
    validation = ValidationSet(np.arange(200) < 40, np.arange(200), 100)
    for _ in range(40):
        best, *others = (simulate_trial(rng, validation, BEST_SEPARATION) for _ in range(4))
        pool = [dict(other.iloc[0]) for other in others]
        for name, separation in (("equal", BEST_SEPARATION), ("worse", BEST_SEPARATION / 3)):
            first_seed = simulate_trial(rng, validation, separation)[["seed-0"]]
            pruned[name] += paired_difference(first_seed, best, pool)[2] < 0
            assert np.isnan(paired_difference(first_seed, best)[2])  # one seed alone never decides
    assert pruned["equal"] <= 4
    assert pruned["worse"] >= 36


def test_a_search_space_has_the_types_of_its_keys_and_the_present_values(demo_project, monkeypatch):
    use_project(demo_project, monkeypatch)
    expressions = [
        "demo.train.lr=log(1e-4,1e-2)",
        "demo.train.dropout=interval(0.3,0.5)",
        "demo.train.epochs=range(1,6,2)",
        "demo.train.batch_size=tag(log, interval(4,32))",
        "demo.train.optimizer=adamw,sgd",
        "demo.train.head_hidden=[],[256,128]",
    ]
    space, present = parse_search_space(expressions, load_config(), _apply)
    assert list(space.values()) == [
        optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
        optuna.distributions.FloatDistribution(0.3, 0.5),
        optuna.distributions.IntDistribution(1, 5, step=2),
        optuna.distributions.IntDistribution(4, 32, log=True),
        optuna.distributions.CategoricalDistribution(["adamw", "sgd"]),
        optuna.distributions.CategoricalDistribution(["[]", "[256,128]"]),
    ]
    assert present == {
        "demo.train.lr": 2e-3,
        "demo.train.epochs": 2,
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
        ("demo.train.lr=log(a,b)", "demo.train.lr=log(a,b): TypeError while evaluating 'log(a,b)'"),
        ("demo.train.fused=interval(0,1)", "demo.train.fused=interval(0,1): no numbers (False); list its values"),
        ("demo.train.lr", "demo.train.lr: missing EQUAL at '<EOF>'; write one of KEY=A,B  KEY=interval(LOW,HIGH)"),
        ("demo.train.lr=1,2 demo.train.lr=3,4", "demo.train.lr: given twice; give it once"),
        ("demo.split.seed=1,2", "demo.split.seed: not in demo.prepare, demo.train, demo.weights; other keys change"),
        ("competition.train.lr=1,2", "competition.train.lr: not in demo.prepare, demo.train, demo.weights"),
        ("demo.train.lr=1,2 --seeds 0,0", "params.yaml: seeds: a seed is listed twice"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(demo_project, monkeypatch, arguments, message):
    use_project(demo_project, monkeypatch)
    assert error_line_of(f"cxr tune {arguments.replace(', ', ',')}").startswith(f"Error: {message}")
    assert not Path("optuna.db.lock").exists()


def test_a_killed_search_resumes_and_its_best_trial_is_applied_and_compared(demo_project, tmp_path, monkeypatch):
    project = copy_project(demo_project, tmp_path / "project")
    (project / ".gitignore").write_text((project / ".gitignore").read_text() + "/*.log\n")
    commit_all(project)
    command = "cxr tune 'demo.train.lr=log(1e-4,1e-2)' demo.train.optimizer=adamw,sgd"
    command += " --trials 2"
    client = mlflow_client(project)
    versions = client.search_model_versions()
    with (project / "tune.log").open("w") as out:
        tune = psutil.Popen(shlex.split(command), cwd=project, env=clean_environment(), stdout=out, stderr=out)
        log = project / "logs/tune-1.log"
        while not log.exists() or "Running stage 'train@1'" not in log.read_text():
            assert tune.poll() is None, (project / "tune.log").read_text()
            time.sleep(0.05)
        for process in [tune, *tune.children(recursive=True)]:
            process.kill()
        tune.wait()
    assert "tune-0 complete" in (project / "tune.log").read_text()
    assert "Running stage" not in (project / "logs/tune-0.log").read_text()  # the present recipe had run before

    use_project(project, monkeypatch)
    output = output_of(command)
    assert "Running stage 'train@0'" not in log.read_text()  # trained before the kill
    assert "Running stage 'train@1'" in log.read_text()
    study = optuna.load_study(study_name="tune", storage="sqlite:///optuna.db")
    first, killed, resumed = study.trials
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert first.params == {"demo.train.lr": 2e-3, "demo.train.optimizer": "adamw"}
    assert killed.params == resumed.params
    best = "tune-0" if first.value >= resumed.value else "tune-1"
    *_, caveat, apply, confirm = output.splitlines()
    assert caveat.startswith(
        f"{best} is the best of 2 trials on the images that selected it, so its AUROC is optimistic"
    )
    assert apply == f"  dvc exp apply {best}"
    assert confirm == f"  dvc exp run -n {best}-confirmed -S 'seeds=[0,1]' && cxr compare HEAD {best}-confirmed"

    assert client.search_model_versions() == versions
    experiment = client.get_experiment_by_name("covid-xray-demo")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.trial = 'tune-1'")
    assert parent.info.status == "FINISHED"
    assert (parent.data.tags["study"], parent.data.tags["trial_state"]) == ("tune", "complete")
    assert parent.data.metrics["seeds/auroc_mean"] == pytest.approx(resumed.value)
    assert "train.lr" in output_of("cxr compare HEAD tune-1")
    apply = "dvc exp apply tune-1"
    assert run(project, *apply.split()).returncode == 0
    assert load_config().active.train.lr == pytest.approx(resumed.params["demo.train.lr"])
    error = error_line_of("cxr tune demo.train.lr=1,2")
    assert error == "Error: study tune in optuna.db has another search space; start a new one: --study NAME"
