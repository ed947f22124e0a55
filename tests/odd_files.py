"""Small synthetic radiographs in all supported file formats."""

import io

import numpy as np
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000, ComputedRadiographyImageStorage, ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless


def chest(size: int = 64) -> np.ndarray:
    """Draw two dark lungs in a bright body: uint8 (size, size), from 0 to 255."""
    row, column = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    lungs = ((np.abs(column) - 0.45) / 0.3) ** 2 + (row / 0.7) ** 2 < 1
    brightness = 1.5 + 0.6 * row - 0.9 * lungs - 0.4 * column**2
    return np.rint((brightness - brightness.min()) * 255 / np.ptp(brightness)).astype(np.uint8)


def encode(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def dicom(values: np.ndarray, syntax: str = ExplicitVRLittleEndian, data: bytes | None = None, **elements) -> bytes:
    """Make a DICOM of uint8 or uint16 values (H, W); `data` is their encoded form for compressed transfer syntaxes."""
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = syntax
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = ComputedRadiographyImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = "1.2.3"
    file.Modality, file.PhotometricInterpretation, file.SamplesPerPixel = "CR", "MONOCHROME2", 1
    file.Rows, file.Columns = values.shape[-2:]
    file.BitsAllocated = file.BitsStored = 8 * values.itemsize
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, 0
    file.PixelData = values.tobytes() if data is None else encapsulate([data])
    file["PixelData"].VR = "OB" if data is not None else "OW"
    if syntax == RLELossless:
        file.compress(RLELossless, values)
    for name, value in elements.items():
        setattr(file, name, value)
    stream = io.BytesIO()
    file.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def formats(size: int = 64) -> dict[str, bytes]:
    """Encode one image in every format and mode; all decode to similar pixels."""
    gray = chest(size)
    image, gray16 = Image.fromarray(gray), gray.astype(np.uint16) * 100 + 300
    alpha = Image.merge("LA", [image, Image.new("L", image.size, 255)])
    exif = Image.Exif()
    exif[0x0112] = 1
    return {
        "gray.png": encode(image, "PNG"),
        "gray16.png": encode(Image.fromarray(gray16)),
        "rgb.png": encode(image.convert("RGB")),
        "rgba.png": encode(alpha.convert("RGBA")),
        "alpha.png": encode(alpha),
        "palette.png": encode(image.convert("P")),
        "gray.jpg": encode(image, "JPEG", quality=90),
        "rgb.jpg": encode(image.convert("RGB"), "JPEG", quality=90),
        "progressive.jpg": encode(image.convert("RGB"), "JPEG", quality=90, progressive=True),
        "exif.jpg": encode(image.convert("RGB"), "JPEG", quality=90, exif=exif),
        "cmyk.jpg": encode(image.convert("RGB").convert("CMYK"), "JPEG", quality=95),
        "lossless.webp": encode(image.convert("RGB"), "WEBP", lossless=True),
        "lossy.webp": encode(image.convert("RGB"), "WEBP", quality=90),
        "lossy.avif": encode(image.convert("RGB"), "AVIF", quality=90),
        "gray.tiff": encode(image, "TIFF"),
        "gray16.tiff": encode(Image.fromarray(gray16), "TIFF", compression="tiff_lzw"),
        "float.tiff": encode(Image.fromarray(gray.astype(np.float32) / 255), "TIFF"),
        "gray.bmp": encode(image, "BMP"),
        "gray.gif": encode(image, "GIF"),
        "gray.pgm": encode(image, "PPM"),
        "gray16.jp2": encode(Image.fromarray(gray16), "JPEG2000"),
        "gray.dcm": dicom(gray),
        "gray16.dcm": dicom(gray16),
        "rle.dcm": dicom(gray16, RLELossless),
        "baseline.dcm": dicom(gray, JPEGBaseline8Bit, encode(image, "JPEG", quality=90)),
        "jpeg2000.dcm": dicom(gray16, JPEG2000, encode(Image.fromarray(gray16), "JPEG2000", no_jp2=True)),
        "inverted.dcm": dicom(255 - gray, PhotometricInterpretation="MONOCHROME1"),
        "windowed.dcm": dicom(gray16, WindowCenter=300 + 100 * 127.5, WindowWidth=100 * 255.0),
    }
