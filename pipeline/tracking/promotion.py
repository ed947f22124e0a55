"""Decides which candidate is champion."""

import getpass
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

import numpy as np
import pandas as pd
from mlflow.entities.model_registry import ModelVersion

from pipeline.core.config import BAG, Config, PromoteParams
from pipeline.core.errors import UserError
from pipeline.core.files import md5_of_file, read_json, write_json
from pipeline.evaluation import calibration, gate
from pipeline.evaluation.intervals import compare_predictions
from pipeline.evaluation.metric_tables import Predictions
from pipeline.evaluation.metrics import Scores, best_model, count_groups, score_predictions
from pipeline.tracking import fingerprint, registry, saved_view
from pipeline.tracking.backfill import SPLIT_FILE
from pipeline.tracking.runs import MANIFEST
from pipeline.tracking.store import Store, login, retry_conflicts
from pipeline.tracking.validation_predictions import ValidationPredictions

DECISIONS = Path("metrics/promotion.json")


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
    low: float | None  # of the 95 % confidence interval of the difference, apparent: the best candidate was chosen
    high: float | None
    p_value: float | None
    level: float | None  # the largest p-value that promotes
    comparison: int | None  # number of the comparison among those on this validation set
    calibration_error: float | None
    data_md5: str


@retry_conflicts
def promote_best(store: Store, config: Config, versions: Mapping[str, ModelVersion]) -> Decision:
    """Make the best candidate challenger, and champion if it passes the gate.

    The decision is appended to metrics/promotion.json and set as tags of the version. A repeated call changes nothing.

    Args:
        store: the store of the registered model.
        config: its active profile has the requirements.
        versions: the version of every candidate by name, as returned by `backfill`.

    Raises:
        UserError: the files of the best candidate are missing or changed, or the file of decisions is damaged.
    """
    name, predictions = config.model_name, ValidationPredictions(config)
    _read_decisions()  # ends here if they are damaged
    best = best_model(predictions.scores)
    registry.load_version(versions[best])
    store.client.set_registered_model_alias(name, registry.CHALLENGER, versions[best].version)
    registry.reconcile_alias(store, name)
    while True:
        champion = registry.get_champion(store, name)
        number = _comparison_number(store, versions[best], champion)
        decision = decide(config, predictions, versions, best, champion, registry.overruled_up_to(store, name), number)
        with store.lock:
            if _number(registry.get_champion(store, name)) != _number(champion):
                continue  # another process promoted a version meanwhile
            if _comparison_number(store, versions[best], champion) != number:
                continue  # or compared one
            if _number(champion) != _number(versions[best]):
                _apply(store, versions[best], champion, decision)
            elif [row["version"] for row in _read_decisions()[-1:]] != [decision["version"]]:
                _append_decision(decision)  # already champion, but the last row is about another version
        break
    registry.mark_champion(store, name)
    saved_view.save_view(store, config)
    return decision


def promote_version(
    store: Store, config: Config, alias_or_number: str, reason: str, *, rollback: bool = False
) -> Decision:
    """Make a version champion without the gate, and record that as `promote_best` does.

    Args:
        store: the store of the registered model.
        config: names the registered model.
        alias_or_number: the version.
        reason: why, shown by `cxr history`.
        rollback: whether this restores the previous champion.

    Raises:
        UserError: the version does not exist, is already champion, or its files are missing or changed, or the file of
            decisions is damaged.
    """
    name = config.model_name
    _read_decisions()  # ends here if they are damaged
    with store.lock:
        registry.reconcile_alias(store, name)
        version, champion = registry.get_version(store, name, alias_or_number), registry.get_champion(store, name)
        if _number(champion) == _number(version):
            raise UserError(f"{name}: version {version.version} is already champion; see: cxr history")
        registry.load_version(version)
        tags = {key: version.tags.get(key, "") for key in ("candidate", "data_md5")}
        fields = {**tags, "version": str(version.version), "promoted": True, "reason": reason}
        decision: Decision = {**dict.fromkeys(Decision.__annotations__), **fields}  # type: ignore[typeddict-item]
        _apply(store, version, champion, decision, person=user_name(), rollback=rollback)
    registry.mark_champion(store, name)
    saved_view.save_view(store, config)
    return decision


def user_name() -> str:
    """Return the name of who decides: that of the login at MLflow, or else of git, or else of the operating system."""
    if name := login()[0]:
        return name
    with suppress(OSError, subprocess.CalledProcessError):  # git is missing, or knows no name
        named = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True, check=True)
        if named.stdout.strip():
            return named.stdout.strip()
    with suppress(OSError, KeyError):  # the user has no name, as in a container
        return getpass.getuser()
    return "a person"


def format_decision(name: str, decision: Decision) -> str:
    """Format a decision about the registered model `name` as one line."""
    outcome = "is champion" if decision["promoted"] else "is challenger, not champion"
    return f"{name} version {decision['version']} ({decision['candidate']}) {outcome}: {decision['reason']}"


def decide(
    config: Config,
    predictions: ValidationPredictions,
    versions: Mapping[str, ModelVersion],
    best: str,
    champion: ModelVersion | None,
    overruled_up_to: int,
    number: int,
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
        number: of this comparison with the champion among those on this validation set.
    """
    params, scores, challenger = config.active.promote, predictions.scores[best], versions[best]
    error = calibration.expected_calibration_error(predictions.labels, predictions.probabilities[best].to_numpy())
    decision: Decision = {
        **dict.fromkeys(Decision.__annotations__),  # type: ignore[typeddict-item]
        "run": fingerprint.parent_run_name(config, fingerprint.candidate_fingerprints(config)[BAG]), "candidate": best,
        "version": str(challenger.version), "promoted": False, "reason": "", "f1": scores["f1"],
        "calibration_error": error, "data_md5": md5_of_file(MANIFEST),
    }  # fmt: skip
    f1 = f"apparent F1 {scores['f1']:.4f}"
    override = f"cxr promote --model {challenger.version} --reason TEXT"
    if champion and champion.version == challenger.version:
        return {**decision, "promoted": True, "reason": f"{f1}; already champion"}
    failures = check_requirements(params, scores, error)
    if failures:
        return {**decision, "reason": f"{f1}, but the requirements of promote are not met: {', '.join(failures)}"}
    if champion is None:
        return {**decision, "promoted": True, "reason": f"{f1}; there was no champion"}
    try:
        model, known = registry.load_with_images(champion)
    except UserError as load_error:
        missing = isinstance(load_error, registry.MissingFilesError)  # then it may come back
        reason = f"{f1}; the champion cannot be loaded: {load_error}{f': {override}' if missing else ''}"
        return {**decision, "promoted": not missing, "reason": reason}
    obstacle = f"a person chose version {champion.version} instead; to change that"
    finding = config.active.finding.name
    if model.finding.name != finding:
        obstacle = (
            f"champion, version {champion.version}, cannot be compared: it predicts {model.finding.name}, not "
            f"{finding}; to promote all the same"
        )
    elif int(challenger.version) > overruled_up_to:
        labels, obstacle = find_champion_labels(config, predictions, versions, champion, known)
    if obstacle:
        return {**decision, "reason": f"{f1}, but {obstacle}: {override}"}

    unknown = labels.index[labels.isna()].to_numpy()
    if len(unknown):
        labels.loc[unknown] = predictions.predict_with(model, unknown)
    decision |= compare_with_champion(params, predictions, best, labels, number)  # type: ignore[typeddict-item]
    promoted = decision["p_value"] <= decision["level"]  # type: ignore[operator]
    subset = f" on {len(labels)} images that neither was trained on" if len(labels) < len(predictions.files) else ""
    reason = (
        f"{f1}; {'previous ' if promoted else ''}champion, version {champion.version}: "
        f"{decision['champion_f1']:.4f}{subset}; {format_comparison(params, decision)}"
    )
    return {**decision, "promoted": promoted, "reason": reason}


def find_champion_labels(
    config: Config,
    predictions: ValidationPredictions,
    versions: Mapping[str, ModelVersion],
    champion: ModelVersion,
    known: pd.DataFrame | None,
) -> tuple[pd.Series, str]:
    """Find the images of the validation set on which the champion can be compared, and its labels for them.

    Args:
        config: the present split.
        predictions: of the present candidates.
        versions: the present candidates.
        champion: the champion.
        known: its table of labeled images, see `ValidationPredictions.labeled_images`; None if it has none.

    Returns:
        The labels by row number of the images, NaN where the champion must still predict, and why it cannot be
        compared, or an empty text.
    """
    name = next((name for name, version in versions.items() if version.version == champion.version), None)
    if name is not None:
        labels = predictions.predicted[name].astype(float)
    elif known is not None:
        labels = gate.find_comparable_images(predictions.checksums, predictions.groups, known)
    else:
        labels = pd.Series(np.nan, range(len(predictions.files)))
        if champion.tags.get("split_md5") != md5_of_file(SPLIT_FILE) or config.active.split.cross_validate:
            return labels, (
                f"champion, version {champion.version}, cannot be compared fairly: it is of another split, and its "
                "training images were not recorded; to promote all the same"
            )
    rows = labels.index.to_numpy()
    positive, negative = count_groups(predictions.labels[rows], predictions.groups[rows])
    if len(rows) < len(predictions.files) and min(positive, negative) < gate.MIN_GROUPS:
        return labels, (
            f"champion, version {champion.version}, cannot be compared fairly: it was trained on others of these "
            f"images, and only {positive} positive and {negative} negative patients are new to both "
            f"({gate.MIN_GROUPS} each are needed); to promote all the same"
        )
    return labels, ""


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
    params: PromoteParams, predictions: ValidationPredictions, best: str, champion: pd.Series, number: int
) -> dict[str, float | None]:
    """Compare the F1 of the best candidate with that of the champion.

    Args:
        params: the rate of false promotions, the margin and the number of resamples.
        predictions: of all candidates.
        best: name of the candidate.
        champion: the champion's predicted labels by row number of the images to compare on.
        number: of this comparison.

    Returns:
        The fields of a decision that describe the comparison.
    """
    rows, theirs = champion.index.to_numpy(), champion.to_numpy(int)
    labels, groups, ours = predictions.labels[rows], predictions.groups[rows], predictions.predicted[best].to_numpy()
    table = compare_predictions(labels, groups, Predictions(ours[rows], None), Predictions(theirs, None))
    f1 = pd.Series(table.set_index("metric").loc["f1"])
    p_value = gate.randomization_p_value(
        labels,
        groups,
        ours[rows],
        theirs,
        [epochs[rows] for epochs in predictions.by_epoch],
        params.resamples,
        params.margin,
        None if predictions.folds is None else predictions.folds[rows],
    )
    return {
        "champion_f1": score_predictions(labels, theirs, theirs)["f1"],
        "difference": 0.0 if pd.isna(f1["difference"]) else float(f1["difference"]),
        "low": None if pd.isna(f1["low"]) else float(f1["low"]),
        "high": None if pd.isna(f1["high"]) else float(f1["high"]),
        "p_value": p_value,
        "level": gate.comparison_level(params.false_promotion_rate, number),
        "comparison": number,
    }


def format_comparison(params: PromoteParams, decision: Decision) -> str:
    """Format the comparison with the champion in words."""
    margin = f" beyond the margin of {params.margin}" if params.margin else ""
    interval = ""
    if decision["low"] is not None:
        interval = f" (apparent 95% CI {decision['low']:+.4f} to {decision['high']:+.4f})"
    return (
        f"difference {decision['difference']:+.4f}{interval}; probability that an interchangeable one looks as good"
        f"{margin}: p = {decision['p_value']:.4f} (required: {decision['level']:.4f}, comparison "
        f"{decision['comparison']} on this validation set)"
    )


def _apply(
    store: Store,
    version: ModelVersion,
    champion: ModelVersion | None,
    decision: Decision,
    *,
    person: str | None = None,
    rollback: bool = False,
) -> None:
    """Record the decision in the version's tags and on disk, and make the version champion if so decided."""
    version = store.client.get_model_version(version.name, version.version)  # with the tags of `backfill`
    if decision["comparison"] is not None and champion:
        numbers = str(version.version), str(champion.version)
        registry.record_comparison(store, version.name, md5_of_file(SPLIT_FILE), *numbers, decision["comparison"])
    outcome = "promoted" if decision["promoted"] else "not promoted"
    tags = {"decision": f"{outcome}: {decision['reason']}", "previous_champion": _number(champion) or "none"}
    for key, value in tags.items():
        store.client.set_model_version_tag(version.name, version.version, key, value)
    known = {key: value for key, value in decision.items() if value is not None}
    registry.record_decision(store, version, {"decided_by": person or registry.GATE, **known})
    # Last: a version that is champion gets no decision any more.
    if decision["promoted"]:
        registry.set_champion(store, version.name, version, decision["reason"], person=person, rollback=rollback)
    _append_decision(decision)


def _comparison_number(store: Store, challenger: ModelVersion, champion: ModelVersion | None) -> int:
    split_md5 = md5_of_file(SPLIT_FILE)
    return registry.comparison_number(
        store, challenger.name, split_md5, str(challenger.version), str(_number(champion))
    )


def _read_decisions() -> list[Decision]:
    try:
        return list(read_json(DECISIONS)["decisions"]) if DECISIONS.exists() else []
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{DECISIONS}: damaged; delete it (the decisions are in the registry, too)") from None


def _append_decision(decision: Decision) -> None:
    decisions = _read_decisions()
    if decisions[-1:] != [decision]:
        write_json(DECISIONS, {**decision, "decisions": [*decisions, decision]})


def _number(version: ModelVersion | None) -> str | None:
    return str(version.version) if version else None
