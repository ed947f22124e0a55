"""Radiographs in every form in which they come, made small."""

import io

import numpy as np
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000, ComputedRadiographyImageStorage, ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless


def chest(size: int = 64) -> np.ndarray:
    """Draw two dark lungs on a bright body, uint8, from 0 to 255."""
    row, column = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    lungs = ((np.abs(column) - 0.45) / 0.3) ** 2 + (row / 0.7) ** 2 < 1
    drawn = 1.5 + 0.6 * row - 0.9 * lungs - 0.4 * column**2
    return np.rint((drawn - drawn.min()) * 255 / np.ptp(drawn)).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def dicom(values: np.ndarray, syntax: str = ExplicitVRLittleEndian, data: bytes | None = None, **elements) -> bytes:
    """Make a DICOM of the values, uint8 or uint16 (H, W), given encoded where the transfer syntax compresses."""
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
    """Encode one chest in every format and mode; decoded, all look alike."""
    gray = chest(size)
    image, deep = Image.fromarray(gray), gray.astype(np.uint16) * 100 + 300
    alpha = Image.merge("LA", [image, Image.new("L", image.size, 255)])
    exif = Image.Exif()
    exif[0x0112] = 1
    return {
        "gray.png": encoded(image, "PNG"),
        "deep.png": encoded(Image.fromarray(deep)),
        "rgb.png": encoded(image.convert("RGB")),
        "rgba.png": encoded(alpha.convert("RGBA")),
        "alpha.png": encoded(alpha),
        "palette.png": encoded(image.convert("P")),
        "gray.jpg": encoded(image, "JPEG", quality=90),
        "rgb.jpg": encoded(image.convert("RGB"), "JPEG", quality=90),
        "progressive.jpg": encoded(image.convert("RGB"), "JPEG", quality=90, progressive=True),
        "turned.jpg": encoded(image.convert("RGB"), "JPEG", quality=90, exif=exif),
        "cmyk.jpg": encoded(image.convert("RGB").convert("CMYK"), "JPEG", quality=95),
        "lossless.webp": encoded(image.convert("RGB"), "WEBP", lossless=True),
        "lossy.webp": encoded(image.convert("RGB"), "WEBP", quality=90),
        "picture.avif": encoded(image.convert("RGB"), "AVIF", quality=90),
        "gray.tiff": encoded(image, "TIFF"),
        "deep.tiff": encoded(Image.fromarray(deep), "TIFF", compression="tiff_lzw"),
        "float.tiff": encoded(Image.fromarray(gray.astype(np.float32) / 255), "TIFF"),
        "gray.bmp": encoded(image, "BMP"),
        "gray.gif": encoded(image, "GIF"),
        "gray.pgm": encoded(image, "PPM"),
        "deep.jp2": encoded(Image.fromarray(deep), "JPEG2000"),
        "plain.dcm": dicom(gray),
        "deep.dcm": dicom(deep),
        "rle.dcm": dicom(deep, RLELossless),
        "baseline.dcm": dicom(gray, JPEGBaseline8Bit, encoded(image, "JPEG", quality=90)),
        "jpeg2000.dcm": dicom(deep, JPEG2000, encoded(Image.fromarray(deep), "JPEG2000", no_jp2=True)),
        "inverted.dcm": dicom(255 - gray, PhotometricInterpretation="MONOCHROME1"),
        "windowed.dcm": dicom(deep, WindowCenter=300 + 100 * 127.5, WindowWidth=100 * 255.0),
    }
