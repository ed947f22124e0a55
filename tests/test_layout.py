import contextlib
import io
import os
import random
import re
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from functools import partial

import pandas as pd
import pytest
from conftest import archive_members, refusal_of_file, write_zip

from pipeline.core.config import ArchiveParams
from pipeline.core.errors import UserError
from pipeline.data import layout
from pipeline.data.sources import archive, fetch_source

refusal = partial(refusal_of_file, layout.read_layout)
LABELS, SAMPLE = "train_labels.csv", "sample_submission.csv"


def zipped(tmp_path, **changes):
    """Write a small archive; None takes a file out. Names are given with __ for / and without .csv or .jpg."""
    members = archive_members(train=6, test=3)
    for name, data in changes.items():
        path = f"{name.replace('__', '/')}.jpg" if "__" in name else f"{name}.csv"
        members.pop(path, None)
        if data is not None:
            members[path] = data if isinstance(data, bytes) else data.encode()
    return write_zip(tmp_path / "raw.zip", members)


def labels(*lines: str) -> str:
    return "\n".join(["File,Label", *lines, ""])


def good(count: int = 6) -> list[str]:
    return [f"a{index:03}.jpg,{int(index % 3 == 0)}" for index in range(count)]


@pytest.mark.parametrize("nested", [True, False])
def test_both_nestings_are_read(tmp_path, nested):
    path = write_zip(tmp_path / "raw.zip", archive_members(train=6, test=3, nested=nested))
    found = layout.read_layout(path)
    assert list(found.images["file"]) == [f"a{i:03}.jpg" for i in range(6)] + [f"t{i:03}.jpg" for i in range(3)]
    assert list(found.images["set"]) == ["train"] * 6 + ["test"] * 3
    assert list(found.images["label"][:6]) == [1, 0, 0, 1, 0, 0]
    assert found.images["label"][6:].isna().all()
    with zipfile.ZipFile(path) as content:
        for member in found.images["member"]:
            assert content.read(member)
    assert list(found.sample["File"]) == [f"t{i:03}.jpg" for i in range(3)]


def test_images_come_in_the_order_of_the_tables(tmp_path):
    found = layout.read_layout(zipped(tmp_path, train_labels=labels(*reversed(good()))))
    assert list(found.images["file"][:6]) == [f"a{i:03}.jpg" for i in reversed(range(6))]
    assert list(found.images["label"][:6]) == [0, 0, 1, 0, 0, 1]


def test_files_that_are_no_images_of_the_competition_are_left_alone(tmp_path):
    members = archive_members(train=6, test=3) | {
        "train/.DS_Store": b"", "__MACOSX/train/train/._a000.jpg": b"", "train/train/": b"", "notes.txt": b"",
        "train/train/old/a999.jpg": b"",
    }  # fmt: skip
    assert len(layout.read_layout(write_zip(tmp_path / "raw.zip", members)).images) == 9


@pytest.mark.parametrize("name", [LABELS, SAMPLE])
def test_a_missing_table_is_named(tmp_path, name):
    path = zipped(tmp_path, **{name.removesuffix(".csv"): None})
    assert refusal(path) == f"has no {name}; add it at the top of the zip"


@pytest.mark.parametrize(
    ("header", "missing"), [("File,Class", "Label"), ("Name,Label", "File"), ("file,label", "File")]
)
def test_a_missing_column_is_named(tmp_path, header, missing):
    message = refusal(zipped(tmp_path, train_labels=f"{header}\na000.jpg,1\n"))
    assert message == f"{LABELS}: no column {missing!r}; its header is {header} and must have File,Label"


@pytest.mark.parametrize(("header", "line"), [("File", "a000.jpg,1"), ("File,Label", "a000.jpg,1,")])
def test_lines_with_more_fields_than_the_header_are_refused(tmp_path, header, line):
    message = refusal(zipped(tmp_path, train_labels=f"{header}\n{line}\n"))
    assert message.startswith(f"{LABELS}: the lines have more fields than the header; name every column there")


@pytest.mark.parametrize("label", ["2", "", "yes", "1.0", "-1", "NaN"])
def test_a_label_that_is_not_0_or_1_is_named_with_its_line_and_file(tmp_path, label):
    lines = good()
    lines[3] = f"a003.jpg,{label}"
    message = refusal(zipped(tmp_path, train_labels=labels(*lines)))
    assert message.startswith(f"{LABELS} line 5: the label of a003.jpg is {label!r}; it must be 0")


def test_a_label_without_an_image_has_no_member(tmp_path):
    images = layout.read_layout(zipped(tmp_path, train_labels=labels(*good(), "a100.jpg,0", "a101.jpg,1"))).images
    assert list(images.loc[images["member"] == "", "file"]) == ["a100.jpg", "a101.jpg"]
    assert len(images) == 11


def test_a_line_of_the_sample_without_an_image_is_named(tmp_path):
    message = refusal(zipped(tmp_path, test__test__t001=None))
    assert message.startswith(f"{SAMPLE} line 3: there is no image t001.jpg in test/ (1 missing in all); a submission")


def test_an_image_without_a_label_is_named(tmp_path):
    message = refusal(zipped(tmp_path, train_labels=labels(*good(4))))
    assert message.startswith("2 training images have no label, the first is a004.jpg; add them to train_labels.csv")


def test_a_duplicate_line_is_named(tmp_path):
    message = refusal(zipped(tmp_path, train_labels=labels(*good(), "a001.jpg,1")))
    assert message == f"{LABELS} line 8: a001.jpg is listed twice; keep one line"
    message = refusal(zipped(tmp_path, sample_submission="File,Label\nt000.jpg,0\nt000.jpg,0\n"))
    assert message.startswith(f"{SAMPLE} line 3: t000.jpg is listed twice")


def test_a_file_in_train_and_in_test_is_refused(tmp_path):
    sample = "File,Label\na000.jpg,0\nt000.jpg,0\nt001.jpg,0\nt002.jpg,0\n"
    message = refusal(zipped(tmp_path, test__test__a000=b"x", sample_submission=sample))
    assert message == "a000.jpg is in train and in test; give every image its own name"


@pytest.mark.parametrize("name", [LABELS, SAMPLE])
def test_an_empty_table_is_refused(tmp_path, name):
    members = {key: data for key, data in archive_members().items() if key.endswith(".csv")}
    members[name] = b"File,Label\n"
    if name == SAMPLE:
        members |= archive_members()
        members[name] = b"File,Label\n"
    assert refusal(write_zip(tmp_path / "raw.zip", members)) == f"{name} lists no image; it needs at least one"


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00File", b'File,Label\n"a000.jpg,1\n', b"File,Label\na,b,c\nd,e,f,g\n"]
)
def test_a_table_that_is_no_csv_is_named(tmp_path, content):
    assert LABELS in refusal(zipped(tmp_path, train_labels=content))


def test_a_comma_too_many_in_every_line_is_refused(tmp_path):
    assert LABELS in refusal_of_file(
        layout.read_layout, zipped(tmp_path, train_labels=labels(*(f"{line}," for line in good())))
    )


def test_tables_as_spreadsheets_write_them_are_read(tmp_path):
    text = "\ufeff" + labels(*good()).replace("\n", "\r\n")
    assert len(layout.read_layout(zipped(tmp_path, train_labels=text)).images) == 9


def test_metadata_are_joined_by_file_and_unknown_ones_are_empty(tmp_path):
    metadata = "File,patient,source,view\nt001.jpg,p9,B,AP\na002.jpg,p7,A,PA\nelse.jpg,p1,A,PA\n"
    images = layout.read_layout(zipped(tmp_path, metadata=metadata)).images.set_index("file")
    assert list(images.loc["a002.jpg", layout.METADATA]) == ["p7", "A", "PA"]
    assert list(images.loc["t001.jpg", layout.METADATA]) == ["p9", "B", "AP"]
    assert list(images.loc["a000.jpg", layout.METADATA]) == ["", "", ""]
    assert list(images.index[:6]) == [f"a{i:03}.jpg" for i in range(6)]


def test_patients_are_texts_and_na_is_a_name(tmp_path):
    images = layout.read_layout(zipped(tmp_path, metadata="File,patient,source,view\na000.jpg,007,NA,\n")).images
    assert list(images.loc[0, layout.METADATA]) == ["007", "NA", ""]


def test_metadata_without_a_column_are_refused(tmp_path):
    message = refusal(zipped(tmp_path, metadata="File,source,view\n"))
    must = "its header is File,source,view and must have File,patient,source,view"
    assert message == f"metadata.csv: no column 'patient'; {must}"


def test_licenses_are_kept_where_metadata_have_them(tmp_path):
    metadata = "File,patient,source,view,license\na000.jpg,p1,A,PA,CC BY 4.0\n"
    images = layout.read_layout(zipped(tmp_path, metadata=metadata)).images
    assert list(images["license"][:2]) == ["CC BY 4.0", ""]


def test_no_metadata_are_empty_texts(tmp_path):
    images = layout.read_layout(zipped(tmp_path)).images
    assert (images[[*layout.METADATA, "license"]] == "").all(axis=None)


def folder(tmp_path):
    for name, data in archive_members(train=4, test=2).items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "folder"


def test_a_folder_zips_to_the_same_bytes_twice(tmp_path):
    source = folder(tmp_path)
    archive.write(ArchiveParams(source="archive", path=source), tmp_path / "one.zip")
    for path in sorted(source.rglob("*.jpg"), reverse=True):
        os.utime(path, (10**9, 10**9))
        path.chmod(0o600)
    archive.write(ArchiveParams(source="archive", path=source), tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_a_zipped_folder_holds_its_files_and_reads_as_a_layout(tmp_path):
    fetch_source(ArchiveParams(source="archive", path=folder(tmp_path)), tmp_path / "raw.zip")
    with zipfile.ZipFile(tmp_path / "raw.zip") as content:
        assert {name: content.read(name) for name in content.namelist()} == archive_members(train=4, test=2)
        assert content.namelist() == sorted(content.namelist())
    assert len(layout.read_layout(tmp_path / "raw.zip").images) == 6


def test_a_zip_is_copied_unchanged(tmp_path, raw):
    fetch_source(ArchiveParams(source="archive", path=raw), tmp_path / "copy.zip")
    assert (tmp_path / "copy.zip").read_bytes() == raw.read_bytes()


def test_a_home_directory_is_understood(tmp_path, raw, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    archive.write(ArchiveParams(source="archive", path="~/raw.zip"), tmp_path / "copy.zip")
    assert (tmp_path / "copy.zip").read_bytes() == raw.read_bytes()


def test_what_is_no_zip_not_found_or_not_named_is_refused(tmp_path):
    (tmp_path / "text.zip").write_text("no zip")
    for path, reason in [
        (tmp_path / "text.zip", f"{tmp_path / 'text.zip'}: not a zip; name a zip or a folder at download.path"),
        (tmp_path / "absent.zip", f"{tmp_path / 'absent.zip'}: not found; put a zip or a folder there"),
        (None, "params.yaml: download.path: no archive is named; download the competition's zip"),
    ]:
        with pytest.raises(UserError) as caught:
            archive.write(ArchiveParams(source="archive", path=path), tmp_path / "raw.zip")
        assert str(caught.value).startswith(reason)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "raw.zip").exists()


def with_member(path, name: str, data: bytes = b"x", **facts):
    """Add a member with these facts to a small archive."""
    write_zip(path, archive_members(train=6, test=3))
    member = zipfile.ZipInfo(name)
    member.compress_type = facts.pop("compress_type", zipfile.ZIP_STORED)
    for fact, value in facts.items():
        setattr(member, fact, value)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        archive.writestr(member, data)
    return path


@pytest.mark.parametrize(
    ("name", "facts", "wrong"),
    [
        ("train/train/../../../../etc/passwd", {}, "leads out of the archive"),
        ("train\\..\\..\\passwd", {}, "leads out of the archive"),
        ("/etc/passwd", {}, "has an absolute name"),
        ("\\\\host\\share\\x.jpg", {}, "has an absolute name"),
        ("C:\\x.jpg", {}, "has an absolute name"),
        ("train/train/a001.jpg", {}, "is in it twice"),
        ("train/train/link.jpg", {"external_attr": 0o120777 << 16}, "is a symbolic link"),
        ("train/train/new.jpg", {"compress_type": zipfile.ZIP_LZMA}, "is neither stored nor deflated"),
        ("bomb.bin", {"compress_type": zipfile.ZIP_DEFLATED, "data": bytes(2**24)}, "is a decompression bomb"),
    ],
)
def test_an_archive_with_a_member_that_is_not_to_be_trusted_is_refused(tmp_path, name, facts, wrong):
    message = refusal(with_member(tmp_path / "raw.zip", name, **facts))
    assert message.startswith(f"{name!r} {wrong}")
    assert message.endswith("; make the zip anew without it")


def test_an_encrypted_archive_is_refused(tmp_path):
    path = zipped(tmp_path)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")  # the first entry of the directory, which has the flags at 8
    for flag in (1, 64):
        path.write_bytes(data[: at + 8] + bytes([data[at + 8] | flag]) + data[at + 9 :])
        assert refusal(path) == "'train/train/a000.jpg' is encrypted; make the zip anew without it"


def test_a_member_that_says_it_is_huge_is_refused_unread(tmp_path):
    path = zipped(tmp_path)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + 24  # where the size is
    data[at : at + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    assert refusal(path) == "'train/train/a000.jpg' is too large (2147483648 bytes); make the zip anew without it"


def read_whole(path) -> str:
    """Read the archive and its images, and return what was said if it was refused."""
    try:
        rows = layout.read_layout(path).images
    except UserError as error:
        return str(error)
    with zipfile.ZipFile(path) as archive:
        for member in filter(None, rows["member"]):
            with contextlib.suppress(*layout.DAMAGED_ZIP_ERRORS):  # which sends an image to quarantine
                archive.read(member)
    return ""


def test_a_damaged_archive_is_read_or_refused_in_one_line(tmp_path):
    good, path = zipped(tmp_path).read_bytes(), tmp_path / "raw.zip"
    heads = [match.start() for match in re.finditer(b"PK\x03\x04|PK\x01\x02|PK\x05\x06", good)]
    chance, said = random.Random(1), []
    for _ in range(400):
        data = bytearray(good)
        for _ in range(chance.choice([1, 3])):
            place = min(chance.choice(heads) + chance.randrange(50), len(data) - 1)
            data[place] = chance.choice([255, chance.randrange(256), data[place] ^ 64])
        path.write_bytes(data[: chance.choice([len(data)] * 9 + [chance.randrange(len(data))])])
        said.append(read_whole(path))
    assert max(len(line.splitlines()) for line in said) == 1
    assert 100 < said.count("") < 300


@pytest.mark.parametrize("name", [LABELS, SAMPLE])
def test_a_table_damaged_in_the_zip_is_named(tmp_path, name):
    path = zipped(tmp_path)
    data = path.read_bytes()
    at = data.index(b"File,Label", data.index(name.encode()))
    path.write_bytes(data[:at] + b"e" + data[at + 1 :])
    assert refusal(path).startswith(f"{name} is damaged in the zip (Bad CRC-32")


def test_images_without_an_ending_are_found(tmp_path):
    more = {f"train/train/{name}": b"x" for name in ("IM1", "0001", "README", ".gitkeep")}
    members = archive_members(train=6, test=3) | more
    members[LABELS] += b"IM1,1\n0001,0\n"
    images = layout.read_layout(write_zip(tmp_path / "raw.zip", members)).images
    assert list(images["member"][6:8]) == ["train/train/IM1", "train/train/0001"]
    assert len(images) == 11


def test_a_table_that_inflates_to_more_than_the_archive_says_is_not_read_whole(tmp_path):
    path = tmp_path / "raw.zip"
    said = b"File,Label\na000.jpg,1\na001.jpg,0\n"
    members = archive_members(train=2, test=1) | {LABELS: said + bytes(2**26)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    data = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 14), (b"PK\x01\x02", 16)):  # where checksum and sizes are
        place = data.rindex(mark, 0, data.rindex(LABELS.encode()) if at == 16 else data.index(LABELS.encode())) + at
        data[place : place + 4] = struct.pack("<I", zlib.crc32(said))
        data[place + 8 : place + 12] = struct.pack("<I", len(said))
    path.write_bytes(data)
    tracemalloc.start()
    assert len(layout.read_layout(path).images) == 3
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_member_that_is_said_to_lie_behind_the_end_is_refused(tmp_path):
    path = zipped(tmp_path)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + 42
    data[at : at + 4] = struct.pack("<I", 2**31)
    path.write_bytes(data)
    assert refusal(path) == "'train/train/a000.jpg' lies outside of it; make the zip anew without it"


def test_one_image_in_both_nestings_is_refused(tmp_path):
    message = refusal(with_member(tmp_path / "raw.zip", "train/a001.jpg"))
    assert message == ("'train/a001.jpg' and 'train/train/a001.jpg' have one name; leave one of them in it")


def test_names_that_begin_with_the_folder_itself_are_found(tmp_path):
    members = {f"./{name}" if "/" in name else name: data for name, data in archive_members(6, 3).items()}
    found = layout.read_layout(write_zip(tmp_path / "raw.zip", members))
    with zipfile.ZipFile(tmp_path / "raw.zip") as archive:
        assert all(archive.read(member) for member in found.images["member"])


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret.jpg", "/etc"])
def test_a_link_that_leaves_the_folder_is_refused_and_one_inside_is_followed(tmp_path, target):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    source = folder(tmp_path)
    (source / "train/train/inside.jpg").symlink_to("a001.jpg")
    archive.write(ArchiveParams(source="archive", path=source), tmp_path / "raw.zip")
    with zipfile.ZipFile(tmp_path / "raw.zip") as content:
        assert content.read("train/train/inside.jpg") == content.read("train/train/a001.jpg")
    (source / "link.jpg").symlink_to(target)
    with pytest.raises(UserError, match=f"^{source}/link.jpg: a symbolic link that leaves {source}; put the file"):
        archive.write(ArchiveParams(source="archive", path=source), tmp_path / "raw.zip")


def test_the_sample_is_kept_as_it_is(tmp_path):
    sample = layout.read_layout(zipped(tmp_path)).sample
    pd.testing.assert_frame_equal(
        sample, pd.read_csv(io.StringIO("File,Label\nt000.jpg,0\nt001.jpg,0\nt002.jpg,0\n"), dtype=str)
    )
