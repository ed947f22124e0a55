"""The log of predictions that `cxr monitor` reads: hashes and figures of every image, no names and no pixels."""

import fcntl
import hashlib
import json
import math
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pipeline.core.errors import UserError
from pipeline.data import images
from pipeline.data.dicom import read_metadata
from pipeline.data.views import BASIC_PROJECTIONS, possible_projections
from pipeline.evaluation import acquisition
from pipeline.evaluation.monitoring import ACQUISITION_FEATURES, CATEGORIES

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.inference.candidate import Candidate

EMBEDDING_SIZE = 32
MAX_LINE = 4096  # bytes; a line has about 850
OTHER = "other"
# The words that may be in the log: a manufacturer is free text in a DICOM file.
MANUFACTURER = re.compile(
    r"\b(AGFA|CANON|CARESTREAM|DRTECH|FUJI|GE\b|HITACHI|HOLOGIC|KODAK|KONICA|PHILIPS|RAYENCE|SAMSUNG|"
    r"SHIMADZU|SIEMENS|SWISSRAY|TOSHIBA|VAREX|VIEWORKS)"
)
HINT = "give the log that --log of cxr predict or cxr serve wrote"
TEXTS = ["version", "content_hash", "sha256", *CATEGORIES]
PREDICTIONS = ["score", "probability", "label", "agreement"]
NUMBERS = ["width", "height", "bytes", "jpeg_quantization", *ACQUISITION_FEATURES, *PREDICTIONS]


def describe_image(data: bytes, shape: tuple[int, int], pixels: np.ndarray) -> dict[str, Any]:
    """Describe an image for the log; it takes about a millisecond and no torch, so it can run where images are decoded.

    Args:
        data: content of the file.
        shape: height and width of the upright image, pixels.
        pixels: the square image, uint8 (S, S), as the model gets it.

    Returns:
        `sha256` of the content; `view` and `manufacturer` of a DICOM, as `NORMALIZE` has them, else empty; `width`,
        `height`, `bytes` and `jpeg_quantization` as in the manifest; `brightness` and `contrast`, mean and standard
        deviation of the gray levels; and the columns of `acquisition.compute_features`.
    """
    height, width = shape
    jpeg_quantization, metadata = images.jpeg_quantization(data), read_metadata(data)
    file = {"width": width, "height": height, "bytes": len(data), "jpeg_quantization": jpeg_quantization}
    features = describe_pixels(pixels[None], pd.DataFrame([file])).iloc[0]
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        **{name: normalize(metadata[name]) for name, normalize in NORMALIZE.items()},
        **file,
        **dict(zip(ACQUISITION_FEATURES, features.tolist(), strict=True)),
    }


def normalize_view(text: str) -> str:
    """Return PA, AP, LL or RL, without the position of the patient, or `OTHER`; empty if not known which."""
    meanings = possible_projections(text)
    projections = sorted(meanings.intersection(BASIC_PROJECTIONS))
    if not meanings or len(projections) > 1:
        return ""
    return projections[0] if projections else OTHER


def normalize_manufacturer(text: str) -> str:
    """Return the name of a large manufacturer, or `OTHER`; empty if not known."""
    found = MANUFACTURER.search(text.upper())
    return found[0] if found else OTHER if text else ""


NORMALIZE = {"view": normalize_view, "manufacturer": normalize_manufacturer}  # of the log and of the manifest


def describe_pixels(images: np.ndarray, files: pd.DataFrame) -> pd.DataFrame:
    """Return the `ACQUISITION_FEATURES` of images, as `acquisition.compute_features` takes them."""
    levels = {
        "brightness": images.mean(axis=(1, 2), dtype=float),
        "contrast": images.std(axis=(1, 2), dtype=float),
    }
    return acquisition.compute_features(images, files).assign(**levels)[list(ACQUISITION_FEATURES)]


class PredictionLog:
    """Appends a line of JSON per image to a file, which several threads and processes may share.

    It is opened for every batch, so a file that is moved away (log rotation) is followed by a new one.
    """

    def __init__(self, path: Path, candidate: "Candidate", content_hash: str, version: str) -> None:
        """Create the file if it is not there.

        Args:
            path: the log.
            candidate: the model that predicts.
            content_hash: of the candidate.
            version: its registered version, or the name of a candidate from `models/`.

        Raises:
            UserError: the file cannot be written, or is no log of predictions.
        """
        self._path, self._candidate = path, candidate
        self._model = {"version": version, "content_hash": content_hash}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open(path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give a log that can be written") from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode) or os.pread(descriptor, 1, 0) not in (b"", b"{"):
                raise UserError(f"{path}: no log of predictions; give the log another name")
        finally:
            os.close(descriptor)

    def append(self, descriptions: Sequence[dict[str, Any]], pixels: "Tensor", predictions: pd.DataFrame) -> None:
        """Append images; all their lines are in the file when it returns.

        Args:
            descriptions: N, at least one, from `describe_image`.
            pixels: the images, uint8 (N, S, S).
            predictions: N rows, from `Candidate.predict`.

        Raises:
            OSError: the file cannot be written.
        """
        from pipeline.inference.candidate import agreement  # which needs torch

        predictions = predictions.assign(agreement=agreement(predictions, self._candidate.config))
        values = predictions[PREDICTIONS].to_numpy(float).tolist()
        rows = [dict(zip(PREDICTIONS, row, strict=True)) for row in values]
        constant = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **self._model}
        embeddings = embed(self._candidate, pixels)
        lines = [
            _format_line({**constant, **description, **row, "embedding": embedding})
            for description, row, embedding in zip(descriptions, rows, embeddings.tolist(), strict=True)
        ]
        descriptor = _open(self._path)
        try:
            # The lock ends with the process. What a killed one left of a line is ended, so that it spoils no other.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            data = memoryview((b"\n" if is_torn else b"") + b"".join(lines))
            while data:  # once, except on a full disk, whose error the second time raises
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)


def embed(candidate: "Candidate", pixels: "Tensor") -> np.ndarray:
    """Return random projections of the features of one member's backbone, float32 (N, EMBEDDING_SIZE).

    They keep distances about as they are, do not depend on the images, and are too few to restore an image. Like the
    content hash, the choice of the member does not depend on their order. Of a cross-validated member it is the network
    of the first fold, which was not trained on the images of that fold.

    Args:
        candidate: the model.
        pixels: gray images, uint8 (N, S, S).
    """
    from pipeline.inference.apply_networks import apply_networks

    networks = (networks[0] for networks in candidate.members.values())
    network = min(networks, key=lambda one: list(one.parameters())[-1].tolist())  # of the head
    batches = apply_networks([network.embed], pixels.split(candidate.batch_size), candidate.device)
    features = np.concatenate([of_batch.numpy() for (of_batch,) in batches])
    shape = (features.shape[1], EMBEDDING_SIZE)
    return np.asarray(features @ np.random.default_rng(0).standard_normal(shape, dtype=np.float32))


def round_figure(value: Any) -> Any:
    """Round floats, also those of a list, to six significant digits; JSON knows no NaN, which becomes None."""
    if isinstance(value, list):
        return [round_figure(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read_log(
    path: Path, content_hash: str | None = None, since: datetime | None = None
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Read the images that a model predicted; what is left out takes no memory.

    Args:
        path: the log.
        content_hash: of the model; by default that of the last line, and all models are in memory until then.
        since: leave out earlier predictions.

    Returns:
        A row per different image, from its first prediction: `time` (UTC), the texts `TEXTS`, the floats `NUMBERS`, NaN
        where unknown, and `embedding`, float32 (EMBEDDING_SIZE,); and the number of lines that are left out, by reason.

    Raises:
        UserError: the file has no readable line, or cannot be read.
    """
    images = defaultdict[str, dict[str, list[Any]]](dict)  # by model and hash of the file
    lines, earlier, unreadable, last = Counter[str](), Counter[str](), 0, content_hash
    try:
        for row in _read_lines(path):
            if row is None:
                unreadable += 1
                continue
            time, _, model, sha256, *_ = row
            lines[model] += 1
            last = model if content_hash is None else content_hash
            if since and time < since:
                earlier[model] += 1
            elif model == last:
                images[model].setdefault(sha256, row)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {HINT}") from None
    if not lines:
        raise UserError(f"{path}: {'no log of predictions' if unreadable else 'empty'}; {HINT}")
    model = str(last)
    table = pd.DataFrame(list(images[model].values()), columns=["time", *TEXTS, *NUMBERS, "embedding"])
    left_out = {
        "repeated images, counted once": lines[model] - earlier[model] - len(table),
        "earlier predictions, left out": earlier[model],
        "predictions of other versions, left out": lines.total() - lines[model],
        "unreadable lines, left out": unreadable,
    }
    return table.assign(time=pd.to_datetime(table["time"], utc=True)), left_out


def _open(path: Path) -> int:
    # Not blocking, since opening a named pipe that nobody reads would wait.
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)


def _format_line(record: dict[str, Any]) -> bytes:
    return (
        json.dumps({name: round_figure(value) for name, value in record.items()}, separators=(",", ":")).encode()
        + b"\n"
    )


def _read_lines(path: Path) -> Iterator[list[Any] | None]:
    """Yield the values of each line that is not empty, None for an unreadable one, such as a killed process leaves."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE):
            try:
                yield _parse_line(line)
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                if line != b"\n":
                    yield None


def _parse_line(line: bytes) -> list[Any]:
    record = json.loads(line)
    numbers = [math.nan if record[name] is None else float(record[name]) for name in NUMBERS]
    embedding = np.asarray(record["embedding"], dtype=np.float32)
    is_valid = embedding.shape == (EMBEDDING_SIZE,) and np.isfinite(embedding).all()
    if not is_valid or not all(0 <= float(record[name]) <= 1 for name in PREDICTIONS):
        raise ValueError("not a line of a log")
    return [
        datetime.fromisoformat(record["time"]).astimezone(UTC),
        *(str(record[name]) for name in TEXTS),
        *numbers,
        embedding,
    ]
