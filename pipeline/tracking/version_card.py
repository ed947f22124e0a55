"""The card of a registered version, which MLflow shows as its description: state and decisions, metrics, model card."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from pipeline.core.config import BAG, Config
from pipeline.core.markdown import escape_markdown, markdown_table
from pipeline.evaluation.metrics import METRIC_LABELS

if TYPE_CHECKING:
    from pipeline.tracking.registry import ChampionRecord

RULE = "\n\n---\n\n"  # between the state, which changes, and the rest of a card
MAX_CANDIDATE = 3100  # characters of what `describe_candidate` returns; MLflow's database takes 5000 for all of it
MAX_STATE = 1000  # characters of the decisions that `describe_state` returns
MAX_REASON = 300  # characters of a reason in it
MAX_NOTE = 300  # characters of the sentence that says what is left out
MISSING = "–"
CHECKLIST = "\n## "  # begins the last part of the model card, the only one with a heading
# The sections of the model card that are kept first; of the others, those that fit.
KEPT_FIRST = ["Limitations", "Model details", "Intended use"]
METRICS = ["f1", "accuracy", "recall", "specificity", "precision", "auroc", "average_precision"]
PARAMS = {"backbone", "image_size", "epochs", "batch_size", "optimizer", "lr"}  # the others only where not the default
ESTIMATE_TYPES = {
    "fixed": "Fixed: nothing was chosen on these images",
    "cross-fitted": "Cross-fitted: what was chosen for an image was chosen on other patients",
    "corrected": "Corrected for the choice of this model on these images; the apparent F1 is {}",
    "apparent": "Apparent: chosen and evaluated on the same images, so optimistic",
}


def estimates_of(intervals: pd.DataFrame, config: Config, name: str) -> pd.DataFrame:
    """Return the rows of metrics/intervals.csv about a candidate; corrected estimates come after the apparent ones."""
    label = f"{BAG} ({config.active.bag.method})" if name == BAG else name
    return intervals[intervals["model"] == label]


def format_f1(estimates: pd.DataFrame) -> str:
    """Format F1, corrected if it is, with its 95 % interval."""
    row = estimates[estimates["metric"] == "f1"].iloc[-1]
    return _number(row["value"]) + (f" ({_interval(row)})" if pd.notna(row["low"]) else "")


def describe_candidate(
    config: Config, name: str, tags: Mapping[str, str], estimates: pd.DataFrame, model_card: str
) -> str:
    """Describe what stays as it is: the metrics of a candidate, how it was trained, and the model card in short.

    Args:
        config: the parameters it was trained with.
        name: of the candidate.
        tags: of its version and its run.
        estimates: its metrics, see `estimates_of`.
        model_card: report/model-card.md.
    """
    by_metric = {metric: estimates[estimates["metric"] == metric] for metric in METRICS}
    rows = [
        [METRIC_LABELS[metric], _number(last["value"]), _interval(last), last["estimate_type"]]
        for metric, last in ((metric, found.iloc[-1]) for metric, found in by_metric.items())
    ]
    types = dict.fromkeys(row[-1] for row in rows)
    meaning = ". ".join(ESTIMATE_TYPES[one].format(_number(by_metric["f1"]["value"].iloc[0])) for one in types)
    names = config.active.train.model_dump(exclude_defaults=True).keys() | PARAMS
    train = {key: value for key, value in config.active.train.model_dump().items() if key in names}
    members = {"members": len(config.bag_members), "method": config.active.bag.method}
    seed = {"seed": name.removeprefix("seed-")}
    params = {
        **(members if name == BAG else seed),
        **train,
        "operating_point": config.active.evaluate.operating_point,
        "recalibration": config.active.evaluate.recalibration,
    }
    origin = {
        "data": tags["data_md5"][:8],
        "split": tags["split_md5"][:8],
        "commit": tags.get(MLFLOW_GIT_COMMIT, MISSING)[:8],
    }
    text = (
        f"**Metrics** on the validation set. {meaning}.\n\n"
        + markdown_table(["metric", "estimate", "95 % interval", "estimate type"], rows)
        + f"\n\n**Training.** {_join(params)}.\n\n**Origin.** {_join(origin)}."
    )
    text += "\n\n" if name == BAG else "\n\n**Model card of the bag**\n\n"
    return text + shorten_model_card(model_card, MAX_CANDIDATE - len(text))


def shorten_model_card(model_card: str, limit: int) -> str:
    """Shorten the model card by its checklist and by sections, and say which are left out.

    Args:
        model_card: its sections begin with a title in bold.
        limit: the largest number of characters.
    """
    _, *texts = re.split(r"\n\n(?=\*\*)", model_card.partition(CHECKLIST)[0].strip())
    sections = {text[2:].partition(".**")[0]: _cut(text, limit - MAX_NOTE) for text in texts}
    kept: dict[str, str] = {}
    for title in sorted(sections, key=lambda title: (title not in KEPT_FIRST, len(sections[title]))):
        longer = {one: text for one, text in sections.items() if one in kept or one == title}
        if len("\n\n".join(longer.values())) <= limit - MAX_NOTE:
            kept = longer
    left_out = ", ".join([*(title for title in sections if title not in kept), "the checklist"])
    note = f"Left out of the model card: {left_out}. All of it is report/model-card.md of the bag's run."
    return "\n\n".join([*kept.values(), _cut(note, MAX_NOTE - 2)])


def describe_state(
    version: ModelVersion,
    history: Sequence["ChampionRecord"],
    decisions: Iterable[Mapping[str, Any]],
    *,
    is_champion: bool,
    is_challenger: bool,
) -> str:
    """Describe what changes: whether a version is champion, and the decisions about it in order.

    Args:
        version: of a version of an earlier release, the tag `decision` is the last decision.
        history: of the champions.
        decisions: about the version, see `registry.decisions_about`.
        is_champion: whether it is the present champion.
        is_challenger: whether it is the best candidate of the last run.
    """
    number, state, events = str(version.version), "has not been champion", list[tuple[str, str]]()
    for record, following in pairwise([*history, None]):
        if record is None or record.version != number:
            continue
        events.append((record.since, f"promoted{_by(record)}: {_short(record.reason)}"))
        if is_champion:
            state = f"champion since {format_time(record.since)} UTC"
        elif following:
            state = f"was champion until {format_time(following.since)} UTC, replaced by version {following.version}"
        if following and following.version != number:
            text = f"replaced by version {following.version}{_by(following)}: {_short(following.reason)}"
            events.append((following.since, text))
    if is_challenger and not is_champion:
        state += "; challenger, the best candidate of the last run"
    rejections = [(str(one["time"]), str(one["reason"])) for one in decisions if not one["promoted"]]
    kind, _, reason = version.tags.get("decision", "").partition(": ")
    if kind == "not promoted" and not rejections:
        rejections = [("", reason)]
    events += [(time, f"not promoted: {_short(reason)}") for time, reason in rejections]
    lines = [f"- {format_time(time)} UTC: {text}" for time, text in sorted(events, key=lambda event: event[0])]
    while len("\n".join(lines)) > MAX_STATE:
        lines = ["- earlier decisions are in the tags", *lines[2:]]
    return "\n".join([f"**Version {number} ({version.tags['candidate']}): {state}.**", "", *lines]).strip()


def format_time(time: str) -> str:
    """Format a time of the history (ISO 8601, UTC) to the minute."""
    return time[:16].replace("T", " ") or MISSING


def _by(record: "ChampionRecord") -> str:
    return f", decided by {escape_markdown(record.decided_by)}" if record.decided_by else ""


def _short(reason: str) -> str:
    return escape_markdown(_cut(" ".join(reason.split()), MAX_REASON))


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _number(value: float) -> str:
    return MISSING if pd.isna(value) else f"{value:.3f}"


def _interval(row: pd.Series) -> str:
    return MISSING if pd.isna(row["low"]) else f"{row['low']:.3f} to {row['high']:.3f}"


def _join(values: Mapping[str, Any]) -> str:
    return escape_markdown(", ".join(f"{key} {value}" for key, value in values.items()))
