"""Any file that claims to be a radiograph becomes one square grey image, or a reason why not."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SMALLEST = 32  # pixels; a shorter edge shows no lung


class UnusableError(Exception):
    """The reason why a file is no usable radiograph."""


def decode(data: bytes, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode an encoded image (JPEG, PNG, WEBP, TIFF, …) to grey and stretch it to a square.

    Colour becomes luma, transparent pixels lie on black, EXIF rotation is applied, and images of more than 8 bits
    are scaled by the range of their own values.

    Returns:
        The pixels, uint8 of shape (size, size), and the file's own width and height in pixels.

    Raises:
        UnusableError: the file is empty, broken, not an image or too small.
    """
    if not data:
        raise UnusableError("empty file")
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        width, height = image.size
        if min(width, height) < SMALLEST:
            raise UnusableError(f"too small: {width}×{height} pixels")
        if image.mode == "RGB":
            image.draft("L", (width, height))  # a JPEG's luma as it is stored, without a detour by RGB
        grey = _grey(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise UnusableError("not an image in a known format") from None
    except (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnusableError(f"broken image: {' '.join(str(error).split())}") from None
    return _square(grey, size), (width, height)


def stretch(pixels: np.ndarray, size: int) -> np.ndarray:
    """Stretch grey pixels (H, W) with values of 0 to 255 to a square, as `decode` does with a file's.

    Returns:
        uint8 of shape (size, size).

    Raises:
        UnusableError: it is no such array, or too small.
    """
    if pixels.ndim != 2 or pixels.dtype.kind not in "ui" or pixels.min(initial=0) < 0 or pixels.max(initial=0) > 255:
        raise UnusableError("not grey pixels (height, width) with whole values of 0 to 255")
    if min(pixels.shape) < SMALLEST:
        raise UnusableError(f"too small: {pixels.shape[1]}×{pixels.shape[0]} pixels")
    return _square(Image.fromarray(pixels.astype(np.uint8)), size)


def _square(grey: Image.Image, size: int) -> np.ndarray:
    # Pillow's bilinear filter widens with the scale, so that shrinking is antialiased.
    return np.asarray(grey.resize((size, size), Image.Resampling.BILINEAR))


def _grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)  # convert("L") would cut everything above 255
        low, high = values.min(), values.max()
        if not np.isfinite([low, high]).all():
            raise UnusableError("values that are not finite")
        return Image.fromarray(((values - low) * (255 / (high - low or 1))).round().astype(np.uint8))
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), layered).convert("L")
    return image.convert("L")
