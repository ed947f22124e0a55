"""Decoding of all images of the zip into one array on disk, and a manifest that describes its rows."""

import errno
import os
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from pathlib import Path

import numpy as np
import pandas as pd
from joblib import cpu_count
from numpy.lib.format import open_memmap, write_array_header_1_0
from xxhash import xxh3_128_hexdigest

from pipeline.core.config import PrepareParams
from pipeline.core.errors import UserError
from pipeline.core.files import DamagedFileError, atomic_path, write_csv, write_json
from pipeline.core.progress import track_progress
from pipeline.data import duplicates, images, layout

FILE_COLUMNS = ["width", "height", "bytes", "jpeg_quantization", "xxh128", "phash", "reason"]

# Each worker process opens the zip and the array once.
_archive: zipfile.ZipFile
_array_descriptor: int
_data_offset: int


def pack_images(raw: Path, params: PrepareParams, target: Path) -> None:
    """Write `images.npy`, `images.json`, `manifest.csv` and `quarantine.csv` into the folder `target`.

    The array is uint8 (N, size, size). Row i of the manifest describes image i: file, set, label, patient, source,
    view, sex, age (years), license, width and height (of the upright image, pixels), bytes and `jpeg_quantization` (of
    the file), the XXH3 hash of the pixels, so that the hash of the manifest identifies the array, and the perceptual
    hash. Workers write their rows directly into the file, so memory does not grow with N. The JSON records the resize
    method, which inference must repeat.

    Args:
        raw: zip in the competition's layout.
        params: size, resize method, and the share of the labeled images that may be unusable.
        target: folder of the four files.

    Raises:
        UserError: a test image is unusable, or more labeled images than `max_quarantined` allows.
    """
    rows = layout.read_layout(raw).images
    with atomic_path(target / "images.npy") as array_path:
        offset = _allocate(array_path, len(rows), params.size)
        with ProcessPoolExecutor(cpu_count(), initializer=_open_files, initargs=(raw, array_path, offset)) as pool:
            jobs = pool.map(_decode, range(len(rows)), rows["member"], repeat(params), chunksize=32)
            try:
                file_data = pd.DataFrame(track_progress(jobs, "decoding", len(rows)), columns=FILE_COLUMNS)
            except BrokenProcessPool:
                raise UserError(
                    "a worker process that decoded images was killed, probably for lack of memory; free memory and run "
                    "again"
                ) from None
        rows = pd.concat([rows.drop(columns="member"), file_data], axis="columns")
        unusable = rows["reason"] != ""
        _check_quarantine(rows[unusable], len(rows[rows["set"] == "train"]), params.max_quarantined)
        if unusable.any():
            _keep_rows(array_path, np.flatnonzero(~unusable))
        write_json(target / "images.json", {"resize": params.resize})
        write_csv(target / "manifest.csv", rows[~unusable].drop(columns="reason"))
        write_csv(target / "quarantine.csv", rows.loc[unusable, ["file", "set", "label", "reason"]])


def _allocate(path: Path, count: int, size: int) -> int:
    """Create the array's file and return the offset of its data, bytes."""
    array = open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, size, size))
    return int(array.offset)


def _open_files(raw: Path, array: Path, offset: int) -> None:
    global _archive, _array_descriptor, _data_offset
    warnings.simplefilter("ignore")  # of decoders; errors go to quarantine.csv
    _archive, _array_descriptor, _data_offset = zipfile.ZipFile(raw), os.open(array, os.O_WRONLY), offset


def _decode(row: int, member: str, params: PrepareParams) -> tuple[int, int, int, float, str, str, str]:
    if not member:
        return 0, 0, 0, 0, "", "", "not in the zip"
    try:
        data = layout.read_member(_archive, member)
    except DamagedFileError as error:
        return 0, 0, 0, 0, "", "", f"damaged in the zip: {error}"
    try:
        pixels, (width, height) = images.decode_radiograph(data, params.size, params.resize)
    except images.UnusableError as error:
        return 0, 0, 0, 0, "", "", str(error)
    # Not through a memory map, which would kill the process when the disk is full.
    if os.pwrite(_array_descriptor, pixels.data, _data_offset + row * pixels.nbytes) < pixels.nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    hashes = xxh3_128_hexdigest(pixels.data), duplicates.perceptual_hash(pixels)
    return width, height, len(data), images.jpeg_quantization(data), *hashes, ""


def _check_quarantine(unusable: pd.DataFrame, labeled_count: int, max_quarantined: float) -> None:
    test = unusable[unusable["set"] == "test"]
    if len(test):
        first = test.iloc[0]
        raise UserError(
            f"test image {first['file']}: {first['reason']} ({len(test)} unusable in total); "
            "replace it: a submission needs every test image"
        )
    if len(unusable) > max_quarantined * labeled_count:
        reasons = unusable.groupby(unusable["reason"].str.split(":").str[0])["file"].agg(["count", "first"])
        most_common = ", ".join(
            f"{count} × {reason} (first {first})" for reason, count, first in reasons.nlargest(3, "count").itertuples()
        )
        raise UserError(
            f"{len(unusable)} of {labeled_count} labeled images are unusable, more than prepare.max_quarantined = "
            f"{max_quarantined:g} allows: {most_common}; repair or remove them, or raise the limit"
        )


def _keep_rows(path: Path, rows: np.ndarray) -> None:
    """Remove all other rows from the array's file."""
    images_before = np.load(path, mmap_mode="r")
    with atomic_path(path) as temporary, temporary.open("wb") as out:
        shape = (len(rows), *images_before.shape[1:])
        write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for row in rows:
            out.write(images_before[row].tobytes())
