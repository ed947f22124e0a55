"""Every image of the zip, decoded once, as one array on disk and a table of what each row is."""

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
from pipeline.core.errors import UserError, first_line
from pipeline.core.files import atomic_path, write_csv, write_json
from pipeline.core.progress import track_progress
from pipeline.data import duplicates, images, layout

FILE_COLUMNS = ["width", "height", "bytes", "jpeg_quantization", "xxh128", "phash", "reason"]

# Each worker process opens the zip and the array once.
_archive: zipfile.ZipFile
_array: int
_start: int


def pack_images(raw: Path, params: PrepareParams, target: Path) -> None:
    """Write `images.npy`, `images.json`, `manifest.csv` and `quarantine.csv` into the folder `target`.

    The array is uint8 of shape (N, size, size). Row i of the manifest is image i: file, set, label, patient, source,
    view, license, width and height (of the upright image, pixels), bytes and `jpeg_quantization` (of the file), the XXH3 hash
    of its pixels, so that the manifest's own hash stands for the array, and their perceptual hash. Workers write their
    rows into the file themselves: memory does not grow with N. The JSON says how the images became square, which a
    model must know to do the same.

    Raises:
        UserError: a test image is not usable, or more labeled ones than `max_quarantined` allows.
    """
    rows = layout.read_layout(raw).images
    with atomic_path(target / "images.npy") as array_path:
        start = _allocate(array_path, len(rows), params.size)
        with ProcessPoolExecutor(cpu_count(), initializer=_open, initargs=(raw, array_path, start)) as pool:
            jobs = pool.map(_decode, range(len(rows)), rows["member"], repeat(params), chunksize=32)
            try:
                facts = pd.DataFrame(track_progress(jobs, "decoding", len(rows)), columns=FILE_COLUMNS)
            except BrokenProcessPool:
                raise UserError(
                    "a process that decoded images was killed, most likely for lack of memory; free some and run again"
                ) from None
        rows = pd.concat([rows.drop(columns="member"), facts], axis="columns")
        bad = rows["reason"] != ""
        _check(rows[bad], len(rows[rows["set"] == "train"]), params.max_quarantined)
        if bad.any():
            _keep(array_path, np.flatnonzero(~bad))
        write_json(target / "images.json", {"resize": params.resize})
        write_csv(target / "manifest.csv", rows[~bad].drop(columns="reason"))
        write_csv(target / "quarantine.csv", rows.loc[bad, ["file", "set", "label", "reason"]])


def _allocate(path: Path, count: int, size: int) -> int:
    """Write the array's header and return where its first byte of data lies."""
    array = open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, size, size))
    return int(array.offset)


def _open(raw: Path, array: Path, start: int) -> None:
    global _archive, _array, _start
    warnings.simplefilter("ignore")  # decoders warn of what is odd; what matters becomes a reason
    _archive, _array, _start = zipfile.ZipFile(raw), os.open(array, os.O_WRONLY), start


def _decode(row: int, member: str, params: PrepareParams) -> tuple[int, int, int, float, str, str, str]:
    if not member:
        return 0, 0, 0, 0, "", "", "no such image in the archive"
    try:
        data = layout.read_member(_archive, member)
    except layout.DAMAGED_ZIP_ERRORS as reason:
        return 0, 0, 0, 0, "", "", f"damaged in the zip: {first_line(reason)}"
    try:
        pixels, (width, height) = images.decode_radiograph(data, params.size, params.resize)
    except images.UnusableError as reason:
        return 0, 0, 0, 0, "", "", str(reason)
    # Writing, unlike a memory map, says so when the disk is full.
    if os.pwrite(_array, pixels.data, _start + row * pixels.nbytes) < pixels.nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    hashes = xxh3_128_hexdigest(pixels.data), duplicates.perceptual_hash(pixels)
    return width, height, len(data), images.jpeg_quantization(data), *hashes, ""


def _check(bad: pd.DataFrame, labeled: int, allowed: float) -> None:
    test = bad[bad["set"] == "test"]
    if len(test):
        first = test.iloc[0]
        raise UserError(
            f"test image {first['file']}: {first['reason']} ({len(test)} unusable in all); "
            "a submission needs every test image, so replace it"
        )
    if len(bad) > allowed * labeled:
        kinds = bad.groupby(bad["reason"].str.split(":").str[0])["file"].agg(["count", "first"])
        worst = ", ".join(
            f"{count} × {kind} (first {first})" for kind, count, first in kinds.nlargest(3, "count").itertuples()
        )
        raise UserError(
            f"{len(bad)} of {labeled} labeled images are unusable, more than prepare.max_quarantined = {allowed:g} "
            f"allows: {worst}; mend them or raise it"
        )


def _keep(path: Path, rows: np.ndarray) -> None:
    """Leave only the given rows in the array."""
    everything = np.load(path, mmap_mode="r")
    with atomic_path(path) as aside, aside.open("wb") as out:
        shape = (len(rows), *everything.shape[1:])
        write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for row in rows:
            out.write(everything[row].tobytes())
