"""Decoding of DICOM files to 8-bit gray images, and what they say of the patient and the acquisition."""

import contextlib
import io
import math
import re
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.data.codecs import JPEG2000_START, LOSSLESS, decode_frame, read_frame
from pipeline.data.demographics import SEXES, UNKNOWN_PATIENTS
from pipeline.data.gray_levels import TABLE_SIZE, find_percentiles, find_range, scale_to_uint8
from pipeline.data.image_checks import (
    JPEG_START,
    MAX_PIXELS,
    MAX_REASON,
    MIN_CONTRAST,
    UnusableError,
    check_color,
    check_contrast,
    check_shape,
    describe_error,
)

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

PREFIX = slice(128, 132)  # where a file with a preamble has DICM
FIRST_ELEMENT = re.compile(  # of a file without preamble: of group 2 or 8, little or big endian
    rb"(?:[\x02\x08]\0[\0-\xff]\0(?:[A-Z]{2}|[\0-\xff][\0-\x03]\0\0)|\0\x08\0[\0-\xff][A-Z]{2})", re.DOTALL
)
PIXEL_GROUP = 0x7FE0
ITEM = b"\xfe\xff\x00\xe0"  # starts the first fragment of encapsulated pixel data
MAX_INFLATED = 3 * MAX_PIXELS  # bytes of a deflated data set
LOSSY_PADDING = 1 / 128  # of the range of the stored bits; padding may differ by this after lossy compression
MIN_INSIDE_WINDOW = 0.05  # share of the pixels that are neither black nor white; of less no lung can be seen
OTHER_MODALITIES = {"CT", "MR", "NM", "PT", "US"}
INTERPRETATIONS = {
    *("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_ICT", "YBR_RCT"),
    *("YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420"),
}
METADATA = {
    "patient": "PatientID",
    "view": "ViewPosition",
    "sex": "PatientSex",
    "age": "PatientAge",
    "manufacturer": "Manufacturer",
    "modality": "Modality",
}
# Up to 120 years, also as 63Y or 63; 999Y, 0 and the like stand for an unknown age.
AGE = re.compile(r"(?:0?\d?\d|1[01]\d|120)Y|\d{1,3}[DWM]|0?[1-9]\d?|1[01]\d|120")
PLACEHOLDERS = UNKNOWN_PATIENTS | {  # for a patient's id
    "-", "0", "anon", "anonymised", "anonymized", "anonymous", "de-identified", "deidentified", "removed",
}  # fmt: skip
NO_IMAGE = "not an image in a known format"


def is_dicom(data: bytes) -> bool:
    """Return whether a file has the preamble of a DICOM or starts like a data set without one, from its first bytes."""
    return data[PREFIX] == b"DICM" or FIRST_ELEMENT.match(data) is not None


def decode_dicom(data: bytes) -> np.ndarray:
    """Decode a DICOM for which `is_dicom`, with or without preamble and file meta information.

    The modality LUT or rescale slope and the first VOI LUT or window are applied; a window that misses the values, so
    that 95 % or more of the pixels are black or white, or whose width is not positive, is not. Levels are then
    scaled from the range that `gray_levels.find_range` finds, or kept as they are if the DICOM has 8 bits and no
    window. Only the stored bits count, not overlays above them. Pixels of the padding value or range become black.
    MONOCHROME1, or a presentation LUT shape of INVERSE, is inverted. An element without a value is as if it were
    absent. Color that is gray, or has a tint at most, is converted to luma.

    Returns:
        The pixels, uint8 (H, W).

    Raises:
        UnusableError: the file is broken, has no image or several frames, is of another modality, in color, too small,
            too large, too narrow, blank or nearly blank, or compressed in a way that no decoder reads.
    """
    is_certain = data[PREFIX] == b"DICM"
    try:
        file, syntax = _read_file(data)
        is_certain = is_certain or syntax is not None or "SOPClassUID" in file or "PixelData" in file
        gray = _to_gray(file, syntax) if is_certain else None
    except UnusableError:
        raise
    except Exception as error:  # noqa: BLE001  # pydicom raises errors of any type for damaged files
        raise UnusableError(f"broken DICOM: {describe_error(error)}" if is_certain else NO_IMAGE) from None
    if gray is None:
        raise UnusableError(NO_IMAGE)
    return gray


def read_metadata(data: bytes) -> dict[str, str]:
    """Read patient, view, sex, age, manufacturer and modality of a DICOM; empty where it says nothing.

    Of several values it is the first; control characters and blanks at the ends are left out. An id that de-identifiers
    give to every patient, such as `anonymous`, is no id. The sex is F, M or O. The age is as in DICOM (`063Y`,
    `018M`) or, as in many files, without zeros or unit, and in whole years from the dates of birth and study if only
    these are there.

    Args:
        data: content of a file; everything is empty if it is no DICOM or a broken one.
    """
    metadata = dict.fromkeys(METADATA, "")
    if not is_dicom(data):
        return metadata
    try:
        file, _ = _read_file(data, [*METADATA.values(), "PatientBirthDate", "StudyDate"])
    except Exception:  # noqa: BLE001  # pydicom raises errors of any type for damaged files
        return metadata
    for name, keyword in METADATA.items():
        with contextlib.suppress(UnusableError):
            metadata[name] = _text(file, keyword)
    if metadata["patient"].lower() in PLACEHOLDERS:
        metadata["patient"] = ""
    metadata["sex"] = SEXES.get(metadata["sex"].lower(), "")
    with contextlib.suppress(UnusableError):
        metadata["age"] = metadata["age"].upper() or _age_at_study(file)
    if not AGE.fullmatch(metadata["age"]):
        metadata["age"] = ""
    return metadata


def _age_at_study(file: "Dataset") -> str:
    birth, study = _text(file, "PatientBirthDate"), _text(file, "StudyDate")
    if not (re.fullmatch(r"\d{8}", birth) and re.fullmatch(r"\d{8}", study)):
        return ""
    return f"{(int(study) - int(birth)) // 10_000:03}Y"  # YYYYMMDD


def _read_file(data: bytes, keywords: list[str] | None = None) -> tuple["Dataset", "UID | None"]:
    """Read a data set and its transfer syntax, None if it does not say it.

    Args:
        data: content of the file.
        keywords: of the only elements to read, none of them pixels; all if None.
    """
    from pydicom.filereader import read_dataset
    from pydicom.tag import Tag
    from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

    stream = io.BytesIO(data)
    stream.seek(PREFIX.stop if data[PREFIX] == b"DICM" else 0)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, *_: tag.group != 2)
    syntax = UID(_text(meta, "TransferSyntaxUID")) or None
    start = stream.tell()
    if syntax == DeflatedExplicitVRLittleEndian:
        # Not with pydicom, which would decompress any amount.
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        stream, start = io.BytesIO(inflater.decompress(data[start:], MAX_INFLATED)), 0
        if inflater.unconsumed_tail:
            raise UnusableError(f"too large: deflated DICOM of more than {MAX_INFLATED:,} bytes")
    if syntax is None:
        first = data[start : start + 6]
        is_implicit, is_big_endian = not first[4:6].isalpha(), first.startswith(b"\0")
    else:
        is_implicit, is_big_endian = syntax == ImplicitVRLittleEndian, syntax == ExplicitVRBigEndian
    file = read_dataset(
        stream,
        is_implicit,
        not is_big_endian,
        stop_when=None if keywords is None else lambda tag, *_: tag.group >= PIXEL_GROUP,
        specific_tags=None if keywords is None else [Tag(keyword) for keyword in ("SpecificCharacterSet", *keywords)],
    )
    return file, syntax


def _to_gray(file: "Dataset", syntax: "UID | None") -> np.ndarray:
    interpretation = _check_elements(file)
    try:
        pixels = _decode_pixels(file, syntax, interpretation)
    except UnusableError:
        raise
    except Exception as error:  # noqa: BLE001  # decoders raise errors of any type for damaged pixels
        raise UnusableError(f"broken DICOM: {describe_error(error)}; in {_name(syntax)}") from None
    if pixels.ndim == 3 and pixels.itemsize > 1 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if pixels.ndim == 2 and interpretation == "PALETTE COLOR":
        pixels = _look_up_colors(pixels, file)
    if pixels.ndim == 2:
        return _scale(pixels, file, is_lossy=_is_lossy(file, syntax))
    if pixels.dtype != np.uint8 or pixels.shape[2] != 3:
        raise UnusableError("DICOM in color: expected three channels of 8 bits")
    image = Image.fromarray(np.ascontiguousarray(pixels))
    check_color(image)
    gray = np.asarray(image.convert("L"))
    return 255 - gray if _is_inverted(file) else gray


def _check_elements(file: "Dataset") -> str:
    """Check size, modality and number of frames; return the photometric interpretation."""
    if not len(file):
        raise UnusableError("broken DICOM: it is cut off within an element")
    if _number(file, "Rows") is None or _number(file, "Columns") is None:
        raise UnusableError("DICOM without an image")
    if not file.get("PixelData"):
        raise UnusableError("broken DICOM: its pixel data are missing or cut off")
    check_shape(_integer(file, "Columns"), _integer(file, "Rows"))
    modality, interpretation = _text(file, "Modality"), _text(file, "PhotometricInterpretation")
    if modality in OTHER_MODALITIES:
        raise UnusableError(f"not a radiograph: DICOM modality {modality}")
    if _integer(file, "NumberOfFrames", 1) > 1:
        raise UnusableError(f"DICOM with several frames: {_integer(file, 'NumberOfFrames')}")
    if interpretation not in INTERPRETATIONS:
        raise UnusableError(f"DICOM of unknown photometric interpretation: {interpretation or 'none'}")
    return interpretation


def _is_inverted(file: "Dataset") -> bool:
    return _text(file, "PhotometricInterpretation") == "MONOCHROME1" or _text(file, "PresentationLUTShape") == "INVERSE"


def _decode_pixels(file: "Dataset", syntax: "UID | None", interpretation: str) -> np.ndarray:
    """Decode to integers as they are stored, with all bits: (H, W), or (H, W, 3) as red, green and blue."""
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    rows, columns, value = _integer(file, "Rows"), _integer(file, "Columns"), file["PixelData"].value
    channels = _integer(file, "SamplesPerPixel", 1)
    if channels not in (1, 3):
        raise ValueError(f"{channels} samples per pixel")
    is_ycbcr = interpretation.startswith(("YBR_FULL", "YBR_PARTIAL"))
    if not _is_compressed(syntax, value):
        pixels = _decode_native(file, value, rows, columns, channels)
    elif not value.startswith(ITEM):
        raise ValueError("no image in the pixel data")
    else:
        frame = get_frame(value, 0, number_of_frames=1)
        if syntax == RLELossless:
            pixels = _decode_rle(frame, rows, columns, channels)
        else:
            pixels, is_rgb = _decode_jpeg(frame, syntax, rows, columns, channels, interpretation)
            is_ycbcr = is_ycbcr and not is_rgb
    if pixels.shape[:2] != (rows, columns):
        raise ValueError("image of another size")
    if is_ycbcr and pixels.ndim == 3 and pixels.dtype == np.uint8:
        return np.asarray(Image.frombytes("YCbCr", (columns, rows), pixels.tobytes()).convert("RGB"))
    return pixels


def _is_compressed(syntax: "UID | None", value: bytes) -> bool:
    if syntax is None or syntax.is_private or not syntax.is_transfer_syntax:
        return value.startswith(ITEM)
    return syntax.is_compressed


def _decode_native(file: "Dataset", value: bytes, rows: int, columns: int, channels: int) -> np.ndarray:
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

    size, rest = divmod(len(value), rows * columns * channels)  # bytes; the rest is the byte that makes the length even
    bits = _integer(file, "BitsAllocated", 8 * size if rest <= 1 else 0)
    if bits == 0:
        raise ValueError("no BitsAllocated, and the length of the pixel data fits none")
    options: dict[str, Any] = {
        "rows": rows,
        "columns": columns,
        "number_of_frames": 1,
        "samples_per_pixel": channels,
        "planar_configuration": _integer(file, "PlanarConfiguration"),
        "bits_allocated": bits,
        "bits_stored": bits,
        "pixel_representation": 0,
        "photometric_interpretation": _text(file, "PhotometricInterpretation"),
        "pixel_keyword": "PixelData",
        "pixel_vr": file["PixelData"].VR,
        "correct_unused_bits": False,
    }
    decoder = get_decoder(ExplicitVRLittleEndian if file.original_encoding[1] else ExplicitVRBigEndian)
    pixels: np.ndarray = decoder.as_array(value, index=0, raw=True, **options)[0]
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _decode_rle(frame: bytes, rows: int, columns: int, channels: int) -> np.ndarray:
    import imagecodecs

    dtype = np.dtype(f"<u{int.from_bytes(frame[:4], 'little') // channels}")  # a segment per byte
    decoded = imagecodecs.dicomrle_decode(frame, dtype, out=rows * columns * channels * dtype.itemsize)
    planes = np.frombuffer(decoded, dtype).reshape(channels, rows, columns)
    return planes[0] if channels == 1 else np.moveaxis(planes, 0, 2)


def _decode_jpeg(
    data: bytes, syntax: "UID | None", rows: int, columns: int, channels: int, interpretation: str
) -> tuple[np.ndarray, bool]:
    """Decode a frame of any kind of JPEG, whatever the transfer syntax says; also whether color is RGB for sure."""
    start = max(data.find(JPEG2000_START), 0) if not data.startswith(JPEG_START) else 0  # after the boxes of a JP2
    frame = read_frame(data[start:])
    if frame is None:
        if syntax is not None and "JPEG" in syntax.name and "XL" not in syntax.name:
            raise ValueError("no image in the pixel data")
        raise UnusableError(
            f"DICOM compressed as {_name(syntax)}: it cannot be read; decompress it first, for example with gdcmconv "
            "--raw or dcmdjpeg"
        )
    if (frame.width, frame.height) != (columns, rows):
        raise UnusableError(
            f"broken DICOM: {columns}×{rows} pixels in its header, but {frame.width}×{frame.height} in its image"
        )
    # Without the segments in which JPEGs name their color space, decoders assume YCbCr; lossless ones are as stored.
    is_rgb = interpretation == "RGB" and b"JFIF" not in data[:64] and b"Adobe" not in data[:1000]
    is_rgb = is_rgb or (frame.marker in LOSSLESS and channels == 3)
    pixels = decode_frame(data[start:], frame, is_rgb=is_rgb)
    return pixels, frame.marker not in LOSSLESS | {0}


def _name(syntax: "UID | None") -> str:
    if syntax is None:
        return "unknown transfer syntax"
    return syntax if syntax.name == syntax else f"{syntax.name} ({syntax})"


def _is_lossy(file: "Dataset", syntax: "UID | None") -> bool:
    from pydicom.uid import HTJ2K, JPEG2000, JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless

    lossy = (HTJ2K, JPEG2000, JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless)
    return _text(file, "LossyImageCompression") == "01" or syntax in lossy


def _scale(pixels: np.ndarray, file: "Dataset", *, is_lossy: bool) -> np.ndarray:
    """Convert stored values to gray levels once per value that occurs, which is faster than once per pixel.

    Args:
        pixels: integers with all bits as they are stored, (H, W).
        file: its elements.
        is_lossy: whether compression has changed the values a little, those of padding as well.

    Returns:
        uint8 (H, W).
    """
    pixels = pixels.view(f"u{pixels.itemsize}")
    allocated = 8 * pixels.itemsize
    if pixels.itemsize <= 2:
        counts = np.bincount(pixels.ravel())
        containers, indices = np.arange(len(counts)), pixels
    else:
        containers = np.unique(pixels)
        indices = np.searchsorted(containers, pixels)
        counts, containers = np.bincount(indices.ravel()), containers.astype(np.int64)
    is_signed = _integer(file, "PixelRepresentation") == 1
    bits, shift = _find_stored_bits(file, allocated)
    stored = _sign((containers >> shift) & ((1 << bits) - 1), bits, is_signed=is_signed)
    tolerance = (1 << bits) * LOSSY_PADDING if is_lossy else 0
    is_padding = _is_padding(stored, _sign(containers, allocated, is_signed=is_signed), file, tolerance)
    is_picture = (counts > 0) & ~is_padding
    if not is_picture.any():
        raise UnusableError("blank or nearly blank: all pixels have the padding value")
    levels, level_of = np.unique(stored[is_picture], return_inverse=True)
    weights = np.bincount(level_of, counts[is_picture])
    low, high = find_range(levels, weights)
    check_contrast(high - low)
    gray = _to_gray_levels(levels, weights, file, is_8_bit=bits <= 8 and not is_signed)
    table = np.zeros(len(containers), np.uint8)
    table[is_picture] = (255 - gray if _is_inverted(file) else gray)[level_of]
    image: np.ndarray = table[indices]
    return image


def _find_stored_bits(file: "Dataset", allocated: int) -> tuple[int, int]:
    """Return the number of the bits that are the picture, and of the bits below them."""
    bits = min(_integer(file, "BitsStored", allocated), allocated)
    return bits, min(max(_integer(file, "HighBit", bits - 1) + 1 - bits, 0), allocated - bits)


def _sign(values: np.ndarray, bits: int, *, is_signed: bool) -> np.ndarray:
    """Read unsigned integers of this many bits as signed ones."""
    return values - ((values >> (bits - 1)) << bits) if is_signed else values


def _is_padding(stored: np.ndarray, containers: np.ndarray, file: "Dataset", tolerance: float) -> np.ndarray:
    """Compare with PixelPaddingValue and its range, which may lie outside of the stored bits."""
    value = _number(file, "PixelPaddingValue")
    if value is None:
        return np.zeros(len(stored), dtype=bool)
    limit = _number(file, "PixelPaddingRangeLimit")
    low, high = sorted((value, value if limit is None else limit))
    if _integer(file, "PixelRepresentation") == 1 and high >= TABLE_SIZE // 2:  # written as unsigned
        low, high = sorted(number - TABLE_SIZE * (number >= TABLE_SIZE // 2) for number in (low, high))
    elif _integer(file, "PixelRepresentation") == 0:  # written as signed
        low, high = sorted(number % TABLE_SIZE if number < 0 else number for number in (low, high))
    low, high = low - tolerance, high + tolerance
    return ((stored >= low) & (stored <= high)) | ((containers >= low) & (containers <= high))


def _to_gray_levels(levels: np.ndarray, counts: np.ndarray, file: "Dataset", *, is_8_bit: bool) -> np.ndarray:
    """Apply the modality and VOI transformations to the stored levels and scale them to uint8.

    Args:
        levels: (N,), distinct.
        counts: (N,), of the pixels of each level.
        file: elements of the transformations.
        is_8_bit: whether the levels are gray levels if nothing transforms them.
    """
    modality_lut, voi_lut = _find_lut(file, "ModalityLUTSequence"), _find_lut(file, "VOILUTSequence")
    slope = _number(file, "RescaleSlope") or 1.0
    if modality_lut is None:
        values = levels * slope + (_number(file, "RescaleIntercept") or 0.0)
    else:
        values = _look_up(levels, modality_lut, file)
    if voi_lut is not None:
        entries = _look_up(np.rint(values), voi_lut, file)
        gray: np.ndarray | None = entries * (255 / (entries.max() or 1))
    else:
        gray = _apply_window(values, file)
    if gray is not None:
        merged = _merge(gray, counts)
        low, high = find_percentiles(*merged, 0.01)
        inside = counts[(gray >= 0.5) & (gray <= 254.5)].sum() / counts.sum()  # a sigmoid never reaches its ends
        if high - low >= MIN_CONTRAST and inside >= MIN_INSIDE_WINDOW:
            return scale_to_uint8(gray, *find_range(*merged))
    if is_8_bit and modality_lut is None:
        return (levels if slope > 0 else 255 - levels).astype(np.uint8)
    return scale_to_uint8(values, *find_range(*_merge(values, counts)))


def _merge(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct values, ascending, and the sum of the counts of each."""
    levels, level_of = np.unique(values, return_inverse=True)
    return levels, np.bincount(level_of, counts)


def _apply_window(values: np.ndarray, file: "Dataset") -> np.ndarray | None:
    """Apply the first window to values: 0 to 255; None without one whose width is positive (PS3.3 C.11.2.1)."""
    center, width = _number(file, "WindowCenter"), _number(file, "WindowWidth")
    if center is None or width is None or width <= 0:
        return None
    function = _text(file, "VOILUTFunction")
    if function == "SIGMOID":
        return 255 / (1 + np.exp(np.clip(-4 * (values - center) / width, -500, 500)))
    if function != "LINEAR_EXACT":  # LINEAR, the default
        center, width = center - 0.5, max(width - 1, 1e-6)
    gray: np.ndarray = 255 * np.clip((values - center) / width + 0.5, 0, 1)
    return gray


def _find_lut(file: "Dataset", keyword: str) -> "Dataset | None":
    """Return the first LUT that has entries."""
    items = file.get(keyword) or []
    return next((item for item in items if item.get("LUTDescriptor") and item.get("LUTData")), None)


def _look_up(values: np.ndarray, lut: "Dataset", file: "Dataset") -> np.ndarray:
    """Replace values by the entries of a LUT; those before and after it by its first and last (PS3.3 C.11.1.1)."""
    try:
        count, first, _ = (int(number) for number in lut.LUTDescriptor)
    except (TypeError, ValueError):
        raise UnusableError("broken DICOM: LUTDescriptor: not three numbers") from None
    count = count or TABLE_SIZE
    if _integer(file, "PixelRepresentation") == 1 and first >= TABLE_SIZE // 2:  # written as unsigned
        first -= TABLE_SIZE
    entries = lut.LUTData
    if isinstance(entries, bytes):
        word = "<u2" if file.original_encoding[1] else ">u2"
        entries = np.frombuffer(entries, np.uint8 if len(entries) in (count, count + 1) else word)
    entries = np.atleast_1d(np.asarray(entries, float))[:count]
    if len(entries) < count:
        raise UnusableError(f"broken DICOM: a LUT of {count} entries has {len(entries)}")
    looked_up: np.ndarray = entries[np.clip(values - first, 0, len(entries) - 1).astype(int)]
    return looked_up


def _look_up_colors(pixels: np.ndarray, file: "Dataset") -> np.ndarray:
    from pydicom.pixels.processing import apply_color_lut

    bits, shift = _find_stored_bits(file, 8 * pixels.itemsize)
    pixels = (pixels >> shift) & ((1 << bits) - 1)
    colors = apply_color_lut(np.arange(int(pixels.max()) + 1), file)[:, :3]
    looked_up: np.ndarray = (colors >> 8 if colors.dtype == np.uint16 else colors).astype(np.uint8)[pixels]
    return looked_up


def _first(file: "Dataset", keyword: str) -> Any:  # of any type that an element can have
    """Return the first value of an element; None if it is absent or has no value."""
    try:
        value = file.get(keyword)
    except Exception as error:  # noqa: BLE001  # pydicom raises errors of any type for damaged elements
        raise UnusableError(f"broken DICOM: {keyword}: {describe_error(error)}") from None
    if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
        value = value[0] if len(value) else None
    return value


def _number(file: "Dataset", keyword: str) -> float | None:
    value = _first(file, keyword)
    if isinstance(value, bytes):
        value = int.from_bytes(value, "little" if file.original_encoding[1] else "big") if value else None
    try:
        number = math.nan if value is None or value == "" else float(value)
    except (TypeError, ValueError):
        raise UnusableError(f"broken DICOM: {keyword}: not a number: {value!r}"[:MAX_REASON]) from None
    return number if math.isfinite(number) else None


def _integer(file: "Dataset", keyword: str, default: int = 0) -> int:
    return int(_number(file, keyword) or default)


def _text(file: "Dataset", keyword: str) -> str:
    value = _first(file, keyword)
    text = "" if value is None else str(value)
    return "".join(letter for letter in text if letter.isprintable()).strip()
