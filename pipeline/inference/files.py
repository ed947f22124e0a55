"""Classifies image files with a candidate; each file is decoded once."""

import glob
import os
from collections.abc import Iterator, Sequence
from itertools import chain, islice, tee
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import cpu_count

from pipeline.core.config import Resize
from pipeline.core.errors import UserError
from pipeline.core.files import escape_undecodable
from pipeline.core.parallel import map_in_threads
from pipeline.core.progress import track_progress
from pipeline.data import images
from pipeline.data.image_checks import UnusableError
from pipeline.inference.candidate import Candidate


class ImageFiles:
    """Files, folders (recursively) and patterns such as `x/*.png`, expanded each time that they are iterated over.

    Of a single folder, only the names in one folder at a time are in memory, so it may hold millions of files.
    """

    def __init__(self, names: Sequence[str], excluded: Path | None = None) -> None:
        """Check the names; `excluded` is a file in one of the folders that is none of the images.

        Raises:
            UserError: a name matches no file.
        """
        self.names, self.excluded = names, excluded
        for name in names:
            if next(_expand(name), None) is None:
                raise UserError(f"{escape_undecodable(name)}: no files found; give radiographs, folders or patterns")

    def __iter__(self) -> Iterator[Path]:
        """Yield every file once, those of a folder in the order of their paths."""
        files: Iterator[Path] = chain.from_iterable(map(_expand, self.names))
        if len(self.names) > 1 or not Path(self.names[0]).is_dir():  # names and patterns may overlap
            files = iter(dict.fromkeys(files))
        return (file for file in files if not self._is_excluded(file))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _is_excluded(self, file: Path) -> bool:
        return self.excluded is not None and file.name == self.excluded.name and file.samefile(self.excluded)


def _expand(name: str) -> Iterator[Path]:
    path = Path(name)
    if path.is_dir():
        yield from _walk(path)
    elif path.exists():
        yield path
    else:
        matches = map(Path, glob.iglob(name, recursive=True))  # noqa: PTH207  # Path.glob takes no absolute pattern
        yield from sorted(file for file in matches if file.is_file() and not file.name.startswith("."))


def _walk(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        children = sorted(entries, key=lambda entry: entry.name)
    for child in children:
        if child.is_dir(follow_symlinks=False):
            yield from _walk(Path(child.path))
        elif child.is_file() and not child.name.startswith("."):
            yield Path(child.path)


def predict_files(candidate: Candidate, paths: ImageFiles) -> Iterator[pd.DataFrame]:
    """Classify image files; memory does not grow with their number.

    Yields:
        Tables with a row per file: `file`, `probability` and `label` as of `Candidate.predict`, and `reason`: empty, or
        why a file is not a usable radiograph, whose probability and label are missing. Bytes of a file name that are no
        UTF-8, and carriage returns, are escaped.
    """

    def decode(path: Path) -> tuple[Path, np.ndarray | str]:
        return path, _decode(path, candidate.packed_size, candidate.resize)

    # Decode ahead of the networks, but not the whole folder.
    remaining = track_progress(paths, "predicting", len(paths))
    decoded = map_in_threads(decode, remaining, cpu_count(), max(2 * candidate.batch_size, cpu_count()))
    batches, to_predict = tee(iter(lambda: list(islice(decoded, candidate.batch_size)), []))
    # An unusable image keeps its place, as a black one: the last bits of a probability depend on the batch.
    black = np.zeros((candidate.packed_size,) * 2, np.uint8)
    pixels = (torch.from_numpy(np.stack([black if isinstance(one, str) else one for _, one in b])) for b in to_predict)
    for batch, predicted in zip(batches, candidate.predict_batches(pixels), strict=True):
        yield _tabulate(batch, predicted)


def _tabulate(batch: list[tuple[Path, np.ndarray | str]], predicted: pd.DataFrame) -> pd.DataFrame:
    # Readers of CSV take a carriage return, which a Mac's `Icon\r` has, for the end of a row.
    files = [escape_undecodable(str(path)).replace("\r", r"\r") for path, _ in batch]
    reasons = [result if isinstance(result, str) else "" for _, result in batch]
    table = predicted[["probability", "label"]].astype({"label": "Int64"}).assign(reason=reasons)
    table.loc[table["reason"] != "", ["probability", "label"]] = pd.NA
    table.insert(0, "file", files)
    return table


def _decode(path: Path, size: int, resize: Resize) -> np.ndarray | str:
    """Return the pixels, or why the file is not usable."""
    try:
        return images.decode_radiograph(path.read_bytes(), size, resize)[0]
    except (UnusableError, OSError) as reason:
        return str(reason)
