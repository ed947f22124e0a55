"""Decoding of an image into what prediction, heatmaps and the log need of it; without torch, which takes memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core.config import Resize
from pipeline.data import images

MAX_PREVIEW = 1024  # pixels, longer edge


@dataclass(frozen=True)
class DecodedImage:
    """A radiograph, whose preview and description are empty if they were not asked for.

    Attributes:
        pixels: as the model gets them, uint8 (S, S).
        preview: the upright radiograph, uint8 (H, W), its longer edge at most `MAX_PREVIEW` pixels.
        width: of the upright radiograph, pixels.
        height: of the upright radiograph, pixels.
        description: of `prediction_log.describe_image`.
    """

    pixels: np.ndarray
    preview: np.ndarray
    width: int
    height: int
    description: dict[str, Any]


def decode_image(data: bytes, size: int, resize: Resize, *, with_preview: bool, with_description: bool) -> DecodedImage:
    """Decode a radiograph as `images.decode_radiograph` does.

    Raises:
        UnusableError: it cannot be used.
    """
    gray = images.decode_gray(data)
    pixels = images.resize_to_square(gray, size, resize)
    height, width = gray.shape
    preview, description = np.empty((0, 0), np.uint8), dict[str, Any]()
    if with_preview:
        image = Image.fromarray(gray.astype(np.uint8, copy=False))
        image.thumbnail((MAX_PREVIEW, MAX_PREVIEW))
        preview = np.asarray(image)
    if with_description:
        from pipeline.inference.prediction_log import describe_image  # imports pandas and scipy

        description = describe_image(data, (height, width), pixels)
    return DecodedImage(pixels, preview, width, height, description)
