"""Small synthetic radiographs in all supported file formats."""

import io
import struct

import imagecodecs
import numpy as np
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)


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


def dicom(
    values: np.ndarray, syntax: str = ExplicitVRLittleEndian, data: bytes | None = None, **elements: object
) -> bytes:
    """Make a DICOM of integers, (H, W) or (H, W, 3); `data` is their encoded form for compressed transfer syntaxes."""
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = syntax
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = ComputedRadiographyImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = "1.2.3"
    file.Modality, file.PhotometricInterpretation, file.SamplesPerPixel = "CR", "MONOCHROME2", 1
    file.Rows, file.Columns = values.shape[:2]
    if values.ndim == 3:
        file.PhotometricInterpretation, file.SamplesPerPixel, file.PlanarConfiguration = "RGB", 3, 0
    file.BitsAllocated = file.BitsStored = 8 * values.itemsize
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(values.dtype.kind == "i")
    stored = values.astype(values.dtype.newbyteorder(">")) if syntax == ExplicitVRBigEndian else values
    file.PixelData = stored.tobytes() if data is None else encapsulate([data])
    file["PixelData"].VR = "OB" if data is not None or values.itemsize == 1 else "OW"
    if syntax == RLELossless:
        file.compress(RLELossless, values)
    for name, value in elements.items():
        setattr(file, name, value)
    stream = io.BytesIO()
    file.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def tiff(values: np.ndarray, interpretation: int, byte_order: str = "<") -> bytes:
    """Make an uncompressed TIFF of numbers of any type, (H, W) or (H, W, 3), many of which Pillow cannot write."""
    height, width = values.shape[:2]
    channels, kind = values[0, 0].size, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    per_channel = (np.uint16([8 * values.itemsize] * channels), np.uint16([kind] * channels))
    bits, sample_format = (numbers.astype(f"{byte_order}u2").tobytes() for numbers in per_channel)
    if channels == 3:
        bits, sample_format = (struct.pack(f"{byte_order}I", offset) for offset in (200, 206))
    entries = [
        (256, 4, 1, struct.pack(f"{byte_order}I", width)),
        (257, 4, 1, struct.pack(f"{byte_order}I", height)),
        (258, 3, channels, bits),
        (259, 3, 1, struct.pack(f"{byte_order}H", 1)),
        (262, 3, 1, struct.pack(f"{byte_order}H", interpretation)),
        (273, 4, 1, struct.pack(f"{byte_order}I", 212)),
        (277, 3, 1, struct.pack(f"{byte_order}H", channels)),
        (278, 4, 1, struct.pack(f"{byte_order}I", height)),
        (279, 4, 1, struct.pack(f"{byte_order}I", values.nbytes)),
        (339, 3, channels, sample_format),
    ]
    data = (b"II" if byte_order == "<" else b"MM") + struct.pack(f"{byte_order}HIH", 42, 8, len(entries))
    for tag, field, count, value in entries:
        data += struct.pack(f"{byte_order}HHI", tag, field, count) + value.ljust(4, b"\0")
    data = data.ljust(200, b"\0") + b"".join(numbers.astype(f"{byte_order}u2").tobytes() for numbers in per_channel)
    return data.ljust(212, b"\0") + values.astype(values.dtype.newbyteorder(byte_order)).tobytes()


def lut(entries: np.ndarray, first: int = 0, bits: int = 16) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", entries.tolist())
    return item


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


EXACT, ROUNDED, LOSSY = 0, 1, 12  # largest difference of a pixel, gray levels


def encodings(size: int = 64) -> dict[str, tuple[bytes, int]]:
    """Encode one image with a black corner in every way that can be written, each with its `largest difference`.

    All are what scanners, archives and programs write; `heic` is only there if pillow can write it.
    """
    gray = chest(size)
    gray[: size // 6, : size // 6] = 0
    corner = np.s_[: size // 6, : size // 6]
    image, rgb = Image.fromarray(gray), np.dstack([gray] * 3)
    deep, wide = gray.astype(np.uint16) * 12 + 400, gray.astype(np.uint16) * 200 + 5000  # 12 and 16 bits
    ycbcr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    halves = np.concatenate([ycbcr[:, ::2, :1], ycbcr[:, 1::2, :1], ycbcr[:, ::2, 1:]], axis=2)  # Y Y Cb Cr
    signed = deep.astype(np.int16) - 2048
    overlay = deep | np.where(np.arange(size) % 7 == 0, 1 << 14, 0).astype(np.uint16)
    padded = deep.copy()
    padded[corner] = 65535
    float32 = gray.astype(np.float32) / 255
    with_nan = float32.copy()
    with_nan[corner] = np.nan
    opaque = np.full_like(wide, 65535)
    pgm = b"P5 %d %d 4095\n" % (size, size) + deep.astype(">u2").tobytes()
    jpeg12 = imagecodecs.jpeg8_encode(deep, level=98, bitspersample=12)
    lossless = [imagecodecs.jpeg8_encode(deep, lossless=True, bitspersample=12, predictor=number) for number in (1, 4)]
    j2k = imagecodecs.jpeg2k_encode(deep, level=0, codecformat="j2k", bitspersample=12, reversible=True)
    j2k_lossy = imagecodecs.jpeg2k_encode(deep, level=60, codecformat="j2k", bitspersample=12, reversible=False)
    stored12 = {"BitsStored": 12, "HighBit": 11}
    plain, implicit = dicom(deep, **stored12), dicom(deep, ImplicitVRLittleEndian, **stored12)
    data_set = 144 + int.from_bytes(plain[140:144], "little")  # after the preamble and the meta information
    implicit_set = 144 + int.from_bytes(implicit[140:144], "little")
    ramp = np.arange(256, dtype=np.uint16) * 257
    palette = {"PhotometricInterpretation": "PALETTE COLOR"}
    for color in ("Red", "Green", "Blue"):
        palette[f"{color}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{color}PaletteColorLookupTableData"] = ramp[::-1].tobytes()
    window = {"WindowCenter": 400 + 12 * 127.5 + 0.5, "WindowWidth": 12 * 255 + 1}
    pictures = {
        "png": encode(image),
        "png16": encode(Image.fromarray(wide)),
        "png12": encode(Image.fromarray(deep)),
        "png16 of color": imagecodecs.png_encode(np.dstack([deep] * 3)),
        "png16 with opacity": imagecodecs.png_encode(np.dstack([wide, opaque])),
        "png16 of color with opacity": imagecodecs.png_encode(np.dstack([wide] * 3 + [opaque])),
        "tiff": encode(image, "TIFF"),
        "tiff lzw": encode(image, "TIFF", compression="tiff_lzw"),
        "tiff16 lzw": encode(Image.fromarray(wide), "TIFF", compression="tiff_lzw"),
        "tiff16 deflate": encode(Image.fromarray(deep), "TIFF", compression="tiff_adobe_deflate"),
        "tiff32": encode(Image.fromarray(wide.astype(np.int32) * 1000), "TIFF"),
        "tiff float": encode(Image.fromarray(float32), "TIFF"),
        "tiff float with nan": encode(Image.fromarray(with_nan), "TIFF"),
        "tiff min is white": tiff(255 - gray, 0),
        "tiff16 min is white": tiff(4095 - deep, 0),
        "tiff16 min is white, big endian": tiff(4095 - deep, 0, ">"),
        "tiff16 signed, min is white": tiff(~signed, 0),
        "tiff32 unsigned": tiff(gray.astype(np.uint32) << 24, 1),
        "tiff float min is white": tiff(1 - float32, 0),
        "tiff float64": tiff(float32.astype(np.float64), 1),
        "tiff16 of color": tiff(np.dstack([deep] * 3), 2),
        "gif": encode(image, "GIF"),
        "bmp": encode(image, "BMP"),
        "pgm": encode(image, "PPM"),
        "pgm16": pgm,
        "webp lossless": encode(image.convert("RGB"), "WEBP", lossless=True),
        "jpeg 2000": encode(image, "JPEG2000"),
        "jpeg 2000 of 16 bits": encode(Image.fromarray(wide), "JPEG2000"),
        "jpeg lossless of 8 bits": imagecodecs.jpeg8_encode(gray, lossless=True),
        "jpeg lossless": lossless[0],
        "jpeg-ls": imagecodecs.jpegls_encode(deep),
        "jpeg-ls of 8 bits": imagecodecs.jpegls_encode(gray),
    }
    lossy = {
        "jpeg": encode(image, "JPEG", quality=98),
        "jpeg of color": encode(image.convert("RGB"), "JPEG", quality=98),
        "jpeg progressive": encode(image, "JPEG", quality=98, progressive=True),
        "jpeg of 12 bits": jpeg12,
        "webp": encode(image.convert("RGB"), "WEBP", quality=98),
        "avif": encode(image.convert("RGB"), "AVIF", quality=98),
        "jpeg 2000 lossy": j2k_lossy,
        "dicom jpeg baseline": dicom(gray, JPEGBaseline8Bit, encode(image, "JPEG", quality=98)),
        "dicom jpeg extended": dicom(deep, JPEGExtended12Bit, jpeg12, **stored12),
        "dicom jpeg-ls near lossless": dicom(
            deep, JPEGLSNearLossless, imagecodecs.jpegls_encode(deep, level=2), **stored12
        ),
        "dicom jpeg 2000 lossy": dicom(deep, JPEG2000, j2k_lossy, **stored12),
        "dicom jpeg-ls near lossless with padding": dicom(
            padded, JPEGLSNearLossless, imagecodecs.jpegls_encode(padded, level=2), PixelPaddingValue=65535
        ),
        "dicom jpeg of ybr": dicom(
            rgb, JPEGBaseline8Bit, encode(image.convert("RGB"), "JPEG", quality=98, subsampling="4:2:2"),
            PhotometricInterpretation="YBR_FULL_422",
        ),
        "dicom jpeg of rgb": dicom(
            rgb, JPEGBaseline8Bit, imagecodecs.jpeg8_encode(rgb, level=98, colorspace="RGB", outcolorspace="RGB")
        ),
    }  # fmt: skip
    dicoms = {
        "8 bits": dicom(gray),
        "8 of 16 bits": dicom(gray.astype(np.uint16), BitsStored=8, HighBit=7),
        "16 bits": dicom(wide),
        "explicit": plain,
        "implicit": implicit,
        "big endian": dicom(deep, ExplicitVRBigEndian, **stored12),
        "big endian of 8 bits": dicom(gray, ExplicitVRBigEndian),
        "deflated": dicom(deep, DeflatedExplicitVRLittleEndian, **stored12),
        "without preamble": plain[132:],
        "without preamble, implicit": implicit[132:],
        "without preamble and meta": plain[data_set:],
        "without preamble and meta, implicit": implicit[implicit_set:],
        "without meta": plain[:132] + plain[data_set:],
        "rle": dicom(deep, RLELossless, **stored12),
        "rle of 8 bits": dicom(gray, RLELossless),
        "rle of color": dicom(rgb, RLELossless),
        "jpeg lossless": dicom(deep, JPEGLossless, lossless[1], **stored12),
        "jpeg lossless sv1": dicom(deep, JPEGLosslessSV1, lossless[0], **stored12),
        "jpeg-ls": dicom(deep, JPEGLSLossless, imagecodecs.jpegls_encode(deep), **stored12),
        "jpeg-ls of color": dicom(rgb, JPEGLSLossless, imagecodecs.jpegls_encode(rgb)),
        "jpeg 2000": dicom(deep, JPEG2000Lossless, j2k, **stored12),
        "jpeg 2000 of color": dicom(
            rgb, JPEG2000Lossless, imagecodecs.jpeg2k_encode(rgb, level=0, codecformat="j2k", reversible=True),
            PhotometricInterpretation="YBR_RCT",
        ),
        "jpeg 2000 in boxes": dicom(
            gray, JPEG2000Lossless, imagecodecs.jpeg2k_encode(gray, level=0, codecformat="jp2", reversible=True)
        ),
        "htj2k": dicom(deep, HTJ2K, imagecodecs.htj2k_encode(deep), **stored12),
        "htj2k lossless": dicom(deep, HTJ2KLossless, imagecodecs.htj2k_encode(deep), **stored12),
        "htj2k rpcl": dicom(deep, HTJ2KLosslessRPCL, imagecodecs.htj2k_encode(deep), **stored12),
        "signed": dicom(signed),
        "signed 12 bits": dicom(signed & 0xFFF, PixelRepresentation=1, **stored12),
        "signed jpeg 2000": dicom(
            signed, JPEG2000Lossless,
            imagecodecs.jpeg2k_encode(signed, level=0, codecformat="j2k", reversible=True),
        ),
        "signed jpeg 2000 said to be unsigned": dicom(
            signed, JPEG2000Lossless,
            imagecodecs.jpeg2k_encode(signed.view(np.uint16), level=0, codecformat="j2k", reversible=True),
        ),
        "monochrome 1": dicom(4095 - deep, PhotometricInterpretation="MONOCHROME1", **stored12),
        "monochrome 1 of 8 bits": dicom(255 - gray, PhotometricInterpretation="MONOCHROME1"),
        "presentation lut": dicom(4095 - deep, PresentationLUTShape="INVERSE", **stored12),
        "padding": dicom(padded, PixelPaddingValue=65535),
        "padding above the stored bits": dicom(padded, PixelPaddingValue=65535, **stored12),
        "padding, monochrome 1": dicom(
            np.where(padded == 65535, 0, 4095 - deep).astype(np.uint16), PixelPaddingValue=0,
            PhotometricInterpretation="MONOCHROME1",
        ),
        "padding range": dicom(
            np.where(padded == 65535, 60000 + np.arange(size, dtype=np.uint16), deep), PixelPaddingValue=65535,
            PixelPaddingRangeLimit=60000,
        ),
        "signed padding": dicom(np.where(padded == 65535, -32768, signed).astype(np.int16), PixelPaddingValue=-32768),
        "padding and window": dicom(padded, PixelPaddingValue=65535, **window),
        "overlay": dicom(overlay, **stored12),
        "overlay in jpeg 2000": dicom(
            overlay, JPEG2000Lossless,
            imagecodecs.jpeg2k_encode(overlay, level=0, codecformat="j2k", reversible=True), **stored12,
        ),
        "overlay in rle": dicom(overlay, RLELossless, **stored12),
        "high bit": dicom(deep << 4, BitsStored=12, HighBit=15),
        "window": dicom(deep, **window),
        "exact window": dicom(
            deep, WindowCenter=400 + 12 * 127.5, WindowWidth=12 * 255, VOILUTFunction="LINEAR_EXACT"
        ),
        "two windows": dicom(
            deep, WindowCenter=[window["WindowCenter"], 40], WindowWidth=[window["WindowWidth"], 400]
        ),
        "window below the values": dicom(deep, WindowCenter=-500, WindowWidth=400),
        "window far below the values": dicom(deep + np.uint16(32768), **window),
        "window of no width": dicom(deep, WindowCenter=2000, WindowWidth=0),
        "rescaled": dicom(deep, RescaleSlope=2, RescaleIntercept=-1000),
        "rescaled by a negative slope": dicom(4095 - deep, RescaleSlope=-1, RescaleIntercept=4095),
        "rescaled 8 bits": dicom(gray, RescaleSlope=1, RescaleIntercept=0),
        "modality lut": dicom(deep, ModalityLUTSequence=[lut(np.arange(4096, dtype=np.uint16) * 3)]),
        "voi lut": dicom(deep, VOILUTSequence=[lut(np.arange(3061, dtype=np.uint16), first=400, bits=12)]),
        "empty elements": dicom(
            deep, RescaleSlope=None, RescaleIntercept=None, VOILUTFunction="", WindowWidth=None, WindowCenter=None,
            ModalityLUTSequence=[Dataset()], VOILUTSequence=[], BitsAllocated=None,
            BitsStored=None, HighBit=None, NumberOfFrames=None,
            PixelPaddingValue=None, PixelRepresentation=None,
        ),
        "one frame": dicom(deep, NumberOfFrames=1, **stored12),
        "rgb": dicom(rgb),
        "rgb in planes": dicom(np.ascontiguousarray(np.moveaxis(rgb, 2, 0)).reshape(rgb.shape), PlanarConfiguration=1),
        "ybr": dicom(ycbcr, PhotometricInterpretation="YBR_FULL"),
        "ybr 422": dicom(
            rgb, PhotometricInterpretation="YBR_FULL_422", PixelData=halves.tobytes()
        ),
        "rgb of 16 bits": dicom(np.dstack([wide] * 3)),
        "palette": dicom(255 - gray, **palette),
    }  # fmt: skip
    return {
        **{name: (data, EXACT) for name, data in pictures.items()},
        **{name: (data, LOSSY) for name, data in lossy.items()},
        **{f"dicom {name}": (data, ROUNDED if name.startswith("ybr") else EXACT) for name, data in dicoms.items()},
    }
