"""Any file that claims to be a radiograph becomes one square gray image, or a reason why not.

The rules look at form, not at anatomy: a CT slice or a lateral view saved as a picture passes.
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

MIN_EDGE = 32  # pixels; a shorter edge shows no lung
MAX_PIXELS = 40_000_000  # pixels, decoded within 1.5 GB; the finest detectors have half as many
MAX_ASPECT_RATIO = 10  # times the shorter edge
MAX_SCANS = 200  # of a progressive JPEG, which has about ten; each costs a pass over the whole image
MIN_CONTRAST = 10  # gray levels between the darkest and the brightest hundredth; the palest radiograph seen has 60
MAX_CHROMA_SD = 10.0  # of 255; radiographs tinted or written on have up to 7, photographs from 13 on
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]  # none runs another program
OTHER_MODALITIES = {"CT", "MR", "NM", "PT", "US"}  # of DICOM's modalities
UNUSUAL_SEGMENT = re.compile(rb"\xff[\xc2\xe1-\xef]")  # in a JPEG's header: progressive, or more said than JFIF says
JPEG_START = b"\xff\xd8"
SCAN_MARKER = b"\xff\xda"
QUANTIZATION_MARKER = b"\xff\xdb"
EXIF_TRANSPOSITIONS = {  # how to turn what EXIF says lies otherwise
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
    """The reason why a file is no usable radiograph."""


def decode_radiograph(data: bytes, size: int, resize: Resize) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode a radiograph (JPEG, PNG, WEBP, TIFF, DICOM, …, known by its bytes) to a square gray image.

    Color becomes luma (ITU-R 601-2), transparent pixels lie on black, EXIF rotation is applied, and more than 8 bits
    are scaled by the range of their values. Of a DICOM the rescale and the first VOI window or table are applied, and
    MONOCHROME1 is inverted, so that bone is bright. Of several pictures in a file the first counts.

    Returns:
        The pixels, uint8 of shape (size, size), and the upright image's own width and height in pixels.

    Raises:
        UnusableError: the file is empty, broken, no image, too small, too large, too narrow, (nearly) blank, a color
            photograph, or a DICOM of several frames, of color or of no radiograph.
    """
    if not data:
        raise UnusableError("empty file")
    gray = _dicom(data) if data[128:132] == b"DICM" else _picture(data)
    return resize_to_square(gray, size, resize), (gray.shape[1], gray.shape[0])


def resize_to_square(gray: np.ndarray, size: int, resize: Resize) -> np.ndarray:
    """Bring gray pixels (H, W) with values of 0 to 255 to a square: stretched, or with black bars and their own shape.

    Returns:
        uint8 of shape (size, size).

    Raises:
        UnusableError: it is no such array, too small, too large, too narrow or (nearly) blank.
    """
    if gray.ndim != 2 or not _is_bytes(gray):
        raise UnusableError("not gray pixels (height, width) with whole values of 0 to 255")
    _check_shape(gray.shape[1], gray.shape[0])
    step = min(gray.shape) // 32 | 1  # odd, for patterns are mostly even
    levels = np.sort(gray[::step, ::step], axis=None).astype(int)
    _check_contrast(levels[-(len(levels) // 100) - 1] - levels[len(levels) // 100])
    if gray.shape == (size, size):
        return gray.astype(np.uint8, copy=False)
    image, method = Image.fromarray(gray.astype(np.uint8, copy=False)), Image.Resampling.BILINEAR
    # Pillow's bilinear filter widens with the scale, so that shrinking is antialiased.
    if resize == "pad":
        return np.asarray(ImageOps.pad(image, (size, size), method, color=0))
    return np.asarray(image.resize((size, size), method))


def jpeg_quantization(data: bytes) -> float:
    """Return the mean step, 1 to 255, of a JPEG's first quantization table; 0 for any other file.

    The table is of the program that made the JPEG and of the quality it was told, and so gives away where it was made.
    """
    if not data.startswith(JPEG_START):
        return 0.0
    place = len(JPEG_START)
    while place < len(data) and data[place : place + 2] != QUANTIZATION_MARKER:  # in EXIF there may be a thumbnail's
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return sum(data[place + 5 : place + 69]) / 64


def _is_bytes(values: np.ndarray) -> bool:
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


def _check_contrast(levels: float) -> None:
    if levels < MIN_CONTRAST:
        raise UnusableError("blank or nearly so")


def _picture(data: bytes) -> np.ndarray:
    _check_scans(data)
    try:
        gray = _gray_jpeg(data)
        if gray is not None:
            return gray
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_shape(*image.size)
        image.load()
        return _gray(_upright(image))
    except UnusableError:
        raise
    except UnidentifiedImageError:
        raise UnusableError("not an image in a known format") from None
    except Exception as error:  # noqa: BLE001  # Pillow passes on whatever a damaged value leads to
        raise UnusableError(f"broken image: {_line(error)}") from None


def _check_scans(data: bytes) -> None:
    if data.startswith(JPEG_START) and data.count(SCAN_MARKER) > MAX_SCANS:
        raise UnusableError("broken image: a JPEG of too many scans")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = EXIF_TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  # a damaged EXIF says nothing, and the pixels may be whole
        turn = None
    return image if turn is None else image.transpose(turn)


def _gray_jpeg(data: bytes) -> np.ndarray | None:
    """Decode a plain JPEG made from gray pixels, as most radiographs are: its luma, which is all there is in it.

    Returns:
        What Pillow gives, in half the time; nothing for any other file, which is left to Pillow.
    """
    scan = data.find(SCAN_MARKER)
    if not data.startswith(JPEG_START) or UNUSUAL_SEGMENT.search(data[:scan]):
        return None
    try:
        height, width, colors, _ = decode_jpeg_header(data)
        _check_shape(width, height)
        if data[scan + 4] != {"Gray": 1, "YCbCr": 3}.get(colors):  # not all in this scan
            return None
        if colors == "YCbCr":
            # Flat parts take few bytes, so an eighth of the bytes is an eighth of what there is to see; no camera makes
            # so much of a photograph exactly gray.
            beginning = decode_jpeg(
                data[: scan + len(data) // 8], "RGB", min_factor=8, min_width=1, min_height=1, strict=False
            )
            red, green, blue = np.moveaxis(beginning, 2, 0)
            if (red != green).any() or (green != blue).any():
                return None
        gray: np.ndarray = decode_jpeg(data, "GRAY")[..., 0]
    except (IndexError, ValueError):
        return None
    return gray


def _gray(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(np.asarray(image))  # convert("L") would cut everything above 255
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), layered)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
        _check_color(image)
    return np.asarray(image.convert("L"))


def _check_color(image: Image.Image) -> None:
    """Refuse what has colors that brightness does not explain, unlike a tint."""
    small = np.asarray(image.resize((64, 64), Image.Resampling.BOX).convert("YCbCr"), dtype=float).reshape(-1, 3)
    (light, *to_chroma), (_, blue, _), (_, _, red) = np.cov(small, rowvar=False)
    unexplained = blue + red - sum(part**2 for part in to_chroma) / max(light, 1)
    if unexplained > MAX_CHROMA_SD**2:
        raise UnusableError("a color photograph or drawing")


def _scaled(values: np.ndarray) -> np.ndarray:
    """Scale by the range that the values use, not by the one that they could use; 8 bits stay as they are."""
    if values.dtype == np.uint8:
        return values
    scaled = values.astype(np.float64)
    low, high = scaled.min(), scaled.max()
    if not np.isfinite([low, high]).all():
        raise UnusableError("values that are not finite")
    if values.dtype.kind in "iu":
        _check_contrast(high - low)
    scaled -= low
    scaled *= 255 / (high - low or 1)
    return np.rint(scaled, out=scaled).astype(np.uint8)


def _dicom(data: bytes) -> np.ndarray:
    from pydicom import dcmread

    if DEFLATED_TRANSFER_SYNTAX in data:
        raise UnusableError("a deflated DICOM, whose size nobody knows before it is inflated")
    try:
        return _gray_dicom(dcmread(io.BytesIO(data)))
    except UnusableError:
        raise
    except Exception as error:  # noqa: BLE001  # pydicom passes on whatever a damaged value leads to
        raise UnusableError(f"broken DICOM: {_line(error)}") from None


def _gray_dicom(file: "Dataset") -> np.ndarray:
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    _check_shape(file.Columns, file.Rows)
    if file.get("Modality") in OTHER_MODALITIES:
        raise UnusableError(f"no radiograph: a DICOM of modality {file.Modality}")
    if int(file.get("NumberOfFrames") or 1) > 1:
        raise UnusableError(f"a DICOM of {file.NumberOfFrames} frames")
    kind = file.PhotometricInterpretation
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnusableError(f"a DICOM in color ({kind})")
    _check_inside(file)
    stored = file.pixel_array
    if stored.dtype.kind in "iu":
        _check_contrast(int(stored.max()) - int(stored.min()))
    gray = _scaled(apply_voi_lut(apply_modality_lut(stored, file), file))
    return 255 - gray if kind == "MONOCHROME1" else gray


def _check_inside(file: "Dataset") -> None:
    """Refuse a JPEG or JPEG 2000 that is larger than the DICOM around it says, before a decoder makes room for it."""
    from pydicom.encaps import get_frame
    from pydicom.pixels.decoders.pillow import DECODER_DEPENDENCIES

    if file.file_meta.TransferSyntaxUID in DECODER_DEPENDENCIES:
        frame = get_frame(file.PixelData, 0, number_of_frames=1)
        _check_scans(frame)
        inside = Image.open(io.BytesIO(frame), formats=["JPEG", "JPEG2000"]).size
        said = file.Columns, file.Rows
        if inside != said:
            raise UnusableError(f"broken DICOM: of {said[0]}×{said[1]} pixels, with {inside[0]}×{inside[1]} inside")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
