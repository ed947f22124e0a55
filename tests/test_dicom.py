import io
import json
import struct
import sys
import tracemalloc
import zlib

import imagecodecs
import numpy as np
import pytest
from conftest import ROOT, run
from odd_files import chest, dicom, encode, lut
from PIL import Image
from pydicom.uid import (
    JPEG2000,
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
)

from pipeline.data.dicom import MAX_INFLATED, is_dicom, read_metadata
from pipeline.data.image_checks import MAX_REASON, UnusableError, describe_error
from pipeline.data.images import decode_radiograph

pytestmark = pytest.mark.filterwarnings("ignore")  # of pydicom
GRAY = chest()
DEEP = GRAY.astype(np.uint16) * 12 + 400
EMPTY = {"patient": "", "view": "", "sex": "", "age": "", "manufacturer": "", "modality": ""}


def pixels(data: bytes) -> np.ndarray:
    return decode_radiograph(data, 64, "stretch")[0]


def reason(data: bytes) -> str:
    with pytest.raises(UnusableError) as error:
        pixels(data)
    return str(error.value)


def photograph() -> np.ndarray:
    """Draw colors that no tint explains."""
    row, column = np.mgrid[:64, :64].astype(np.uint8) * 4
    return np.dstack([row, column, 255 - row])


@pytest.mark.parametrize(
    ("values", "syntax", "elements"),
    [
        (photograph(), ExplicitVRLittleEndian, {}),
        (photograph(), RLELossless, {}),
        (photograph(), JPEGBaseline8Bit, {"PhotometricInterpretation": "YBR_FULL_422"}),
        (photograph(), ExplicitVRLittleEndian, {"PhotometricInterpretation": "YBR_FULL"}),
    ],
)
def test_true_color_is_unusable(values, syntax, elements):
    data = encode(Image.fromarray(values), "JPEG") if syntax == JPEGBaseline8Bit else None
    assert reason(dicom(values, syntax, data, **elements)) == "color photograph or drawing"


def test_color_of_more_than_8_bits_is_unusable():
    assert reason(dicom(photograph().astype(np.uint16) * 200)).startswith("DICOM in color")


def relabel(data: bytes, syntax: str) -> bytes:
    """Replace the transfer syntax JPEG Lossless SV1 by one that pydicom does not write, or encodes itself."""
    return data.replace(JPEGLosslessSV1.encode(), syntax.encode().ljust(len(JPEGLosslessSV1), b"\0"))


@pytest.mark.parametrize(
    ("syntax", "name"),
    [
        ("1.2.840.10008.1.2.4.100", "MPEG2 Main Profile / Main Level (1.2.840.10008.1.2.4.100)"),
        ("1.2.840.10008.1.2.4.90", "JPEG 2000 Image Compression (Lossless Only) (1.2.840.10008.1.2.4.90)"),
        ("1.2.840.99999.1", "1.2.840.99999.1"),
    ],
)
def test_the_reason_names_a_transfer_syntax_that_cannot_be_read_and_what_reads_it(syntax, name):
    video = dicom(GRAY, MPEG2MPML if len(syntax) > len(JPEGLosslessSV1) else JPEGLosslessSV1, bytes(200))
    message = reason(relabel(video, syntax))
    if "JPEG 2000" in name:
        assert message == f"broken DICOM: no image in the pixel data; in {name}"
    else:
        assert message.startswith(f"DICOM compressed as {name}: ")
        assert "gdcmconv" in message


def test_the_reason_names_the_transfer_syntax_of_a_damaged_image():
    message = reason(dicom(GRAY, JPEGLosslessSV1, b"\xff\xd8\xff\xd9"))
    assert message.startswith("broken DICOM: ")
    assert str(JPEGLosslessSV1) in message


def test_an_rle_image_cannot_inflate_beyond_its_size():
    bomb = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 2_000_000  # of 256 MB
    tracemalloc.start()
    message = reason(relabel(dicom(GRAY, JPEGLosslessSV1, bomb), RLELossless))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message.startswith("broken DICOM: ")
    assert str(RLELossless) in message
    assert peak < 50e6


def test_a_deflated_dicom_cannot_inflate_without_bound():
    data = dicom(DEEP, DeflatedExplicitVRLittleEndian)
    start = 144 + int.from_bytes(data[140:144], "little")
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = deflater.compress(zlib.decompress(data[start:], -zlib.MAX_WBITS) + bytes(MAX_INFLATED)) + deflater.flush()
    assert len(bomb) < 1e6
    assert reason(data[:start] + bomb) == "too large: deflated DICOM of more than 120,000,000 bytes"


@pytest.mark.parametrize(
    "data",
    [
        b"\x08\0\x05\0CS" + bytes(500),
        b"\x08\0\x05\0\0\0\0\0" * 60,
        b"\x02\0\0\0UL\x04\0" + bytes(400),
        b"\0\x08\0\x05CS" + b"\xff" * 400,
        bytes(300),
    ],
)
def test_garbage_that_starts_like_a_data_set_is_not_taken_for_a_dicom(data):
    assert reason(data) == "not an image in a known format"


def test_pictures_are_not_taken_for_dicoms():
    for image_format in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "WEBP", "AVIF"):
        assert not is_dicom(encode(Image.fromarray(GRAY), image_format))


def test_padding_everywhere_is_blank():
    data = dicom(DEEP, PixelPaddingValue=0, PixelPaddingRangeLimit=65535)
    assert reason(data) == "blank or nearly blank: all pixels have the padding value"


def test_a_window_clips_what_lies_outside_of_it():
    image = pixels(dicom(DEEP, WindowCenter=1000, WindowWidth=600))
    assert (image[DEEP < 690] == 0).all()
    assert (image[DEEP > 1310] == 255).all()


@pytest.mark.parametrize(("center", "width"), [(40, 400), (-500, 2), (1930, 1), (1930, 20), (1e9, 1e3), (1930, 1e9)])
def test_a_window_that_shows_nothing_is_not_applied(center, width):
    assert (pixels(dicom(DEEP, WindowCenter=center, WindowWidth=width)) == GRAY).all()


def test_a_padding_value_of_the_wrong_sign_is_understood():
    padded = DEEP.copy()
    padded[:20] = 63536
    for values in (padded, padded.view(np.int16)):
        data = bytearray(dicom(values, PixelPaddingValue=12345))
        offset = data.index(struct.pack("<H", 12345))
        data[offset : offset + 2] = struct.pack("<H", 63536)
        image = pixels(bytes(data))
        assert not image[:20].any()
        assert np.abs(image[20:].astype(int) - GRAY[20:]).max() <= 60
        assert image[20:].std() > 60


def test_a_sigmoid_window_is_applied():
    image = pixels(dicom(DEEP, WindowCenter=1930, WindowWidth=2000, VOILUTFunction="SIGMOID")).astype(int)
    curve = 1 / (1 + np.exp(-4 * (DEEP - 1930.0) / 2000))
    expected = (curve - curve.min()) * 255 / np.ptp(curve)
    assert np.abs(image - expected).max() <= 1


@pytest.mark.parametrize("width", [1, 20])
def test_a_sigmoid_window_that_shows_nothing_is_not_applied(width):
    assert (pixels(dicom(DEEP, WindowCenter=1930, WindowWidth=width, VOILUTFunction="SIGMOID")) == GRAY).all()


@pytest.mark.parametrize("sequence", ["ModalityLUTSequence", "VOILUTSequence"])
@pytest.mark.parametrize(
    ("descriptor", "entries", "problem"),
    [
        ([4096, 0, 12], 3600, "a LUT of 4096 entries has 3600"),
        ([0, 0, 16], 4096, "a LUT of 65536 entries has 4096"),
        ([4096, 0], 4096, "LUTDescriptor: not three numbers"),
        (4096, 4096, "LUTDescriptor: not three numbers"),
    ],
)
def test_a_lut_without_all_of_its_entries_is_broken(sequence, descriptor, entries, problem):
    item = lut(np.arange(entries))
    item["LUTDescriptor"].value = descriptor
    item.add_new("LUTData", "OW", np.arange(entries, dtype="<u2").tobytes())
    assert reason(dicom(DEEP, **{sequence: [item]})) == f"broken DICOM: {problem}"


def test_an_overlay_in_a_palette_image_is_left_out():
    palette = {"PhotometricInterpretation": "PALETTE COLOR", "BitsStored": 8, "HighBit": 7}
    for color in ("Red", "Green", "Blue"):
        palette[f"{color}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{color}PaletteColorLookupTableData"] = (np.arange(256, dtype="<u2") * 257).tobytes()
    overlay = GRAY | np.where(np.arange(64) % 7 == 0, 1 << 12, 0).astype(np.uint16)
    assert (pixels(dicom(overlay, **palette)) == GRAY).all()


@pytest.mark.parametrize("interpretation", ["RGB", "YBR_FULL"])
def test_color_of_a_lossless_jpeg_is_what_the_dicom_says(interpretation):
    rgb = np.dstack([GRAY] * 3)
    stored = rgb if interpretation == "RGB" else np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    jpeg = imagecodecs.jpeg8_encode(stored, lossless=True)
    jfif = jpeg[:2] + bytes.fromhex("ffe000104a46494600010100000100010000") + jpeg[2:]  # which says YCbCr
    for data in (jpeg, jfif):
        image = pixels(dicom(rgb, JPEGLosslessSV1, data, PhotometricInterpretation=interpretation))
        assert np.abs(image.astype(int) - GRAY).max() <= 1


def test_a_dicom_without_pixels_has_a_reason():
    assert reason(dicom(GRAY, Rows=None)) == "DICOM without an image"
    assert reason(dicom(GRAY, PixelData=b"")) == "broken DICOM: its pixel data are missing or cut off"


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("start", [0, 132])
def test_metadata_are_read(syntax, start):
    elements = {
        "PatientID": " P-1\x07 ", "ViewPosition": "PA", "PatientSex": "F", "PatientAge": "063Y",
        "Manufacturer": "Röntgen GmbH", "Modality": "DX", "SpecificCharacterSet": "ISO_IR 192",
    }  # fmt: skip
    assert read_metadata(dicom(GRAY, syntax, **elements)[start:]) == {
        "patient": "P-1",
        "view": "PA",
        "sex": "F",
        "age": "063Y",
        "manufacturer": "Röntgen GmbH",
        "modality": "DX",
    }


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"PatientBirthDate": "19600615", "StudyDate": "20200614"}, {"age": "059Y"}),
        ({"PatientBirthDate": "19600615", "StudyDate": "20200615"}, {"age": "060Y"}),
        ({"PatientBirthDate": "19600615"}, {}),
        ({"PatientBirthDate": "20200615", "StudyDate": "19600615"}, {}),
        ({"PatientAge": "999Y"}, {}),
        ({"PatientAge": "018M"}, {"age": "018M"}),
        ({"PatientID": "REMOVED"}, {}),
        ({"PatientID": "nan"}, {}),
        ({"PatientAge": "63", "PatientSex": "female"}, {"age": "63", "sex": "F"}),
        ({"PatientAge": "63y", "PatientSex": "m"}, {"age": "63Y", "sex": "M"}),
        ({"PatientAge": "0"}, {}),
        ({"PatientAge": None, "PatientSex": None, "PatientID": None}, {}),
        ({"PatientSex": "unknown"}, {}),
        ({"PatientID": "Anonymous"}, {}),
        ({"Manufacturer": ["A", "B"]}, {"manufacturer": "A"}),
    ],
)
def test_metadata_that_are_missing_or_impossible_are_empty(elements, expected):
    assert read_metadata(dicom(GRAY, **elements)) == EMPTY | {"modality": "CR"} | expected


def test_one_damaged_element_costs_no_other_metadata():
    data = dicom(GRAY, PatientID="P-1", PatientBirthDate="19600615", StudyDate="20200615", Rows=64)
    damaged = data.replace(b"DA\x08\x0019600615", b"DS\x08\x00ABCDEFGH")
    assert damaged != data
    assert read_metadata(damaged) == EMPTY | {"modality": "CR", "patient": "P-1"}


def test_the_reason_names_a_damaged_element():
    data = dicom(DEEP, WindowCenter="1234", WindowWidth="4321").replace(b"DS\x04\x001234", b"DS\x04\x001,23")
    assert reason(data) == "broken DICOM: WindowCenter: not a number: '1,23'"


def test_what_is_no_dicom_has_no_metadata():
    for data in (b"", encode(Image.fromarray(GRAY)), b"\x08\0\x05\0CS" + bytes(50), dicom(GRAY)[:200]):
        assert read_metadata(data) == EMPTY


def test_reasons_are_the_same_in_every_run():
    assert describe_error(ValueError(f"cannot identify {io.BytesIO()!r} at line\n 2")) == "cannot identify at line 2"
    assert describe_error(KeyError()) == "KeyError"
    assert len(describe_error(ValueError("long " * 1000))) == MAX_REASON
    assert "0x" not in reason(dicom(GRAY, JPEG2000, b"\xff\x4f\xff\x51" + bytes(60)))


@pytest.mark.long
def test_twenty_thousand_damaged_files_neither_crash_nor_hang_nor_exhaust_memory():
    completed = run(ROOT, sys.executable, "tests/fuzzing.py", "20000", "11", PYTHONPATH=str(ROOT))
    assert completed.returncode == 0, completed.stderr[-3000:]
    counts = json.loads(completed.stdout)
    assert counts["decoded"] + counts["unusable"] == 20000
    assert counts["peak_mb"] < 1500
    assert counts["slowest"] < 5
