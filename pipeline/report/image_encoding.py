"""Radiographs and heatmaps as `data:` URIs, which an HTML page can embed."""

import base64
import io

import numpy as np
from matplotlib import colormaps
from PIL import Image

from pipeline.models.heatmaps import COLORMAP, OPACITY

MAX_EDGE = 192  # pixels


def image_data_uri(pixels: np.ndarray) -> str:
    """Encode a radiograph, uint8 (S, S)."""
    return _jpeg_data_uri(Image.fromarray(pixels))


def jpeg_data_uri(jpeg: bytes) -> str:
    """Encode the content of a JPEG file."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def heatmap_data_uri(pixels: np.ndarray, heatmap: np.ndarray) -> str:
    """Encode a radiograph, uint8 (S, S), with a heatmap of any size, values in [0, 1], blended over it."""
    size = (min(MAX_EDGE, pixels.shape[-1]),) * 2
    gray = np.asarray(Image.fromarray(pixels).resize(size), dtype=float)[..., None]
    heat = np.asarray(Image.fromarray(np.float32(heatmap)).resize(size, Image.Resampling.BILINEAR))
    color = 255 * colormaps[COLORMAP](heat)[..., :3]
    opacity = OPACITY * heat[..., None]
    return _jpeg_data_uri(Image.fromarray(np.uint8(np.clip((1 - opacity) * gray + opacity * color, 0, 255))))


def _jpeg_data_uri(image: Image.Image) -> str:
    image.thumbnail((MAX_EDGE, MAX_EDGE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    return jpeg_data_uri(stream.getvalue())
