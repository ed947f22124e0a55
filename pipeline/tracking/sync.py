"""Making MLflow show what DVC holds: the runs, a version of the registered model per candidate, and the aliases."""

import tempfile
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd
import torch
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.core.config import Config
from pipeline.core.errors import UserError
from pipeline.core.files import md5_of_file, read_csv, read_json, write_json
from pipeline.data import images, layout
from pipeline.data.manifest import read_split
from pipeline.evaluation import calibration, ensemble
from pipeline.evaluation.ensemble import BAG
from pipeline.evaluation.intervals import compare_f1
from pipeline.evaluation.metrics import Scores, best_model, score_predictions
from pipeline.inference import candidate
from pipeline.inference.candidate import BATCH_SIZE, Candidate
from pipeline.tracking import fingerprint, registry
from pipeline.tracking.runs import (
    MANIFEST,
    SeedRun,
    commit_and_experiment_tags,
    finish_parent,
    orphaned_runs,
    parent_run,
)
from pipeline.tracking.store import Store, connect

DECISIONS = Path("metrics/promotion.json")
SPLIT_FILE = Path("data/split.csv")


class Decision(TypedDict):
    """Who was to become champion and whether it did; figures that the decision did not need are missing."""

    run: str | None  # the name of the parent run in MLflow
    candidate: str
    version: str
    promoted: bool
    why: str
    f1: float | None
    champion_f1: float | None
    difference: float | None
    low: float | None
    high: float | None
    probability: float | None
    calibration_error: float | None
    data: str


def promote_best(config: Config) -> Decision:
    """Complete runs and registry from what DVC holds, and let the best candidate try for champion.

    The decision becomes a row of metrics/promotion.json and tags of the version. Done twice, it changes nothing more.

    Raises:
        UserError: MLflow cannot be used, or the best candidate's files are not what they were.
    """
    store, name = connect(config.model_name), config.model_name
    versions = backfill(store, config)
    judged = ValidationPredictions(config)
    best = best_model(judged.scores)
    registry.load_version(versions[best])
    store.client.set_registered_model_alias(name, registry.CHALLENGER, versions[best].version)
    registry.reconcile_alias(store, name)
    while True:
        champion = registry.get_champion(store, name)
        decision = decide(config, judged, versions, best, champion, registry.get_override_version(store, name))
        with store.lock:
            if _number(registry.get_champion(store, name)) == _number(champion):  # nobody was promoted meanwhile
                if _number(champion) != _number(versions[best]):
                    _carry_out(store, versions[best], champion, decision)
                elif [one["version"] for one in _decisions()[-1:]] != [decision["version"]]:
                    _record(decision)  # that it is champion already, where the last row is about another one
                return decision


def promote_version(config: Config, wanted: str, why: str, *, rollback: bool = False) -> Decision:
    """Make a version champion, whatever the gate says, and write that down as `sync` does.

    Args:
        config: whose registered model it is.
        wanted: an alias or a number.
        why: for those who read `cxr history`.
        rollback: whether it goes back to an earlier champion.

    Raises:
        UserError: there is no such version, it is champion already, or its files are not what they were.
    """
    store, name = connect(config.model_name), config.model_name
    with store.lock:
        chosen, champion = registry.get_version(store, name, wanted), registry.get_champion(store, name)
        if _number(champion) == _number(chosen):
            raise UserError(f"{name}: version {chosen.version} is champion already; see: cxr history")
        about = {key: chosen.tags.get(key, "") for key in ("candidate", "data")}
        told = {**about, "version": str(chosen.version), "promoted": True, "why": why}
        decision: Decision = {**dict.fromkeys(Decision.__annotations__), **told}  # type: ignore[typeddict-item]
        _carry_out(store, chosen, champion, decision, by_hand=True, rollback=rollback)
    return decision


def format_decision(name: str, decision: Decision) -> str:
    """Put a decision about the registered model `name` into one line."""
    verdict = "is champion" if decision["promoted"] else "is challenger, not champion"
    return f"{name} version {decision['version']} ({decision['candidate']}) {verdict}: {decision['why']}"


def removable_runs(config: Config, experiments: Collection[str]) -> list[Run]:
    """Return this workspace's runs of DVC experiments that are not among `experiments`.

    What trains now, belongs to what is here, or was champion, is not among them.

    Raises:
        UserError: MLflow cannot be used.
    """
    store = connect(config.model_name)
    present = backfill(store, config).values()
    reigned = {reign.version for reign in registry.champion_history(store, config.model_name)}
    known = registry.list_versions(store, config.model_name)
    kept = {version.run_id for version in [*present, *(one for one in known if str(one.version) in reigned)]}
    kept |= {store.client.get_run(str(run_id)).data.tags.get(MLFLOW_PARENT_RUN_ID) for run_id in kept}
    return [run for run in orphaned_runs(store, experiments) if run.info.run_id not in kept]


def remove_runs(config: Config, runs: Collection[Run]) -> None:
    """Delete runs and the registered versions that are theirs."""
    store, ids = connect(config.model_name), {run.info.run_id for run in runs}
    for version in registry.list_versions(store, config.model_name):
        if version.run_id in ids:
            store.client.delete_model_version(config.model_name, str(version.version))
    for run_id in ids:
        store.client.delete_run(run_id)


def backfill(store: Store, config: Config) -> dict[str, ModelVersion]:
    """Make the runs and the registered versions that are missing; return the version of every candidate by name."""
    rules, parent = ensemble.load_candidate_configs(config), parent_run(store, config)
    runs = {BAG: parent.info.run_id}
    for seed, (name, mark) in zip(config.seeds, fingerprint.model_fingerprints(config).items(), strict=True):
        run = SeedRun(store, config, parent, seed, mark)
        run.finish(Path("models", name))
        runs[name] = run.run_id
    bag = config.active.bag
    finish_parent(store, parent, Path("report"), read_json(Path("metrics/bag.json"))[bag.method])

    table = read_split(MANIFEST.parent)
    example = np.load("data/images.npy", mmap_mode="r")[table.index[table["subset"] == "validation"][0]]
    versions, shared = (
        {},
        {"data": md5_of_file(MANIFEST), "split": md5_of_file(SPLIT_FILE), **commit_and_experiment_tags()},
    )
    for name, rule in rules.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, registry.ARTIFACT)
            candidate.assemble_candidate(folder, Path("models"), rule)
            versions[name] = registry.register_candidate(
                store, config.model_name, runs[name], folder, example, {"candidate": name, **shared}
            )
    registry.set_model_description(store, config.model_name, Path("report/model-card.md").read_text(encoding="utf-8"))
    return versions


class ValidationPredictions:
    """The validation set, and what the candidates say of it."""

    def __init__(self, config: Config) -> None:
        predictions = read_csv(Path("predictions/validation.csv"))
        table = read_split(MANIFEST.parent).set_index("file").loc[predictions["file"]]
        self.files, self.labels = predictions["file"], predictions["label"].to_numpy()
        self.groups = table["group"].to_numpy()
        rules = ensemble.load_candidate_configs(config)
        answers = {name: ensemble.predict(predictions, rule) for name, rule in rules.items()}
        self.probabilities, self.predicted = (
            pd.DataFrame({name: answer[column] for name, answer in answers.items()})
            for column in ("probability", "label")
        )
        self.scores: Mapping[str, Scores] = {
            name: score_predictions(self.labels, self.probabilities[name].to_numpy(), self.predicted[name].to_numpy())
            for name in answers
        }

    def predict_with(self, other: Candidate) -> np.ndarray:
        """Return the labels that a model, which may want other squares, gives to the files of the validation set."""
        members = layout.read_layout(Path("data/raw.zip")).images.set_index("file").loc[self.files, "member"]
        labels = []
        with zipfile.ZipFile("data/raw.zip") as archive:
            for start in range(0, len(members), BATCH_SIZE):
                contents = [layout.read_member(archive, name) for name in members[start : start + BATCH_SIZE]]
                pixels = [images.decode_radiograph(content, other.packed_size, other.resize)[0] for content in contents]
                labels.append(other.predict(torch.from_numpy(np.stack(pixels)))["label"])
        return np.concatenate(labels)


def decide(
    config: Config,
    judged: ValidationPredictions,
    versions: Mapping[str, ModelVersion],
    best: str,
    champion: ModelVersion | None,
    decided_over: int,
) -> Decision:
    """Hold the best candidate against what is required, and against the champion on the same images.

    Where a person chose the champion, versions up to `decided_over` were there then, and are not asked again.
    """
    params, scores = config.active.promote, judged.scores[best]
    error = calibration.expected_calibration_error(judged.labels, judged.probabilities[best].to_numpy())
    decision: Decision = {
        "run": fingerprint.parent_run_name(config, fingerprint.training_fingerprint(config)), "candidate": best,
        "version": str(versions[best].version), "promoted": False, "why": "", "f1": scores["f1"], "champion_f1": None,
        "difference": None, "low": None, "high": None, "probability": None, "calibration_error": error,
        "data": md5_of_file(MANIFEST),
    }  # fmt: skip
    figure = f"validation F1 {scores['f1']:.4f}"
    if champion and champion.version == versions[best].version:
        return {**decision, "promoted": True, "why": f"{figure}; it is champion already"}
    required: list[tuple[str, Any, bool]] = [
        ("sensitivity", scores["recall"], (scores["recall"] or 0) >= params.min_sensitivity),
        ("specificity", scores["specificity"], (scores["specificity"] or 0) >= params.min_specificity),
        ("calibration error", error, error <= params.max_calibration_error),
    ]
    missed = [f"{name} {value:.3f}" for name, value, met in required if not met]
    if missed:
        return {**decision, "why": f"{figure}, but its {' and '.join(missed)} miss what promote requires"}
    if champion is None:
        return {**decision, "promoted": True, "why": f"{figure}; there was no champion"}

    try:
        other = registry.load_version(champion)
    except UserError as broken:
        return {**decision, "promoted": True, "why": f"{figure}; the champion cannot be used any more: {broken}"}
    if int(versions[best].version) <= decided_over:
        why = f"{figure}, but a person chose version {champion.version} over it; cxr promote --model chooses anew"
        return {**decision, "why": why}
    known = [name for name, version in versions.items() if version.version == champion.version]
    theirs = judged.predicted[known[0]].to_numpy() if known else judged.predict_with(other)
    ours = judged.predicted[best].to_numpy()
    found = compare_f1(judged.labels, judged.groups, ours, theirs, params.resamples, params.margin)
    theirs_f1 = scores["f1"] - found["difference"]
    promoted = found["probability"] is not None and found["probability"] >= params.min_probability
    saw = (
        ""
        if known or champion.tags.get("split") == md5_of_file(SPLIT_FILE)
        else ", which may have trained on these images"
    )
    why = f"{figure}, {theirs_f1:.4f} of version {champion.version}, the champion{' before' if promoted else ''}{saw}; "
    if found["probability"] is None:
        why += "the resamples do not tell them apart"
    else:
        why += (
            f"difference {found['difference']:+.4f} (95 % {found['low']:+.4f} to {found['high']:+.4f}), better with "
            f"probability {found['probability']:.2f}, {params.min_probability} is required"
        )
    return {**decision, **found, "promoted": promoted, "champion_f1": theirs_f1, "why": why}


def _carry_out(
    store: Store, version: ModelVersion, champion: ModelVersion | None, decision: Decision, **how: bool
) -> None:
    """Move the alias if that was decided, and keep the decision as tags of the version and as a row."""
    if decision["promoted"]:
        registry.set_champion(store, version.name, version, decision["why"], **how)
    tags = {
        "decision": f"{'promoted' if decision['promoted'] else 'not promoted'}: {decision['why']}",
        "champion_then": _number(champion) or "none",
        **{f"validation_{key}": decision[key] for key in ("f1", "calibration_error") if decision[key] is not None},
        **commit_and_experiment_tags(),
    }
    for key, value in tags.items():
        store.client.set_model_version_tag(version.name, version.version, key, str(value))
    store.client.update_model_version(version.name, version.version, f"{decision['candidate']}: {tags['decision']}")
    _record(decision)


def _decisions() -> list[Decision]:
    return list(read_json(DECISIONS)["decisions"]) if DECISIONS.exists() else []


def _record(decision: Decision) -> None:
    decisions = _decisions()
    if decisions[-1:] != [decision]:
        write_json(DECISIONS, {**decision, "decisions": [*decisions, decision]})


def _number(version: ModelVersion | None) -> str | None:
    return str(version.version) if version else None
