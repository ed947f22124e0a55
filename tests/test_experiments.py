"""What DVC's tables and plots show of the results, and a queue of experiments."""

import json
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from conftest import clean_environment, commit_all, copy_project, edit_params, mlflow_client, run, stage_server

pytestmark = pytest.mark.slow

WIDTH = 120  # characters of a terminal


def output_of(project: Path, command: str) -> str:
    completed = run(project, *shlex.split(command))
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "failed to load" not in completed.stderr
    return completed.stdout


def table_of(project: Path, command: str) -> str:
    """Return a table of DVC, which must fit in the terminal and have no cell that could not be read."""
    table = output_of(project, command)
    assert max(len(line.rstrip()) for line in table.splitlines()) <= WIDTH
    assert "!" not in table
    return table


def test_the_metrics_are_few_and_the_plots_have_a_line_per_seed(demo_project, tmp_path):
    header, values = table_of(demo_project, "dvc metrics show").splitlines()
    assert header.split()[1:] == ["auroc", "f1", "f1_best", "f1_mean", "f1_sd", "recall", "specificity"]
    assert len(values.split()) == len(header.split())

    output = json.loads(output_of(demo_project, f"dvc plots show --json --out {tmp_path}"))
    assert output.keys() == {"data"}  # no errors
    models = {
        name: {point.get("model") for point in plot["content"]["data"]["values"]}
        for name, (plot,) in output["data"].items()
        if plot["type"] == "vega"
    }
    seeds = {"seed-0", "seed-1"}
    assert models["F1 by epoch"] == models["Loss by epoch"] == seeds
    assert models["ROC"] == models["Precision and recall"] == {*seeds, "bag"}
    assert {"report/table.png", "Confusion matrix of the bag", "Reliability of the bag"} <= output["data"].keys()


@pytest.mark.long
def test_a_queue_of_experiments_can_be_compared_and_applied_and_is_in_mlflow(demo_project, tmp_path):
    project = copy_project(demo_project, tmp_path / "project")
    edit_params(project, lambda params: params.update(seeds=[1]))
    commit_all(project)
    decisions = (project / "metrics/promotion.json").read_bytes()
    output_of(project, "dvc exp run --queue -n lr -S 'demo.train.lr=1e-3,3e-4'")
    command, environment = shlex.split("dvc queue start --jobs 2"), clean_environment(**stage_server())
    # Its workers keep this pipe open until they end, which is long after their last experiment.
    with subprocess.Popen(command, cwd=project, env=environment, stdout=subprocess.PIPE) as queue:
        deadline = time.monotonic() + 300
        while len(output_of(project, "git for-each-ref refs/exps/*/*/lr-[12]").splitlines()) < 2:
            assert time.monotonic() < deadline, output_of(project, "dvc queue status")
            time.sleep(0.5)
        while "Running" in (status := output_of(project, "dvc queue status")):
            time.sleep(0.5)
        assert status.count("Success") == 2, status

        table = table_of(project, "dvc exp show --only-changed --drop '.*/|models|Created|State|Executor'")
        for text in ("lr-1", "lr-2", "f1", "demo.train.lr", "0.001", "0.0003"):
            assert text in table
        _, baseline = json.loads(output_of(project, "dvc exp show --json"))
        for experiment in baseline["experiments"]:
            assert set(experiment["revs"][0]["data"]["metrics"]) == {"metrics/headline.json"}
        assert "demo.train.lr" in table_of(project, "dvc exp diff lr-1 lr-2")

        output_of(project, "dvc exp apply lr-2")
        assert json.loads(output_of(project, "dvc params diff --json"))["params.yaml"].keys() == {"demo.train.lr"}
        assert "metrics/headline.json" in table_of(project, "dvc metrics diff --all")
        assert (project / "metrics/promotion.json").read_bytes() == decisions  # nothing restores it
        queue.communicate()
    assert queue.returncode == 0

    client = mlflow_client(project)
    runs = client.search_runs([client.get_experiment_by_name("covid-xray-demo").experiment_id])
    rates = {run.data.tags.get("dvc.experiment"): run.data.params["lr"] for run in runs if "lr" in run.data.params}
    assert rates["lr-1"] == "0.001"
    assert rates["lr-2"] == "0.0003"
