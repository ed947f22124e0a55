"""Decoding of radiographs into square 8-bit gray images, and the checks that reject unusable files.

The checks look at the file and its gray levels, not at anatomy: a CT slice or a lateral view saved as PNG passes.
"""

import io
import re
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from simplejpeg import decode_jpeg, decode_jpeg_header

from pipeline.core.config import Resize

if TYPE_CHECKING:
    from pydicom import Dataset

MIN_EDGE = 32  # pixels; smaller images show no lung detail
MAX_PIXELS = 40_000_000  # decoding needs up to 1.5 GB; the detectors with the highest resolution have half as many
MAX_ASPECT_RATIO = 10  # longer edge by shorter edge
MAX_SCANS = 200  # of a progressive JPEG; usual are about ten, and each takes a pass over the whole image
MIN_CONTRAST = 10  # gray levels between the 1st and 99th percentile; the lowest value seen in a radiograph is 60
MAX_CHROMA_SD = 10.0  # of 255; tinted or annotated radiographs have up to 7, photographs 13 or more
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]  # not EPS: Pillow runs Ghostscript
OTHER_MODALITIES = {"CT", "MR", "NM", "PT", "US"}  # DICOM codes
UNUSUAL_SEGMENT = re.compile(rb"\xff[\xc2\xe1-\xef]")  # of a JPEG header: progressive, or other metadata than JFIF's
JPEG_START = b"\xff\xd8"
SCAN_MARKER = b"\xff\xda"
QUANTIZATION_MARKER = b"\xff\xdb"
EXIF_TRANSPOSITIONS = {  # EXIF orientation to the operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DEFLATED_TRANSFER_SYNTAX = b"1.2.840.10008.1.2.1.99"


class UnusableError(Exception):
    """A file is not a usable radiograph; the message is the reason, as listed in quarantine.csv."""


def decode_radiograph(data: bytes, size: int, resize: Resize) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode a radiograph to a square gray image; its content, not its name, decides the format (JPEG, DICOM, …).

    Color is converted to luma (ITU-R 601-2), transparent pixels become black, EXIF orientation is applied, and images
    of more than 8 bits are rescaled from the range of their values. For DICOM, the rescale slope and the first VOI
    window or LUT are applied, and MONOCHROME1 is inverted, so that bone is bright. Only the first image of a file is
    read.

    Args:
        data: content of the file.
        size: edge of the result, pixels.
        resize: how the image becomes square.

    Returns:
        The pixels, uint8 (size, size), and the original width and height of the upright image, pixels.

    Raises:
        UnusableError: the file is empty, broken, not an image, too small, too large, too narrow, blank or nearly
            blank, a color photograph, or a DICOM with several frames, with color or of another modality.
    """
    if not data:
        raise UnusableError("empty file")
    gray = _decode_dicom(data) if data[128:132] == b"DICM" else _decode_image(data)
    return resize_to_square(gray, size, resize), (gray.shape[1], gray.shape[0])


def resize_to_square(gray: np.ndarray, size: int, resize: Resize) -> np.ndarray:
    """Resize a gray image to a square: stretched, or padded with black bars to keep its aspect ratio.

    Args:
        gray: integers from 0 to 255, (H, W).
        size: edge of the result, pixels.
        resize: stretch or pad.

    Returns:
        uint8 (size, size).

    Raises:
        UnusableError: the array is not a gray image, too small, too large, too narrow, blank or nearly blank.
    """
    if gray.ndim != 2 or not _fits_uint8(gray):
        raise UnusableError("not a gray image: expected integers from 0 to 255 of shape (height, width)")
    _check_shape(gray.shape[1], gray.shape[0])
    step = min(gray.shape) // 32 | 1  # odd: repeated patterns mostly have even periods, which an even step would miss
    levels = np.sort(gray[::step, ::step], axis=None).astype(int)
    _check_contrast(levels[-(len(levels) // 100) - 1] - levels[len(levels) // 100])
    if gray.shape == (size, size):
        return gray.astype(np.uint8, copy=False)
    image, method = Image.fromarray(gray.astype(np.uint8, copy=False)), Image.Resampling.BILINEAR
    # The support of Pillow's bilinear filter grows with the scale, so downsampling is antialiased.
    if resize == "pad":
        return np.asarray(ImageOps.pad(image, (size, size), method, color=0))
    return np.asarray(image.resize((size, size), method))


def jpeg_quantization(data: bytes) -> float:
    """Compute the mean step of a JPEG's first quantization table, 1 (best quality) to 255; 0 for any other format.

    The table depends on the encoder and its quality setting, and can therefore reveal the source of an image.
    """
    if not data.startswith(JPEG_START):
        return 0.0
    offset = len(JPEG_START)
    # Segment by segment, because an EXIF segment may contain a thumbnail with a table of its own.
    while offset < len(data) and data[offset : offset + 2] != QUANTIZATION_MARKER:
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4])
    return sum(data[offset + 5 : offset + 69]) / 64


def _fits_uint8(values: np.ndarray) -> bool:
    if values.dtype == np.uint8:
        return True
    return values.dtype.kind in "ui" and values.min(initial=0) >= 0 and values.max(initial=0) <= 255


def _check_shape(width: int, height: int) -> None:
    shape = f"{width}×{height} pixels"
    if min(width, height) < MIN_EDGE:
        raise UnusableError(f"too small: {shape}")
    if width * height > MAX_PIXELS:
        raise UnusableError(f"too large: {shape}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise UnusableError(f"too narrow: {shape}")


def _check_contrast(contrast: float) -> None:
    if contrast < MIN_CONTRAST:
        raise UnusableError(f"blank or nearly blank: contrast of {contrast:g} gray levels")


def _decode_image(data: bytes) -> np.ndarray:
    _check_scans(data)
    try:
        gray = _decode_gray_jpeg(data)
        if gray is not None:
            return gray
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_shape(*image.size)
        image.load()
        return _to_gray(_apply_exif_orientation(image))
    except UnusableError:
        raise
    except UnidentifiedImageError:
        raise UnusableError("not an image in a known format") from None
    except Exception as error:  # noqa: BLE001  # Pillow raises errors of any type for damaged files
        raise UnusableError(f"broken image: {_one_line(error)}") from None


def _check_scans(data: bytes) -> None:
    if data.startswith(JPEG_START) and data.count(SCAN_MARKER) > MAX_SCANS:
        raise UnusableError(f"broken image: JPEG with more than {MAX_SCANS} scans")


def _apply_exif_orientation(image: Image.Image) -> Image.Image:
    try:
        transposition = EXIF_TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  # damaged EXIF is ignored, because the pixels may be intact
        transposition = None
    return image if transposition is None else image.transpose(transposition)


def _decode_gray_jpeg(data: bytes) -> np.ndarray | None:
    """Decode the luma of a baseline JPEG made from a gray image, which most radiographs are, at twice Pillow's speed.

    Returns:
        The pixels that Pillow gives; None for any other file, which Pillow must decode.
    """
    scan = data.find(SCAN_MARKER)
    if not data.startswith(JPEG_START) or UNUSUAL_SEGMENT.search(data[:scan]):
        return None
    try:
        height, width, colors, _ = decode_jpeg_header(data)
        _check_shape(width, height)
        if data[scan + 4] != {"Gray": 1, "YCbCr": 3}.get(colors):  # channels in separate scans
            return None
        if colors == "YCbCr":
            # Checking the first eighth of the bytes is enough: uniform areas take few bytes, so it has an eighth of the
            # detail, and no color photograph has that much exactly gray detail.
            preview = decode_jpeg(
                data[: scan + len(data) // 8], "RGB", min_factor=8, min_width=1, min_height=1, strict=False
            )
            red, green, blue = np.moveaxis(preview, 2, 0)
            if (red != green).any() or (green != blue).any():
                return None
        gray: np.ndarray = decode_jpeg(data, "GRAY")[..., 0]
    except (IndexError, ValueError):
        return None
    return gray


def _to_gray(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        return _rescale_to_uint8(np.asarray(image))  # convert("L") would clip all values above 255
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
        _check_color(image)
    return np.asarray(image.convert("L"))


def _check_color(image: Image.Image) -> None:
    """Reject images with chroma variance that a linear function of luma, such as a tint, does not explain."""
    small = np.asarray(image.resize((64, 64), Image.Resampling.BOX).convert("YCbCr"), dtype=float).reshape(-1, 3)
    (luma_variance, *covariances), (_, cb_variance, _), (_, _, cr_variance) = np.cov(small, rowvar=False)
    unexplained = cb_variance + cr_variance - sum(value**2 for value in covariances) / max(luma_variance, 1)
    if unexplained > MAX_CHROMA_SD**2:
        raise UnusableError("color photograph or drawing")


def _rescale_to_uint8(values: np.ndarray) -> np.ndarray:
    """Rescale from the range of the values, not of their type, to 0 to 255; uint8 is returned unchanged."""
    if values.dtype == np.uint8:
        return values
    scaled = values.astype(np.float64)
    low, high = scaled.min(), scaled.max()
    if not np.isfinite([low, high]).all():
        raise UnusableError("pixel values that are not finite")
    if values.dtype.kind in "iu":
        _check_contrast(high - low)
    scaled -= low
    scaled *= 255 / (high - low or 1)
    return np.rint(scaled, out=scaled).astype(np.uint8)


def _decode_dicom(data: bytes) -> np.ndarray:
    from pydicom import dcmread

    if DEFLATED_TRANSFER_SYNTAX in data:
        raise UnusableError("deflated DICOM: not supported, because its size is unknown before decompression")
    try:
        return _dicom_to_gray(dcmread(io.BytesIO(data)))
    except UnusableError:
        raise
    except Exception as error:  # noqa: BLE001  # pydicom raises errors of any type for damaged files
        raise UnusableError(f"broken DICOM: {_one_line(error)}") from None


def _dicom_to_gray(file: "Dataset") -> np.ndarray:
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    _check_shape(file.Columns, file.Rows)
    if file.get("Modality") in OTHER_MODALITIES:
        raise UnusableError(f"not a radiograph: DICOM modality {file.Modality}")
    if int(file.get("NumberOfFrames") or 1) > 1:
        raise UnusableError(f"DICOM with several frames: {file.NumberOfFrames}")
    interpretation = file.PhotometricInterpretation
    if interpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnusableError(f"DICOM in color: {interpretation}")
    _check_encapsulated_size(file)
    stored = file.pixel_array
    if stored.dtype.kind in "iu":
        _check_contrast(int(stored.max()) - int(stored.min()))
    gray = _rescale_to_uint8(apply_voi_lut(apply_modality_lut(stored, file), file))
    return 255 - gray if interpretation == "MONOCHROME1" else gray


def _check_encapsulated_size(file: "Dataset") -> None:
    """Reject an encapsulated JPEG or JPEG 2000 of another size than the DICOM's, before a decoder allocates memory."""
    from pydicom.encaps import get_frame
    from pydicom.pixels.decoders.pillow import DECODER_DEPENDENCIES

    if file.file_meta.TransferSyntaxUID in DECODER_DEPENDENCIES:
        frame = get_frame(file.PixelData, 0, number_of_frames=1)
        _check_scans(frame)
        width, height = Image.open(io.BytesIO(frame), formats=["JPEG", "JPEG2000"]).size
        if (width, height) != (file.Columns, file.Rows):
            raise UnusableError(
                f"broken DICOM: {file.Columns}×{file.Rows} pixels in its header, but {width}×{height} in its image"
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
