"""What the pipeline would make of a folder, archive or table, found out without writing anything to the project."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from pipeline.core.config import DownloadParams, PrepareParams
from pipeline.core.errors import UserError, rename_in_errors
from pipeline.core.files import DamagedFileError
from pipeline.core.progress import track_progress
from pipeline.data import images, layout, sources
from pipeline.data.dicom import read_metadata
from pipeline.data.exclusion import count_values, exclusion_reasons
from pipeline.data.image_checks import UnusableError
from pipeline.data.raw_images import RawImages
from pipeline.data.source_folder import open_source_folder
from pipeline.data.sources import detection
from pipeline.data.sources.archive_writer import without_reading_images


@dataclass(frozen=True)
class CheckedImages:
    """Images that were decoded, M of them, and how many were not.

    Attributes:
        pixels: uint8 (M, S, S).
        names: (M,).
        unusable: the reason why an image is not usable, by its name.
        dicom: what DICOM files say, M rows with the columns of `dicom.read_metadata`.
    """

    pixels: np.ndarray
    names: list[str]
    unusable: pd.Series
    dicom: pd.DataFrame


@dataclass(frozen=True)
class CheckedData:
    """Data that the pipeline has not seen yet.

    Attributes:
        read: returns the content of an image file.
        names: of these files: as `prepare.excluded_files` takes them or, if there is a problem, paths.
        rows: from `layout.read_layout`; None if there is a problem.
        warnings: what in the tables does not match.
        problem: why `download` would refuse the data, or an empty text.
    """

    read: Callable[[str], bytes]
    names: list[str]
    rows: pd.DataFrame | None
    warnings: list[str]
    problem: str


@contextmanager
def open_data(params: DownloadParams, problem: str = "") -> Iterator[CheckedData]:
    """Read the data as `download` would, in a folder that is deleted at the end; or, if it cannot, only list images.

    Args:
        params: of the stage.
        problem: already known, so that images are only listed.

    Raises:
        UserError: as `download` would, if the data are not in a folder.
    """
    path = getattr(params, "path", None)
    paths = path if isinstance(path, list) else [path] if path else []
    is_listed = bool(paths) and all(map(detection.can_list, paths))
    if is_listed:  # nor are the images of an archive copied or those of a folder all read
        params = params.model_copy(update={"copy_images": False})
    with ExitStack() as stack:
        raw = Path(stack.enter_context(TemporaryDirectory(prefix="cxr-"))) / "raw.zip"
        contents = None
        try:
            if not problem:
                with rename_in_errors({str(raw): sources.name_data(params)}), without_reading_images():
                    sources.fetch_source(params, raw)
                    contents = layout.read_layout(raw)
        except UserError as error:
            if not is_listed:
                raise
            problem = str(error)
        if contents is not None:
            reader, rows = stack.enter_context(RawImages(raw, params)), contents.images
            found = rows[rows["member"] != ""]
            members: dict[str, str] = dict(zip(found["file"], found["member"], strict=True))
            yield CheckedData(lambda file: reader.read(members[file]), list(members), rows, contents.warnings, "")
        else:
            folder = open_source_folder(path, "the data")
            yield CheckedData(folder.read_bytes, detection.list_images(folder), None, [], problem)


def check_images(data: CheckedData, params: PrepareParams, limit: int) -> CheckedImages:
    """Decode images as `prepare` would.

    Args:
        data: from `open_data`.
        params: size and resize method.
        limit: how many to decode, evenly spaced; 0 for all.
    """
    names = data.names
    step = max(len(names) / limit, 1) if limit else 1
    chosen = [names[int(index * step)] for index in range(int(len(names) / step))]

    def decode(name: str) -> tuple[np.ndarray, dict[str, str]] | str:
        try:
            content = data.read(name)
            return images.decode_radiograph(content, params.image_size, params.resize)[0], read_metadata(content)
        except (UnusableError, DamagedFileError, UserError) as error:
            return str(error)

    jobs = Parallel(n_jobs=-1, prefer="threads", return_as="generator")(delayed(decode)(name) for name in chosen)
    results = dict(zip(chosen, track_progress(jobs, "decoding", len(chosen)), strict=True))
    usable = {name: result for name, result in results.items() if not isinstance(result, str)}
    return CheckedImages(
        np.array([pixels for pixels, _ in usable.values()], np.uint8).reshape(-1, params.image_size, params.image_size),
        list(usable),
        pd.Series({name: result for name, result in results.items() if isinstance(result, str)}, dtype="str"),
        pd.DataFrame([metadata for _, metadata in usable.values()]),
    )


def describe_rows(rows: pd.DataFrame, params: PrepareParams) -> dict[str, str]:
    """Describe what is understood of the images, by what it is about.

    Args:
        rows: from `layout.read_layout`.
        params: the views to keep.
    """
    labeled = rows[rows["set"] == "train"]
    described = {
        "labeled": f"{len(labeled)} images: {(labeled['label'] == 0).sum()} negative, {(labeled['label'] == 1).sum()} "
        "positive",
        "test": f"{(rows['set'] == 'test').sum()} images",
    }
    missing = rows["file"][rows["member"] == ""]
    if len(missing):
        described["missing"] = f"{len(missing)} labeled images, the first is {missing.iloc[0]}"
    unknown = (rows["patient"] == "").sum()
    described["patients"] = f"{rows['patient'].replace('', pd.NA).nunique()} known; {unknown} images of unknown ones"
    described |= {key: count_values(rows[key]) for key in ("source", "view", "sex", "manufacturer", "modality")}
    age = rows["age"].dropna()
    described["age"] = f"{len(age)} known" + (f", {age.min():.3g} to {age.max():.3g} years" if len(age) else "")
    excluded = exclusion_reasons(rows, params)
    if (excluded != "").any():
        described["left out"] = count_values(excluded[excluded != ""])
    return described


def describe_images(checked: CheckedImages, count: int) -> dict[str, str]:
    """Describe the files of the images, by what it is about.

    Args:
        checked: some of them.
        count: of all images.
    """
    tried = len(checked.names) + len(checked.unusable)
    described = {"decoded": f"{len(checked.names)} of {tried}" + (f", from all {count}" if tried < count else "")}
    if len(checked.unusable):
        groups = checked.unusable.index.to_series().groupby(checked.unusable)
        reasons = groups.agg(["count", "first"]).sort_values("count", ascending=False, kind="stable")
        listed = [f"{number} × {reason} (first {first})" for reason, number, first in reasons.head(5).itertuples()]
        more = f"; {len(reasons) - 5} more reasons" if len(reasons) > 5 else ""
        described["unusable"] = f"{len(checked.unusable)}: {'; '.join(listed)}{more}"
    for key, values in checked.dicom.items():
        if values.ne("").any():
            is_listed = key not in ("patient", "age")
            number = f"{values[values != ''].nunique()} values"
            described[f"DICOM {key}"] = count_values(values) if is_listed else number
    return described
