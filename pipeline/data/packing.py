"""Decoding of all images of the zip into one array on disk, and a manifest that describes its rows."""

import errno
import json
import logging
import multiprocessing
import os
import shutil
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import distributions
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from joblib import cpu_count
from numpy.lib.format import open_memmap, write_array_header_1_0
from xxhash import xxh3_128_hexdigest

from pipeline.core.config import DownloadParams, KaggleParams, PrepareParams
from pipeline.core.errors import UserError
from pipeline.core.files import DamagedFileError, atomic_path, md5_of_file, write_csv, write_json
from pipeline.core.progress import track_progress
from pipeline.data import dicom, duplicates, images, layout
from pipeline.data.demographics import read_age
from pipeline.data.exclusion import exclusion_reasons, report_exclusions
from pipeline.data.image_checks import UnusableError
from pipeline.data.raw_images import RawImages

log = logging.getLogger(__name__)

FILE_COLUMNS = ["width", "height", "bytes", "jpeg_quantization", "xxh128", "phash"]
METADATA = [*dicom.METADATA]
DICOM_COLUMNS = [f"dicom_{name}" for name in METADATA]
RESULTS = [*FILE_COLUMNS, *DICOM_COLUMNS, "reason"]  # of an image
ARRAY = "decoded.npy"

# Each worker process opens the raw images and the array once.
_raw_images: RawImages
_array_descriptor: int
_data_offset: int


def pack_images(raw: Path, params: PrepareParams, target: Path, download: DownloadParams | None = None) -> None:
    """Write `images.npy`, `images.json`, `manifest.csv` and `quarantine.csv` into the folder `target`.

    The array is uint8 (N, size, size). Row i of the manifest describes image i: file, set, label, patient, source,
    view, sex, age (years), license, manufacturer, modality, width and height (of the upright image, pixels), bytes and
    `jpeg_quantization` (of the file), the XXH3 hash of the pixels, so that the hash of the manifest identifies the
    array, and the perceptual hash. What the zip's table does not say of an image is taken from its DICOM header. The
    JSON records the resize method, which inference must repeat.

    Workers write their rows directly into a file, so memory hardly grows with N. A run that was stopped, even if it was
    killed, leaves the folder `.prepare`; the next one with the same data, parameters and code decodes the images that
    are left, and those that were unusable again.

    Args:
        raw: zip in the competition's layout.
        params: size, resize method, the share of the labeled images that may be unusable, and what is left out.
        target: folder of the four files.
        download: where the images are that the zip refers to, if it does.

    Raises:
        UserError: an image that the zip refers to is missing or changed; a test image is unusable, or more labeled
            images than `max_quarantined` allows, which are in `quarantine.csv` then; or the disk has too little space.
            See also `exclusion_reasons` and `report_exclusions`.
    """
    rows = layout.read_layout(raw).images
    folder = target / ".prepare"
    members = rows["member"].where(exclusion_reasons(rows, params) == "", "")  # what is left out is not decoded
    results = _decode_images(raw, download, members, params, folder)
    rows = _fill_metadata(pd.concat([rows.drop(columns="member"), results], axis="columns"))
    excluded = exclusion_reasons(rows, params)  # again, with the views of DICOM files
    needs_every_test_image = isinstance(download, KaggleParams) and download.competition is not None
    report_exclusions(rows, excluded, params.views, needs_every_test_image=needs_every_test_image)
    rows["reason"] = rows["reason"].where(excluded == "", excluded)
    unusable = rows["reason"] != ""
    write_csv(target / "quarantine.csv", rows.loc[unusable, ["file", "set", "label", "reason"]])
    is_included = excluded == ""
    labeled_count = (is_included & (rows["set"] == "train")).sum()
    _check_quarantine(rows[unusable & is_included], labeled_count, params.max_quarantined)
    write_json(target / "images.json", {"resize": params.resize})
    write_csv(target / "manifest.csv", rows[~unusable].drop(columns="reason"))
    if unusable.any():
        _copy_rows(folder / ARRAY, np.flatnonzero(~unusable), target / "images.npy")
    else:
        (folder / ARRAY).replace(target / "images.npy")
    shutil.rmtree(folder)


def _decode_images(
    raw: Path, download: DownloadParams | None, members: pd.Series, params: PrepareParams, folder: Path
) -> pd.DataFrame:
    """Decode all images into the array in the folder, and return their `RESULTS` with the index of `members`."""
    results_path, run = folder / "results.jsonl", _describe_run(raw, params)
    left = members
    if (folder / ARRAY).exists() and _is_of_run(results_path, run):
        results = _read_results(results_path)
        left = members.drop(results.index[results["reason"] == ""])
        log.warning("decoding continues: %s of %s images are left", len(left), len(members))
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_space(folder.parent, (members != "").sum(), params.image_size)
        folder.mkdir()
        shape = (len(members), params.image_size, params.image_size)
        open_memmap(folder / ARRAY, mode="w+", dtype=np.uint8, shape=shape)
        _allocate(folder / ARRAY)
        results_path.write_text(run, encoding="utf-8")
    offset = (folder / ARRAY).stat().st_size - len(members) * params.image_size**2
    with (
        RawImages(raw, download),  # for its errors; one in a worker would only say that the worker ended
        results_path.open("a", encoding="utf-8", buffering=1) as lines,
        ProcessPoolExecutor(
            cpu_count(), initializer=_open_files, initargs=(raw, download, folder / ARRAY, offset)
        ) as pool,
    ):
        jobs = pool.map(_decode, left.index, left, repeat(params), chunksize=32)
        try:
            for row in track_progress(jobs, "decoding", len(left)):
                lines.write(json.dumps(row) + "\n")
        except BrokenProcessPool:
            raise UserError(
                "a worker process that decoded images was killed, probably for lack of memory; free memory and run "
                "again"
            ) from None
    return _read_results(results_path)


def _describe_run(raw: Path, params: PrepareParams) -> str:
    """Return a line with all on which the pixels depend; the raw data are identified by time and size, as DVC does."""
    stat = raw.stat()
    run = {
        "raw": [stat.st_ino, stat.st_mtime_ns, stat.st_size],
        "params": [params.image_size, params.resize],
        "code": [md5_of_file(path) for path in sorted(Path(__file__).parent.iterdir()) if path.suffix == ".py"],
        "packages": sorted({"{Name}=={Version}".format_map(package.metadata) for package in distributions()}),
    }
    return json.dumps(run) + "\n"


def _is_of_run(results: Path, run: str) -> bool:
    """Tell whether the file begins with this line, and remove the line that a killed run may have left incomplete."""
    if not results.exists():
        return False
    content = results.read_bytes()
    os.truncate(results, content.rfind(b"\n") + 1)
    return content.startswith(run.encode())


def _read_results(path: Path) -> pd.DataFrame:
    """Read the last results of each image."""
    with path.open(encoding="utf-8") as lines:
        next(lines)
        results = pd.DataFrame(map(json.loads, lines), columns=["row", *RESULTS]).set_index("row")
    return results[~results.index.duplicated(keep="last")].sort_index()


def _check_space(folder: Path, count: int, size: int) -> None:
    needed, free = count * size**2, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the disk is full: in {folder}, {count} images of {size}×{size} pixels need {needed / 1e6:.0f} MB, but "
            f"{free / 1e6:.0f} MB are free; free some space or lower prepare.image_size"
        )


def _allocate(path: Path) -> None:
    """Allocate the space of a file, where the system can: writing takes less time then, and cannot run out of it."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _open_files(raw: Path, download: DownloadParams | None, array: Path, offset: int) -> None:
    global _raw_images, _array_descriptor, _data_offset
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # of decoders; errors go to quarantine.csv
    _raw_images, _array_descriptor, _data_offset = RawImages(raw, download), os.open(array, os.O_WRONLY), offset


def _exit_with_parent() -> None:
    """Wait until the parent process ends; workers of one that was killed would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _decode(row: int, member: str, params: PrepareParams) -> list[Any]:
    """Write the image into the array, and return its row and `RESULTS`."""
    if not member:
        return _unusable(row, "not in the zip")
    try:
        data = _raw_images.read(member)
    except DamagedFileError as error:
        return _unusable(row, f"damaged in the zip: {error}")
    try:
        pixels, (width, height) = images.decode_radiograph(data, params.image_size, params.resize)
    except UnusableError as error:
        return _unusable(row, str(error))
    # Not through a memory map, which would kill the process when the disk is full.
    if os.pwrite(_array_descriptor, pixels.data, _data_offset + row * pixels.nbytes) < pixels.nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    hashes = xxh3_128_hexdigest(pixels.data), duplicates.perceptual_hash(pixels)
    metadata = dicom.read_metadata(data)
    found = (metadata[name] for name in METADATA)
    return [row, width, height, len(data), images.jpeg_quantization(data), *hashes, *found, ""]


def _unusable(row: int, reason: str) -> list[Any]:
    return [row, 0, 0, 0, 0, "", "", *[""] * len(METADATA), reason]


def _fill_metadata(rows: pd.DataFrame) -> pd.DataFrame:
    """Take what the table does not say of an image from its DICOM file, and remove `DICOM_COLUMNS`."""
    found = rows[DICOM_COLUMNS].set_axis(METADATA, axis="columns")
    found["age"] = read_age(found["age"], "DICOM")
    missing = (rows[METADATA] == "") | rows[METADATA].isna()
    filled = missing["patient"] & (found["patient"] != "")
    if filled.any() and not missing["patient"].all():
        log.warning(
            "the patients of %s images are those of their DICOM files, and those of %s images are those of the table; "
            "equal names count as one patient",
            filled.sum(),
            (~missing["patient"]).sum(),
        )
    rows[METADATA] = rows[METADATA].where(~missing, found)
    return rows.drop(columns=DICOM_COLUMNS)


def _check_quarantine(unusable: pd.DataFrame, labeled_count: int, max_quarantined: float) -> None:
    test = unusable[unusable["set"] == "test"]
    if len(test):
        first = test.iloc[0]
        raise UserError(
            f"test image {first['file']}: {first['reason']} ({len(test)} unusable in total); "
            "replace it: a submission needs every test image"
        )
    if len(unusable) > max_quarantined * labeled_count:
        kinds = unusable.groupby(unusable["reason"].str.split(":").str[0])
        reasons = sorted((_describe_kind(rows) for _, rows in kinds), key=lambda pair: -pair[0])
        raise UserError(
            f"{len(unusable)} of {labeled_count} labeled images are unusable, more than prepare.max_quarantined = "
            f"{max_quarantined:g} allows: {', '.join(f'{count} × {reason}' for count, reason in reasons[:3])}; "
            "data/quarantine.csv lists them; repair or remove them, or raise the limit"
        )


def _describe_kind(unusable: pd.DataFrame) -> tuple[int, str]:
    """Return the number of images with reasons of one kind, and the commonest of the reasons with its first image."""
    reasons = unusable["reason"].value_counts()
    first = unusable["file"][unusable["reason"] == reasons.index[0]].iloc[0]
    return len(unusable), f"{reasons.index[0]}{' or similar' if len(reasons) > 1 else ''} (first {first})"


def _copy_rows(source: Path, rows: np.ndarray, target: Path) -> None:
    """Write an array with these rows only; a copy, so that an interruption leaves the source complete."""
    pixels = np.load(source, mmap_mode="r")
    with atomic_path(target) as temporary, temporary.open("wb") as out:
        shape = (len(rows), *pixels.shape[1:])
        write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for row in rows:
            out.write(pixels[row].tobytes())
