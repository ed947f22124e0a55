"""Completes MLflow from DVC's files (`backfill`), and decides which candidate is champion (`promote_best`)."""

import tempfile
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
import pandas as pd
import torch
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.core.config import BAG, Config, PromoteParams
from pipeline.core.errors import UserError
from pipeline.core.files import DamagedFileError, md5_of_file, read_csv, read_json, write_json
from pipeline.data import images, layout
from pipeline.data.manifest import read_split
from pipeline.evaluation import calibration, ensemble
from pipeline.evaluation.intervals import MetricDifference, compare_f1
from pipeline.evaluation.metrics import Scores, best_model, score_predictions
from pipeline.inference import candidate
from pipeline.inference.candidate import BATCH_SIZE, Candidate
from pipeline.tracking import fingerprint, registry
from pipeline.tracking.runs import (
    MANIFEST,
    SeedRun,
    commit_and_experiment_tags,
    finish_parent,
    parent_run,
    runs_of_removed_experiments,
)
from pipeline.tracking.store import Store, connect

DECISIONS = Path("metrics/promotion.json")
SPLIT_FILE = Path("data/split.csv")


class Decision(TypedDict):
    """Whether a candidate became champion and why; metrics that the decision did not need are None."""

    run: str | None  # name of the parent run in MLflow
    candidate: str
    version: str
    promoted: bool
    reason: str
    f1: float | None
    champion_f1: float | None
    difference: float | None
    low: float | None
    high: float | None
    probability: float | None
    calibration_error: float | None
    data_md5: str


def backfill(store: Store, config: Config) -> dict[str, ModelVersion]:
    """Create what is missing in MLflow, runs and registered versions; return the version of every candidate by name.

    Raises:
        UserError: MLflow cannot be used, or a model is not up to date.
    """
    configs, fingerprints = ensemble.load_candidate_configs(config), fingerprint.candidate_fingerprints(config)
    parent = parent_run(store, config, fingerprints[BAG])
    run_ids = {BAG: parent.info.run_id}
    for seed, name in zip(config.seeds, config.model_names, strict=True):
        run = SeedRun(store, config, parent, seed, fingerprints[name])
        run.finish(Path("models", name))
        run_ids[name] = run.run_id
    finish_parent(store, parent, Path("report"), read_json(Path("metrics/bag.json"))[config.active.bag.method])

    table = read_split(MANIFEST.parent)
    example = np.load("data/images.npy", mmap_mode="r")[table.index[table["subset"] == "validation"][0]]
    tags = {"data_md5": md5_of_file(MANIFEST), "split_md5": md5_of_file(SPLIT_FILE), **commit_and_experiment_tags()}
    versions = {}
    for name, ensemble_config in configs.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, registry.ARTIFACT)
            candidate.assemble_candidate(folder, Path("models"), ensemble_config)
            versions[name] = registry.register_candidate(
                store, config.model_name, run_ids[name], folder, example, {"candidate": name, **tags}
            )
    registry.set_model_description(store, config.model_name, Path("report/model-card.md").read_text(encoding="utf-8"))
    return versions


def promote_best(store: Store, config: Config, versions: Mapping[str, ModelVersion]) -> Decision:
    """Make the best candidate challenger, and champion if it passes the gate.

    The decision is appended to metrics/promotion.json and set as tags of the version. A repeated call changes nothing.

    Args:
        store: the store of the registered model.
        config: its active profile has the requirements.
        versions: the version of every candidate by name, as returned by `backfill`.

    Raises:
        UserError: the files of the best candidate are missing or changed.
    """
    name, predictions = config.model_name, ValidationPredictions(config)
    best = best_model(predictions.scores)
    registry.load_version(versions[best])
    store.client.set_registered_model_alias(name, registry.CHALLENGER, versions[best].version)
    registry.reconcile_alias(store, name)
    while True:
        champion = registry.get_champion(store, name)
        decision = decide(config, predictions, versions, best, champion, registry.overruled_up_to(store, name))
        with store.lock:
            if _number(registry.get_champion(store, name)) != _number(champion):
                continue  # another process promoted a version meanwhile
            if _number(champion) != _number(versions[best]):
                _apply(store, versions[best], champion, decision)
            elif [row["version"] for row in _read_decisions()[-1:]] != [decision["version"]]:
                _append_decision(decision)  # already champion, but the last row is about another version
            return decision


def promote_version(config: Config, alias_or_number: str, reason: str, *, rollback: bool = False) -> Decision:
    """Make a version champion without the gate, and record that as `promote_best` does.

    Args:
        config: names the registered model.
        alias_or_number: the version.
        reason: why, shown by `cxr history`.
        rollback: whether this restores the previous champion.

    Raises:
        UserError: the version does not exist, is already champion, or its files are missing or changed.
    """
    store, name = connect(config.model_name), config.model_name
    with store.lock:
        version, champion = registry.get_version(store, name, alias_or_number), registry.get_champion(store, name)
        if _number(champion) == _number(version):
            raise UserError(f"{name}: version {version.version} is already champion; see: cxr history")
        tags = {key: version.tags.get(key, "") for key in ("candidate", "data_md5")}
        fields = {**tags, "version": str(version.version), "promoted": True, "reason": reason}
        decision: Decision = {**dict.fromkeys(Decision.__annotations__), **fields}  # type: ignore[typeddict-item]
        _apply(store, version, champion, decision, manual=True, rollback=rollback)
    return decision


def format_decision(name: str, decision: Decision) -> str:
    """Format a decision about the registered model `name` as one line."""
    outcome = "is champion" if decision["promoted"] else "is challenger, not champion"
    return f"{name} version {decision['version']} ({decision['candidate']}) {outcome}: {decision['reason']}"


def removable_runs(
    store: Store, name: str, versions: Collection[ModelVersion], experiments: Collection[str]
) -> list[Run]:
    """Return this workspace's runs of DVC experiments that no longer exist.

    Runs that are training, that have been champion, or that belong to the present candidates are never among them.

    Args:
        store: the store of the runs.
        name: the registered model.
        versions: the present candidates.
        experiments: names of the DVC experiments that exist.
    """
    kept = {version.run_id for version in versions}
    champions = {record.version for record in registry.champion_history(store, name)}
    kept |= {version.run_id for version in registry.list_versions(store, name) if str(version.version) in champions}
    kept |= {store.client.get_run(str(run_id)).data.tags.get(MLFLOW_PARENT_RUN_ID) for run_id in kept}
    return [run for run in runs_of_removed_experiments(store, experiments) if run.info.run_id not in kept]


def remove_runs(store: Store, name: str, runs: Collection[Run]) -> None:
    """Delete runs and their versions of the registered model `name`."""
    run_ids = {run.info.run_id for run in runs}
    for version in registry.list_versions(store, name):
        if version.run_id in run_ids:
            store.client.delete_model_version(name, str(version.version))
    for run_id in run_ids:
        store.client.delete_run(run_id)


class ValidationPredictions:
    """Labels of the validation set and all candidates' predictions for it."""

    def __init__(self, config: Config) -> None:
        predictions = read_csv(Path("predictions/validation.csv"))
        table = read_split(MANIFEST.parent).set_index("file").loc[predictions["file"]]
        self.files, self.labels = predictions["file"], predictions["label"].to_numpy()
        self.groups = table["group"].to_numpy()
        configs = ensemble.load_candidate_configs(config)
        combined = {name: ensemble.predict(predictions, ensemble_config) for name, ensemble_config in configs.items()}
        self.probabilities, self.predicted = (
            pd.DataFrame({name: table[column] for name, table in combined.items()})
            for column in ("probability", "label")
        )
        self.scores: Mapping[str, Scores] = {
            name: score_predictions(self.labels, self.probabilities[name].to_numpy(), self.predicted[name].to_numpy())
            for name in combined
        }

    def predict_with(self, model: Candidate) -> np.ndarray:
        """Return a model's labels for the validation set, decoding the images at the size that it needs."""
        members = layout.read_layout(Path("data/raw.zip")).images.set_index("file").loc[self.files, "member"]
        labels = []
        with zipfile.ZipFile("data/raw.zip") as archive:
            for start in range(0, len(members), BATCH_SIZE):
                try:
                    contents = [layout.read_member(archive, name) for name in members[start : start + BATCH_SIZE]]
                except DamagedFileError as error:
                    raise UserError(f"data/raw.zip: damaged ({error}); run: dvc repro -f download") from None
                pixels = [images.decode_radiograph(content, model.packed_size, model.resize)[0] for content in contents]
                labels.append(model.predict(torch.from_numpy(np.stack(pixels)))["label"])
        return np.concatenate(labels)


def decide(
    config: Config,
    predictions: ValidationPredictions,
    versions: Mapping[str, ModelVersion],
    best: str,
    champion: ModelVersion | None,
    overruled_up_to: int,
) -> Decision:
    """Decide whether the best candidate becomes champion.

    Args:
        config: its active profile has the requirements.
        predictions: of all candidates.
        versions: the version of every candidate by name.
        best: name of the candidate.
        champion: the present champion.
        overruled_up_to: the newest version that existed when a person chose the champion; 0 if the gate chose it.
            Versions up to this one do not replace it.
    """
    params, scores, challenger = config.active.promote, predictions.scores[best], versions[best]
    error = calibration.expected_calibration_error(predictions.labels, predictions.probabilities[best].to_numpy())
    decision: Decision = {
        "run": fingerprint.parent_run_name(config, fingerprint.candidate_fingerprints(config)[BAG]), "candidate": best,
        "version": str(challenger.version), "promoted": False, "reason": "", "f1": scores["f1"], "champion_f1": None,
        "difference": None, "low": None, "high": None, "probability": None, "calibration_error": error,
        "data_md5": md5_of_file(MANIFEST),
    }  # fmt: skip
    f1 = f"validation F1 {scores['f1']:.4f}"
    if champion and champion.version == challenger.version:
        return {**decision, "promoted": True, "reason": f"{f1}; already champion"}
    failures = check_requirements(params, scores, error)
    if failures:
        return {**decision, "reason": f"{f1}, but the requirements of promote are not met: {', '.join(failures)}"}
    if champion is None:
        return {**decision, "promoted": True, "reason": f"{f1}; there was no champion"}
    try:
        model = registry.load_version(champion)
    except UserError as load_error:
        return {**decision, "promoted": True, "reason": f"{f1}; the champion cannot be loaded: {load_error}"}
    if int(challenger.version) <= overruled_up_to:
        reason = (
            f"{f1}, but a person chose version {champion.version} instead; to change that: cxr promote --model "
            f"{challenger.version} --reason TEXT"
        )
        return {**decision, "reason": reason}

    # The champion's predictions exist if it is a candidate of the present run.
    candidates = [name for name, version in versions.items() if version.version == champion.version]
    labels = predictions.predicted[candidates[0]].to_numpy() if candidates else predictions.predict_with(model)
    leaked = not candidates and champion.tags.get("split_md5") != md5_of_file(SPLIT_FILE)
    comparison = compare_with_champion(params, predictions, best, labels)
    promoted = comparison["probability"] is not None and comparison["probability"] >= params.min_probability
    champion_f1 = scores["f1"] - comparison["difference"]
    reason = (
        f"{f1}; {'previous ' if promoted else ''}champion, version {champion.version}: {champion_f1:.4f}"
        f"{' (it may have been trained on these images)' if leaked else ''}; {format_comparison(params, comparison)}"
    )
    return {**decision, **comparison, "promoted": promoted, "champion_f1": champion_f1, "reason": reason}


def check_requirements(params: PromoteParams, scores: Scores, calibration_error: float) -> list[str]:
    """Return the requirements that a candidate does not meet, with its values; an undefined metric counts as 0."""
    sensitivity, specificity = scores["recall"] or 0.0, scores["specificity"] or 0.0
    requirements = {
        f"sensitivity {sensitivity:.3f} < {params.min_sensitivity}": sensitivity >= params.min_sensitivity,
        f"specificity {specificity:.3f} < {params.min_specificity}": specificity >= params.min_specificity,
        f"calibration error {calibration_error:.3f} > {params.max_calibration_error}": (
            calibration_error <= params.max_calibration_error
        ),
    }
    return [failure for failure, met in requirements.items() if not met]


def compare_with_champion(
    params: PromoteParams, predictions: ValidationPredictions, best: str, champion_labels: np.ndarray
) -> MetricDifference:
    """Compare the F1 of a candidate and the champion on the validation set by a paired bootstrap of the groups."""
    best_labels = predictions.predicted[best].to_numpy()
    return compare_f1(
        predictions.labels, predictions.groups, best_labels, champion_labels, params.resamples, params.margin
    )


def format_comparison(params: PromoteParams, comparison: MetricDifference) -> str:
    if comparison["probability"] is None:
        return "F1 is undefined in the bootstrap resamples"
    margin = f" by {params.margin}" if params.margin else ""
    return (
        f"difference {comparison['difference']:+.4f} (95% CI {comparison['low']:+.4f} to {comparison['high']:+.4f}), "
        f"probability that it is better{margin}: {comparison['probability']:.2f} (required: {params.min_probability})"
    )


def _apply(
    store: Store, version: ModelVersion, champion: ModelVersion | None, decision: Decision, **options: bool
) -> None:
    """Make the version champion if so decided, and record the decision in its tags and description and on disk."""
    if decision["promoted"]:
        registry.set_champion(store, version.name, version, decision["reason"], **options)
    tags = {
        "decision": f"{'promoted' if decision['promoted'] else 'not promoted'}: {decision['reason']}",
        "previous_champion": _number(champion) or "none",
        **{f"validation_{key}": decision[key] for key in ("f1", "calibration_error") if decision[key] is not None},
        **commit_and_experiment_tags(),
    }
    for key, value in tags.items():
        store.client.set_model_version_tag(version.name, version.version, key, str(value))
    store.client.update_model_version(version.name, version.version, f"{decision['candidate']}: {tags['decision']}")
    _append_decision(decision)


def _read_decisions() -> list[Decision]:
    return list(read_json(DECISIONS)["decisions"]) if DECISIONS.exists() else []


def _append_decision(decision: Decision) -> None:
    decisions = _read_decisions()
    if decisions[-1:] != [decision]:
        write_json(DECISIONS, {**decision, "decisions": [*decisions, decision]})


def _number(version: ModelVersion | None) -> str | None:
    return str(version.version) if version else None
