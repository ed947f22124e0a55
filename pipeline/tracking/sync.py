"""Making MLflow show what DVC holds: the runs, a version of the registered model per candidate, and the aliases."""

import tempfile
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypedDict

import mlflow
import numpy as np
import pandas as pd
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from pipeline import ensemble, layout
from pipeline.config import Config
from pipeline.dataset import read_table
from pipeline.evaluation import calibration
from pipeline.evaluation.intervals import f1_difference
from pipeline.evaluation.metrics import Scores, best_model, score
from pipeline.files import dvc_hash, read_json
from pipeline.models import candidate
from pipeline.models.candidate import BAG
from pipeline.tracking import fingerprint, registry
from pipeline.tracking.runs import MANIFEST, SeedRun, finish_parent, origin, parent_name, parent_run, runs_of_others
from pipeline.tracking.store import Store, connect


class Decision(TypedDict):
    """How the best candidate fared against the champion; figures of a comparison that was not made are missing."""

    new: bool  # not so when the candidate is champion already
    run: str  # the name of the parent run in MLflow
    candidate: str
    promoted: bool
    why: str
    f1: float
    champion_f1: float | None
    difference: float | None
    low: float | None
    high: float | None
    probability: float | None
    calibration_error: float
    data: str


def sync(config: Config) -> Decision:
    """Complete runs and registry from what DVC holds, and let the best candidate try for champion.

    Done twice, it changes nothing more.

    Raises:
        UserError: MLflow cannot be used, or the champion's files are not what they were.
    """
    store = connect(config.model_name)
    versions = complete(store, config)
    judged = Judged(config)
    best = best_model(judged.scores)
    with store.lock:
        store.client.set_registered_model_alias(config.model_name, registry.CHALLENGER, versions[best].version)
        registry.settle(store, config.model_name)
        champion = registry.champion(store, config.model_name)
        decision = decide(config, judged, versions, best, champion)
        if decision["new"]:
            _write_down(store, versions[best], champion, decision)
            if decision["promoted"]:
                registry.crown(store, config.model_name, versions[best], decision["why"])
    return decision


def said(name: str, decision: Decision) -> str:
    """Put a decision about the registered model `name` into one line."""
    verdict = "is champion" if decision["promoted"] else "is challenger, not champion"
    return f"{name}: {decision['candidate']} {verdict}: {decision['why']}"


def removable(config: Config, experiments: Collection[str]) -> list[Run]:
    """Return the runs of DVC experiments that are not among `experiments`, but no run of what is here or was champion.

    Raises:
        UserError: MLflow cannot be used.
    """
    store = connect(config.model_name)
    present = complete(store, config).values()
    reigned = {reign.version for reign in registry.history(store, config.model_name)}
    known = registry.versions(store, config.model_name)
    kept = {version.run_id for version in [*present, *(one for one in known if str(one.version) in reigned)]}
    return [run for run in runs_of_others(store, experiments) if run.info.run_id not in kept]


def remove(config: Config, runs: Collection[Run]) -> None:
    """Delete runs and the registered versions that are theirs."""
    store, ids = connect(config.model_name), {run.info.run_id for run in runs}
    for version in registry.versions(store, config.model_name):
        if version.run_id in ids:
            store.client.delete_model_version(config.model_name, str(version.version))
    for run_id in ids:
        store.client.delete_run(run_id)


def complete(store: Store, config: Config) -> dict[str, ModelVersion]:
    """Make the runs and the registered versions that are missing; return the version of every candidate by name."""
    parent = parent_run(store, config)
    members, runs = candidate.members(config), {BAG: parent.info.run_id}
    for seed in config.seeds:
        name = f"seed-{seed}"
        folder = members[name][name]
        # The environment is part of the fingerprint, and may have been another machine's.
        run = SeedRun(store, config, parent, seed, read_json(folder / "model.json")["fingerprint"])
        run.finish(folder)
        runs[name] = run.run_id
    bag = config.active.bag
    finish_parent(store, parent, Path("report"), read_json(Path("metrics/bag.json"))[bag.method])

    table = read_table(MANIFEST.parent)
    example = np.load("data/images.npy", mmap_mode="r")[table.index[table["subset"] == "validation"][0]]
    rules, versions, shared = ensemble.read_rules(), {}, {"data": dvc_hash(MANIFEST), **origin()}
    for name, folders in members.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, registry.FOLDER)
            candidate.assemble(folder, folders, rules[name])
            versions[name] = registry.register(
                store, config.model_name, runs[name], folder, example, {"candidate": name, **shared}
            )
    return versions


class Judged:
    """The validation set, and what the candidates say of it."""

    def __init__(self, config: Config) -> None:
        predictions = pd.read_csv("predictions/validation.csv")
        table = read_table(MANIFEST.parent).set_index("file").loc[predictions["file"]]
        self.files, self.labels = predictions["file"], predictions["label"].to_numpy()
        self.groups = table["group"].to_numpy()
        rules = ensemble.read_rules()
        answers = {
            name: ensemble.judge(predictions[list(members)], rules[name])
            for name, members in candidate.members(config).items()
        }
        self.probabilities, self.called = (
            pd.DataFrame({name: answer[column] for name, answer in answers.items()})
            for column in ("probability", "label")
        )
        self.scores: Mapping[str, Scores] = {
            name: score(self.labels, self.probabilities[name].to_numpy(), self.called[name].to_numpy())
            for name in answers
        }

    def called_by(self, version: ModelVersion) -> np.ndarray:
        """Return the labels that a registered model gives to the files of the validation set."""
        images = layout.read(Path("data/raw.zip")).images.set_index("file").loc[self.files, "member"]
        model = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
        with zipfile.ZipFile("data/raw.zip") as archive:
            parts = [
                model.predict(pd.DataFrame({"image": [archive.read(name) for name in images[start : start + 64]]}))
                for start in range(0, len(images), 64)
            ]
        return np.concatenate([part["label"].to_numpy() for part in parts])


def decide(
    config: Config, judged: Judged, versions: Mapping[str, ModelVersion], best: str, champion: ModelVersion | None
) -> Decision:
    """Hold the best candidate against what is required, and against the champion on the same images."""
    params, scores = config.active.promote, judged.scores[best]
    error = calibration.error(judged.labels, judged.probabilities[best].to_numpy())
    decision: Decision = {
        "new": True, "run": parent_name(config, fingerprint.of_training(config)), "candidate": best,
        "promoted": False, "why": "", "f1": scores["f1"], "champion_f1": None, "difference": None, "low": None,
        "high": None, "probability": None, "calibration_error": error, "data": dvc_hash(MANIFEST),
    }  # fmt: skip
    figure = f"validation F1 {scores['f1']:.4f}"
    if champion and champion.version == versions[best].version:
        return {**decision, "new": False, "promoted": True, "why": f"{figure}; it is champion already"}
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

    known = [name for name, version in versions.items() if version.version == champion.version]
    theirs = judged.called[known[0]].to_numpy() if known else judged.called_by(champion)
    ours = judged.called[best].to_numpy()
    found = f1_difference(judged.labels, judged.groups, ours, theirs, params.resamples, params.margin)
    theirs_f1 = scores["f1"] - found["difference"]
    promoted = found["probability"] >= params.min_probability
    why = (
        f"{figure}, {theirs_f1:.4f} of version {champion.version}, the champion{' before' if promoted else ''}; "
        f"difference {found['difference']:+.4f} (95 % {found['low']:+.4f} to {found['high']:+.4f}), better with "
        f"probability {found['probability']:.2f}, {params.min_probability} is required"
    )
    return {**decision, **found, "promoted": promoted, "champion_f1": theirs_f1, "why": why}


def _write_down(store: Store, version: ModelVersion, champion: ModelVersion | None, decision: Decision) -> None:
    """Keep a decision as tags of the version that it is about."""
    tags = {
        "decision": f"{'promoted' if decision['promoted'] else 'not promoted'}: {decision['why']}",
        "champion_then": champion.version if champion else "none",
        **{f"validation_{key}": decision[key] for key in ("f1", "calibration_error")},
        **origin(),
    }
    for key, value in tags.items():
        store.client.set_model_version_tag(version.name, version.version, key, str(value))
    store.client.update_model_version(version.name, version.version, f"{decision['candidate']}: {tags['decision']}")
