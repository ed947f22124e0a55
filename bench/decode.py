"""Decode JPEGs of 512×512 pixels one after another on one core; the baseline does the same with Pillow.

python bench/decode.py [ROUNDS]    # each with every radiograph; prints milliseconds per image and ratios

The parts are what `prepare` does with an image once it has its bytes. The checks of the file and the perceptual hash,
which the baseline leaves out, are counted in the total.
"""

import io
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from common import radiographs
from PIL import Image
from simplejpeg import decode_jpeg
from xxhash import xxh3_128_hexdigest

from pipeline.data import duplicates, images

SIZE = 512


def decode_with_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("L"))


def decode_and_describe(data: bytes) -> None:
    pixels, _ = images.decode_radiograph(data, SIZE, "stretch")
    images.jpeg_quantization(data)
    xxh3_128_hexdigest(pixels.data)
    duplicates.perceptual_hash(pixels)


def main(rounds: int = 9) -> None:
    files = radiographs()
    pixels = [decode_with_pillow(data) for data in files]
    parts: dict[str, tuple[Callable, list]] = {
        "pillow": (decode_with_pillow, files),
        "total": (decode_and_describe, files),
        "decode_radiograph": (lambda data: images.decode_radiograph(data, SIZE, "stretch"), files),
        "luma": (lambda data: decode_jpeg(data, "GRAY"), files),
        "contrast and size": (lambda image: images.resize_to_square(image, SIZE, "stretch"), pixels),
        "quantization": (images.jpeg_quantization, files),
        "hash": (lambda image: xxh3_128_hexdigest(image.data), pixels),
        "perceptual hash": (duplicates.perceptual_hash, pixels),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, (function, inputs) in parts.items():
            start = time.process_time()
            for value in inputs:
                function(value)
            times[name].append((time.process_time() - start) * 1e3 / len(inputs))
    results = {name: round(statistics.median(values), 3) for name, values in times.items()}
    ratios = {
        f"pillow / {name}": round(statistics.median(np.divide(times["pillow"], times[name])), 2)
        for name in ("total", "decode_radiograph", "luma")
    }
    print(json.dumps({"images": len(files), "milliseconds": results, **ratios}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
