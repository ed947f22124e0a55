"""A candidate's judgment of files, each decoded once."""

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
    """Return the files that are meant by names of files, folders (all that is in them) and patterns such as `x/*.png`.

    Raises:
        UserError: a name means no file.
    """
    found: dict[Path, None] = {}  # in order, each once
    for name in names:
        path = Path(name)
        pattern = glob.escape(name) if path.exists() else name
        matching = glob.glob(pattern, recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
        meant = sorted(path.rglob("*") if path.is_dir() else map(Path, matching))
        of_name = [one for one in meant if one.is_file() and not one.name.startswith(".")]
        if not of_name:
            raise UserError(f"{name}: no file is there; name radiographs, folders or patterns")
        found |= dict.fromkeys(of_name)
    return list(found)


def predict_files(candidate: Candidate, paths: list[Path]) -> pd.DataFrame:
    """Judge the files; all members see each decoded image.

    Returns:
        A row per file: `file`, `probability` and `label` as `Candidate.predict` gives them, and `reason`, why a file
        is not a usable radiograph, in which case the two are missing.
    """
    decoded = Parallel(n_jobs=-1, prefer="threads", return_as="generator")(
        delayed(_decode)(path, candidate.packed_size, candidate.resize) for path in paths
    )
    left, rows = track_progress(decoded, "judging", len(paths)), []
    while part := list(islice(left, BATCH_SIZE)):
        usable = [pixels for pixels in part if isinstance(pixels, np.ndarray)]
        judged = iter(candidate.predict(torch.from_numpy(np.stack(usable))).to_dict("records") if usable else [])
        rows += [
            {**next(judged), "reason": ""} if isinstance(pixels, np.ndarray) else {"reason": pixels} for pixels in part
        ]
    table = pd.DataFrame(rows, columns=["probability", "label", "reason"])
    table.insert(0, "file", [str(path) for path in paths])
    return table.astype({"label": "Int64"})


def _decode(path: Path, size: int, resize: Resize) -> np.ndarray | str:
    try:
        return images.decode_radiograph(path.read_bytes(), size, resize)[0]
    except (images.UnusableError, OSError) as reason:
        return str(reason)
