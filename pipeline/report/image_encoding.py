"""Radiographs as `data:` addresses that a page carries in itself."""

import base64
import io

import numpy as np
from matplotlib import colormaps
from PIL import Image

MAX_EDGE = 192  # pixels, at most


def image_data_uri(pixels: np.ndarray) -> str:
    """Encode a radiograph, uint8 (S, S)."""
    return _encoded(Image.fromarray(pixels))


def heatmap_data_uri(pixels: np.ndarray, heat: np.ndarray) -> str:
    """Encode a radiograph, uint8 (S, S), under a map of heat in [0, 1] of any size."""
    size = (min(MAX_EDGE, pixels.shape[-1]),) * 2
    gray = np.asarray(Image.fromarray(pixels).resize(size), dtype=float)[..., None]
    warmth = np.asarray(Image.fromarray(np.float32(heat)).resize(size, Image.Resampling.BILINEAR))
    color = 255 * colormaps["inferno"](warmth)[..., :3]
    share = 0.65 * warmth[..., None]
    return _encoded(Image.fromarray(np.uint8(np.clip((1 - share) * gray + share * color, 0, 255))))


def _encoded(image: Image.Image) -> str:
    image.thumbnail((MAX_EDGE, MAX_EDGE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
