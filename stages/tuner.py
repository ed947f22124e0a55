"""The search of `cxr tune`: Optuna chooses, `dvc exp run` trains, and paired comparisons stop trials that are worse."""

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import RLock
from typing import Any

import click
import dvc.api
import optuna
import pandas as pd
from mlflow.exceptions import MlflowException
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.table import Table

from pipeline.core.config import Config
from pipeline.core.errors import UserError, first_line
from pipeline.evaluation.compare_recipes import Recipe, check_same_images
from pipeline.evaluation.metrics import METRIC_LABELS
from pipeline.evaluation.paired_pruning import is_worse, resample_metric
from pipeline.tracking.fingerprint import training_fingerprint
from pipeline.tracking.runs import finish_parent_of_copy
from pipeline.tracking.store import connect
from pipeline.training.signals import SignalHandler
from stages.common import list_experiments, print_table
from stages.compare import load_experiment
from stages.train_all import first_error, gpu_environments, start_logged

STORAGE = "optuna.db"


class Tuner:
    """A study in `optuna.db`, which is created, or opened and resumed."""

    def __init__(
        self, config: Config, space: dict[str, BaseDistribution], present: dict[str, Any], seeds: list[int],
        metric: str, name: str, lock_file: int,
    ) -> None:  # fmt: skip
        self.config, self.space, self.present, self.seeds = config, space, present, seeds
        self.metric, self.name, self.lock_file, self.lock = metric, name, lock_file, RLock()
        self.recipes, self.resampled = dict[str, Recipe](), dict[str, pd.DataFrame]()  # by experiment
        self.stop: Callable[[], int] = lambda: 0
        self.start_seed: Callable[..., Any] | None = None  # on a Ray cluster, from which the seeds in
        self.pushed: set[tuple[str, int]] = set()  # are in the DVC remote
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            storage=f"sqlite:///{STORAGE}", study_name=name, direction="maximize", load_if_exists=True
        )
        # With the same seed, a resumed sampler would draw the same parameters again.
        self.study.sampler = optuna.samplers.TPESampler(seed=len(self.study.trials))
        if not self.study.trials and any(re.fullmatch(rf"{name}-\d+", other) for other in list_experiments()):
            raise UserError(f"there are DVC experiments {name}-…; remove them (dvc exp remove), or give --study NAME")
        setup = {
            "search space": {key: distribution_to_json(distribution) for key, distribution in space.items()},
            "list of seeds": seeds, "metric": metric, "recipe, or its data or code": training_fingerprint(config),
        }  # fmt: skip
        for key, value in setup.items():
            if self.study.user_attrs.get(key, value) != value:
                raise UserError(f"study {name} in {STORAGE} has another {key}; start a new one: --study NAME")
            self.study.set_user_attr(key, value)
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):  # their process was killed
            self.study.enqueue_trial(trial.params, {"experiment": self._experiment(trial)})
            self.study.tell(trial.number, state=TrialState.FAIL)
        if not self.study.trials:
            self.study.enqueue_trial(present)

    def run(self, trials: int, jobs: int) -> None:
        """Run trials, `jobs` at once, until the study has as many as `trials`; a signal stops them."""
        with SignalHandler() as self.stop, gpu_environments(jobs) as gpus, ThreadPoolExecutor(jobs) as pool:
            workers = [pool.submit(self._work, trials, gpus[slot % len(gpus)]) for slot in range(jobs)]
        if self.stop():
            click.echo("stopped; the same command resumes", err=True)
            sys.exit(128 + self.stop())
        for worker in workers:
            worker.result()

    def _work(self, trials: int, variables: dict[str, str]) -> None:
        """Run trials one after another."""
        while True:
            with self.lock:
                if self.stop() or len(self._trials()) >= trials:
                    return
                trial = self.study.ask(self.space)
                name = self._experiment(trial)
                trial.set_user_attr("experiment", name)
            try:
                pruned = self._run_trial(trial, name, variables)
            except UserError as error:
                if self.stop():
                    return
                click.echo(f"{name} failed: {error}")
                trial.set_user_attr("error", str(error))
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            state = "pruned" if pruned else "complete"
            seed_metrics = self.resampled[name].iloc[0].to_dict()
            trial.set_user_attr("seed_metrics", seed_metrics)
            mean = statistics.mean(seed_metrics.values())
            trial.report(mean, len(seed_metrics))
            self._log_to_mlflow(name, state)
            self.study.tell(trial, None if pruned else mean, TrialState[state.upper()])
            click.echo(f"{name} {state}: mean {METRIC_LABELS[self.metric]} {mean:.4f} of {len(seed_metrics)} seeds")

    def _run_trial(self, trial: Trial, name: str, variables: dict[str, str]) -> bool:
        """Train seed by seed, evaluate them and the bag, and return whether the trial was pruned."""
        for count in range(1 if self._best() else len(self.seeds), len(self.seeds) + 1):
            seeds = self.seeds[:count]
            self._run_experiment(name, trial.params, seeds, "bag" if seeds == self.seeds else "evaluate", variables)
            self.resampled.pop(name, None)  # of fewer seeds
            recipe, best = self._read(name), self._best()  # another trial may have become the best one meanwhile
            if best is None:
                continue
            check_same_images(self._read(self._experiment(best)), recipe)
            if seeds != self.seeds and self._is_worse(trial, best):
                self._run_experiment(name, trial.params, seeds, "bag", variables)
                return True
        return False

    def _is_worse(self, trial: Trial, best: FrozenTrial) -> bool:
        ours, theirs = (self.resampled[self._experiment(one)] for one in (trial, best))
        others = [other for other in self.study.trials if "seed_metrics" in other.user_attrs]
        by_params = {_key(trial): ours.iloc[0].to_dict()}  # and so without repetitions
        by_params |= {_key(other): other.user_attrs["seed_metrics"] for other in others}
        complete = sum(other.state == TrialState.COMPLETE for other in others)
        return is_worse(ours, theirs, pd.DataFrame(list(by_params.values())), complete)

    def _run_experiment(
        self, name: str, params: dict[str, Any], seeds: list[int], target: str, variables: dict[str, str]
    ) -> None:
        """Replace the DVC experiment of a trial by one with these seeds; those that are trained come from DVC's cache.

        Raises:
            UserError: a stage failed, or was interrupted.
        """
        overrides = [f"++{key}={value}" for key, value in params.items()] + [f"seeds={seeds}".replace(" ", "")]
        options, pull = [option for override in overrides for option in ("-S", override)], []
        if self.start_seed:
            from stages.ray_backend import wait_for_seeds

            new = [seed for seed in seeds if (name, seed) not in self.pushed]
            wait_for_seeds([self.start_seed(seed, ["-n", name, *options]) for seed in new], self.stop)
            self.pushed |= {(name, seed) for seed in new}
            pull = ["--pull"]
        command, log = ["dvc", "--wait-for-lock", "exp"], Path("logs", f"{name}.log")
        # With --force, DVC would replace the experiment of this name, but train again what it has in its cache.
        if name in list_experiments():
            subprocess.run([*command, "remove", name], capture_output=True, check=False)
        run = [*command, "run", "--temp", *pull, "-n", name, *options, target]
        process = start_logged(run, log, variables, pass_fds=[self.lock_file])
        while process.poll() is None and not self.stop():
            time.sleep(0.2)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)  # DVC ignores it while a stage runs
        if process.wait():
            raise UserError(f"{first_error(log)} (see {log})")

    def _read(self, name: str) -> Recipe:
        """Read an experiment and the metric of its seeds, unless they have been read.

        Raises:
            UserError: an out is missing, or the metric is undefined.
        """
        with self.lock:
            if name not in self.resampled:
                self.recipes[name] = load_experiment(name)
                self.resampled[name] = resample_metric(self.recipes[name], self.metric)
                if self.resampled[name].iloc[0].isna().any():
                    raise UserError(f"{METRIC_LABELS[self.metric]} is undefined: validation images of one class only")
            return self.recipes[name]

    def _experiment(self, trial: Trial | FrozenTrial) -> str:
        """Return the name of a trial's DVC experiment, which a trial keeps when it is resumed."""
        return str(trial.user_attrs.get("experiment", f"{self.name}-{trial.number}"))

    def _trials(self) -> list[FrozenTrial]:
        """Return the trials that run or have ended, without the waiting ones and those whose process was killed."""
        states = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
        return [trial for trial in self.study.trials if trial.state in states or "error" in trial.user_attrs]

    def _best(self) -> FrozenTrial | None:
        """Return the best complete trial."""
        complete = self.study.get_trials(states=[TrialState.COMPLETE])
        return max(complete, key=lambda trial: trial.value or 0.0, default=None)

    def _log_to_mlflow(self, name: str, state: str) -> None:
        config, tags = self.recipes[name].config, {"study": self.name, "trial": name, "trial_state": state}
        with self.lock:
            try:
                store, seed, method = connect(config.model_name), config.model_names[0], config.active.bag.method
                finish_parent_of_copy(store, seed, method, lambda path: str(dvc.api.read(path, rev=name)), tags)
            except (UserError, MlflowException) as error:  # `cxr sync` logs the experiment once it is applied
                click.echo(f"{name} is not complete in MLflow: {first_line(error)}")

    def print_results(self) -> None:
        """Print the trials, the best one first, and how to apply it and to compare it on all seeds."""
        trials, best, metric = self._trials(), self._best(), METRIC_LABELS[self.metric]
        failed = {self._experiment(trial): trial.user_attrs["error"] for trial in trials if "error" in trial.user_attrs}
        errors = [f"{name} failed: {error}" for name, error in failed.items()]
        if best is None:
            raise UserError(f"no trial of study {self.name} is complete: {errors[0] if errors else 'none has run'}")
        keys = [key.partition(".")[2] for key in self.space]
        table = Table("trial", *keys, f"mean {metric}", "difference to the best", "seeds", "state")
        trials.sort(key=lambda trial: (trial.number != best.number, trial.state.name, -(trial.value or 0.0)))
        for trial in trials:
            seed_metrics, cells = trial.user_attrs.get("seed_metrics", {}), ["–", "–"]
            if seed_metrics:
                differences = [value - best.user_attrs["seed_metrics"][seed] for seed, value in seed_metrics.items()]
                cells = [f"{statistics.mean(seed_metrics.values()):.4f}", f"{statistics.mean(differences):+.4f}"]
            params = [_format(trial.params.get(key, "")) for key in self.space]
            name, state = self._experiment(trial), trial.state.name.lower()
            table.add_row(name, *params, *cells, str(len(seed_metrics)), "failed" if name in failed else state)
        print_table(table)
        for error in errors:
            click.echo(error)
        name, seeds = self._experiment(best), ",".join(str(seed) for seed in self.config.seeds)
        if best.params == self.present:
            click.echo(f"{name} is the best of {len(trials)} trials, and has the present values.")
            return
        click.echo(
            f"{name} is the best of {len(trials)} trials on the images that selected it, so its {metric} is "
            "optimistic. To apply it, and to compare it on all seeds with the present recipe:\n"
            f"  dvc exp apply {name}\n"
            f"  dvc exp run -n {name}-all-seeds -S 'seeds=[{seeds}]' && cxr compare HEAD {name}-all-seeds"
        )


def _key(trial: Trial | FrozenTrial) -> str:
    return str(sorted(trial.params.items()))


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
