"""Any file that claims to be a radiograph becomes one square grey image, or a reason why not.

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

SMALLEST = 32  # pixels; a shorter edge shows no lung
LARGEST = 40_000_000  # pixels, decoded within 1.5 GB; the finest detectors have half as many
LONGEST = 10  # times the shorter edge
SCANS = 200  # of a progressive JPEG, which has about ten; each costs a pass over the whole image
FLATTEST = 10  # grey levels between the darkest and the brightest hundredth; the palest radiograph seen has 60
COLOUR = 10.0  # of 255; radiographs tinted or written on have up to 7, photographs from 13 on
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]  # none runs another program
NO_RADIOGRAPH = {"CT", "MR", "NM", "PT", "US"}  # of DICOM's modalities
UNUSUAL = re.compile(rb"\xff[\xc2\xe1-\xef]")  # in a JPEG's header: progressive, or more said than JFIF says
JPEG = b"\xff\xd8"
SCAN = b"\xff\xda"
QUANTISATION = b"\xff\xdb"
UPRIGHT = {  # how to turn what EXIF says lies otherwise
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DEFLATED = b"1.2.840.10008.1.2.1.99"


class UnusableError(Exception):
    """The reason why a file is no usable radiograph."""


def decode(data: bytes, size: int, resize: Resize) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode a radiograph (JPEG, PNG, WEBP, TIFF, DICOM, …, known by its bytes) to a square grey image.

    Colour becomes luma (ITU-R 601-2), transparent pixels lie on black, EXIF rotation is applied, and more than 8 bits
    are scaled by the range of their values. Of a DICOM the rescale and the first VOI window or table are applied, and
    MONOCHROME1 is inverted, so that bone is bright. Of several pictures in a file the first counts.

    Returns:
        The pixels, uint8 of shape (size, size), and the upright image's own width and height in pixels.

    Raises:
        UnusableError: the file is empty, broken, no image, too small, too large, too narrow, (nearly) blank, a colour
            photograph, or a DICOM of several frames, of colour or of no radiograph.
    """
    if not data:
        raise UnusableError("empty file")
    grey = _dicom(data) if data[128:132] == b"DICM" else _picture(data)
    return square(grey, size, resize), (grey.shape[1], grey.shape[0])


def square(grey: np.ndarray, size: int, resize: Resize) -> np.ndarray:
    """Bring grey pixels (H, W) with values of 0 to 255 to a square: stretched, or with black bars and their own shape.

    Returns:
        uint8 of shape (size, size).

    Raises:
        UnusableError: it is no such array, too small, too large, too narrow or (nearly) blank.
    """
    if grey.ndim != 2 or not _is_bytes(grey):
        raise UnusableError("not grey pixels (height, width) with whole values of 0 to 255")
    _check_shape(grey.shape[1], grey.shape[0])
    step = min(grey.shape) // 32 | 1  # odd, for patterns are mostly even
    levels = np.sort(grey[::step, ::step], axis=None).astype(int)
    _check_contrast(levels[-(len(levels) // 100) - 1] - levels[len(levels) // 100])
    if grey.shape == (size, size):
        return grey.astype(np.uint8, copy=False)
    image, method = Image.fromarray(grey.astype(np.uint8, copy=False)), Image.Resampling.BILINEAR
    # Pillow's bilinear filter widens with the scale, so that shrinking is antialiased.
    if resize == "pad":
        return np.asarray(ImageOps.pad(image, (size, size), method, color=0))
    return np.asarray(image.resize((size, size), method))


def coarseness(data: bytes) -> float:
    """Return the mean step, 1 to 255, of a JPEG's first quantisation table; 0 for any other file.

    The table is of the program that made the JPEG and of the quality it was told, and so gives away where it was made.
    """
    if not data.startswith(JPEG):
        return 0.0
    place = len(JPEG)
    while place < len(data) and data[place : place + 2] != QUANTISATION:  # in EXIF there may be a thumbnail's
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return sum(data[place + 5 : place + 69]) / 64


def _is_bytes(values: np.ndarray) -> bool:
    if values.dtype == np.uint8:
        return True
    return values.dtype.kind in "ui" and values.min(initial=0) >= 0 and values.max(initial=0) <= 255


def _check_shape(width: int, height: int) -> None:
    shape = f"{width}×{height} pixels"
    if min(width, height) < SMALLEST:
        raise UnusableError(f"too small: {shape}")
    if width * height > LARGEST:
        raise UnusableError(f"too large: {shape}")
    if max(width, height) > LONGEST * min(width, height):
        raise UnusableError(f"too narrow: {shape}")


def _check_contrast(levels: float) -> None:
    if levels < FLATTEST:
        raise UnusableError("blank or nearly so")


def _picture(data: bytes) -> np.ndarray:
    _check_scans(data)
    try:
        grey = _grey_jpeg(data)
        if grey is not None:
            return grey
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_shape(*image.size)
        image.load()
        return _grey(_upright(image))
    except UnusableError:
        raise
    except UnidentifiedImageError:
        raise UnusableError("not an image in a known format") from None
    except Exception as error:  # noqa: BLE001  # Pillow passes on whatever a damaged value leads to
        raise UnusableError(f"broken image: {_line(error)}") from None


def _check_scans(data: bytes) -> None:
    if data.startswith(JPEG) and data.count(SCAN) > SCANS:
        raise UnusableError("broken image: a JPEG of too many scans")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  # a damaged EXIF says nothing, and the pixels may be whole
        turn = None
    return image if turn is None else image.transpose(turn)


def _grey_jpeg(data: bytes) -> np.ndarray | None:
    """Decode a plain JPEG made from grey pixels, as most radiographs are: its luma, which is all there is in it.

    Returns:
        What Pillow gives, in half the time; nothing for any other file, which is left to Pillow.
    """
    scan = data.find(SCAN)
    if not data.startswith(JPEG) or UNUSUAL.search(data[:scan]):
        return None
    try:
        height, width, colours, _ = decode_jpeg_header(data)
        _check_shape(width, height)
        if data[scan + 4] != {"Gray": 1, "YCbCr": 3}.get(colours):  # not all in this scan
            return None
        if colours == "YCbCr":
            # Flat parts take few bytes, so an eighth of the bytes is an eighth of what there is to see; no camera makes
            # so much of a photograph exactly grey.
            beginning = decode_jpeg(
                data[: scan + len(data) // 8], "RGB", min_factor=8, min_width=1, min_height=1, strict=False
            )
            red, green, blue = np.moveaxis(beginning, 2, 0)
            if (red != green).any() or (green != blue).any():
                return None
        grey: np.ndarray = decode_jpeg(data, "GRAY")[..., 0]
    except (IndexError, ValueError):
        return None
    return grey


def _grey(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(np.asarray(image))  # convert("L") would cut everything above 255
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), layered)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
        _check_colour(image)
    return np.asarray(image.convert("L"))


def _check_colour(image: Image.Image) -> None:
    """Refuse what has colours that brightness does not explain, unlike a tint."""
    small = np.asarray(image.resize((64, 64), Image.Resampling.BOX).convert("YCbCr"), dtype=float).reshape(-1, 3)
    (light, *to_chroma), (_, blue, _), (_, _, red) = np.cov(small, rowvar=False)
    unexplained = blue + red - sum(part**2 for part in to_chroma) / max(light, 1)
    if unexplained > COLOUR**2:
        raise UnusableError("a colour photograph or drawing")


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

    if DEFLATED in data:
        raise UnusableError("a deflated DICOM, whose size nobody knows before it is inflated")
    try:
        return _grey_dicom(dcmread(io.BytesIO(data)))
    except UnusableError:
        raise
    except Exception as error:  # noqa: BLE001  # pydicom passes on whatever a damaged value leads to
        raise UnusableError(f"broken DICOM: {_line(error)}") from None


def _grey_dicom(file: "Dataset") -> np.ndarray:
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    _check_shape(file.Columns, file.Rows)
    if file.get("Modality") in NO_RADIOGRAPH:
        raise UnusableError(f"no radiograph: a DICOM of modality {file.Modality}")
    if int(file.get("NumberOfFrames") or 1) > 1:
        raise UnusableError(f"a DICOM of {file.NumberOfFrames} frames")
    kind = file.PhotometricInterpretation
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnusableError(f"a DICOM in colour ({kind})")
    _check_inside(file)
    stored = file.pixel_array
    if stored.dtype.kind in "iu":
        _check_contrast(int(stored.max()) - int(stored.min()))
    grey = _scaled(apply_voi_lut(apply_modality_lut(stored, file), file))
    return 255 - grey if kind == "MONOCHROME1" else grey


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
