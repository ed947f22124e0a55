"""The parent runs of the trials of a hyperparameter search, which `promote` completes only for what is applied."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.core.config import Config
from pipeline.core.files import read_csv, read_json
from pipeline.tracking.runs import find_run, log_summary, seed_statistics
from pipeline.tracking.store import connect

FILES = ["metrics/bag.json", "metrics/seeds.csv"]  # of the outs, besides a model.json


def finish_trial(folder: Path, config: Config, tags: Mapping[str, str]) -> None:
    """Complete and close the parent run of a trial, unless MLflow has none: then all its seeds came from DVC's cache.

    Args:
        folder: with models/seed-K/model.json of its first seed, metrics/bag.json, and metrics/seeds.csv.
        config: its parameters.
        tags: of the run: the study, the trial and its state.
    """
    store = connect(config.model_name)
    fingerprint = read_json(folder / "models" / config.model_names[0] / "model.json")["parent_fingerprint"]
    run = find_run(store, fingerprint)
    if run is None:
        return
    for key, value in tags.items():
        store.client.set_tag(run.info.run_id, key, value)
    bag = read_json(folder / "metrics/bag.json")[config.active.bag.method]
    seeds = read_csv(folder / "metrics/seeds.csv").set_index("metric")
    log_summary(store.client, run.info.run_id, {**bag, **seed_statistics(seeds)})
    store.client.set_terminated(run.info.run_id, "FINISHED")
