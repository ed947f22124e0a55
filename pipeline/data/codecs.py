"""Decoding of the kinds of JPEG that Pillow cannot decode, as files of their own or inside of a DICOM."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.data.image_checks import JPEG_START, SCAN_MARKER, UnusableError, check_scans, check_shape

JPEG_END = b"\xff\xd9"
JPEG_LS = 0xF7
JPEG_FRAMES = {
    0xC0: "JPEG Baseline",
    0xC1: "JPEG Extended",
    0xC2: "progressive JPEG",
    0xC3: "JPEG Lossless",
    0xC5: "hierarchical JPEG",
    0xC6: "hierarchical progressive JPEG",
    0xC7: "hierarchical JPEG Lossless",
    0xC9: "arithmetic-coded JPEG",
    0xCA: "arithmetic-coded progressive JPEG",
    0xCB: "arithmetic-coded JPEG Lossless",
    0xCD: "hierarchical arithmetic-coded JPEG",
    0xCE: "hierarchical arithmetic-coded progressive JPEG",
    0xCF: "hierarchical arithmetic-coded JPEG Lossless",
    JPEG_LS: "JPEG-LS",
}
WITHOUT_DECODER = {0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF}
LOSSLESS = {0xC3, JPEG_LS}
JPEG2000_START = b"\xff\x4f\xff\x51"  # of its code stream; a JP2 file has boxes before it


class Frame(NamedTuple):
    """What the header of a compressed image says; `marker` is the JPEG's kind, 0 for JPEG 2000."""

    marker: int
    precision: int  # bits
    width: int
    height: int

    @property
    def name(self) -> str:
        return f"{JPEG_FRAMES[self.marker]} of {self.precision} bits" if self.marker else "JPEG 2000"

    @property
    def needs_decoder(self) -> bool:
        """Whether Pillow cannot decode it."""
        return self.marker in LOSSLESS | WITHOUT_DECODER or (self.marker != 0 and self.precision > 8)


def iterate_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield marker and offset of the content, after the length, of the segments of a JPEG before its first scan.

    Segment by segment, because a segment of metadata may contain a thumbnail with segments of its own.
    """
    offset = len(JPEG_START)
    while offset + 4 <= len(data) and data[offset : offset + 2] != SCAN_MARKER:
        if data[offset + 1] == 0xFF:  # fill byte
            offset += 1
            continue
        yield data[offset + 1], offset + 4
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4])


def read_frame(data: bytes) -> Frame | None:
    """Read the header of a JPEG, JPEG-LS or JPEG 2000 code stream without decoding; None if it is none or broken."""
    if data.startswith(JPEG2000_START):
        right, bottom, left, top = (int.from_bytes(data[offset : offset + 4]) for offset in range(8, 24, 4))
        return Frame(0, (int.from_bytes(data[42:43]) & 0x7F) + 1, right - left, bottom - top)
    if data.startswith(JPEG_START):
        for marker, offset in iterate_segments(data):
            if marker in JPEG_FRAMES:
                precision, height, width = data[offset], data[offset + 1 : offset + 3], data[offset + 3 : offset + 5]
                return Frame(marker, precision, int.from_bytes(width), int.from_bytes(height))
    return None


def decode_frame(data: bytes, frame: Frame, *, is_rgb: bool = False) -> np.ndarray:
    """Decode a JPEG, JPEG-LS or JPEG 2000 code stream.

    Args:
        data: the code stream.
        frame: its header, from `read_frame`.
        is_rgb: that there are three channels that are not to be converted, whatever the JPEG lets one assume.

    Returns:
        Integers, (H, W) or (H, W, C). Three channels of a lossy JPEG or JPEG 2000 are red, green and blue; those of a
        lossless one are as stored.

    Raises:
        UnusableError: too small, too large, too narrow, or a kind of JPEG that no decoder reads.
        Exception: of any type, the code stream is broken.
    """
    import imagecodecs

    check_shape(frame.width, frame.height)
    if frame.marker == 0:
        return imagecodecs.jpeg2k_decode(data)
    if frame.marker in WITHOUT_DECODER:
        raise UnusableError(f"{frame.name}: no decoder reads it; convert it to PNG or JPEG Baseline")
    check_scans(data)
    if data.rfind(JPEG_END) < data.rfind(SCAN_MARKER):
        raise ValueError(f"{frame.name} is truncated")
    if frame.marker == JPEG_LS:
        return imagecodecs.jpegls_decode(data)
    colors = {"colorspace": "RGB", "outcolorspace": "RGB"} if is_rgb else {}
    return imagecodecs.jpeg8_decode(data, **colors)  # type: ignore[arg-type]
