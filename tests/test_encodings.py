"""One drawn chest in every encoding gives one picture."""

import zipfile

import numpy as np
import pytest
from conftest import ROOT
from odd_files import chest, encodings

from pipeline.data import images

CASES = ROOT.parent / "shared/data/cases"
ENCODINGS = encodings()


def decode(data: bytes, size: int = 64) -> np.ndarray:
    return images.decode_radiograph(data, size, "stretch")[0].astype(int)


@pytest.mark.filterwarnings("ignore")  # of the decoders
@pytest.mark.parametrize("name", ENCODINGS)
def test_a_radiograph_is_the_same_picture_in_every_encoding(name):
    data, largest_difference = ENCODINGS[name]
    expected = chest().astype(int)
    expected[:10, :10] = 0
    assert np.abs(decode(data) - expected).max() <= largest_difference


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ENCODINGS)
def test_a_truncated_file_is_no_picture_in_any_encoding(name):
    data = ENCODINGS[name][0]
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(images.UnusableError, match=r"broken (image|DICOM): |not an image in a known format"):
            decode(data[: int(len(data) * share)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not CASES.is_dir(), reason="the files of real kinds are missing")
@pytest.mark.parametrize(
    "name",
    [
        "00-reference/plain.dcm",
        "01-pixel-padding/cr-padding-65535.dcm",
        "01-pixel-padding/dx-padding-minus32768.dcm",
        "01-pixel-padding/windowed-padding-65535.dcm",
        "03-dicom-without-preamble/IM000001",
        "03-dicom-without-preamble/no-preamble-but-meta.dcm",
        "04-rgb-secondary-capture/rgb-grey.dcm",
        "04-rgb-secondary-capture/ybr-jpeg.dcm",
        "05-one-hot-pixel/burned-marker16.png",
        "05-one-hot-pixel/hot16.dcm",
        "05-one-hot-pixel/hot16.png",
        "06-overlay-in-high-bits/overlay-j2k.dcm",
        "06-overlay-in-high-bits/overlay-uncompressed.dcm",
        "07-jpeg-lossless/jpeg-extended-12bit.dcm",
        "07-jpeg-lossless/jpeg-lossless-sv1.dcm",
        "07-jpeg-lossless/jpeg-ls.dcm",
        "08-windows/values-32768-above-window.dcm",
        "08-windows/width-zero.dcm",
        "08-windows/window-off-the-values.dcm",
        "09-pictures/12bit.jpg",
        "09-pictures/lossless.jpg",
        "09-pictures/phone.heic",
        "20-empty-elements/empty-rescale.dcm",
        "20-empty-elements/empty-voi-function.dcm",
        "20-empty-elements/modality-lut-item-empty.dcm",
    ],
)
def test_files_of_real_kinds_show_the_reference_and_lungs_keep_their_contrast(name):
    if name.endswith(".heic"):
        pytest.importorskip("pi_heif")
    reference, image = (decode((CASES / file).read_bytes(), 256) for file in ("00-reference/plain.png", name))
    lungs = np.zeros(image.shape, dtype=bool)
    lungs[80:180, 50:110] = lungs[80:180, 150:210] = True
    assert np.abs(image - reference)[lungs].max() <= 8
    assert image[lungs].std() == pytest.approx(reference[lungs].std(), rel=0.05)
    if name.startswith("01"):  # the frame of 16 pixels is padding
        assert (image[:16] == 0).all() or (image[:, :16] == 0).all() or (image[:8, :8] == 0).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not CASES.is_dir(), reason="the files of real kinds are missing")
@pytest.mark.parametrize("name", ["all-jpeg-lossless.zip", "one-12bit-jpeg.zip"])
def test_all_radiographs_of_archives_of_real_kinds_are_usable(name):
    with zipfile.ZipFile(CASES / "07-jpeg-lossless" / name) as archive:
        members = [member for member in archive.namelist() if not member.endswith(".csv")]
        assert len(members) >= 25
        for member in members:
            assert decode(archive.read(member)).std() > 40, member
