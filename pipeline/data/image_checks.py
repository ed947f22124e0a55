"""The checks that reject unusable files, whatever their format.

They look at the file and its gray levels, not at anatomy: a CT slice or a lateral view saved as PNG passes.
"""

import re

import numpy as np
from PIL import Image

MIN_EDGE = 32  # pixels; smaller images show no lung detail
MAX_PIXELS = 40_000_000  # decoding needs up to 1.5 GB; the detectors with the highest resolution have half as many
MAX_BYTES = 256 << 20  # of a file that is given to a model; MAX_PIXELS of 16 bits have 76 MiB
MAX_ASPECT_RATIO = 10  # longer edge by shorter edge
MAX_SCANS = 200  # of a progressive JPEG; usual are about ten, and each takes a pass over the whole image
MIN_CONTRAST = 10  # gray levels between the 1st and 99th percentile; the lowest value seen in a radiograph is 60
MAX_CHROMA_SD = 10.0  # of 255; tinted or annotated radiographs have up to 7, photographs 13 or more
MAX_REASON = 300  # characters
JPEG_START = b"\xff\xd8"
SCAN_MARKER = b"\xff\xda"
OBJECT_REPRESENTATION = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>|0x[0-9a-fA-F]{7,}")  # differs from run to run


class UnusableError(Exception):
    """A file is not a usable radiograph; the message is the reason, as listed in quarantine.csv."""


def check_bytes(count: int) -> None:
    if count > MAX_BYTES:
        raise UnusableError(f"too large: more than {MAX_BYTES:,} bytes")


def check_shape(width: int, height: int) -> None:
    shape = f"{width}×{height} pixels"
    if min(width, height) < MIN_EDGE:
        raise UnusableError(f"too small: {shape}")
    if width * height > MAX_PIXELS:
        raise UnusableError(f"too large: {shape}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise UnusableError(f"too narrow: {shape}")


def check_contrast(contrast: float) -> None:
    if contrast < MIN_CONTRAST:
        raise UnusableError(f"blank or nearly blank: contrast of {contrast:g} gray levels")


def check_scans(data: bytes) -> None:
    if data.startswith(JPEG_START) and data.count(SCAN_MARKER) > MAX_SCANS:
        raise UnusableError(f"broken image: JPEG with more than {MAX_SCANS} scans")


def check_color(image: Image.Image) -> None:
    """Reject images with chroma variance that a linear function of luma, such as a tint, does not explain."""
    small = np.asarray(image.resize((64, 64), Image.Resampling.BOX).convert("YCbCr"), dtype=float).reshape(-1, 3)
    (luma_variance, *covariances), (_, cb_variance, _), (_, _, cr_variance) = np.cov(small, rowvar=False)
    unexplained = cb_variance + cr_variance - sum(value**2 for value in covariances) / max(luma_variance, 1)
    if unexplained > MAX_CHROMA_SD**2:
        raise UnusableError("color photograph or drawing")


def describe_error(error: Exception) -> str:
    """Return the error's message on one line, the same text in every run: without memory addresses."""
    message = " ".join(OBJECT_REPRESENTATION.sub("", str(error)).split())
    return message[:MAX_REASON] or type(error).__name__
