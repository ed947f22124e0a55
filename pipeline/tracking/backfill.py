"""Completes MLflow from DVC's files: runs, registered versions, descriptions."""

import tempfile
from pathlib import Path

import numpy as np
from mlflow.entities.model_registry import ModelVersion

from pipeline.core.config import BAG, Config
from pipeline.core.files import md5_of_file, read_csv, read_json, write_csv
from pipeline.data.manifest import read_split
from pipeline.evaluation import ensemble
from pipeline.inference import candidate
from pipeline.tracking import fingerprint, registry, version_card, weights
from pipeline.tracking.runs import MANIFEST, SeedRun, commit_and_experiment_tags, finish_parent, parent_run
from pipeline.tracking.store import Store, retry_conflicts
from pipeline.tracking.validation_predictions import ValidationPredictions

SUMMARY = Path("metrics/summary.json")
SPLIT_FILE = Path("data/split.csv")


@retry_conflicts
def backfill(store: Store, config: Config) -> dict[str, ModelVersion]:
    """Create what is missing in MLflow, runs and registered versions; return the version of every candidate by name.

    Raises:
        UserError: MLflow cannot be used, or a model is not up to date.
    """
    configs, fingerprints = ensemble.load_candidate_configs(config), fingerprint.candidate_fingerprints(config)
    ensemble.check_weights(config.model_names)
    predictions = ValidationPredictions(config)
    parent = parent_run(store, config, fingerprints[BAG])
    run_ids = {BAG: parent.info.run_id}
    for seed, name in zip(config.seeds, config.model_names, strict=True):
        run = SeedRun(store, config, parent, seed, fingerprints[name])
        run.finish(Path("models", name))
        run_ids[name] = run.run_id
    intervals = read_csv(Path("metrics/intervals.csv"))
    estimates = {name: version_card.estimates_of(intervals, config, name) for name in configs}
    headline = {key: value for key, value in read_json(SUMMARY)["bag"].items() if type(value) is float}
    bag = read_json(Path("metrics/bag.json"))[config.active.bag.method]
    bag |= {key: headline[key] for key in bag if key in headline}  # corrected where members were selected
    scores = {**read_json(Path("metrics/evaluate.json")), BAG: bag}
    seeds = read_csv(Path("metrics/seeds.csv")).set_index("metric")
    finish_parent(store, parent, Path("report"), headline | bag, seeds)

    table = read_split(MANIFEST.parent, config.active.split.validation_folds)
    example = np.load("data/images.npy", mmap_mode="r")[table.index[table["subset"] == "validation"][0]]
    tags = {"data_md5": md5_of_file(MANIFEST), "split_md5": md5_of_file(SPLIT_FILE), **commit_and_experiment_tags()}
    versions = {}
    for name, ensemble_config in configs.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, registry.ARTIFACT)
            candidate.assemble_candidate(folder, Path("models"), ensemble_config, config.active.finding)
            write_csv(folder / registry.LABELED_IMAGES, predictions.labeled_images(name))
            versions[name] = registry.register_candidate(
                store, config.model_name, run_ids[name], folder, example, {"candidate": name, **tags}
            )
    weights.remove_copies(store, run_ids, versions)
    metrics = {str(version.version): {"f1": scores[name]["f1"], **scores[name]} for name, version in versions.items()}
    validation_digest = f"{tags['data_md5'][:8]}-{tags['split_md5'][:8]}"
    registry.complete_logged_models(store, config.model_name, metrics, validation_digest)
    registry.set_introduction(store, config.model_name, config.active.finding)
    model_card = Path("report/model-card.md").read_text(encoding="utf-8")
    for name, version in versions.items():
        all_tags = version.tags | store.client.get_run(run_ids[name]).data.tags
        card = version_card.describe_candidate(config, name, all_tags, estimates[name], model_card)
        registry.set_card(store, version, card, version_card.format_f1(estimates[name]))
    return versions
