"""Tune hyperparameters."""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import click

from pipeline.core.errors import UserError, first_line, rename_in_errors
from stages.common import check_git, print_table, stage
from stages.train_all import gpu_environments

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from pipeline.core.config import Config
    from pipeline.evaluation.paired_pruning import TrialMetrics

STORAGE = "optuna.db"
PARAMS = Path("params.yaml")
METRICS = ["auroc", "average_precision", "balanced_accuracy", "f1"]  # higher is better


@stage
@click.argument("space", metavar="KEY=VALUES...", nargs=-1, required=True)
@click.option("--trials", metavar="N", type=click.IntRange(1), default=20, show_default=True, help="Trials in all.")
@click.option("--seeds", metavar="LIST", help="Seeds of each trial.", show_default="the first three of params.yaml")
@click.option(
    "--metric", type=click.Choice(METRICS), default="auroc", show_default=True, help="Metric to maximize, on average."
)
@click.option("--study", "name", metavar="NAME", default="tune", show_default=True, help="Name of the study.")
@click.option("--jobs", metavar="N", type=click.IntRange(1), default=1, show_default=True, help="Trials at once.")
@click.option("--ray", metavar="ADDRESS", help="Train on this Ray cluster.")
def tune(
    space: tuple[str, ...], trials: int, seeds: str | None, metric: str, name: str, jobs: int, ray: str | None
) -> None:
    """Search for better values of keys of params.yaml with Optuna, and show the trials.

    KEY=VALUES is KEY=A,B or KEY=interval(LOW,HIGH), KEY=log(LOW,HIGH) (uniform in the logarithm), or
    KEY=range(START,STOP,STEP) (without STOP). Each trial is a DVC experiment, NAME-0, NAME-1, …, the first one with
    the present values. A trial stops after a seed if it is worse than the best one by a paired comparison. The study is
    kept in optuna.db: the same command resumes it, also after a kill, and a larger N extends it.
    """
    from pipeline.core.config import load_config
    from pipeline.training.search_space import parse_search_space

    config = load_config()
    distributions, present = parse_search_space(space, config, _apply)
    trial_seeds = config.seeds[:3]
    if seeds:
        _apply("seeds", f"[{seeds}]")
        trial_seeds = [int(seed) for seed in seeds.split(",")]
    _apply("seeds", f"[{trial_seeds[0]}]")  # as bag.members must allow
    check_git()
    if ray:
        from stages.ray_backend import open_cluster
    with _lock_study() as lock:
        if subprocess.run(["dvc", "--wait-for-lock", "repro", "weights", "split"], check=False).returncode:
            raise UserError("a stage before training failed; see the output of dvc repro above")
        tuner = Tuner(config, trial_seeds, metric, name, lock)
        tuner.open_study(distributions, present)
        if ray:
            tuner.start_seed = open_cluster(ray, config)
        tuner.run(trials, jobs)
        tuner.print_results()


def _apply(key: str, value: str) -> "Config":
    """Return the configuration in which a key has another value, as `dvc exp run -S` sets it."""
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from pipeline.core.config import load_config

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, PARAMS.name)
        path.write_bytes(PARAMS.read_bytes())
        try:
            apply_overrides(path, [f"++{key}={value}"])
        except (DvcException, HydraException, OmegaConfBaseException) as error:
            raise UserError(f"{key}={value}: {first_line(error)}") from None
        with rename_in_errors({str(path): str(PARAMS)}):
            return load_config(path)


@contextmanager
def _lock_study() -> Iterator[int]:
    """Lock optuna.db during the block, and yield the lock's file descriptor, which the commands of trials inherit.

    So a search waits for another one, and for trials that outlived one that was killed.
    """
    import fcntl

    lock = os.open(f"{STORAGE}.lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            click.echo("waiting for another cxr tune in this workspace, or for a trial that it left running")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


class Tuner:
    """A search: Optuna chooses parameters, `dvc exp run` trains, and paired comparisons stop trials that are worse."""

    def __init__(self, config: "Config", seeds: list[int], metric: str, name: str, lock_file: int) -> None:
        self.config, self.seeds, self.metric, self.name, self.lock_file = config, seeds, metric, name, lock_file
        self.lock, self.processes = RLock(), set[subprocess.Popen[bytes]]()
        self.metrics: dict[str, TrialMetrics] = {}  # by experiment
        self.stop: Callable[[], int] = lambda: 0
        self.start_seed: Callable[..., Any] | None = None  # on a Ray cluster, from which the seeds in
        self.pushed: set[tuple[str, int]] = set()  # are in the DVC remote

    def open_study(self, space: "dict[str, BaseDistribution]", present: dict[str, Any]) -> None:
        """Create the study, or open it and put the trials of a process that was killed back into its queue."""
        import optuna
        from optuna.distributions import distribution_to_json
        from optuna.trial import TrialState

        from pipeline.tracking.fingerprint import training_fingerprint

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = space
        self.study = optuna.create_study(
            storage=f"sqlite:///{STORAGE}", study_name=self.name, direction="maximize", load_if_exists=True
        )
        # With the same seed, a resumed sampler would draw the same parameters again.
        self.study.sampler = optuna.samplers.TPESampler(seed=len(self.study.trials))
        setup = {
            "search space": {key: distribution_to_json(distribution) for key, distribution in space.items()},
            "list of seeds": self.seeds, "metric": self.metric,
            "recipe, or its data or code": training_fingerprint(self.config),
        }  # fmt: skip
        known = self.study.user_attrs
        for key, value in setup.items():
            if known.setdefault(key, value) != value:
                raise UserError(f"study {self.name} in {STORAGE} has another {key}; start a new one: --study NAME")
            self.study.set_user_attr(key, value)
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            experiment = trial.user_attrs.get("experiment", f"{self.name}-{trial.number}")
            self.study.enqueue_trial(trial.params, {"experiment": experiment})
            self.study.tell(trial.number, state=TrialState.FAIL)
        if not self.study.trials:
            self.study.enqueue_trial(present)

    def run(self, trials: int, jobs: int) -> None:
        """Run trials, `jobs` at once, until the study has as many as `trials`; a signal stops them."""
        from pipeline.training.signals import SignalHandler

        with SignalHandler() as self.stop, gpu_environments(jobs) as gpus, ThreadPoolExecutor(jobs) as pool:
            workers = [pool.submit(self._work, trials, gpus[slot % len(gpus)]) for slot in range(jobs)]
            while not all(worker.done() for worker in workers):
                time.sleep(0.2)
                while self.stop() and self.processes:
                    os.killpg(self.processes.pop().pid, signal.SIGINT)  # DVC ignores it while a stage runs
        if self.stop():
            click.echo("stopped; the same command resumes", err=True)
            sys.exit(128 + self.stop())
        for worker in workers:
            worker.result()

    def _work(self, trials: int, variables: dict[str, str]) -> None:
        """Run trials one after another."""
        from optuna.trial import TrialState

        from pipeline.evaluation.metrics import METRIC_LABELS

        while True:
            with self.lock:
                if self.stop() or len(self._trials()) >= trials:
                    return
                trial = self.study.ask(self.space)
                name = trial.user_attrs.get("experiment", f"{self.name}-{trial.number}")
                trial.set_user_attr("experiment", name)
            try:
                state = "pruned" if self._run_trial(trial, name, variables) else "complete"
            except UserError as error:
                if self.stop():
                    return
                click.echo(f"{name} failed: {error}")
                trial.set_user_attr("error", str(error))
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            values = self.metrics[name].values
            trial.set_user_attr("values", values)
            mean = statistics.mean(values.values())
            trial.report(mean, len(values))
            self._log_to_mlflow(name, state)
            self.study.tell(trial, mean if state == "complete" else None, TrialState[state.upper()])
            click.echo(f"{name} {state}: mean {METRIC_LABELS[self.metric]} {mean:.4f} of {len(values)} seeds")

    def _run_trial(self, trial: "Trial", name: str, variables: dict[str, str]) -> bool:
        """Train seed by seed, evaluate them and the bag, and return whether the trial was pruned."""
        from pipeline.evaluation.compare_recipes import check_same_images

        best = self._best()
        for count in range(1 if best else len(self.seeds), len(self.seeds) + 1):
            seeds = self.seeds[:count]
            targets = ["bag"] if seeds == self.seeds else [f"train@{seed}" for seed in seeds]
            self._run_experiment(name, trial.params, seeds, targets, variables)
            recipe = self._read_metrics(name, seeds).recipe
            if best is None:
                continue
            best = self._best() or best  # another trial may have become the best one meanwhile
            check_same_images(self._read_metrics(best, self.seeds).recipe, recipe)
            if seeds != self.seeds and self._difference(name, best)[2] < 0:
                self._run_experiment(name, trial.params, seeds, ["bag"], variables)
                return True
        return False

    def _run_experiment(
        self, name: str, params: dict[str, Any], seeds: list[int], targets: list[str], variables: dict[str, str]
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
        if subprocess.run(["git", "for-each-ref", f"refs/exps/*/*/{name}"], capture_output=True, check=False).stdout:
            subprocess.run([*command, "remove", name], capture_output=True, check=False)
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, "run", "--temp", *pull, "-n", name, *options, *targets],
                env=os.environ | {"GOMP_SPINCOUNT": "0"} | variables, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=[self.lock_file],
            )  # fmt: skip
        self.processes.add(process)
        code = process.wait()
        self.processes.discard(process)
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            errors = [line[len("error: ") :] for line in lines if line.lower().startswith("error: ")]
            raise UserError(f"{errors[0] if errors else 'no error message'} (see {log})")

    def _read_metrics(self, name: str, seeds: list[int]) -> "TrialMetrics":
        """Read the metric of a trial's seeds from its DVC experiment."""
        from pipeline.evaluation.paired_pruning import TrialMetrics, load_trial, seed_files

        with self.lock:
            known = self.metrics.get(name)
            if known is None or len(known.values) != len(seeds):
                with tempfile.TemporaryDirectory() as scratch:
                    _fetch(name, seed_files(seeds), Path(scratch))
                    self.metrics[name] = TrialMetrics(load_trial(Path(scratch), name, seeds), self.metric)
            return self.metrics[name]

    def _trials(self) -> "list[FrozenTrial]":
        """Return the trials that run or have ended, without the waiting ones and those whose process was killed."""
        return [
            trial
            for trial in self.study.trials
            if trial.state.name in ("RUNNING", "COMPLETE", "PRUNED") or "error" in trial.user_attrs
        ]

    def _best(self) -> str | None:
        """Return the experiment of the best complete trial."""
        complete = [trial for trial in self.study.trials if trial.state.name == "COMPLETE"]
        return max(complete, key=lambda trial: trial.value or 0.0).user_attrs["experiment"] if complete else None

    def _difference(self, name: str, best: str) -> tuple[float, float, float]:
        """Compare a trial, whose metrics have been read, with the best one."""
        from pipeline.evaluation.paired_pruning import paired_difference

        others = [
            trial.user_attrs["values"]
            for trial in self._trials()
            if "values" in trial.user_attrs and trial.user_attrs["experiment"] not in (name, best)
        ]
        with self.lock:
            return paired_difference(self.metrics[name].samples, self._read_metrics(best, self.seeds).samples, others)

    def _log_to_mlflow(self, name: str, state: str) -> None:
        from pipeline.tracking.trial_runs import FILES, finish_trial

        config = self.metrics[name].recipe.config
        with self.lock, tempfile.TemporaryDirectory() as scratch:
            _fetch(name, [f"models/{config.model_names[0]}/model.json", *FILES], Path(scratch))
            try:
                finish_trial(Path(scratch), config, {"study": self.name, "trial": name, "trial_state": state})
            except UserError as error:  # the experiment is complete, and `cxr sync` logs it once it is applied
                click.echo(f"{name} is not complete in MLflow: {error}")

    def print_results(self) -> None:
        """Print the trials, the best one first, and how to apply and confirm it."""
        from rich.table import Table

        from pipeline.evaluation.metrics import METRIC_LABELS

        best, metric = self._best(), METRIC_LABELS[self.metric]
        if best is None:
            errors = [trial.user_attrs["error"] for trial in self._trials() if "error" in trial.user_attrs]
            raise UserError(f"no trial of study {self.name} is complete: {errors[0] if errors else 'none has run'}")
        table = Table("trial", *(key.partition(".")[2] for key in self.space), f"mean {metric}")
        for header in ("difference to the best", "95 % interval", "seeds", "state"):
            table.add_column(header)
        trials = sorted(self._trials(), key=lambda trial: (trial.state.name, -(trial.value or 0.0)))
        for trial in sorted(trials, key=lambda trial: trial.user_attrs["experiment"] != best):
            name, values = trial.user_attrs["experiment"], trial.user_attrs.get("values", {})
            params = [_format(trial.params.get(key, "")) for key in self.space]
            cells = ["–"] * 3
            if values:
                self._read_metrics(name, self.seeds[: len(values)])
                mean, low, high = self._difference(name, best)
                cells[0] = f"{statistics.mean(values.values()):.4f}"
                if name != best:
                    cells[1:] = [f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}" if low < high else "–"]
            state = "failed" if "error" in trial.user_attrs else trial.state.name.lower()
            table.add_row(name, *params, *cells, str(len(values)), state)
        print_table(table)
        for trial in trials:
            if "error" in trial.user_attrs:
                click.echo(f"{trial.user_attrs['experiment']} failed: {trial.user_attrs['error']}")
        seeds = ",".join(str(seed) for seed in self.config.seeds)
        click.echo(
            f"{best} is the best of {len(trials)} trials on the images that selected it, so its {metric} is "
            "optimistic. To apply it, and to compare it on all seeds with the present recipe:\n"
            f"  dvc exp apply {best}\n"
            f"  dvc exp run -n {best}-confirmed -S 'seeds=[{seeds}]' && cxr compare HEAD {best}-confirmed"
        )


def _fetch(experiment: str, paths: list[str], folder: Path) -> None:
    """Copy outs and params.yaml of a DVC experiment to a folder.

    Raises:
        UserError: they are neither in the experiment nor in DVC's cache.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.scm import SCMError

    try:
        files = DVCFileSystem(".", rev=experiment)
        for path in paths:
            files.get_file(path, str(folder / path))
    except (FileNotFoundError, DvcException, SCMError) as error:
        raise UserError(f"DVC experiment {experiment}: {first_line(error)}; start a new study: --study NAME") from None


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    tune()
