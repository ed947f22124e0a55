"""Classifies image files with a candidate; each file is read and decoded once."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, tee
from pathlib import Path
from threading import BoundedSemaphore
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from joblib import cpu_count

from pipeline.core.errors import UnreachableError, UserError
from pipeline.core.files import atomic_path, escape_undecodable
from pipeline.core.parallel import map_in_threads
from pipeline.data.dicom import NO_IMAGE
from pipeline.data.file_names import IMAGE_ENDING
from pipeline.data.image_checks import UnusableError
from pipeline.data.sources.image_paths import is_image
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.evaluation.prevalence import change_prevalence
from pipeline.inference.archives import ImageFile
from pipeline.inference.candidate import Candidate, agreement
from pipeline.inference.decoding import DecodedImage, decode_image
from pipeline.inference.prediction_table import COLUMNS, REQUIRED

if TYPE_CHECKING:
    from pipeline.inference.prediction_log import PredictionLog

DICOMDIR = "dicomdir"  # the list of a folder of DICOM files, which is one without pixels
NOT_TEXT = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]")


@dataclass(frozen=True)
class DecodedFile:
    """A file and its radiograph, or a black one and the `reason` why it is not usable.

    It `is_skipped` if it is plainly no image: neither its content nor its name is one's, and the user did not name it.
    """

    file: ImageFile
    image: DecodedImage
    reason: str = ""
    is_skipped: bool = False


def _is_plainly_no_image(file: ImageFile, data: bytes, reason: str) -> bool:
    if file.is_named or (file.problem and not file.member):
        return False
    name = (file.member or file.path).lower()
    is_of_known_format = bool(data) and not reason.startswith(NO_IMAGE)
    if is_of_known_format and not name.endswith(DICOMDIR):
        return False
    return (is_text(data, reason) and not IMAGE_ENDING.search(name)) or not is_image(name)


def is_text(data: bytes | bytearray, reason: str) -> bool:
    """Return whether a file that is not usable for this reason is a text; an empty file is none."""
    return reason == NO_IMAGE and not NOT_TEXT.search(data[:4096])


def convert_to_prevalence(probabilities: np.ndarray, config: EnsembleConfig, prevalence: float | None) -> np.ndarray:
    """Convert probabilities of a calibrated candidate, see `change_prevalence`; without a prevalence they stay."""
    if prevalence is None or config.prevalence is None:
        return probabilities
    return change_prevalence(probabilities, config.prevalence, prevalence)


def predict_files(
    candidate: Candidate,
    files: Iterable[ImageFile],
    *,
    model: str = "",
    version: str = "",
    prevalence: float | None = None,
    heatmaps: Path | None = None,
    log: "PredictionLog | None" = None,
    skip: Callable[[ImageFile], object] | None = None,
) -> Iterator[pd.DataFrame]:
    """Classify image files; memory does not grow with their number.

    Args:
        candidate: the model.
        files: the files.
        model: its name, for the table.
        version: its version, for the table.
        prevalence: to which the probabilities are converted, see `change_prevalence`; the candidate must be calibrated.
        heatmaps: an existing folder, to which an overlay of each usable radiograph and its heatmap is written as PNG.
        log: to which the usable radiographs are appended.
        skip: called with each file that is plainly no image, which the tables do not have.

    Yields:
        Tables with a row per file, or one without rows: `file`, without bytes that are no UTF-8 and carriage returns,
        which are escaped; `probability` and `label` as of `Candidate.predict`; `reason`: empty, or why a file is not a
        usable radiograph, whose probability, label and agreement are missing; `agreement`: the share of the members
        whose own label is that of all together; `model` and `version`; `threshold`: the probability from which the
        label is 1; `prevalence`, for which the probability is calibrated, missing if it is not; and `heatmap`, the name
        of the overlay, if they are written.

    Raises:
        UnreachableError: a server does not answer.
    """
    decoded = _decode_files(files, candidate, skip, with_preview=heatmaps is not None, with_description=log is not None)
    batches, to_predict = tee(iter(lambda: list(islice(decoded, candidate.batch_size)), []))
    columns, is_empty = [*REQUIRED, *(["heatmap"] if heatmaps else [])], True
    for batch, predicted in zip(batches, candidate.predict_batches(map(_stack, to_predict)), strict=True):
        table = _tabulate(batch, predicted, candidate.config, prevalence).assign(model=model, version=version)
        rows = [row for row, one in enumerate(batch) if not one.reason]
        usable, of_usable = [batch[row] for row in rows], predicted.iloc[rows]
        if log and rows:
            log.append([one.image.description for one in usable], _stack(usable), of_usable)
        if heatmaps:
            names = _write_heatmaps(heatmaps, candidate, usable, of_usable["label"]) if rows else []
            table["heatmap"] = pd.Series(names, rows, dtype="str").reindex(table.index, fill_value="")
        is_empty = False
        yield table[columns]
    if is_empty:
        yield pd.DataFrame(columns=columns).astype({name: COLUMNS[name] for name in columns})


def _decode_files(
    files: Iterable[ImageFile],
    candidate: Candidate,
    skip: Callable[[ImageFile], object] | None,
    *,
    with_preview: bool,
    with_description: bool,
) -> Iterator[DecodedFile]:
    """Decode ahead of the networks, but not the whole folder; leave out what is plainly no image."""
    contents = BoundedSemaphore(2 * cpu_count())  # that wait to be decoded; other files are read when they are

    def limit_contents() -> Iterator[ImageFile]:
        for file in files:
            if file.content is not None:
                contents.acquire()
            yield file

    def decode(file: ImageFile) -> DecodedFile:
        try:
            return _decode_file(file, candidate, with_preview=with_preview, with_description=with_description)
        finally:
            if file.content is not None:
                contents.release()

    for decoded in map_in_threads(decode, limit_contents(), cpu_count(), max(2 * candidate.batch_size, cpu_count())):
        if not decoded.is_skipped:
            yield decoded
        elif skip:
            skip(decoded.file)


def _decode_file(file: ImageFile, candidate: Candidate, *, with_preview: bool, with_description: bool) -> DecodedFile:
    data, size, resize = b"", candidate.packed_size, candidate.resize
    try:
        data, file = file.read(), replace(file, content=None)  # which may wait long for the rest of its batch
        image = decode_image(data, size, resize, with_preview=with_preview, with_description=with_description)
    except UnreachableError:
        raise
    except (UnusableError, UserError, OSError) as error:
        reason = str(error) or repr(error)
        # It keeps its place in the batch, on which the last bits of a probability depend.
        black = DecodedImage(np.zeros((size, size), np.uint8), np.empty((0, 0), np.uint8), 0, 0, {})
        return DecodedFile(file, black, reason, _is_plainly_no_image(file, data, reason))
    return DecodedFile(file, image)


def _stack(batch: Sequence[DecodedFile]) -> torch.Tensor:
    """Stack the pixels, uint8 (N, S, S)."""
    return torch.from_numpy(np.stack([one.image.pixels for one in batch]))


def _tabulate(
    batch: list[DecodedFile], predicted: pd.DataFrame, config: EnsembleConfig, prevalence: float | None
) -> pd.DataFrame:
    probabilities = np.append(predicted["probability"], config.threshold_probability)
    probabilities = convert_to_prevalence(probabilities, config, prevalence)
    table = pd.DataFrame({
        # Readers of CSV take a carriage return, which a Mac's `Icon\r` has, for the end of a row.
        "file": [escape_undecodable(one.file.name).replace("\r", r"\r") for one in batch],
        "probability": probabilities[:-1],
        "label": predicted["label"].astype("Int64"),
        "reason": [one.reason for one in batch],
        "agreement": agreement(predicted, config),
        "threshold": probabilities[-1],
        "prevalence": config.prevalence if prevalence is None else prevalence,
    })  # fmt: skip
    table.loc[table["reason"] != "", ["probability", "label", "agreement"]] = pd.NA
    return table.astype({"prevalence": float})


def _write_heatmaps(folder: Path, candidate: Candidate, batch: list[DecodedFile], labels: pd.Series) -> list[str]:
    """Write overlays of the predicted class, and return their names."""
    from pipeline.inference.explain import explain, overlay

    names = [_heatmap_name(one.file) for one in batch]
    for name, one, heatmap in zip(names, batch, explain(candidate, _stack(batch), labels.tolist()), strict=True):
        with atomic_path(folder / name) as temporary:
            overlay(one.image.preview, heatmap, candidate.resize).save(temporary, "PNG")
    return names


def _heatmap_name(file: ImageFile) -> str:
    """Return the file's name without its folders, and what distinguishes it from files of the same name elsewhere."""
    stem = re.sub(r"[^\w.-]+", "_", Path(file.name).stem, flags=re.ASCII)[:100]
    digest = hashlib.sha256(
        f"{file.path}\0{file.member}\0{file.offset or ''}".encode(errors="surrogateescape")
    ).hexdigest()
    return f"{stem}-{digest[:16]}.png"
