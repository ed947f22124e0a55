import json
import os
import zipfile

import numpy as np
import pandas as pd
import pytest
import sklearn.datasets
from conftest import archive_members, write_zip
from odd_files import chest, dicom, encoded, formats
from PIL import Image
from xxhash import xxh3_128_hexdigest

from pipeline.core.config import PrepareParams
from pipeline.core.errors import UserError
from pipeline.data import images, layout, manifest, packing

BROKEN, SHORT = "train/train/a004.jpg", "train/train/a007.jpg"


def params(size: int = 40, max_quarantined: float = 0.1, resize: str = "stretch") -> PrepareParams:
    return PrepareParams(size=size, resize=resize, max_quarantined=max_quarantined)


def archive(tmp_path, **changed: bytes):
    members = archive_members()
    assert set(changed) <= set(members)
    return write_zip(tmp_path / "raw.zip", members | changed)


def expected(raw, member: str, size: int = 40) -> np.ndarray:
    with zipfile.ZipFile(raw) as content:
        return images.decode_radiograph(content.read(member), size, "stretch")[0]


def assert_rows_are_images(raw, folder, size: int = 40) -> None:
    array, table = np.load(folder / "images.npy"), manifest.read_manifest(folder)
    members = layout.read_layout(raw).images.set_index("file")["member"]
    assert array.shape == (len(table), size, size)
    assert array.dtype == np.uint8
    for row, (file, digest) in enumerate(zip(table["file"], table["xxh128"], strict=True)):
        assert (array[row] == expected(raw, members[file], size)).all()
        assert xxh3_128_hexdigest(array[row].tobytes()) == digest


def test_row_i_of_the_array_is_image_i_of_the_manifest(raw, tmp_path):
    packing.pack_images(raw, params(), tmp_path / "data")
    assert_rows_are_images(raw, tmp_path / "data")


def test_the_manifest_lists_every_image_with_its_label_and_shape(raw, tmp_path):
    packing.pack_images(raw, params(), tmp_path)
    table, rows = manifest.read_manifest(tmp_path), layout.read_layout(raw).images
    known = ["file", "set", "label", "patient", "source", "view", "license"]
    pd.testing.assert_frame_equal(table[known], rows[known])
    assert (table[["width", "height"]] == 64).all(axis=None)
    assert list(table.columns) == [*known, "width", "height", "bytes", "jpeg_quantization", "xxh128", "phash"]


def test_metadata_are_kept_and_a_patient_named_na_stays_one(tmp_path):
    metadata = b"File,patient,source,view\na000.jpg,NA,A,PA\na001.jpg,007,B,AP\n"
    packing.pack_images(
        write_zip(tmp_path / "raw.zip", archive_members() | {"metadata.csv": metadata}), params(), tmp_path
    )
    table = manifest.read_manifest(tmp_path)
    assert list(table["patient"][:3]) == ["NA", "007", ""]
    assert list(table["view"][:3]) == ["PA", "AP", ""]


def test_nothing_is_quarantined_from_a_sound_archive(raw, tmp_path):
    packing.pack_images(raw, params(), tmp_path)
    table = pd.read_csv(tmp_path / "quarantine.csv")
    assert table.empty
    assert list(table.columns) == ["file", "set", "label", "reason"]


@pytest.mark.parametrize("changed", [{}, {BROKEN: b"no image"}])
def test_the_bytes_are_the_same_whatever_the_number_of_workers(tmp_path, monkeypatch, changed):
    raw = archive(tmp_path, **changed)
    for workers in (1, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, workers=workers: set(range(workers)))
        packing.pack_images(raw, params(), tmp_path / str(workers))
    for name in ("images.npy", "manifest.csv", "quarantine.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_a_broken_labeled_image_goes_to_quarantine_with_a_reason_and_leaves_the_pack_compact(tmp_path):
    raw = archive(tmp_path, **{BROKEN: b"no image", SHORT: archive_members()[SHORT][:500]})
    packing.pack_images(raw, params(), tmp_path / "data")
    kept = manifest.read_manifest(tmp_path / "data")
    assert len(kept) == 26
    assert not kept["file"].isin(["a004.jpg", "a007.jpg"]).any()
    assert_rows_are_images(raw, tmp_path / "data")
    aside = pd.read_csv(tmp_path / "data" / "quarantine.csv")
    assert list(aside["file"]) == ["a004.jpg", "a007.jpg"]
    assert list(aside["label"]) == [0, 0]
    assert aside["reason"][0] == "not an image in a known format"
    assert aside["reason"][1].startswith("broken image: ")


def test_an_image_damaged_inside_the_zip_goes_to_quarantine(tmp_path):
    raw = archive(tmp_path)
    data = raw.read_bytes()
    place = data.index(archive_members()[BROKEN]) + 900
    raw.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
    packing.pack_images(raw, params(), tmp_path / "data")
    aside = pd.read_csv(tmp_path / "data" / "quarantine.csv")
    assert list(aside["file"]) == ["a004.jpg"]
    assert aside["reason"][0].startswith("damaged in the zip: ")


def test_a_label_without_an_image_goes_to_quarantine_and_counts(tmp_path):
    members = archive_members()
    del members[BROKEN], members[SHORT]
    raw = write_zip(tmp_path / "raw.zip", members)
    packing.pack_images(raw, params(max_quarantined=2 / 24), tmp_path / "data")
    aside = pd.read_csv(tmp_path / "data" / "quarantine.csv")
    assert list(aside["file"]) == ["a004.jpg", "a007.jpg"]
    assert set(aside["reason"]) == {"no such image in the archive"}
    with pytest.raises(UserError, match=r"2 of 24 labeled images .* 2 × no such image in the archive"):
        packing.pack_images(raw, params(max_quarantined=1 / 24), tmp_path / "data")


def test_every_reason_stands_in_the_quarantine_and_the_rest_is_packed(tmp_path):
    broken = {
        "a001.jpg": encoded(Image.new("L", (64, 64), 7)),
        "a002.jpg": encoded(Image.new("L", (20, 64))),
        "a003.jpg": encoded(Image.fromarray(sklearn.datasets.load_sample_image("flower.jpg"))),
        "a005.jpg": dicom(chest(), Modality="CT"),
    }
    raw = archive(tmp_path, **{f"train/train/{name}": data for name, data in broken.items()})
    packing.pack_images(raw, params(max_quarantined=1), tmp_path / "data")
    aside = pd.read_csv(tmp_path / "data" / "quarantine.csv", index_col="file")
    assert aside["reason"].to_dict() == {
        "a001.jpg": "blank or nearly so",
        "a002.jpg": "too small: 20×64 pixels",
        "a003.jpg": "a color photograph or drawing",
        "a005.jpg": "no radiograph: a DICOM of modality CT",
    }
    assert_rows_are_images(raw, tmp_path / "data")


def test_images_of_any_format_are_packed_whatever_their_names_end_in(tmp_path):
    found = list(formats().values())
    raw = archive(tmp_path, **{f"train/train/a{row:03}.jpg": data for row, data in enumerate(found[:24])})
    packing.pack_images(raw, params(max_quarantined=0), tmp_path)
    assert len(manifest.read_manifest(tmp_path)) == 28


def test_how_images_became_square_stands_beside_the_pack(tmp_path):
    wide = encoded(Image.fromarray(chest(80)[:40]))
    packing.pack_images(archive(tmp_path, **{"train/train/a000.jpg": wide}), params(resize="pad"), tmp_path)
    assert json.loads((tmp_path / "images.json").read_text()) == {"resize": "pad"}
    first = np.load(tmp_path / "images.npy")[0]
    assert not first[:10].any()
    assert first[10:30].any()


def test_exactly_as_many_as_allowed_may_be_quarantined(tmp_path):
    raw = archive(tmp_path, **{BROKEN: b"", SHORT: b"", "train/train/a001.jpg": b""})
    packing.pack_images(raw, params(max_quarantined=3 / 24), tmp_path / "data")
    assert len(manifest.read_manifest(tmp_path / "data")) == 25


def test_too_many_quarantined_are_refused_with_their_reasons_counted_and_nothing_is_left(tmp_path):
    small = [encoded(Image.new("L", (width, 64))) for width in (20, 21)]
    raw = archive(tmp_path, **dict(zip([BROKEN, SHORT, "train/train/a001.jpg"], [*small, b"text"], strict=True)))
    with pytest.raises(UserError) as caught:
        packing.pack_images(raw, params(), tmp_path / "data")
    assert str(caught.value) == (
        "3 of 24 labeled images are unusable, more than prepare.max_quarantined = 0.1 allows: "
        "2 × too small (first a004.jpg), 1 × not an image in a known format (first a001.jpg); mend them or raise it"
    )
    assert list((tmp_path / "data").iterdir()) == []


def test_a_refusal_leaves_the_last_pack_as_it_was(raw, tmp_path):
    data = tmp_path / "data"
    packing.pack_images(raw, params(), data)
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    with pytest.raises(UserError):
        packing.pack_images(archive(tmp_path, **{BROKEN: b""}), params(max_quarantined=0), data)
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before


def test_a_broken_test_image_is_named_and_nothing_is_left(tmp_path):
    raw = archive(tmp_path, **{"test/test/t002.jpg": b"text", "test/test/t003.jpg": b""})
    with pytest.raises(UserError) as caught:
        packing.pack_images(raw, params(max_quarantined=1), tmp_path / "data")
    assert str(caught.value).startswith(
        "test image t002.jpg: not an image in a known format (2 unusable in all); a submission needs every test image"
    )
    assert list((tmp_path / "data").iterdir()) == []
