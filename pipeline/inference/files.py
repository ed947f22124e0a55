"""Classifies image files with a candidate; each file is decoded once."""

import glob
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed

from pipeline.core.config import Resize
from pipeline.core.errors import UserError
from pipeline.core.progress import track_progress
from pipeline.data import images
from pipeline.inference.candidate import BATCH_SIZE, Candidate


def expand_paths(names: Iterable[str]) -> list[Path]:
    """Expand files, folders (recursively) and patterns such as `x/*.png` to a list of files without duplicates.

    Raises:
        UserError: a name matches no file.
    """
    files: dict[Path, None] = {}  # an ordered set
    for name in names:
        path = Path(name)
        pattern = glob.escape(name) if path.exists() else name
        matches = glob.glob(pattern, recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
        candidates = sorted(path.rglob("*") if path.is_dir() else map(Path, matches))
        visible = [file for file in candidates if file.is_file() and not file.name.startswith(".")]
        if not visible:
            raise UserError(f"{name}: no files found; give radiographs, folders or patterns")
        files |= dict.fromkeys(visible)
    return list(files)


def predict_files(candidate: Candidate, paths: list[Path]) -> pd.DataFrame:
    """Classify image files.

    Returns:
        A row per file: `file`, `probability` and `label` as of `Candidate.predict`, and `reason`: empty, or why a file
        is not a usable radiograph, whose probability and label are missing.
    """
    decoded = Parallel(n_jobs=-1, prefer="threads", return_as="generator")(
        delayed(_decode)(path, candidate.packed_size, candidate.resize) for path in paths
    )
    results, rows = track_progress(decoded, "predicting", len(paths)), []
    while batch := list(islice(results, BATCH_SIZE)):
        usable = [pixels for pixels in batch if isinstance(pixels, np.ndarray)]
        predictions = iter(candidate.predict(torch.from_numpy(np.stack(usable))).to_dict("records") if usable else [])
        rows += [
            {**next(predictions), "reason": ""} if isinstance(pixels, np.ndarray) else {"reason": pixels}
            for pixels in batch
        ]
    table = pd.DataFrame(rows, columns=["probability", "label", "reason"])
    table.insert(0, "file", [str(path) for path in paths])
    return table.astype({"label": "Int64"})


def _decode(path: Path, size: int, resize: Resize) -> np.ndarray | str:
    """Return the pixels, or why the file is not usable."""
    try:
        return images.decode_radiograph(path.read_bytes(), size, resize)[0]
    except (images.UnusableError, OSError) as reason:
        return str(reason)
