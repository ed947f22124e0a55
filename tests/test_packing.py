import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import sklearn.datasets
from conftest import ROOT, archive_members, write_zip
from odd_files import chest, dicom, encode, formats
from PIL import Image
from xxhash import xxh3_128_hexdigest

from pipeline.core.config import PrepareParams
from pipeline.core.errors import UserError
from pipeline.data import images, layout, manifest, packing

BROKEN, SHORT = "train/train/a004.jpg", "train/train/a007.jpg"


def params(size: int = 40, max_quarantined: float = 0.1, resize: str = "stretch") -> PrepareParams:
    return PrepareParams(image_size=size, resize=resize, max_quarantined=max_quarantined)


def write_archive(tmp_path, **changed: bytes):
    members = archive_members()
    assert set(changed) <= set(members)
    return write_zip(tmp_path / "raw.zip", members | changed)


def decode_member(raw, member: str, size: int = 40) -> np.ndarray:
    with zipfile.ZipFile(raw) as content:
        return images.decode_radiograph(content.read(member), size, "stretch")[0]


def outs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def assert_rows_are_images(raw, folder, size: int = 40) -> None:
    array, table = np.load(folder / "images.npy"), manifest.read_manifest(folder)
    members = layout.read_layout(raw).images.set_index("file")["member"]
    assert array.shape == (len(table), size, size)
    assert array.dtype == np.uint8
    for row, (file, digest) in enumerate(zip(table["file"], table["xxh128"], strict=True)):
        assert (array[row] == decode_member(raw, members[file], size)).all()
        assert xxh3_128_hexdigest(array[row].tobytes()) == digest


def test_row_i_of_the_array_is_image_i_of_the_manifest(raw_zip, tmp_path):
    packing.pack_images(raw_zip, params(), tmp_path / "data")
    assert_rows_are_images(raw_zip, tmp_path / "data")


def test_the_manifest_lists_every_image_with_its_label_and_shape(raw_zip, tmp_path):
    packing.pack_images(raw_zip, params(), tmp_path)
    table, rows = manifest.read_manifest(tmp_path), layout.read_layout(raw_zip).images
    columns = ["file", "set", "label", "patient", "source", "view", "sex", "age", "license", "manufacturer", "modality"]
    pd.testing.assert_frame_equal(table[columns], rows[columns])
    assert (table[["width", "height"]] == 64).all(axis=None)
    assert list(table.columns) == [*columns, "width", "height", "bytes", "jpeg_quantization", "xxh128", "phash"]


def test_metadata_are_in_the_manifest_and_a_patient_named_na_is_not_missing(tmp_path):
    metadata = b"File,patient,source,view,sex,age\na000.jpg,NA,A,PA,female,063Y\na001.jpg,007,B,AP,,\n"
    packing.pack_images(
        write_zip(tmp_path / "raw.zip", archive_members() | {"metadata.csv": metadata}), params(), tmp_path
    )
    table = manifest.read_manifest(tmp_path)
    assert list(table["patient"][:3]) == ["NA", "007", ""]
    assert list(table["view"][:3]) == ["PA", "AP", ""]
    assert list(table["sex"][:3]) == ["F", "", ""]
    assert table["age"][0] == 63
    assert table["age"][1:].isna().all()


@pytest.mark.parametrize("test_labels", [b"File,Label\nt000.jpg,1\nt001.jpg,0\n", b"no table \xff"])
def test_labels_of_test_images_in_the_archive_are_not_read(tmp_path, test_labels):
    for name, added in (("without", {}), ("with", {"test_labels.csv": test_labels})):
        packing.pack_images(write_zip(tmp_path / f"{name}.zip", archive_members() | added), params(), tmp_path / name)
    for name in ("images.npy", "images.json", "manifest.csv", "quarantine.csv"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_no_image_of_an_intact_archive_is_quarantined(raw_zip, tmp_path):
    packing.pack_images(raw_zip, params(), tmp_path)
    table = pd.read_csv(tmp_path / "quarantine.csv")
    assert table.empty
    assert list(table.columns) == ["file", "set", "label", "reason"]


@pytest.mark.parametrize("changed", [{}, {BROKEN: b"no image"}])
def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, monkeypatch, changed):
    raw = write_archive(tmp_path, **changed)
    for workers in (1, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, workers=workers: set(range(workers)))
        packing.pack_images(raw, params(), tmp_path / str(workers))
    for name in ("images.npy", "manifest.csv", "quarantine.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_a_broken_labeled_image_is_quarantined_with_a_reason_and_its_row_is_removed(tmp_path):
    raw = write_archive(tmp_path, **{BROKEN: b"no image", SHORT: archive_members()[SHORT][:500]})
    packing.pack_images(raw, params(), tmp_path / "data")
    table = manifest.read_manifest(tmp_path / "data")
    assert len(table) == 26
    assert not table["file"].isin(["a004.jpg", "a007.jpg"]).any()
    assert_rows_are_images(raw, tmp_path / "data")
    quarantine = pd.read_csv(tmp_path / "data" / "quarantine.csv")
    assert list(quarantine["file"]) == ["a004.jpg", "a007.jpg"]
    assert list(quarantine["label"]) == [0, 0]
    assert quarantine["reason"][0] == "not an image in a known format"
    assert quarantine["reason"][1].startswith("broken image: ")


def test_an_image_damaged_in_the_zip_is_quarantined(tmp_path):
    raw = write_archive(tmp_path)
    data = raw.read_bytes()
    offset = data.index(archive_members()[BROKEN]) + 900
    raw.write_bytes(data[:offset] + bytes([data[offset] ^ 255]) + data[offset + 1 :])
    packing.pack_images(raw, params(), tmp_path / "data")
    quarantine = pd.read_csv(tmp_path / "data" / "quarantine.csv")
    assert list(quarantine["file"]) == ["a004.jpg"]
    assert quarantine["reason"][0].startswith("damaged in the zip: ")


def test_a_label_without_an_image_is_quarantined_and_counted(tmp_path):
    members = archive_members()
    del members[BROKEN], members[SHORT]
    raw = write_zip(tmp_path / "raw.zip", members)
    packing.pack_images(raw, params(max_quarantined=2 / 24), tmp_path / "data")
    quarantine = pd.read_csv(tmp_path / "data" / "quarantine.csv")
    assert list(quarantine["file"]) == ["a004.jpg", "a007.jpg"]
    assert set(quarantine["reason"]) == {"not in the zip"}
    with pytest.raises(UserError, match=r"2 of 24 labeled images .* 2 × not in the zip"):
        packing.pack_images(raw, params(max_quarantined=1 / 24), tmp_path / "data")


def test_the_quarantine_lists_every_reason_and_all_other_images_are_packed(tmp_path):
    broken = {
        "a001.jpg": encode(Image.new("L", (64, 64), 7)),
        "a002.jpg": encode(Image.new("L", (20, 64))),
        "a003.jpg": encode(Image.fromarray(sklearn.datasets.load_sample_image("flower.jpg"))),
        "a005.jpg": dicom(chest(), Modality="CT"),
    }
    raw = write_archive(tmp_path, **{f"train/train/{name}": data for name, data in broken.items()})
    packing.pack_images(raw, params(max_quarantined=1), tmp_path / "data")
    quarantine = pd.read_csv(tmp_path / "data" / "quarantine.csv", index_col="file")
    assert quarantine["reason"].to_dict() == {
        "a001.jpg": "blank or nearly blank: contrast of 0 gray levels",
        "a002.jpg": "too small: 20×64 pixels",
        "a003.jpg": "color photograph or drawing",
        "a005.jpg": "not a radiograph: DICOM modality CT",
    }
    assert_rows_are_images(raw, tmp_path / "data")


def test_images_of_any_format_are_packed_whatever_their_file_extension(tmp_path):
    files = list(formats().values())
    raw = write_archive(tmp_path, **{f"train/train/a{row:03}.jpg": data for row, data in enumerate(files[:24])})
    packing.pack_images(raw, params(max_quarantined=0), tmp_path)
    assert len(manifest.read_manifest(tmp_path)) == 28


def test_the_resize_method_is_recorded_beside_the_pack(tmp_path):
    wide = encode(Image.fromarray(chest(80)[:40]))
    packing.pack_images(write_archive(tmp_path, **{"train/train/a000.jpg": wide}), params(resize="pad"), tmp_path)
    assert json.loads((tmp_path / "images.json").read_text()) == {"resize": "pad"}
    first = np.load(tmp_path / "images.npy")[0]
    assert not first[:10].any()
    assert first[10:30].any()


def test_as_many_images_as_allowed_may_be_quarantined(tmp_path):
    raw = write_archive(tmp_path, **{BROKEN: b"", SHORT: b"", "train/train/a001.jpg": b""})
    packing.pack_images(raw, params(max_quarantined=3 / 24), tmp_path / "data")
    assert len(manifest.read_manifest(tmp_path / "data")) == 25


def test_too_many_quarantined_images_are_an_error_with_counts_of_full_reasons_and_only_the_quarantine_is_written(
    tmp_path,
):
    unusable = [encode(Image.new("L", (width, 64))) for width in (21, 20, 20)] + [b"text"]
    names = [f"train/train/{name}.jpg" for name in ("a004", "a007", "a009", "a001")]
    raw = write_archive(tmp_path, **dict(zip(names, unusable, strict=True)))
    with pytest.raises(UserError) as error:
        packing.pack_images(raw, params(), tmp_path / "data")
    assert str(error.value) == (
        "4 of 24 labeled images are unusable, more than prepare.max_quarantined = 0.1 allows: "
        "3 × too small: 20×64 pixels or similar (first a007.jpg), 1 × not an image in a known format (first a001.jpg); "
        "data/quarantine.csv lists them; repair or remove them, or raise the limit"
    )
    assert outs(tmp_path / "data") == ["quarantine.csv"]
    quarantine = pd.read_csv(tmp_path / "data/quarantine.csv", index_col="file")
    assert list(quarantine.index) == ["a001.jpg", "a004.jpg", "a007.jpg", "a009.jpg"]


def test_an_error_leaves_the_previous_pack_unchanged(raw_zip, tmp_path):
    data = tmp_path / "data"
    packing.pack_images(raw_zip, params(), data)
    before = {name: (data / name).read_bytes() for name in outs(data)}
    with pytest.raises(UserError):
        packing.pack_images(write_archive(tmp_path, **{BROKEN: b""}), params(max_quarantined=0), data)
    assert b"a004.jpg" in (data / "quarantine.csv").read_bytes()
    assert {name: (data / name).read_bytes() for name in outs(data)} | {"quarantine.csv": b""} == (
        before | {"quarantine.csv": b""}
    )


def test_a_broken_test_image_is_named_and_only_the_quarantine_is_written(tmp_path):
    raw = write_archive(tmp_path, **{"test/test/t002.jpg": b"text", "test/test/t003.jpg": b""})
    with pytest.raises(UserError) as error:
        packing.pack_images(raw, params(max_quarantined=1), tmp_path / "data")
    assert str(error.value).startswith(
        "test image t002.jpg: not an image in a known format (2 unusable in total); replace it: a submission"
    )
    assert outs(tmp_path / "data") == ["quarantine.csv"]
    assert list(pd.read_csv(tmp_path / "data/quarantine.csv")["file"]) == ["t002.jpg", "t003.jpg"]


def test_a_limit_raised_after_the_error_decodes_only_the_unusable_images_again(tmp_path, decoded):
    raw = write_archive(tmp_path, **{BROKEN: b"text", SHORT: b""})
    with pytest.raises(UserError):
        packing.pack_images(raw, params(max_quarantined=0), tmp_path / "data")
    assert decoded() == 28
    packing.pack_images(raw, params(), tmp_path / "data")
    assert decoded() == 2
    assert_rows_are_images(raw, tmp_path / "data")
    assert not (tmp_path / "data/.prepare").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_is_continued_and_ends_in_the_same_bytes(tmp_path, decoded, number):
    raw = write_archive(tmp_path, **{BROKEN: b"text"})
    packing.pack_images(raw, params(), tmp_path / "whole")
    assert decoded() == 28
    workers = kill_after_images(raw, tmp_path / "data", 17, number)
    assert outs(tmp_path / "data") == []
    with (tmp_path / "data/.prepare/results.jsonl").open("a") as results:
        results.write("[17, 64")  # as a kill in the middle of a line leaves it
    packing.pack_images(raw, params(), tmp_path / "data")
    assert decoded() == 28 - 17 + 1  # the unusable image again
    assert outs(tmp_path / "data") == ["images.json", "images.npy", "manifest.csv", "quarantine.csv"]
    for name in outs(tmp_path / "data"):
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "data/.prepare").exists()
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]


def kill_after_images(raw: Path, target: Path, count: int, number: int) -> list[psutil.Process]:
    """Stop a run by a signal after it has recorded this many images, and return its worker processes."""
    code = f"""
import itertools, time
from pathlib import Path
from pipeline.core.config import PrepareParams
from pipeline.data import packing
def stop(jobs, *_):
    yield from itertools.islice(jobs, {count})
    print("ready", flush=True)
    time.sleep(60)
packing.track_progress = stop
params = PrepareParams(image_size=40, resize="stretch", max_quarantined=0.1)
packing.pack_images(Path({str(raw)!r}), params, Path({str(target)!r}))
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        workers = psutil.Process(process.pid).children()
        process.send_signal(number)
    psutil.wait_procs(workers, timeout=10)
    return workers


@pytest.mark.parametrize("change", ["raw", "size", "resize", "code"])
def test_a_run_with_other_data_parameters_or_code_starts_again(tmp_path, monkeypatch, decoded, change):
    raw = write_archive(tmp_path, **{BROKEN: b"text"})
    with pytest.raises(UserError):
        packing.pack_images(raw, params(max_quarantined=0), tmp_path / "data")
    changed = params(**{"size": {"size": 48}, "resize": {"resize": "pad"}}.get(change, {}))
    if change == "raw":
        raw = write_archive(tmp_path, **{SHORT: b"text"})
        os.utime(raw, (0, 0))
    if change == "code":
        monkeypatch.setattr(packing, "md5_of_file", lambda path: "changed")
    decoded()
    packing.pack_images(raw, changed, tmp_path / "data")
    assert decoded() == 28
    assert np.load(tmp_path / "data/images.npy").shape == (27, changed.image_size, changed.image_size)


@pytest.fixture
def decoded(tmp_path, monkeypatch):
    """Returns a function that counts the images that were decoded since its last call."""
    record, decode = tmp_path / "decoded.txt", images.decode_radiograph

    def count(*arguments):
        with record.open("a") as lines:
            lines.write("1\n")
        return decode(*arguments)

    def read() -> int:
        lines = record.read_text().split() if record.exists() else []
        record.unlink(missing_ok=True)
        return len(lines)

    monkeypatch.setattr(images, "decode_radiograph", count)
    return read


def test_a_disk_with_too_little_space_is_an_error_before_decoding(raw_zip, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40, 40_000))
    with pytest.raises(UserError, match=r"28 images of 40×40 pixels need 0 MB, but 0 MB are free; free some"):
        packing.pack_images(raw_zip, params(), tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40, 28 * 40 * 40))
    packing.pack_images(raw_zip, params(), tmp_path / "data")


def test_what_a_table_does_not_say_is_taken_from_dicom_files(tmp_path, caplog):
    said = {"PatientID": "D1", "ViewPosition": "AP", "PatientSex": "M", "PatientAge": "041Y", "Manufacturer": "ACME"}
    strange = {"PatientID": "D2", "PatientSex": "X", "PatientAge": "999Y"}
    files = {"a000": said, "a001": said, "a002": strange}
    changed = {f"train/train/{name}.jpg": dicom(chest(), **elements) for name, elements in files.items()}
    metadata = b"File,patient,source,view,sex,manufacturer\na000.jpg,T1,A,PA,F,Beta\na003.jpg,T2,A,,,\n"
    raw = write_archive(tmp_path, **changed)
    with zipfile.ZipFile(raw, "a") as archive:
        archive.writestr("metadata.csv", metadata)
    with caplog.at_level(logging.WARNING):
        packing.pack_images(raw, params(), tmp_path / "data")
    table = manifest.read_manifest(tmp_path / "data").fillna({"age": -1})
    columns = ["patient", "view", "sex", "age", "manufacturer", "modality"]
    assert table.loc[:3, columns].to_numpy().tolist() == [
        ["T1", "PA", "F", 41, "Beta", "CR"],
        ["D1", "AP", "M", 41, "ACME", "CR"],
        ["D2", "", "", -1, "", "CR"],
        ["T2", "", "", -1, "", ""],
    ]
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("the patients of 2 images are those of their DICOM files, and those of 2 images")


def test_damaged_files_give_the_same_bytes_again(tmp_path):
    rng, files = np.random.default_rng(0), list(formats().values())
    broken = []
    for data in files[:24]:
        content = bytearray(data)
        for position in rng.integers(0, len(content), 3):
            content[position] ^= 255
        broken.append(bytes(content[: rng.integers(len(content) // 2, len(content))]))
    raw = write_archive(tmp_path, **{f"train/train/a{row:03}.jpg": data for row, data in enumerate(broken)})
    for name in ("first", "second"):
        packing.pack_images(raw, params(max_quarantined=1), tmp_path / name)
    assert len(pd.read_csv(tmp_path / "first/quarantine.csv")) > 12
    for name in outs(tmp_path / "first"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
        assert b" at 0x" not in (tmp_path / "first" / name).read_bytes()
