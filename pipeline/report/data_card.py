"""The data card: what a reader must know of the data before believing a score."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.core.files import atomic_path, write_json
from pipeline.core.markdown import markdown_table
from pipeline.evaluation.metrics import score_predictions

MAX_LISTED = 20  # in card.md; card.json has all
UNKNOWN = "not known"
COLUMNS = ["negative", "positive", "test"]


def describe_data(
    manifest: pd.DataFrame, quarantine: pd.DataFrame, split: pd.DataFrame, same: np.ndarray
) -> dict[str, Any]:
    """Count what there is.

    Args:
        manifest: N rows.
        quarantine: what `prepare` put aside, one row per image.
        split: what `splitting.split` gave.
        same: (N,), what `duplicates.find` gave.

    Returns:
        Counts by negative, positive (labeled) and test images; duplicates, one entry per radiograph that is there
        more than once; patients in both train and test; and what guessing the label from the source is worth.
    """
    kind = manifest["label"].map({0: "negative", 1: "positive"}).fillna("test")
    size = manifest["width"].astype(str) + "×" + manifest["height"].astype(str)
    keys = {"subset": split["subset"], **{name: manifest[name] for name in ("source", "view", "license")}, "size": size}
    trained, tested = (set(manifest.loc[manifest["set"] == name, "patient"]) - {""} for name in ("train", "test"))
    return {
        "images": len(manifest),
        "patients": len(trained | tested),
        "groups": split["group"].nunique(),
        **{name: _count(key.replace("", UNKNOWN), kind) for name, key in keys.items()},
        "quarantine": quarantine["reason"].value_counts().sort_index().to_dict(),
        "source_alone": _guess_from_source(manifest, split["subset"]),
        "duplicates": _duplicates(manifest, same),
        "patients_in_train_and_test": sorted(trained & tested),
    }


def data_warnings(card: Mapping[str, Any]) -> list[str]:
    """Say in a line each what makes scores doubtful."""
    contradictory, leaking = _contradictory(card["duplicates"]), _leaking(card["duplicates"])
    patients = card["patients_in_train_and_test"]
    lines = []
    if contradictory:
        what = _files(contradictory[0])
        lines.append(f"{len(contradictory)} radiograph(s) are there twice with different labels, the first is {what}")
    if leaking:
        what = _files(leaking[0])
        lines.append(f"{len(leaking)} radiograph(s) are in train and in test, the first is {what}")
    if patients:
        lines.append(f"{len(patients)} patient(s) are in train and in test, the first is {patients[0]}")
    return lines


def write_data_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write `card.json` and, for reading, `card.md`."""
    write_json(folder / "card.json", card)
    with atomic_path(folder / "card.md") as aside:
        aside.write_text(_markdown(card), encoding="utf-8")


def _count(key: pd.Series, kind: pd.Series) -> dict[str, dict[str, int]]:
    """Count by key and kind, the most frequent key first."""
    table = pd.crosstab(key, kind).reindex(columns=COLUMNS, fill_value=0)
    order = table.sum(axis="columns").sort_values(ascending=False, kind="stable").index
    return {str(name): {column: int(table.loc[name, column]) for column in COLUMNS} for name in order}


def _guess_from_source(manifest: pd.DataFrame, subset: pd.Series) -> dict[str, float] | None:
    """Score the best guess that knows nothing but the source: chosen on training images, scored on validation ones.

    Sources are called positive in the order of their share of positives, as many as serve each figure best.
    """
    train, validation = (manifest[subset == name] for name in ("train", "validation"))
    known = train["label"].astype(int).groupby(train["source"]).agg(["sum", "count"])
    if len(known) < 2 or not validation["source"].isin(known.index).any():
        return None
    known = known.loc[(known["sum"] / known["count"]).sort_values(ascending=False, kind="stable").index]
    hits, called = (np.append(0, known[name].cumsum()) for name in ("sum", "count"))
    worth = {"accuracy": len(train) - hits[-1] + 2 * hits - called, "f1": 2 * hits / (called + hits[-1])}
    found = {}
    for name, by_count in worth.items():
        guess = validation["source"].isin(known.index[: by_count.argmax()]).to_numpy(dtype=float)
        found[name] = score_predictions(validation["label"].to_numpy(dtype=int), guess)[name]  # type: ignore[literal-required]
    return found


def _duplicates(manifest: pd.DataFrame, same: np.ndarray) -> list[dict[str, Any]]:
    several = pd.Series(same).duplicated(keep=False).to_numpy()
    return [
        {
            "files": list(rows["file"]),
            "equal": len(set(rows["xxh128"])) == 1,  # pixel for pixel
            "labels": sorted({int(label) for label in rows["label"].dropna()}),
            "sets": sorted(set(rows["set"])),
        }
        for _, rows in manifest[several].groupby(same[several])
    ]


def _contradictory(duplicates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [one for one in duplicates if len(one["labels"]) > 1]


def _leaking(duplicates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [one for one in duplicates if len(one["sets"]) > 1]


def _files(duplicate: Mapping[str, Any]) -> str:
    return " = ".join(duplicate["files"][:3]) + (" = …" if len(duplicate["files"]) > 3 else "")


def _markdown(card: Mapping[str, Any]) -> str:
    duplicates, guess = card["duplicates"], card["source_alone"]
    known = card["patients"] or "no"
    parts = [
        "# Data card",
        f"{card['images']} images of {known} known patients, in {card['groups']} groups that are never divided.",
        *(_table(name, card[name]) for name in ("subset", "source", "view", "size", "license")),
        "## The label from the source alone",
        f"A guess that knows nothing but the source reaches accuracy {guess['accuracy']:.3f}, or F1 {guess['f1']:.3f}, "
        "on the validation images. A model that scores no more may have learned nothing else."
        if guess
        else "No such guess can be made: no two sources are known, or the one that validates is not trained on.",
        "## Duplicates",
        f"More than once: {len(duplicates)} radiographs; pixel for pixel: {sum(one['equal'] for one in duplicates)}.",
        *_listed("With different labels", [_files(one) for one in _contradictory(duplicates)]),
        *_listed("In train and in test", [_files(one) for one in _leaking(duplicates)]),
        *_listed("Patients in train and in test", card["patients_in_train_and_test"]),
        "## Quarantine",
        "".join(f"- {count} × {reason}\n" for reason, count in card["quarantine"].items()).strip() or "Nothing.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(name: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    rows = [[key, *map(str, row.values())] for key, row in counts.items()]
    more = f"\n\n{len(rows) - MAX_LISTED} more are in card.json." if len(rows) > MAX_LISTED else ""
    return f"## By {name}\n\n{markdown_table([name, *COLUMNS], rows[:MAX_LISTED])}{more}"


def _listed(title: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    more = [f"- … and {len(items) - MAX_LISTED} more, in card.json"] if len(items) > MAX_LISTED else []
    return [f"{title}: {len(items)}", "\n".join([*(f"- {item}" for item in items[:MAX_LISTED]), *more])]
