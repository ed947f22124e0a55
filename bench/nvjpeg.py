"""Decode JPEGs on the GPU (nvJPEG through torchvision); the baseline decodes them on all CPU cores with libjpeg-turbo.

python bench/nvjpeg.py    # prints rates, and how the pixels differ from Pillow's
"""

import io
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

UNIQUE_IMAGES = 64
BATCH_PIXELS = 2**26  # 256 images of 512×512
ENCODINGS: dict[str, dict[str, Any]] = {  # of a 512×512 image, as Pillow's options, except `mode`
    "RGB 4:2:0, quality 75": {"mode": "RGB", "quality": 75},
    "RGB 4:4:4, quality 95": {"mode": "RGB", "quality": 95, "subsampling": "4:4:4"},
    "gray, quality 75": {"mode": "L", "quality": 75},
    "gray, quality 95": {"mode": "L", "quality": 95},
}
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) * 6 // 10],
    "zeros inside": lambda data: data[: len(data) // 2] + bytes(200) + data[len(data) // 2 + 200 :],
    "no image": lambda data: data[2:],
}


def draw_images(count: int, size: int) -> list[Image.Image]:
    """Draw gray noise with the 1/f amplitudes of photographs and radiographs, and a little grain."""
    generator = np.random.default_rng(0)
    images = []
    for _ in range(count):
        pixels = np.zeros((size, size))
        for edge in (4, 8, 16, 32, 64, 128, 256):
            noise = Image.fromarray(generator.standard_normal((edge, edge)).astype(np.float32))
            pixels += np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC)) / edge
        pixels = 128 + 55 * pixels / pixels.std() + generator.standard_normal((size, size))
        images.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return images


def encode(image: Image.Image, mode: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


def decode_with_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("L"))


def decode_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    decoded: torch.Tensor = decode_jpeg(tensor, ImageReadMode.GRAY)
    return decoded


def decode_on_gpu(tensors: list[torch.Tensor], mode: ImageReadMode = ImageReadMode.GRAY) -> list[torch.Tensor]:
    decoded: list[torch.Tensor] = decode_jpeg(tensors, mode, device="cuda")
    torch.cuda.synchronize()
    return decoded


def to_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def rate(decode: Callable[[], object], count: int, rounds: int = 5) -> int:
    """Return images per second, of the fastest round after one that is not counted."""
    decode()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        decode()
        times.append(time.perf_counter() - start)
    return round(count / min(times))


def compare_rates(files: list[bytes], cores: int) -> dict[str, int]:
    """Return images per second of each decoder, for a batch."""
    shape = decode_with_pillow(files[0]).shape
    count = BATCH_PIXELS // (shape[0] * shape[1])
    tensors = [to_tensor(files[index % len(files)]) for index in range(count)]
    target = torch.empty((count, *shape), dtype=torch.uint8, pin_memory=True)
    with ThreadPoolExecutor(cores) as pool:  # decoding releases the interpreter's lock
        return {
            "pillow, 1 core": rate(lambda: [decode_with_pillow(data) for data in files], len(files), rounds=2),
            "libjpeg-turbo, 1 core": rate(lambda: [decode_on_cpu(tensor) for tensor in tensors], count, rounds=2),
            f"libjpeg-turbo, {cores} cores": rate(lambda: list(pool.map(decode_on_cpu, tensors)), count),
            "nvJPEG": rate(lambda: decode_on_gpu(tensors), count),
            "nvJPEG, all channels": rate(lambda: decode_on_gpu(tensors, ImageReadMode.UNCHANGED), count),
            "nvJPEG, and copied to the host": rate(lambda: target.copy_(torch.cat(decode_on_gpu(tensors))), count),
            "nvJPEG, one by one": rate(lambda: [decode_on_gpu([tensor]) for tensor in tensors], count, rounds=2),
        }


def compare_pixels(files: list[bytes]) -> dict[str, object]:
    """Return how the gray levels of nvJPEG differ from Pillow's, and whether torchvision's on the CPU are Pillow's."""
    tensors = [to_tensor(data) for data in files]
    expected = np.stack([decode_with_pillow(data) for data in files]).astype(int)
    on_cpu = np.stack([decode_on_cpu(tensor)[0].numpy() for tensor in tensors])
    difference = torch.cat(decode_on_gpu(tensors)).cpu().numpy() - expected
    shares = np.bincount(np.abs(difference).ravel(), minlength=4) / difference.size
    return {
        "cpu_is_pillow": bool((on_cpu == expected).all()),
        "share_by_difference": [round(float(share), 6) for share in shares],  # of 0, 1, 2, … gray levels
        "mean_difference": round(float(difference.mean()), 6),
        "images_equal": round(float((difference == 0).all(axis=(1, 2)).mean()), 3),
    }


def decode_damaged(name: str) -> None:
    """Decode a batch of which one file is damaged, and print what comes of it."""
    intact = encode(draw_images(1, 512)[0], "L")
    try:
        decoded = decode_on_gpu([to_tensor(intact), to_tensor(DAMAGE[name](intact))])
    except RuntimeError as error:
        print(f"raises: {str(error).splitlines()[0]}")
    else:
        print(f"returns {tuple(decoded[1].shape)}")


def run_damaged(name: str) -> str:
    """Decode damaged files in a process of their own, because a fault on the device would end all work there."""
    command = [sys.executable, "-W", "ignore", __file__, name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return result.stdout.strip() or f"exit code {result.returncode}: {result.stderr.strip()[-200:]}"


def measure_nvjpeg() -> dict[str, object]:
    """Compare nvJPEG with libjpeg-turbo: rates, pixels, and what becomes of damaged files."""
    warnings.filterwarnings("ignore", message=".*TorchCodec.*")  # deprecated since torchvision 0.29
    cores = len(os.sched_getaffinity(0))
    images, large = draw_images(UNIQUE_IMAGES, 512), draw_images(1, 2048)
    files = {name: [encode(image, **options) for image in images] for name, options in ENCODINGS.items()}
    files["gray of 2048×2048, quality 90"] = [encode(image, "L", quality=90) for image in large]
    return {
        "kilobytes": {name: round(np.mean([*map(len, encoded)]) / 1000, 1) for name, encoded in files.items()},
        "images_per_second": {name: compare_rates(encoded, cores) for name, encoded in files.items()},
        "pixels": {name: compare_pixels(encoded) for name, encoded in files.items()},
        "damaged": dict(zip(DAMAGE, ThreadPoolExecutor().map(run_damaged, DAMAGE), strict=True)),
    }


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("bench/nvjpeg.py needs a GPU")
    if len(sys.argv) > 1:
        decode_damaged(sys.argv[1])
    else:
        print(json.dumps(measure_nvjpeg(), ensure_ascii=False))
