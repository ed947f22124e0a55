import contextlib
import io
import os
import random
import re
import struct
import tracemalloc
import unicodedata
import warnings
import zipfile
import zlib
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, archive_members, file_error_message, write_files, write_zip

from pipeline.core.config import ArchiveParams
from pipeline.core.errors import UserError
from pipeline.core.files import DamagedFileError
from pipeline.data import layout, test_labels
from pipeline.data.sources import archive, fetch_source

layout_error = partial(file_error_message, layout.read_layout)
LABELS, SAMPLE = "train_labels.csv", "sample_submission.csv"


def write_archive(tmp_path, **changes):
    """Write a small archive with changed files, named with __ for / and without extension; None removes a file."""
    members = archive_members(train=6, test=3)
    for name, data in changes.items():
        path = f"{name.replace('__', '/')}.jpg" if "__" in name else f"{name}.csv"
        members.pop(path, None)
        if data is not None:
            members[path] = data if isinstance(data, bytes) else data.encode()
    return write_zip(tmp_path / "raw.zip", members)


def labels(*lines: str) -> str:
    return "\n".join(["File,Label", *lines, ""])


def label_lines(count: int = 6) -> list[str]:
    return [f"a{index:03}.jpg,{int(index % 3 == 0)}" for index in range(count)]


@pytest.mark.parametrize("nested", [True, False])
def test_images_are_read_with_and_without_nested_folders(tmp_path, nested):
    path = write_zip(tmp_path / "raw.zip", archive_members(train=6, test=3, nested=nested))
    result = layout.read_layout(path)
    assert list(result.images["file"]) == [f"a{i:03}.jpg" for i in range(6)] + [f"t{i:03}.jpg" for i in range(3)]
    assert list(result.images["set"]) == ["train"] * 6 + ["test"] * 3
    assert list(result.images["label"][:6]) == [1, 0, 0, 1, 0, 0]
    assert result.images["label"][6:].isna().all()
    with zipfile.ZipFile(path) as content:
        for member in result.images["member"]:
            assert content.read(member)
    assert list(result.sample["File"]) == [f"t{i:03}.jpg" for i in range(3)]


def test_images_are_in_the_order_of_the_tables(tmp_path):
    result = layout.read_layout(write_archive(tmp_path, train_labels=labels(*reversed(label_lines()))))
    assert list(result.images["file"][:6]) == [f"a{i:03}.jpg" for i in reversed(range(6))]
    assert list(result.images["label"][:6]) == [0, 0, 1, 0, 0, 1]


def test_other_files_in_the_zip_are_ignored(tmp_path):
    members = archive_members(train=6, test=3) | {
        "train/.DS_Store": b"", "__MACOSX/train/train/._a000.jpg": b"", "train/train/": b"", "notes.txt": b"",
        "train/train/old/a999.jpg": b"",
    }  # fmt: skip
    assert len(layout.read_layout(write_zip(tmp_path / "raw.zip", members)).images) == 9


@pytest.mark.parametrize("name", [LABELS, SAMPLE])
def test_a_missing_table_is_named(tmp_path, name):
    path = write_archive(tmp_path, **{name.removesuffix(".csv"): None})
    assert layout_error(path) == f"has no {name}; add it at the top level, or set download.source (docs/data.md)"


@pytest.mark.parametrize(("header", "missing"), [("File,Class", "Label"), ("Name,Label", "File")])
def test_a_missing_column_is_named(tmp_path, header, missing):
    message = layout_error(write_archive(tmp_path, train_labels=f"{header}\na000.jpg,1\n"))
    assert message == f"{LABELS}: no column {missing!r}; its header is {header} and must have File,Label"


def test_a_missing_column_is_named_with_the_nearest(tmp_path):
    message = layout_error(write_archive(tmp_path, train_labels="File,Labels\na000.jpg,1\n"))
    assert message.startswith(f"{LABELS}: no column 'Label' (did you mean 'Labels'?); its header is")


@pytest.mark.parametrize(("header", "line"), [("File", "a000.jpg,1"), ("File,Label", "a000.jpg,1,")])
def test_lines_with_more_fields_than_the_header_are_an_error(tmp_path, header, line):
    message = layout_error(write_archive(tmp_path, train_labels=f"{header}\n{line}\n"))
    assert message.startswith(f"{LABELS}: the lines have more fields than the header; name every column or delete")


@pytest.mark.parametrize("label", ["2", "", "yes", "1.5", "10", "-1", "NaN", "00", "²"])
def test_an_invalid_label_is_reported_with_its_line_and_file(tmp_path, label):
    lines = label_lines()
    lines[3] = f"a003.jpg,{label}"
    message = layout_error(write_archive(tmp_path, train_labels=labels(*lines)))
    assert message.startswith(f"{LABELS} line 5: the label of a003.jpg is {label!r}; it must be 0")


def test_a_label_without_an_image_has_no_member(tmp_path):
    images = layout.read_layout(
        write_archive(tmp_path, train_labels=labels(*label_lines(), "a100.jpg,0", "a101.jpg,1"))
    ).images
    assert list(images.loc[images["member"] == "", "file"]) == ["a100.jpg", "a101.jpg"]
    assert len(images) == 11


def test_a_missing_test_image_is_named(tmp_path):
    message = layout_error(write_archive(tmp_path, test__test__t001=None))
    assert message.startswith(f"{SAMPLE} line 3: image 't001.jpg' is not in test/ (1 missing in total); add it")


def test_a_training_image_without_a_label_is_named(tmp_path):
    message = layout_error(write_archive(tmp_path, train_labels=labels(*label_lines(4))))
    assert message.startswith("2 training images have no label, the first is a004.jpg; add them to train_labels.csv")


def test_a_duplicate_line_is_named(tmp_path):
    message = layout_error(write_archive(tmp_path, train_labels=labels(*label_lines(), "a001.jpg,1")))
    assert message == f"{LABELS} line 8: a001.jpg is listed twice; keep one line"
    message = layout_error(write_archive(tmp_path, sample_submission="File,Label\nt000.jpg,0\nt000.jpg,0\n"))
    assert message.startswith(f"{SAMPLE} line 3: t000.jpg is listed twice")


def test_a_line_without_a_name_is_an_error(tmp_path):
    message = layout_error(write_archive(tmp_path, train_labels=labels(*label_lines(), ",1", ",1")))
    assert message == f"{LABELS} line 8: File is empty; name the image or delete the line"


def test_a_file_in_train_and_in_test_is_an_error(tmp_path):
    sample = "File,Label\na000.jpg,0\nt000.jpg,0\nt001.jpg,0\nt002.jpg,0\n"
    message = layout_error(write_archive(tmp_path, test__test__a000=b"x", sample_submission=sample))
    assert message == "a000.jpg is in train and in test; give every image a unique name"


@pytest.mark.parametrize("name", [LABELS, SAMPLE])
def test_an_empty_table_is_an_error(tmp_path, name):
    members = {key: data for key, data in archive_members().items() if key.endswith(".csv")}
    members[name] = b"File,Label\n"
    if name == SAMPLE:
        members |= archive_members()
        members[name] = b"File,Label\n"
    assert layout_error(write_zip(tmp_path / "raw.zip", members)) == f"{name} lists no image; it needs at least one"


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00File", b'File,Label\n"a000.jpg,1\n', b"File,Label\na,b,c\nd,e,f,g\n"]
)
def test_a_table_that_is_not_a_csv_is_named(tmp_path, content):
    assert LABELS in layout_error(write_archive(tmp_path, train_labels=content))


def test_metadata_are_joined_by_file_and_empty_if_unknown(tmp_path):
    metadata = "File,patient,source,view\nt001.jpg,p9,B,AP\na002.jpg,p7,A,PA\nelse.jpg,p1,A,PA\n"
    images = layout.read_layout(write_archive(tmp_path, metadata=metadata)).images.set_index("file")
    assert list(images.loc["a002.jpg", layout.METADATA]) == ["p7", "A", "PA"]
    assert list(images.loc["t001.jpg", layout.METADATA]) == ["p9", "B", "AP"]
    assert list(images.loc["a000.jpg", layout.METADATA]) == ["", "", ""]
    assert list(images.index[:6]) == [f"a{i:03}.jpg" for i in range(6)]


def test_patients_are_text_and_na_is_a_name(tmp_path):
    images = layout.read_layout(write_archive(tmp_path, metadata="File,patient,source,view\na000.jpg,007,NA,\n")).images
    assert list(images.loc[0, layout.METADATA]) == ["007", "NA", ""]


def test_metadata_without_a_column_are_an_error(tmp_path):
    message = layout_error(write_archive(tmp_path, metadata="File,source,view\n"))
    header = "its header is File,source,view and must have File,patient,source,view"
    assert message == f"metadata.csv: no column 'patient'; {header}"


def read_metadata(tmp_path, header: str, *lines: str) -> pd.DataFrame:
    metadata = "\n".join([f"File,patient,source,view,{header}", *lines, ""])
    return layout.read_layout(write_archive(tmp_path, metadata=metadata)).images.set_index("file")


def test_sex_and_age_are_read_as_people_and_scanners_write_them(tmp_path):
    values = {"F": "F", " m ": "M", "Female": "F", "MALE": "M", "o": "O", "unknown": "", "U": "", "": ""}
    lines = [f"a{row:03}.jpg,p,A,PA,{text}" for row, text in enumerate(values)]
    train = labels(*label_lines(6), "a006.jpg,0", "a007.jpg,1")
    images = layout.read_layout(
        write_archive(tmp_path, metadata="\n".join(["File,patient,source,view,sex", *lines]), train_labels=train)
    ).images
    assert list(images["sex"][:8]) == list(values.values())
    assert images["age"].isna().all()
    ages = {"63": 63, "63Y": 63, "063Y": 63, "63.5": 63.5, "018M": 1.5, "0": 0}
    images = read_metadata(tmp_path, "age", *(f"a{row:03}.jpg,p,A,PA,{text}" for row, text in enumerate(ages)))
    assert list(images["age"][:6]) == list(ages.values())
    assert images["age"][6:].isna().all()
    assert (images["sex"] == "").all()


def test_the_oldest_and_quoted_ages_of_public_tables_are_read(tmp_path):
    ages = {">89": 90, "> 89": 90, "90+": 90, ">=90": 90, "'058Y'": 58, "NaN": None}
    images = read_metadata(tmp_path, "age", *(f"a{row:03}.jpg,p,A,PA,{text}" for row, text in enumerate(ages)))
    assert [None if pd.isna(age) else age for age in images["age"][:6]] == list(ages.values())


@pytest.mark.parametrize("value", ["x", "1", "FM", "f.", "w"])
def test_an_invalid_sex_is_reported_with_its_line(tmp_path, value):
    metadata = f"File,patient,source,view,age,sex\na001.jpg,p,A,PA,,F\na000.jpg,p,A,PA,,{value}\na002.jpg,p,A,PA,,?\n"
    message = layout_error(write_archive(tmp_path, metadata=metadata))
    assert message.startswith(f"metadata.csv line 3: sex is {value!r} (2 invalid in total); it must be F, M or O")


@pytest.mark.parametrize(
    "value", ["60-70", "60s", "411", "-1", "Y", "1e2", "²", "inf", "63 years", "12/05/1960", ">", "5>60", ">130"]
)
def test_an_age_that_is_no_number_of_years_is_reported_with_its_line(tmp_path, value):
    metadata = f"File,patient,source,view,sex,age\na001.jpg,p,A,PA,F,63\na000.jpg,p,A,PA,F,{value}\n"
    message = layout_error(write_archive(tmp_path, metadata=metadata))
    assert message.startswith(f"metadata.csv line 3: age is {value!r} (1 invalid in total); it must be years from 0 to")


@pytest.mark.parametrize("column", ["license", "licence"])
def test_licenses_are_read_in_either_spelling(tmp_path, column):
    metadata = f"File,patient,source,view,{column}\na000.jpg,p1,A,PA,CC BY 4.0\n"
    images = layout.read_layout(write_archive(tmp_path, metadata=metadata)).images
    assert list(images["license"][:2]) == ["CC BY 4.0", ""]


def test_without_metadata_all_values_are_empty(tmp_path):
    images = layout.read_layout(write_archive(tmp_path)).images
    assert (images[[*layout.METADATA, "sex", "license"]] == "").all(axis=None)
    assert images["age"].isna().all()


def write_folder(tmp_path):
    return write_files(tmp_path / "folder", archive_members(train=4, test=2))


def test_zipping_a_folder_twice_gives_equal_bytes(tmp_path):
    source = write_folder(tmp_path)
    archive.write_source(ArchiveParams(source="archive", path=source), tmp_path / "one.zip")
    for path in sorted(source.rglob("*.jpg"), reverse=True):
        os.utime(path, (10**9, 10**9))
        path.chmod(0o600)
    archive.write_source(ArchiveParams(source="archive", path=source), tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_the_zip_of_a_folder_contains_its_files_and_is_a_valid_layout(tmp_path):
    fetch_source(ArchiveParams(source="archive", path=write_folder(tmp_path)), tmp_path / "raw.zip")
    with zipfile.ZipFile(tmp_path / "raw.zip") as content:
        assert {name: content.read(name) for name in content.namelist()} == archive_members(train=4, test=2)
        assert content.namelist() == sorted(content.namelist())
    assert len(layout.read_layout(tmp_path / "raw.zip").images) == 6


def test_a_zip_is_copied_unchanged(tmp_path, raw_zip):
    fetch_source(ArchiveParams(source="archive", path=raw_zip), tmp_path / "copy.zip")
    assert (tmp_path / "copy.zip").read_bytes() == raw_zip.read_bytes()


def test_a_tilde_in_the_path_is_expanded(tmp_path, raw_zip, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    archive.write_source(ArchiveParams(source="archive", path="~/raw.zip"), tmp_path / "copy.zip")
    assert (tmp_path / "copy.zip").read_bytes() == raw_zip.read_bytes()


def test_a_path_that_is_missing_not_set_or_not_a_zip_is_an_error(tmp_path):
    (tmp_path / "text.zip").write_text("text")
    for path, reason in [
        (
            tmp_path / "text.zip",
            (
                f"{tmp_path / 'text.zip'}: neither a zip nor a tar, or damaged (File is not a zip file); "
                "set download.path to a zip, tar or folder"
            ),
        ),
        (tmp_path / "missing.zip", f"{tmp_path / 'missing.zip'}: not found; correct download.path"),
        (None, "params.yaml: download.path: not set; set it to a zip, tar or folder"),
    ]:
        with pytest.raises(UserError) as error:
            archive.write_source(ArchiveParams(source="archive", path=path), tmp_path / "raw.zip")
        assert str(error.value).startswith(reason)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "raw.zip").exists()


def write_archive_with_member(path, name: str, data: bytes = b"x", **attributes):
    """Write a small archive with an additional member that has the given attributes of ZipInfo."""
    write_zip(path, archive_members(train=6, test=3))
    member = zipfile.ZipInfo(name)
    member.compress_type = attributes.pop("compress_type", zipfile.ZIP_STORED)
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicate names
        archive.writestr(member, data)
    return path


@pytest.mark.parametrize(
    ("name", "attributes", "problem"),
    [
        ("train/train/../../../../etc/passwd", {}, "has a path outside of the zip"),
        ("train\\..\\..\\passwd", {}, "has a path outside of the zip"),
        ("/etc/passwd", {}, "has an absolute path"),
        ("\\\\host\\share\\x.jpg", {}, "has an absolute path"),
        ("C:\\x.jpg", {}, "has an absolute path"),
        ("train/train/a001.jpg", {}, "occurs twice"),
        ("train/train/link.jpg", {"external_attr": 0o120777 << 16}, "is a symbolic link"),
        ("train/train/new.jpg", {"compress_type": zipfile.ZIP_LZMA}, "is neither stored nor deflated"),
        ("bomb.bin", {"compress_type": zipfile.ZIP_DEFLATED, "data": bytes(2**24)}, "is a decompression bomb"),
    ],
)
def test_an_archive_with_an_unsafe_member_is_rejected(tmp_path, name, attributes, problem):
    message = layout_error(write_archive_with_member(tmp_path / "raw.zip", name, **attributes))
    assert message.startswith(f"{name!r} {problem}")
    assert message.endswith("; create the zip again without it")


def test_an_encrypted_archive_is_rejected(tmp_path):
    path = write_archive(tmp_path)
    data = bytearray(path.read_bytes())
    flags = data.index(b"PK\x01\x02") + 8  # in the first entry of the central directory
    for flag in (1, 64):
        path.write_bytes(data[:flags] + bytes([data[flags] | flag]) + data[flags + 1 :])
        assert layout_error(path) == "'train/train/a000.jpg' is encrypted; create the zip again without it"


def test_a_member_with_a_huge_size_is_rejected_unread(tmp_path):
    path = write_archive(tmp_path)
    data = bytearray(path.read_bytes())
    size = data.index(b"PK\x01\x02") + 24  # in the first entry of the central directory
    data[size : size + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    problem = "is too large (2147483648 bytes)"
    assert layout_error(path) == f"'train/train/a000.jpg' {problem}; create the zip again without it"


def read_completely(path) -> str:
    """Read the archive and its images, and return the error message, or an empty string."""
    try:
        rows = layout.read_layout(path).images
    except UserError as error:
        return str(error)
    with zipfile.ZipFile(path) as archive:
        for member in filter(None, rows["member"]):
            with contextlib.suppress(DamagedFileError):  # prepare quarantines the image
                layout.read_member(archive, member)
    return ""


def test_a_damaged_archive_is_read_or_gives_an_error_of_one_line(tmp_path):
    intact, path = write_archive(tmp_path).read_bytes(), tmp_path / "raw.zip"
    headers = [match.start() for match in re.finditer(b"PK\x03\x04|PK\x01\x02|PK\x05\x06", intact)]
    rng, messages = random.Random(1), []
    for _ in range(400):
        data = bytearray(intact)
        for _ in range(rng.choice([1, 3])):
            offset = min(rng.choice(headers) + rng.randrange(50), len(data) - 1)
            data[offset] = rng.choice([255, rng.randrange(256), data[offset] ^ 64])
        path.write_bytes(data[: rng.choice([len(data)] * 9 + [rng.randrange(len(data))])])
        messages.append(read_completely(path))
    assert max(len(message.splitlines()) for message in messages) == 1
    assert 100 < messages.count("") < 300


@pytest.mark.parametrize("name", [LABELS, SAMPLE])
def test_a_damaged_table_is_named(tmp_path, name):
    path = write_archive(tmp_path)
    data = path.read_bytes()
    offset = data.index(b"File,Label", data.index(name.encode()))
    path.write_bytes(data[:offset] + b"e" + data[offset + 1 :])
    assert layout_error(path).startswith(f"{name} is damaged (Bad CRC-32")


def test_images_without_an_extension_are_read(tmp_path):
    more = {f"train/train/{name}": b"x" for name in ("IM1", "0001", "README", ".gitkeep")}
    members = archive_members(train=6, test=3) | more
    members[LABELS] += b"IM1,1\n0001,0\n"
    images = layout.read_layout(write_zip(tmp_path / "raw.zip", members)).images
    assert list(images["member"][6:8]) == ["train/train/IM1", "train/train/0001"]
    assert len(images) == 11


def test_a_table_that_decompresses_to_more_than_its_stated_size_is_not_read_completely(tmp_path):
    path = tmp_path / "raw.zip"
    table = b"File,Label\na000.jpg,1\na001.jpg,0\n"
    members = archive_members(train=2, test=1) | {LABELS: table + bytes(2**26)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    data = bytearray(path.read_bytes())
    # The local header and the entry of the central directory, with the offset of checksum and sizes in them.
    for signature, offset, name in (
        (b"PK\x03\x04", 14, data.index(LABELS.encode())),
        (b"PK\x01\x02", 16, data.rindex(LABELS.encode())),
    ):
        checksum = data.rindex(signature, 0, name) + offset
        data[checksum : checksum + 4] = struct.pack("<I", zlib.crc32(table))
        data[checksum + 8 : checksum + 12] = struct.pack("<I", len(table))
    path.write_bytes(data)
    tracemalloc.start()
    assert len(layout.read_layout(path).images) == 3
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_member_with_an_offset_beyond_the_end_is_rejected(tmp_path):
    path = write_archive(tmp_path)
    data = bytearray(path.read_bytes())
    offset = data.index(b"PK\x01\x02") + 42  # in the first entry of the central directory
    data[offset : offset + 4] = struct.pack("<I", 2**31)
    path.write_bytes(data)
    problem = "has an offset beyond the end of the zip"
    assert layout_error(path) == f"'train/train/a000.jpg' {problem}; create the zip again without it"


def test_the_same_image_name_in_both_folders_is_an_error(tmp_path):
    message = layout_error(write_archive_with_member(tmp_path / "raw.zip", "train/a001.jpg"))
    assert message == ("'train/a001.jpg' and 'train/train/a001.jpg' have the same name; keep one of them")


def test_names_that_start_with_dot_slash_are_read(tmp_path):
    members = {f"./{name}" if "/" in name else name: data for name, data in archive_members(6, 3).items()}
    result = layout.read_layout(write_zip(tmp_path / "raw.zip", members))
    with zipfile.ZipFile(tmp_path / "raw.zip") as archive:
        assert all(archive.read(member) for member in result.images["member"])


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret.jpg", "/etc"])
def test_a_link_to_a_file_outside_of_the_folder_is_an_error_and_one_inside_is_followed(tmp_path, target):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    source = write_folder(tmp_path)
    (source / "train/train/inside.jpg").symlink_to("a001.jpg")
    archive.write_source(ArchiveParams(source="archive", path=source), tmp_path / "raw.zip")
    with zipfile.ZipFile(tmp_path / "raw.zip") as content:
        assert content.read("train/train/inside.jpg") == content.read("train/train/a001.jpg")
    (source / "link.jpg").symlink_to(target)
    with pytest.raises(UserError, match=f"^{source}/link.jpg: symbolic link to a file outside of {source}; replace it"):
        archive.write_source(ArchiveParams(source="archive", path=source), tmp_path / "raw.zip")


def test_the_sample_submission_is_returned_unchanged(tmp_path):
    sample = layout.read_layout(write_archive(tmp_path)).sample
    pd.testing.assert_frame_equal(
        sample, pd.read_csv(io.StringIO("File,Label\nt000.jpg,0\nt001.jpg,0\nt002.jpg,0\n"), dtype=str)
    )


def labels_of(path) -> dict[str, int]:
    images = layout.read_layout(path).images
    return dict(zip(images["file"][:6], images["label"][:6], strict=True))


SPELLINGS = {
    "float": lambda line: line + ".0",
    "boolean": lambda line: line[:-1] + ("True" if line[-1] == "1" else "FALSE"),
    "blanks": lambda line: f" {line[:-2]}\u00a0, {line[-1]} ",
    "no ending": lambda line: line.replace(".jpg", ""),
    "upper case": str.upper,
    "another ending": lambda line: line.replace(".jpg", ".png"),
    "folder": lambda line: f"train/{line}",
    "Windows": lambda line: f"C:\\data\\train\\{line}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_labels_and_names_are_read_as_people_write_them(tmp_path, spelling):
    path = write_archive(tmp_path, train_labels=labels(*map(SPELLINGS[spelling], label_lines())))
    assert labels_of(path) == {f"a{index:03}.jpg": int(index % 3 == 0) for index in range(6)}
    assert layout.read_layout(path).warnings == []


@pytest.mark.parametrize("separator", [";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tables_of_spreadsheets_are_read(tmp_path, separator, encoding):
    text = labels(*label_lines()).replace(",", separator).replace("\n", "\r\n")
    path = write_archive(tmp_path, train_labels=text.encode(encoding))
    assert sum(labels_of(path).values()) == 2


def test_a_submission_keeps_the_spelling_of_the_sample(tmp_path):
    sample = "File,Label\nT002,0\ntest/t000.png,0\nt001.jpg,0\n"
    result = layout.read_layout(write_archive(tmp_path, sample_submission=sample))
    tests = result.images[6:]
    assert list(tests["file"]) == list(result.sample["File"]) == ["T002", "test/t000.png", "t001.jpg"]
    assert list(tests["member"]) == [f"test/test/t00{index}.jpg" for index in (2, 0, 1)]


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name not in ("float", "boolean")])
def test_no_patient_is_lost_by_the_spelling_of_names(tmp_path, spelling):
    lines = [SPELLINGS[spelling](f"a{index:03}.jpg,{index // 2}") + ",A,PA" for index in range(6)]
    path = write_archive(tmp_path, metadata="\n".join(["FILE,Patient,source,view", *lines]))
    result = layout.read_layout(path)
    assert list(result.images["patient"]) == ["0", "0", "1", "1", "2", "2", "", "", ""]
    assert result.warnings == ["metadata.csv: 3 of 9 images have no line, the first is 't000.jpg'"]


def test_metadata_of_test_images_are_found_by_the_name_in_the_zip_too(tmp_path):
    sample = "File,Label\nT000.PNG,0\nt001.jpg,0\nt002.jpg,0\n"
    metadata = "File,patient,source,view\nt000,p1,A,PA\n"
    images = layout.read_layout(write_archive(tmp_path, sample_submission=sample, metadata=metadata)).images
    assert list(images.loc[images["patient"] == "p1", "file"]) == ["T000.PNG"]


def test_patients_lose_blanks_and_decimals_and_words_for_unknown_are_no_patient(tmp_path):
    names = {"12.0": "12", " 12 ": "12", "Mu\u0308ller\u200b": "M\u00fcller", "nan": "", "Unknown": "", "1.25": "1.25"}
    lines = [f"a{row:03}.jpg,{name},A,PA" for row, name in enumerate(names)]
    images = layout.read_layout(
        write_archive(tmp_path, metadata="\n".join(["File,patient,source,view", *lines]))
    ).images
    assert list(images["patient"][:6]) == list(names.values())


def test_names_that_match_nothing_are_warned_of_both_ways(tmp_path):
    metadata = "File,patient,source,view\na0000.jpg,p,A,PA\na001.jpg,p,A,PA\nx.png,p,A,PA\n"
    path = write_archive(tmp_path, metadata=metadata, train_labels=labels(*label_lines(), "a006.jpg,0"))
    assert layout.read_layout(path).warnings == [
        "train_labels.csv: 1 of 7 names have no image in train/, the first is 'a006.jpg'",
        "metadata.csv: 2 of 3 names are of no image, the first is 'a0000.jpg' (did you mean 'a000.jpg'?)",
        "metadata.csv: 9 of 10 images have no line, the first is 'a000.jpg'",
    ]


def test_test_images_that_the_sample_does_not_list_are_warned_of(tmp_path):
    members = archive_members(train=6, test=3) | {"test/test/x.jpg": b"", "test/test/README": b""}
    assert layout.read_layout(write_zip(tmp_path / "raw.zip", members)).warnings == [
        "sample_submission.csv: 1 of 5 images in test/ have no line, the first is 'x.jpg'"
    ]


def test_tables_that_do_not_lie_beside_the_images_are_an_error(tmp_path):
    members = archive_members(train=6, test=3)
    moved = {f"tables/{name}" if name.endswith(".csv") else name: data for name, data in members.items()}
    message = layout_error(write_zip(tmp_path / "raw.zip", moved))
    assert message == "no images in train/ beside train_labels.csv; move the tables or the images there"


def test_tables_of_other_images_are_an_error(tmp_path):
    other = labels("x1.png,0", "x2.png,1")
    message = layout_error(write_archive(tmp_path, train_labels=other))
    assert message.startswith(f"{LABELS}: none of its 2 names is an image in train/; the first is 'x1.png', the first")
    message = layout_error(write_archive(tmp_path, metadata="File,patient,source,view\nx1.png,p,A,PA\n"))
    assert message.startswith(
        "metadata.csv: none of its 1 names is an image; the first is 'x1.png', the first image is"
    )


def test_names_that_differ_by_a_hair_are_both_shown(tmp_path):
    lines = [*label_lines(5), "a0O5.jpg,1"]
    message = layout_error(write_archive(tmp_path, train_labels=labels(*lines)))
    assert "the first is a005.jpg (train_labels.csv has 'a0O5.jpg' (did you mean 'a005.jpg'?))" in message


def test_two_spellings_of_one_image_are_an_error(tmp_path):
    message = layout_error(write_archive(tmp_path, train_labels=labels(*label_lines(), ".\\a001.jpg,1")))
    assert message == f"{LABELS} line 8: .\\a001.jpg is listed twice as 'a001.jpg'; keep one line"


def read_renamed(tmp_path, rename, **more) -> layout.Layout:
    members = {rename(name): data for name, data in archive_members(train=6, test=3).items()}
    return layout.read_layout(write_zip(tmp_path / "raw.zip", members | more))


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_folders_around_everything_and_what_file_managers_add_are_ignored(tmp_path, separator):
    more = {"__MACOSX/data/._train_labels.csv": b"", "data/v1/train/train/._a000.jpg": b"", "data/.DS_Store": b""}
    more["data/.git/train_labels.csv"] = b""
    more = {name.replace("/", separator): data for name, data in more.items()}
    result = read_renamed(tmp_path, lambda name: f"data/v1/{name}".replace("/", separator), **more, readme=b"")
    assert len(result.images) == 9
    with zipfile.ZipFile(tmp_path / "raw.zip") as archive:
        assert all(archive.read(member) for member in result.images["member"])


def test_two_tables_of_labels_in_folders_are_an_error(tmp_path):
    members = {f"{folder}/{name}": data for folder in "ab" for name, data in archive_members(6, 3).items()}
    message = layout_error(write_zip(tmp_path / "raw.zip", members))
    assert message == "has 'a/train_labels.csv' and 'b/train_labels.csv'; keep one of them"


def test_folders_and_tables_in_another_case_are_read(tmp_path):
    assert len(read_renamed(tmp_path, lambda name: name.replace("train", "Train").replace("test", "TEST")).images) == 9


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_in_either_unicode_form_are_matched(tmp_path, form):
    members = archive_members(train=6, test=3)
    for name in [name for name in members if name.endswith(".jpg")]:
        members[unicodedata.normalize(form, name.replace("/a", "/\u00e4"))] = members.pop(name)
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    members[LABELS] = unicodedata.normalize(other, members[LABELS].decode().replace("\na", "\n\u00e4")).encode()
    result = layout.read_layout(write_zip(tmp_path / "raw.zip", members))
    assert result.warnings == []
    assert (result.images["member"] != "").all()


def test_names_in_utf_8_without_the_flag_are_read_as_a_mac_writes_them(tmp_path):
    members = archive_members(train=6, test=3)
    members["train/train/R\u00f6.jpg"] = members.pop("train/train/a000.jpg")
    members[LABELS] = members[LABELS].replace(b"a000", "R\u00f6".encode())
    path = write_zip(tmp_path / "raw.zip", members)
    data = bytearray(path.read_bytes())
    for match in list(re.finditer(b"PK\x03\x04|PK\x01\x02", data)):
        flags = match.start() + (6 if match.group() == b"PK\x03\x04" else 8)
        data[flags + 1] &= ~8  # bit 11: the name is UTF-8
    path.write_bytes(data)
    result = layout.read_layout(path)
    assert "R\u00f6.jpg" in set(result.images["file"])
    with zipfile.ZipFile(path) as archive:
        assert all(archive.read(member) for member in result.images["member"])


CASES = Path(ROOT.parent, "shared/data/cases")


@pytest.mark.skipif(not CASES.exists(), reason="needs files beside the project")
def test_the_cases_beside_the_project_are_read():
    for path in sorted(CASES.glob("1[123]-*/*.zip")) + sorted(CASES.glob("21-*/*.zip")):
        result = layout.read_layout(path)
        assert result.images["label"][:12].tolist() == [0, 1] * 6
        assert (result.images["member"] != "").all()
        if path.parent.name.startswith("12-"):
            assert list(result.images["patient"][:12]) == ["P0"] * 4 + ["P1"] * 4 + ["P2"] * 4


def test_test_labels_are_read_in_any_spelling_and_each_image_once(tmp_path):
    members = {f"data/{name}": data for name, data in archive_members(train=6, test=3).items()}
    table = b"file;label\nT000;1.0\ntest/t001.png;False\n;\nt002.jpg;\n"
    path = write_zip(tmp_path / "raw.zip", members | {"data/test_labels.csv": table})
    read, files = test_labels.read_archived_labels(path), layout.read_layout(path).sample["File"]
    assert test_labels.match_labels(read, files).to_dict() == {"t000.jpg": 1, "t001.jpg": 0}
    assert list(test_labels.match_labels(read.rename({"T000": "x"}), files).index) == ["x", "t001.jpg"]
    with pytest.raises(UserError, match=r"^the labels: \./t001.png is listed twice; keep one line$"):
        test_labels.match_labels(pd.Series({"t001.png": 0, "./t001.png": 0}), files)
