"""The data card: counts, duplicates and possible leaks of the data, as JSON and Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.core.files import atomic_path, write_json
from pipeline.core.markdown import markdown_table
from pipeline.data.exclusion import excluded_views
from pipeline.evaluation.metrics import score_predictions

MAX_LISTED = 20  # rows of a table or list of `card_sections`; card.json is complete
UNKNOWN = "not known"
UNUSUAL_IMAGES = "Most unusual images"  # title of a section
COLUMNS = ["negative", "positive", "test"]
DEVICE_COLUMNS = ["manufacturer", "modality"]  # of DICOM files; readers see them only where they are known
PATIENTS_OF = {column: f"{column}_patients" for column in COLUMNS}


@dataclass(frozen=True)
class CardSection:
    """A paragraph, a table of counts and a list, each of which may be empty."""

    title: str
    text: str = ""
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    items: list[str] = field(default_factory=list)


def describe_data(
    manifest: pd.DataFrame,
    quarantine: pd.DataFrame,
    split: pd.DataFrame,
    duplicate_groups: np.ndarray,
    class_names: Sequence[str] = ("negative", "positive"),
    outliers: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """Count images and find duplicates and leaks.

    Args:
        manifest: N rows.
        quarantine: one row per image that `prepare` rejected or left out.
        split: N rows, from `splitting.split_dataset`.
        duplicate_groups: (N,), from `duplicates.find_duplicates`.
        class_names: what readers are shown for negative and positive.
        outliers: N rows, the most unusual image first, from `outliers.write_outliers`; None if they were not ranked.

    Returns:
        The `class_names`; counts of negative, positive (both labeled) and test images, and of their known patients; the
        `age` in years by class; the number of labeled images whose patient is not known; `excluded_views`, how many
        images `prepare.views` left out by view; the most unusual images; `duplicates`, an entry per radiograph with
        several copies; patients in both train and test; and the metrics of a baseline that predicts from the source
        only, with `majority_accuracy`, that of predicting the class more common in training.
    """
    label = manifest["label"].map({0: "negative", 1: "positive"}).fillna("test")
    size = manifest["width"].astype(str) + "×" + manifest["height"].astype(str)
    keys = {
        "subset": split["subset"],
        **{name: manifest[name] for name in ("source", "view", "sex", "license", *DEVICE_COLUMNS)},
        "size": size,
    }
    train_patients, test_patients = (
        set(manifest.loc[manifest["set"] == name, "patient"]) - {""} for name in ("train", "test")
    )
    without_patient = manifest["file"][(manifest["set"] == "train") & (manifest["patient"] == "")]
    return {
        "class_names": list(class_names),
        "images": len(manifest),
        "patients": len(train_patients | test_patients),
        "groups": split["group"].nunique(),
        **{name: _count_images(key.replace("", UNKNOWN), label, manifest["patient"]) for name, key in keys.items()},
        "age": _describe_age(manifest["age"], label),
        "labeled_without_patient": {"images": len(without_patient), "first": next(iter(without_patient), None)},
        "excluded_views": excluded_views(quarantine["reason"].astype("str")).value_counts().sort_index().to_dict(),
        "outliers": None if outliers is None else _describe_outliers(outliers),
        "quarantine": quarantine["reason"].value_counts().sort_index().to_dict(),
        "source_only_baseline": _score_source_only(manifest, split["subset"]),
        "duplicates": _describe_duplicates(manifest, duplicate_groups),
        "patients_in_train_and_test": sorted(train_patients & test_patients),
    }


def data_warnings(card: Mapping[str, Any]) -> list[str]:
    """Return a line for each problem of the data that makes metrics unreliable."""
    conflicting, leaking = _conflicting_labels(card["duplicates"]), _in_train_and_test(card["duplicates"])
    patients = card["patients_in_train_and_test"]
    lines = []
    without_patient = card["labeled_without_patient"]
    if without_patient["images"]:
        count = f"{without_patient['images']} labeled images" if card["patients"] else "all labeled images"
        lines.append(
            f"the patient of {count} is not known, the first is {without_patient['first']}; images of one patient may "
            "be in both training and validation set"
        )
    if conflicting:
        example = _join_files(conflicting[0])
        lines.append(f"{len(conflicting)} radiograph(s) have copies with different labels, the first is {example}")
    if leaking:
        example = _join_files(leaking[0])
        lines.append(f"{len(leaking)} radiograph(s) are in both train and test, the first is {example}")
    if patients:
        lines.append(f"{len(patients)} patient(s) are in both train and test, the first is {patients[0]}")
    return lines


def write_data_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write `card.json` and `card.md`."""
    write_json(folder / "card.json", card)
    with atomic_path(folder / "card.md") as temporary:
        temporary.write_text(_format_card(card), encoding="utf-8")


def card_sections(card: Mapping[str, Any]) -> list[CardSection]:
    """Return the sections of the card for readers; the first one counts the images by subset."""
    duplicates = card["duplicates"]
    identical = sum(duplicate["identical_pixels"] for duplicate in duplicates)
    labels = [*card["class_names"], "unlabeled (test)"]
    counts = f"{card['images']} images, {card['patients'] or 'no'} known patients, {card['groups']} groups"
    text = f"{counts}. Training and validation set never share a group."
    return [
        _counts_section("subset", labels, card["subset"], text),
        _counts_section("source", labels, card["source"]),
        _counts_section("view", labels, card["view"], _describe_excluded_views(card["excluded_views"])),
        _counts_section("sex", labels, card["sex"]),
        _age_section(labels, card["age"]),
        *(_counts_section(name, labels, card[name]) for name in ("size", "license")),
        *(_counts_section(name, labels, card[name]) for name in DEVICE_COLUMNS if set(card[name]) != {UNKNOWN}),
        CardSection("Source-only baseline", _describe_source_only(card["source_only_baseline"])),
        CardSection(
            "Duplicates", f"Radiographs with several copies: {len(duplicates)}; with identical pixels: {identical}."
        ),
        *([_outliers_section(card["outliers"])] if card["outliers"] else []),
        *_list_sections(
            {
                "Duplicates with different labels": [_join_files(one) for one in _conflicting_labels(duplicates)],
                "Duplicates in both train and test": [_join_files(one) for one in _in_train_and_test(duplicates)],
                "Patients in both train and test": card["patients_in_train_and_test"],
            }
        ),
        CardSection(
            "Quarantine",
            "" if card["quarantine"] else "No images.",
            items=[f"{count} × {reason}" for reason, count in card["quarantine"].items()],
        ),
    ]


def _count_images(key: pd.Series, label: pd.Series, patient: pd.Series) -> dict[str, dict[str, int]]:
    """Count images, and known patients, by key and label, the most frequent key first."""
    counts = pd.crosstab(key, label).reindex(columns=COLUMNS, fill_value=0)
    known = pd.DataFrame({"key": key, "label": label, "patient": patient})[patient != ""].drop_duplicates()
    patients = pd.crosstab(known["key"], known["label"]).reindex(counts.index, columns=COLUMNS, fill_value=0)
    table = counts.join(patients.rename(columns=PATIENTS_OF))
    order = counts.sum(axis="columns").sort_values(ascending=False, kind="stable").index
    rows = table.loc[order].to_dict("index")
    return {str(name): {str(column): int(count) for column, count in row.items()} for name, row in rows.items()}


def _describe_age(age: pd.Series, label: pd.Series) -> dict[str, dict[str, float]]:
    """Return, for each class with known ages, the number of images with one and their median, lowest and highest."""
    ages = age.groupby(label).agg(["count", "median", "min", "max"]).reindex(COLUMNS)
    ages.columns = pd.Index(["images", "median", "lowest", "highest"])
    known = ages[ages["images"] > 0]
    return {str(name): {str(key): float(value) for key, value in row.items()} for name, row in known.iterrows()}


def _describe_outliers(outliers: pd.DataFrame) -> dict[str, Any]:
    first = outliers.head(MAX_LISTED)
    return {
        "files": list(first["file"]),
        "distances": [float(f"{distance:.4g}") for distance in first["distance"]],
        "median_distance": float(f"{outliers['distance'].median():.4g}"),
    }


def _score_source_only(manifest: pd.DataFrame, subset: pd.Series) -> dict[str, float] | None:
    """Score the best prediction from the source alone: fitted to the training images, scored on the validation images.

    Sources are ordered by prevalence; for each metric, the first k are predicted positive, with the k that is best on
    the training images. None if there are fewer than two sources, or if no validation image has a source of them.
    """
    train, validation = (manifest[subset == name] for name in ("train", "validation"))
    sources = train["label"].astype(int).groupby(train["source"]).agg(["sum", "count"])
    if len(sources) < 2 or not validation["source"].isin(sources.index).any():
        return None
    prevalence = sources["sum"] / sources["count"]
    sources = sources.loc[prevalence.sort_values(ascending=False, kind="stable").index]
    true_positives, predicted_positives = (np.append(0, sources[name].cumsum()) for name in ("sum", "count"))
    positives = true_positives[-1]
    by_source_count = {
        "accuracy": len(train) - positives + 2 * true_positives - predicted_positives,  # number of correct predictions
        "f1": 2 * true_positives / (predicted_positives + positives),
    }
    scores = {}
    for metric, values in by_source_count.items():
        predicted = validation["source"].isin(sources.index[: values.argmax()]).to_numpy(dtype=float)
        all_scores = score_predictions(validation["label"].to_numpy(dtype=int), predicted)
        scores[metric] = all_scores[metric]  # type: ignore[literal-required]
    scores["majority_accuracy"] = float((validation["label"] == int(train["label"].mean() > 0.5)).mean())
    return scores


def _describe_duplicates(manifest: pd.DataFrame, duplicate_groups: np.ndarray) -> list[dict[str, Any]]:
    has_copy = pd.Series(duplicate_groups).duplicated(keep=False).to_numpy()
    return [
        {
            "files": list(copies["file"]),
            "identical_pixels": len(set(copies["xxh128"])) == 1,
            "labels": sorted({int(label) for label in copies["label"].dropna()}),
            "sets": sorted(set(copies["set"])),
        }
        for _, copies in manifest[has_copy].groupby(duplicate_groups[has_copy])
    ]


def _conflicting_labels(duplicates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [duplicate for duplicate in duplicates if len(duplicate["labels"]) > 1]


def _in_train_and_test(duplicates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [duplicate for duplicate in duplicates if len(duplicate["sets"]) > 1]


def _join_files(duplicate: Mapping[str, Any]) -> str:
    return " = ".join(duplicate["files"][:3]) + (" = …" if len(duplicate["files"]) > 3 else "")


def _format_card(card: Mapping[str, Any]) -> str:
    blocks = ["# Data card"]
    for section in card_sections(card):
        blocks += [f"## {section.title}", *([section.text] if section.text else [])]
        blocks += [markdown_table(section.header, section.rows)] if section.rows else []
        blocks += ["\n".join(f"- {item}" for item in section.items)] if section.items else []
    return "\n\n".join(blocks) + "\n"


def _describe_source_only(baseline: Mapping[str, float] | None) -> str:
    if baseline is None:
        return "– (fewer than two sources in the training set, or no validation image of a source in the training set)"
    return (
        "Predicting the label from the source alone, with the cutoff tuned on the training images for each metric, "
        f"gives accuracy {baseline['accuracy']:.3f} (the more common class alone: {baseline['majority_accuracy']:.3f}) "
        f"and F1 {baseline['f1']:.3f} on the validation images. A model with no higher F1 may have learned only the "
        "source."
    )


def _counts_section(
    name: str, labels: Sequence[str], counts: Mapping[str, Mapping[str, int]], text: str = ""
) -> CardSection:
    rows = [[key, *(_format_count(row, column) for column in COLUMNS)] for key, row in counts.items()]
    text = " ".join(filter(None, [text, _truncation_note(rows)]))
    return CardSection(f"Images by {name}", text, [name, *labels], rows[:MAX_LISTED])


def _format_count(row: Mapping[str, int], column: str) -> str:
    """Format a number of images with that of their patients, if any is known."""
    patients = row[PATIENTS_OF[column]]
    return f"{row[column]} ({patients} patient{'' if patients == 1 else 's'})" if patients else str(row[column])


def _age_section(labels: Sequence[str], age: Mapping[str, Mapping[str, float]]) -> CardSection:
    names = dict(zip(COLUMNS, labels, strict=True))
    rows = [[names[key], *(f"{value:g}" for value in row.values())] for key, row in age.items()]
    header = ["class", "images of known age", "median", "lowest", "highest"]
    return CardSection("Age in years", "" if rows else "Not known.", header, rows)


def _describe_excluded_views(views: Mapping[str, int]) -> str:
    if not views:
        return ""
    listed = ", ".join(f"{count} × {view}" for view, count in views.items())
    return f"Before prepare.views left out {sum(views.values())} images, there were also: {listed}."


def _outliers_section(outliers: Mapping[str, Any]) -> CardSection:
    files, distances = outliers["files"], outliers["distances"]
    text = (
        "The images that are least like the others, by the features of a network trained on photographs. Look at them "
        "in data/contact_sheet.jpg: CT slices, lateral views or rotated images, if there are any, tend to be among "
        "them. Unusual is not wrong, and no image is left out for it; to leave one out, name it in "
        "prepare.excluded_files in params.yaml. data/outliers.csv lists all images in this order; their median "
        f"distance is {outliers['median_distance']:g}."
    )
    rows = [[file, f"{distance:g}"] for file, distance in zip(files, distances, strict=True)]
    return CardSection(UNUSUAL_IMAGES, text, ["file", "distance"], rows)


def _list_sections(lists: Mapping[str, Sequence[str]]) -> list[CardSection]:
    """Return a section per title whose list is not empty."""
    return [
        CardSection(f"{title}: {len(items)}", _truncation_note(items), items=list(items[:MAX_LISTED]))
        for title, items in lists.items()
        if items
    ]


def _truncation_note(rows: Sequence[Any]) -> str:
    return f"The first {MAX_LISTED} of {len(rows)}; card.json has all." if len(rows) > MAX_LISTED else ""
