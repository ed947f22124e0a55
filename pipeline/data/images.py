"""Decoding of radiographs into square 8-bit gray images; see `image_checks` for what rejects unusable files."""

import io
import re

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from simplejpeg import decode_jpeg, decode_jpeg_header

from pipeline.core.config import Resize
from pipeline.data.codecs import decode_frame, iterate_segments, read_frame
from pipeline.data.dicom import NO_IMAGE, decode_dicom, is_dicom
from pipeline.data.gray_levels import find_range, rescale_to_uint8, scale_to_uint8
from pipeline.data.image_checks import (
    JPEG_START,
    SCAN_MARKER,
    UnusableError,
    check_color,
    check_contrast,
    check_scans,
    check_shape,
    describe_error,
)

FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]  # not EPS: Pillow runs Ghostscript
UNUSUAL_SEGMENT = re.compile(rb"\xff[\xc2\xe1-\xef]")  # of a JPEG header: progressive, or other metadata than JFIF's
QUANTIZATION_TABLE = 0xDB
HEIC_START = re.compile(rb"....ftyp(hei[cmsx]|hev[cmx]|mif1|msf1)", re.DOTALL)
TIFF_START = re.compile(rb"II[*+]\0|MM\0[*+]")
MIN_IS_WHITE = 0  # photometric interpretation of TIFF
LUMA = np.float32(0.299), np.float32(0.587), np.float32(0.114)  # of red, green and blue, ITU-R 601-2
OTHER_FORMATS = {
    b"%PDF": "PDF; convert it to PNG",
    b"8BPS": "Photoshop; convert it to PNG",
    b"II\xbc": "JPEG XR; convert it to PNG",
    b"\xff\x0a": "JPEG XL; convert it to PNG",
    b"\0\0\0\x0cJXL ": "JPEG XL; convert it to PNG",
    b"NRRD": "NRRD; convert it to PNG",
    b"\x93NUMPY": "NumPy; convert it to PNG",
    b"PK\x03\x04": "zip; unpack it",
    b"\x1f\x8b": "gzip; unpack it",
    b"Rar!": "RAR; unpack it",
    b"7z\xbc\xaf": "7z; unpack it",
    b"version https://git-lfs": "Git LFS pointer; run: git lfs pull",
}
EXIF_TRANSPOSITIONS = {  # EXIF orientation to the operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_radiograph(data: bytes, size: int, resize: Resize) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode a radiograph to a square gray image; its content, not its name, decides the format (JPEG, DICOM, …).

    Color is converted to luma (ITU-R 601-2), transparent pixels become black, and EXIF orientation is applied. Images
    of more than 8 bits are scaled as `gray_levels.find_range` says; `dicom.decode_dicom` says what is done to a DICOM.
    Bone is bright: a TIFF or DICOM in which white has the lowest value is inverted. Only the first image of a file is
    read.

    Args:
        data: content of the file.
        size: edge of the result, pixels.
        resize: how the image becomes square.

    Returns:
        The pixels, uint8 (size, size), and the original width and height of the upright image, pixels.

    Raises:
        UnusableError: the file is empty, broken, not an image, too small, too large, too narrow, blank or nearly
            blank, a color photograph, or a DICOM with several frames or of another modality.
    """
    gray = decode_gray(data)
    return resize_to_square(gray, size, resize), (gray.shape[1], gray.shape[0])


def decode_gray(data: bytes) -> np.ndarray:
    """Decode a radiograph as `decode_radiograph` does, at its own size.

    Returns:
        Integers from 0 to 255, (H, W).

    Raises:
        UnusableError: see `decode_radiograph`; a narrow or blank image is rejected only by `resize_to_square`.
    """
    if not data:
        raise UnusableError("empty file")
    return decode_dicom(data) if is_dicom(data) else _decode_image(data)


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
    check_shape(gray.shape[1], gray.shape[0])
    step = min(gray.shape) // 32 | 1  # odd: repeated patterns mostly have even periods, which an even step would miss
    levels = gray[::step, ::step].ravel()
    ends = len(levels) // 100, -(len(levels) // 100) - 1  # where the 1st and the 99th percentile are when sorted
    low, high = np.partition(levels, ends)[[*ends]].astype(int)
    check_contrast(high - low)
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
    for marker, offset in iterate_segments(data):
        if marker == QUANTIZATION_TABLE:
            width = 2 if data[offset : offset + 1] >= b"\x10" else 1  # bytes of a step
            table = np.frombuffer(data[offset + 1 : offset + 1 + 64 * width], f">u{width}")
            return float(table.sum() / 64)
    return 0.0


def _fits_uint8(values: np.ndarray) -> bool:
    if values.dtype == np.uint8:
        return True
    return values.dtype.kind in "ui" and values.min(initial=0) >= 0 and values.max(initial=0) <= 255


def _decode_image(data: bytes) -> np.ndarray:
    try:
        gray = _decode_gray_jpeg(data)
        if gray is not None:
            return gray
        check_scans(data)
        frame = read_frame(data)
        if frame is not None and frame.needs_decoder:
            return _channels_to_gray(decode_frame(data, frame))
        gray = _decode_deep_tiff(data)
        if gray is not None:
            return gray
        image = _open(data)
        check_shape(*image.size)
        if _is_deep_png(image):
            import imagecodecs

            return _transpose(_channels_to_gray(imagecodecs.png_decode(data)), _orientation(image))
        image.load()
        return _transpose(_to_gray(image), _orientation(image))
    except UnusableError:
        raise
    except UnidentifiedImageError:
        name = next((name for start, name in OTHER_FORMATS.items() if data.startswith(start)), None)
        raise UnusableError(f"{NO_IMAGE}: {name}" if name else NO_IMAGE) from None
    except Exception as error:  # noqa: BLE001  # Pillow raises errors of any type for damaged files
        raise UnusableError(f"broken image: {describe_error(error)}") from None


def _open(data: bytes) -> Image.Image:
    if not HEIC_START.match(data) or b"avif" in data[:64]:
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except ValueError:  # a text that begins like a PPM, whose numbers are words
            raise UnidentifiedImageError from None
    try:
        import pi_heif
    except ImportError:
        raise UnusableError(
            f"{NO_IMAGE}: HEIC; install pi-heif, which reads it (pip install 'covid-xray[heic]'), or convert it to PNG"
        ) from None
    pi_heif.register_heif_opener()
    return Image.open(io.BytesIO(data), formats=["HEIF"])


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  # damaged EXIF is ignored, because the pixels may be intact
        return 1


def _transpose(gray: np.ndarray, orientation: int) -> np.ndarray:
    transposition = EXIF_TRANSPOSITIONS.get(orientation)
    return gray if transposition is None else np.asarray(Image.fromarray(gray).transpose(transposition))


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
        check_shape(width, height)
        if data[scan + 4] != {"Gray": 1, "YCbCr": 3}.get(colors):  # channels in separate scans
            return None
        if colors == "YCbCr":
            # Checking the first eighth of the bytes is enough: uniform areas take few bytes, so it has an eighth of the
            # detail, and no color photograph has that much exactly gray detail.
            preview = decode_jpeg(
                data[: scan + len(data) // 8], "RGBX", min_factor=8, min_width=1, min_height=1, strict=False
            ).view("<u4")
            if ((preview ^ preview >> 8) & 0xFFFF).any():  # red is not green, or green is not blue
                return None
        gray: np.ndarray = decode_jpeg(data, "GRAY")[..., 0]
    except (IndexError, ValueError):
        return None
    return gray


def _to_gray(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        return rescale_to_uint8(np.asarray(image))  # convert("L") would clip all values above 255
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
        check_color(image)
    return np.asarray(image.convert("L"))


def _is_deep_png(image: Image.Image) -> bool:
    """Return whether a PNG with color or transparency has 16 bits per channel, of which Pillow gives the upper 8."""
    return (
        isinstance(image, PngImagePlugin.PngImageFile)
        and image.mode.startswith("RGB")
        and any(";16" in str(tile.args) for tile in image.tile)
    )


def _decode_deep_tiff(data: bytes) -> np.ndarray | None:
    """Decode a TIFF of 16 or more bits per channel, many kinds of which Pillow does not read, or not rightly.

    Returns:
        None for any other file.
    """
    if not TIFF_START.match(data):
        return None
    if data.startswith(b"MM\0+"):  # Pillow takes it for another kind of TIFF
        raise UnusableError("big-endian BigTIFF: it cannot be read; convert it to PNG")
    import imagecodecs

    stream = io.BytesIO(data)
    header = stream.read(16 if b"+" in data[2:4] else 8)  # a BigTIFF's is longer
    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
    stream.seek(tags.next)
    tags.load(stream)
    bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    if bits not in (16, 32, 64):
        return None
    width, height = (tags.get(tag, 0) for tag in (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH))
    check_shape(width, height)
    channels = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
    if channels > (4 if bits == 16 else 1):
        raise UnusableError(f"TIFF of {channels} channels of {bits} bits")
    pixels = imagecodecs.tiff_decode(data, index=0)
    if pixels.shape[:1] != (height,) and pixels.shape[1:] == (height, width):  # channels in planes
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.shape[:2] != (height, width):
        raise ValueError("image of another size")
    if pixels.dtype == np.float64:
        pixels = pixels.astype(np.float32)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == MIN_IS_WHITE:
        gray = pixels if pixels.ndim == 2 else pixels[..., 0]  # the other channel is opacity
        gray[:] = -gray if gray.dtype.kind == "f" else ~gray
    return _transpose(_channels_to_gray(pixels), tags.get(ExifTags.Base.Orientation, 1))


def _channels_to_gray(pixels: np.ndarray) -> np.ndarray:
    """Convert unsigned integers, (H, W) or (H, W, C) with gray or red, green and blue, and perhaps opacity, to gray."""
    if pixels.ndim == 2:
        return rescale_to_uint8(pixels)
    channels = list(np.moveaxis(pixels, 2, 0))
    if len(channels) % 2 == 0:
        opacity = channels.pop() / np.float32(np.iinfo(pixels.dtype).max)
        channels = [np.rint(channel * opacity).astype(pixels.dtype) for channel in channels]
    if all((channel == channels[0]).all() for channel in channels):
        return rescale_to_uint8(channels[0])
    if pixels.dtype != np.uint8:
        luma = sum(channel * weight for channel, weight in zip(channels, LUMA, strict=True)).astype(np.uint16)
        ends = find_range(*np.unique(luma, return_counts=True))
        channels = [scale_to_uint8(channel, *ends) for channel in channels]
    image = Image.fromarray(np.dstack(channels))
    check_color(image)
    return np.asarray(image.convert("L"))
