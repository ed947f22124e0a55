"""Archives of all kinds, files behind URLs, and images that data/raw.zip refers to."""

import bz2
import functools
import gzip
import http.server
import importlib
import io
import lzma
import os
import random
import re
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pandas as pd
import pytest
from click.testing import CliRunner
from conftest import (
    archive_members,
    edit_params,
    error_message,
    run,
    run_s3_server,
    use_project,
    write_files,
    write_zip,
)

from pipeline.core.config import ArchiveParams, DownloadParams, KaggleParams, PrepareParams, TableParams
from pipeline.core.errors import UserError
from pipeline.core.files import DamagedFileError
from pipeline.data import layout, packing, remote
from pipeline.data.image_references import IMAGE_REFERENCES
from pipeline.data.raw_images import RawImages
from pipeline.data.source_folder import open_source_folder
from pipeline.data.sources import fetch_source
from pipeline.data.sources.archive_writer import write_zip_of_files
from stages.download import download

COMPRESSORS = {
    "tar": lambda data: data, "tar.gz": functools.partial(gzip.compress, mtime=0), "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
}  # fmt: skip
MEMBERS = archive_members(train=6, test=2)


def pack_tar(members: dict[str, bytes], *special: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member in special:
            archive.addfile(member)
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def write_tar(path: Path, members: dict[str, bytes], *special: tarfile.TarInfo) -> Path:
    compress = next(function for ending, function in reversed(COMPRESSORS.items()) if path.name.endswith(ending))
    path.write_bytes(compress(pack_tar(members, *special)))
    return path


def params(*path: object, **other: object) -> ArchiveParams:
    return ArchiveParams(source="archive", path=path[0] if len(path) == 1 else [str(one) for one in path], **other)


def fetch(source: DownloadParams, raw: Path) -> pd.DataFrame:
    """Fetch twice, check that both give the same bytes, and return the rows of the layout."""
    for _ in range(2):
        before = raw.read_bytes() if raw.exists() else None
        fetch_source(source, raw)
    assert raw.read_bytes() == before
    return layout.read_layout(raw).images


def contents(raw: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(raw) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# Tars and several archives


@pytest.mark.parametrize("ending", [*COMPRESSORS, "tgz"])
def test_a_tar_of_any_compression_gives_what_its_files_are(tmp_path, ending):
    folder = tarfile.TarInfo("./train")
    folder.type = tarfile.DIRTYPE
    members = {f"./{name}": content for name, content in MEMBERS.items()} | {"./train/train/._a000.jpg": b"of a Mac"}
    path = tmp_path / f"data.{ending}"
    write_tar(tmp_path / ("data.tar.gz" if ending == "tgz" else path.name), members, folder).rename(path)
    rows = fetch(params(path), tmp_path / "raw.zip")
    assert contents(tmp_path / "raw.zip") == MEMBERS
    pd.testing.assert_frame_equal(rows, layout.read_layout(write_zip(tmp_path / "same.zip", MEMBERS)).images)


def test_several_archives_are_one_layout(tmp_path):
    tables = {name: content for name, content in MEMBERS.items() if name.endswith(".csv")}
    train = {name: content for name, content in MEMBERS.items() if name.startswith("train/")}
    test = {name: content for name, content in MEMBERS.items() if name.startswith("test/")}
    paths = [
        write_zip(tmp_path / "tables.zip", tables), write_tar(tmp_path / "train.tar.gz", train),
        write_tar(tmp_path / "test.tar", test),
    ]  # fmt: skip
    fetch(params(*paths), tmp_path / "raw.zip")
    assert contents(tmp_path / "raw.zip") == MEMBERS
    again = write_zip(tmp_path / "again.zip", dict([next(iter(train.items()))]))
    assert error_message(fetch_source, params(*paths, again), tmp_path / "raw.zip") == (
        f"'train/train/a000.jpg' is in {paths[1]} and in {again}; keep one of them"
    )
    missing = params(*paths, tmp_path / "missing.tar")
    assert f"{tmp_path}/missing.tar: not found" in error_message(fetch_source, missing, tmp_path / "raw.zip")
    assert "each must be a zip or tar" in error_message(fetch_source, params(*paths, tmp_path), tmp_path / "raw.zip")


def special_member(name: str, kind: bytes, size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, size, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        (special_member("train/link.jpg", tarfile.SYMTYPE), "is a link"),
        (special_member("train/hard.jpg", tarfile.LNKTYPE), "is a link"),
        (special_member("train/pipe.jpg", tarfile.FIFOTYPE), "is neither a file nor a folder"),
        (special_member("train/disk", tarfile.BLKTYPE), "is neither a file nor a folder"),
        (special_member("train/large.jpg", tarfile.REGTYPE, 2**40), "is too large (1099511627776 bytes)"),
    ],
)
def test_an_unsafe_member_of_a_tar_is_named(tmp_path, member, problem):
    path = write_tar(tmp_path / "data.tar.gz", MEMBERS, member)
    message = f"{path}: {member.name!r} {problem}; create the tar again without it"
    assert error_message(fetch_source, params(path), tmp_path / "raw.zip") == message


def test_a_tar_that_decompresses_to_too_much_stops_early(tmp_path):
    path = write_tar(tmp_path / "data.tar.gz", {"train/zeros.jpg": bytes(2**27)})
    message = error_message(fetch_source, params(path), tmp_path / "raw.zip")
    size = re.fullmatch(rf"{path}: damaged tar \(a decompression bomb \(\d+ to (\d+) bytes\)\); download or.*", message)
    assert size is not None
    assert int(size[1]) < 2**25
    assert (tmp_path / "raw.zip").stat().st_size < 2**25


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_a_truncated_or_damaged_tar_never_loses_an_image_in_silence(tmp_path, ending):
    path = write_tar(tmp_path / f"data.{ending}", MEMBERS)
    whole, rng = path.read_bytes(), random.Random(0)
    # A plain tar has no checksum of its contents, but one of every header; its end is padded.
    cuts = [0, 1, 512, *(rng.randrange(len(whole.rstrip(b"\0"))) for _ in range(20))]
    damaged = [whole[:cut] for cut in cuts]
    if ending == "tar":
        with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
            headers = [member.offset for member in archive]
        damaged += [whole[:offset] for offset in headers]  # between two files
        damaged += [whole[: offset + 20] + b"?" + whole[offset + 21 :] for offset in headers]
        damaged += [whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 512], whole + pack_tar({"more.jpg": b"1"})]
    else:
        damaged += [whole + b"more"] if ending != "tar.bz2" else []
        flips = rng.choices(range(len(whole)), k=20)
        damaged += [bytes([*whole[:at], whole[at] ^ 1, *whole[at + 1 :]]) for at in flips]
    for data in damaged:
        path.write_bytes(data)
        try:
            fetch_source(params(path), tmp_path / "raw.zip")
        except UserError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:  # a bit of gzip's header that means nothing, such as the time
            assert contents(tmp_path / "raw.zip") == MEMBERS


def test_a_table_may_describe_images_in_zips_but_not_in_a_tar(tmp_path):
    images = {f"{name}.png": name.encode() for name in "abcd"}
    table = b"file,label,patient\na.png,1,p\nb.png,0,q\nc.png,0,r\nd.png,1,s\n"
    columns = {"patient": "patient"}
    one = write_zip(tmp_path / "one.zip", images | {"labels.csv": table})
    in_zip = TableParams(source="table", path=one, columns=columns, test_share=0.5)
    fetch(in_zip, tmp_path / "raw.zip")
    write_zip(tmp_path / "labels.zip", {"labels.csv": table})
    two = [str(write_zip(tmp_path / "images.zip", images)), str(tmp_path / "labels.zip")]
    fetch(in_zip.model_copy(update={"path": two}), tmp_path / "two.zip")
    assert contents(tmp_path / "raw.zip") == contents(tmp_path / "two.zip")
    tar = in_zip.model_copy(update={"path": str(write_tar(tmp_path / "images.tar", images))})
    assert "neither a folder nor a zip; unpack it" in error_message(fetch_source, tar, tmp_path / "raw.zip")


def test_download_names_the_file_of_the_user(project, monkeypatch, tmp_path):
    use_project(project, monkeypatch)
    for path in (
        write_zip(tmp_path / "own.zip", {"train/a.jpg": b""}),
        write_zip(tmp_path / "unsafe.zip", MEMBERS | {"../a.jpg": b""}),
        write_tar(tmp_path / "unsafe.tar", MEMBERS | {"/etc/a.jpg": b""}),
    ):
        edit_params(project, lambda all_params, path=path: all_params["demo"].update(
            download={"source": "archive", "path": str(path)}
        ))  # fmt: skip
        result = CliRunner().invoke(download)
        assert result.exit_code == 2
        assert str(path) in result.output
        assert ".part" not in result.output
    assert not list((project / "data").glob("*"))


# URLs


class Handler(http.server.SimpleHTTPRequestHandler):
    """Python's file server, with ranges and faults.

    `faults` are those of the next GETs: a status, `cut` (half of the content), or `no range`.
    """

    protocol_version = "HTTP/1.1"
    faults: list[int | str]
    ranges: list[str | None]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        fault = self.faults.pop(0) if self.faults else ""
        if isinstance(fault, int):
            return self.send_error(fault)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        wanted = self.headers.get("Range")
        self.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and fault != "no range" else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.end_headers()
        data = data[start:]
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        if fault == "cut":
            threading.Event().wait(0.1)  # for what was sent to arrive before the end
        self.close_connection = fault == "cut"
        return None


@contextmanager
def serve(folder: Path, *faults: int | str) -> Iterator[tuple[str, list[str | None]]]:
    ranges: list[str | None] = []
    handler = type("Faulty", (Handler,), {"faults": list(faults), "ranges": ranges})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", ranges
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def _no_waiting(monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)


def test_archives_are_downloaded_by_http(tmp_path):
    served, target = tmp_path / "served", tmp_path / "data"
    served.mkdir()
    target.mkdir()
    one = write_zip(served / "radiographs 1.zip", MEMBERS)
    write_tar(served / "data.tar.gz", MEMBERS)
    with serve(served) as (url, _):
        fetch(params(f"{url}/radiographs%201.zip?download=1"), target / "raw.zip")
        assert (target / "raw.zip").read_bytes() == one.read_bytes()
        fetch(params(f"{url}/data.tar.gz"), target / "raw.zip")
    assert contents(target / "raw.zip") == MEMBERS
    assert [path.name for path in target.iterdir()] == ["raw.zip"]


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("faults", [["cut"], ["cut", "no range"], [503, "cut", "cut", 500]])
def test_an_interrupted_download_resumes(tmp_path, faults):
    (tmp_path / "served").mkdir()
    one = write_zip(tmp_path / "served/raw.zip", MEMBERS)
    with serve(tmp_path / "served", *faults) as (url, ranges):
        fetch_source(params(f"{url}/raw.zip"), tmp_path / "raw.zip")
    assert (tmp_path / "raw.zip").read_bytes() == one.read_bytes()
    assert [bool(wanted) for wanted in ranges] == [False, *[True] * (len(ranges) - 1)]


@pytest.mark.usefixtures("_no_waiting")
def test_a_download_that_never_ends_well_is_an_error_and_resumes_in_the_next_run(tmp_path):
    (tmp_path / "served").mkdir()
    one = write_zip(tmp_path / "served/raw.zip", MEMBERS)
    with serve(tmp_path / "served", *["cut"] * remote.MAX_ATTEMPTS) as (url, ranges):
        message = error_message(fetch_source, params(f"{url}/raw.zip"), tmp_path / "raw.zip")
        assert message.startswith(f"{url}/raw.zip: no connection (")
        fetch_source(params(f"{url}/raw.zip"), tmp_path / "raw.zip")
        assert ranges[-1] is not None
        assert (tmp_path / "raw.zip").read_bytes() == one.read_bytes()
        # Another version does not go on where the first one stopped.
        fetch_source(params(f"{url}/raw.zip"), tmp_path / "raw.zip")
        assert ranges[-1] is None


@pytest.mark.usefixtures("_no_waiting")
def test_what_a_server_refuses_is_an_error_without_credentials(tmp_path):
    (tmp_path / "served").mkdir()
    damaged = bytearray(write_zip(tmp_path / "served/damaged.zip", MEMBERS).read_bytes())
    damaged[200] ^= 1
    (tmp_path / "served/damaged.zip").write_bytes(damaged)
    raw = tmp_path / "raw.zip"
    with serve(tmp_path / "served") as (url, _):
        secret = url.replace("//", "//user:secret@")
        message = error_message(fetch_source, params(f"{secret}/no.zip?token=secret"), raw)
        assert message == f"{url}/no.zip: not found; correct download.path in params.yaml"
        message = error_message(fetch_source, params(f"{secret}/damaged.zip"), raw)
        assert message.startswith(f"{url}/damaged.zip: neither a zip nor a tar, or damaged (train/train/a000.jpg")
    for status, reason in ((403, "access denied (the server answers 403)"), (500, "no connection (the server answers")):
        with serve(tmp_path / "served", *[status] * remote.MAX_ATTEMPTS) as (url, _):
            secret = url.replace("//", "//user:secret@")
            message = error_message(fetch_source, params(f"{secret}/damaged.zip?token=secret"), raw)
            assert message.startswith(f"{url}/damaged.zip: {reason}")
    for address, reason in (
        (url, "no connection"),  # nothing listens any more
        ("https://host.invalid", "no connection"),
        ("ftpp://host", "Protocol not known"),
        ("gs://bucket", "Please install gcsfs"),
    ):
        message = error_message(fetch_source, params(f"{address}/a.zip"), raw)
        assert message.startswith(f"{address}/a.zip: {reason}")
    assert not list(tmp_path.glob(".*"))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a bucket of a local S3 server, which holds the archive as a zip and as files."""
    # s3fs would go on with the port of an earlier server, if tests of other modules ran in between.
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    with run_s3_server() as client:
        client.create_bucket(Bucket="hospital")
        for name, content in MEMBERS.items():
            client.put_object(Bucket="hospital", Key=f"images/{name}", Body=content)
        yield "s3://hospital"


def put(key: str, body: bytes) -> None:
    import boto3

    boto3.client("s3").put_object(Bucket="hospital", Key=key, Body=body)


def test_archives_and_folders_come_from_a_bucket(tmp_path, bucket):
    one = write_zip(tmp_path / "one.zip", MEMBERS)
    put("a/one.zip", one.read_bytes())
    put("a/data.tar.gz", write_tar(tmp_path / "data.tar.gz", MEMBERS).read_bytes())
    raw = tmp_path / "raw.zip"
    fetch(params(f"{bucket}/a/one.zip"), raw)
    assert raw.read_bytes() == one.read_bytes()
    for path in (f"{bucket}/a/data.tar.gz", f"{bucket}/images", f"{bucket}/images/"):
        raw.unlink()
        fetch(params(path), raw)
        assert contents(raw) == MEMBERS


@pytest.mark.usefixtures("_no_waiting")
def test_errors_of_a_bucket_are_one_line_without_credentials(tmp_path, bucket, monkeypatch):
    raw = tmp_path / "raw.zip"
    for path, reason in (
        (f"{bucket}/no.zip", "not found"),
        (f"{bucket}/no", "no such folder, or empty"),
        ("s3://nobody-has-this/a.zip", "no such bucket"),
        ("s3://nobody-has-this/a", "no such folder, or empty"),
    ):
        assert error_message(fetch_source, params(path), raw).startswith(f"{path}: {reason}")
    table = TableParams(source="table", path=f"{bucket}/images", labels="no.csv")
    message = error_message(fetch_source, table, raw)
    assert message.startswith(f"{bucket}/images/no.csv: not found; add this table")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    message = error_message(fetch_source, params(f"{bucket}/images"), raw)
    assert message.startswith(f"{bucket}/images: access denied (Unable to locate credentials)")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    message = error_message(fetch_source, params(f"{bucket}/a/one.zip"), raw)
    assert message.startswith(f"{bucket}/a/one.zip: no connection (")
    assert "secret" not in message
    s3fs.S3FileSystem.clear_instance_cache()


def test_without_s3fs_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry").__dict__["_registry"], "s3", raising=False)
    assert error_message(fetch_source, params("s3://hospital/a.zip"), tmp_path / "raw.zip") == (
        "s3://hospital/a.zip: s3:// needs s3fs; run: pip install -c constraints.txt -e '.[s3]'"
    )


# References


def pack(raw: Path, source: DownloadParams, target: Path) -> dict[str, bytes]:
    packing.pack_images(raw, PrepareParams(image_size=32, max_quarantined=0.5), target, source)
    return {path.name: path.read_bytes() for path in target.iterdir()}


@pytest.fixture(params=["folder", "zip", "zip of Windows", "zips", "table", "table in a zip", "bucket"])
def source(request, tmp_path) -> DownloadParams:
    if request.param == "folder":
        return params(write_files(tmp_path / "input", MEMBERS))
    if request.param == "zip":
        return params(write_zip(tmp_path / "input.zip", MEMBERS))
    if request.param == "zip of Windows":
        members = {"around\\" + name.replace("/", "\\"): content for name, content in MEMBERS.items()}
        return params(write_zip(tmp_path / "input.zip", members))
    if request.param == "zips":
        one, two = dict(list(MEMBERS.items())[:4]), dict(list(MEMBERS.items())[4:])
        return params(write_zip(tmp_path / "input.zip", one), write_zip(tmp_path / "two.zip", two))
    if request.param == "bucket":
        return params(f"{request.getfixturevalue('bucket')}/images")
    images = {f"scans/{Path(name).name}": data for name, data in MEMBERS.items() if name.endswith(".jpg")}
    rows = [f"{name},{index % 2},{index}" for index, name in enumerate([*images, "scans/missing.jpg"])]
    rows[-1] = "scans/missing.jpg,1,0"  # of a patient in the training set
    files = images | {"labels.csv": "\n".join(["file,label,patient", *rows]).encode()}
    path = write_files(tmp_path / "input", files)
    if request.param == "table in a zip":
        path = write_zip(tmp_path / "input.zip", files)
    return TableParams(source="table", path=path, columns={"patient": "patient"}, test_share=0.3)


def test_the_pack_is_the_same_with_copies_and_with_references(tmp_path, source):
    fetch(source, tmp_path / "copies.zip")
    references = source.model_copy(update={"copy_images": False})
    fetch(references, tmp_path / "references.zip")
    assert pack(tmp_path / "copies.zip", source, tmp_path / "one") == pack(
        tmp_path / "references.zip", references, tmp_path / "two"
    )
    content = contents(tmp_path / "references.zip")
    assert not any(name.endswith(".jpg") for name in content)
    assert str(tmp_path).encode() not in b"".join(content.values())
    members = (layout.read_layout(tmp_path / name).images["member"] for name in ("copies.zip", "references.zip"))
    with (
        RawImages(tmp_path / "copies.zip", source) as copies,
        RawImages(tmp_path / "references.zip", references) as refer,
    ):
        for one, two in zip(*members, strict=True):
            if one:
                assert copies.read(one) == refer.read(two)
                assert copies.checksum(one) == refer.checksum(two)


def test_a_file_that_is_missing_or_changed_since_download_is_an_error(tmp_path):
    folder = write_files(tmp_path / "input", MEMBERS)
    source, raw = params(folder, copy_images=False), tmp_path / "raw.zip"
    fetch_source(source, raw)
    image = folder / "train/train/a003.jpg"
    before = image.read_bytes()
    for change, reason in (
        (before[:-1] + b"?", "changed since download; run: dvc repro -f download"),
        (before + b"?", "changed since download; run: dvc repro -f download"),
        (None, "is missing since download; restore it, or run: dvc repro -f download"),
    ):
        if change is None:
            image.unlink()
        else:
            image.write_bytes(change)
        message = error_message(pack, raw, source, tmp_path / "pack")
        assert message == f"{folder}: train/train/a003.jpg {reason}"
        assert not (tmp_path / "pack/manifest.csv").exists()
    image.write_bytes(before)
    assert "manifest.csv" in pack(raw, source, tmp_path / "pack")
    folder.rename(tmp_path / "moved")
    message = error_message(pack, raw, source, tmp_path / "pack")
    assert message.startswith(f"{folder}: no such folder; set download.path in params.yaml to where the images of")
    assert "manifest.csv" in pack(raw, params(tmp_path / "moved", copy_images=False), tmp_path / "pack")
    kaggle = KaggleParams(source="kaggle", competition="c")
    assert "its images are in another folder" in error_message(pack, raw, kaggle, tmp_path / "pack")


def test_a_member_of_a_zip_that_changed_or_is_damaged_is_noticed(tmp_path):
    path = write_zip(tmp_path / "input.zip", MEMBERS)
    source, raw, member = params(path, copy_images=False), tmp_path / "raw.zip", "train/train/a003.jpg"
    fetch_source(source, raw)
    data = bytearray(path.read_bytes())
    data[data.index(MEMBERS[member]) + 300] ^= 1
    path.write_bytes(data)
    with RawImages(raw, source) as images, pytest.raises(DamagedFileError):
        images.read(member)
    quarantine = pd.read_csv(io.BytesIO(pack(raw, source, tmp_path / "pack")["quarantine.csv"]))
    assert quarantine["reason"].str.startswith("damaged in the zip").all()
    write_zip(path, MEMBERS | {member: MEMBERS["train/train/a004.jpg"]})
    with RawImages(raw, source) as images, pytest.raises(UserError, match=r"a003\.jpg changed since download"):
        images.read(member)


def test_images_in_a_tar_or_behind_http_cannot_be_referred_to(tmp_path):
    tar = write_tar(tmp_path / "data.tar.gz", MEMBERS)
    for path in (str(tar), "https://host/data.zip", "s3://hospital/data.zip"):
        message = error_message(fetch_source, params(path, copy_images=False), tmp_path / "raw.zip")
        assert message.startswith(f"{path}: images inside a")
        assert "have to be copied; remove download.copy_images: false" in message


def test_a_table_of_references_that_is_none_is_an_error(tmp_path):
    header = b"member,path,bytes,crc32\n"
    for content in (b"", b"\xff\xfe", b"member,path\na,b\n", header + b"a,b,x,y\n", header + b"a\n"):
        raw = write_zip(tmp_path / "raw.zip", MEMBERS | {IMAGE_REFERENCES: content})
        assert f"{raw}: {IMAGE_REFERENCES} is damaged" in error_message(layout.read_layout, raw)


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_a_file_name_that_is_no_utf8_is_read_again(tmp_path):
    folder = write_files(tmp_path / "input", MEMBERS)
    name = os.fsdecode(b"train/train/M\xfcller.jpg")
    (folder / name).write_bytes(MEMBERS["train/train/a000.jpg"])
    with (folder / "train_labels.csv").open("a") as out:
        out.write("M_xfcller.jpg,1\n")
    rows = fetch(params(folder), tmp_path / "copies.zip")
    assert rows["member"][6] == "train/train/M_xfcller.jpg"
    source = params(folder, copy_images=False)
    pd.testing.assert_frame_equal(fetch(source, tmp_path / "raw.zip"), rows)
    with RawImages(tmp_path / "raw.zip", source) as images:
        assert images.read(rows["member"][6]) == MEMBERS["train/train/a000.jpg"]


# Folders


def test_what_is_no_file_of_the_user_is_ignored():
    ignored = ["", "a/", ".", "a/.", "a/..", "a/.b", ".git/a", "a/.git/b", "Thumbs.db", "a/desktop.ini", "__MACOSX/a"]
    kept = ["a", "./a", "../a", "a/./b", "a/../b", "a.b", "__MACOSX"]
    assert [name for name in ignored + kept if layout.is_ignored(name)] == ignored


def test_a_folder_lists_files_behind_links_once_and_nothing_hidden_nor_of_file_managers(tmp_path, caplog):
    files = {"a/1.png": b"1", "2.png": b"2", ".DS_Store": b"", "a/._1.png": b"", ".git/x/3.png": b"", "Thumbs.db": b""}
    folder = write_files(tmp_path / ".cache/input", files)  # it may be hidden itself
    write_files(tmp_path / "other", {"3.png": b"3"})
    (folder / "link").symlink_to(tmp_path / "other")
    (folder / "loop").symlink_to(folder)
    (folder / "a/up").symlink_to("..")
    for name in ("dangling.png", "a/dangling.png", ".#edited.csv"):
        (folder / name).symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    opened = open_source_folder(str(folder), "a folder")
    assert opened.files == ["2.png", "a/1.png", "link/3.png"]
    assert opened.read_bytes("link/3.png") == b"3"
    lost = "2 symbolic links lead to nothing and are left out, the first is a/dangling.png; restore their files (git-"
    assert [record.message for record in caplog.records if lost in record.message]
    with pytest.raises(UserError, match="a web server does not list its files"):
        open_source_folder("https://user:secret@host/images?token=secret", "a folder")
    with (folder / "2.png").open("wb") as out:
        out.truncate(layout.MAX_MEMBER_SIZE + 1)
    with pytest.raises(UserError, match=r"2.png: too large for an image \(268435457 bytes\); move it out"):
        opened.read_bytes("2.png")


def test_what_is_not_listed_is_missing_whatever_else_is_wrong(tmp_path, caplog):
    folder = open_source_folder(str(write_files(tmp_path / "input", {"1.png": b"1", "2.png": b"2"})), "a folder")
    rows = pd.DataFrame({"file": ["1.png", "2.png", "3.png"], "label": [0, None, 1], "path": ["1.png", "2.png", ""]})
    rows = rows.assign(patient="", source="", view="", is_test=[False, True, False])
    write_zip_of_files(rows, folder, tmp_path / "raw.zip")
    assert f"{folder.root}: '3.png' not found (1 labeled images in total)" in caplog.text
    assert sorted(contents(tmp_path / "raw.zip"))[-2:] == ["train/train/1.png", "train_labels.csv"]
    rows.loc[1, ["file", "path"]] = ["4.png", ""]
    assert f"{folder.root}: '4.png' not found (1 missing in total)" in error_message(
        write_zip_of_files, rows, folder, tmp_path / "raw.zip"
    )
    repeated = pd.concat([rows.iloc[[0]], rows.iloc[[0]], rows.iloc[[2]], rows.iloc[[2]], rows.iloc[[2]]])
    assert error_message(write_zip_of_files, repeated, folder, tmp_path / "raw.zip") == (
        "1.png: 2 images have this name, and 1 other names are of several images; give each a unique name"
    )


def test_a_file_in_a_bucket_that_is_no_folder_or_too_large_is_an_error(tmp_path, monkeypatch):
    files = fsspec.filesystem("memory")
    files.pipe({"/hospital/data.zip": b"PK", "/hospital/large.png": b"12345"})
    zipped = TableParams(source="table", path="memory://hospital/data.zip")
    message = error_message(fetch_source, zipped, tmp_path / "raw.zip")
    assert message.startswith("memory://hospital/data.zip: a file, not a folder; download it first, and set download.")
    folder = open_source_folder("memory://hospital", "a folder")
    assert folder.files == ["data.zip", "large.png"]
    monkeypatch.setattr(layout, "MAX_MEMBER_SIZE", 4)
    assert folder.read_bytes("data.zip") == b"PK"
    message = error_message(folder.read_bytes, "large.png")
    assert message.startswith("memory://hospital/large.png: too large for an image (5 bytes)")


def test_a_disk_that_is_too_small_for_the_copy_is_named_before_anything_is_written(tmp_path, monkeypatch):
    archive = write_zip(tmp_path / "own.zip", MEMBERS)
    (tmp_path / "project").mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 50}))
    message = error_message(fetch_source, params(archive), tmp_path / "project/raw.zip")
    assert message.startswith(f"{tmp_path}/project: 0.00 GB do not fit, the disk has 0.00 GB free; free disk space")
    assert not list((tmp_path / "project").iterdir())


# DVC


@pytest.mark.slow
def test_dvc_runs_with_references_and_with_hard_links(project, tmp_path):
    folder = write_files(tmp_path / "input", archive_members())
    source = {"source": "archive", "path": str(folder), "copy_images": False}
    edit_params(project, lambda all_params: all_params["demo"].update(download=source))
    assert run(project, "dvc", "config", "cache.type", "hardlink,copy").returncode == 0
    assert run(project, "dvc", "repro", "prepare").returncode == 0
    outs = [project / "data" / name for name in ("images.npy", "manifest.csv", "quarantine.csv")]
    references = [path.read_bytes() for path in outs]
    assert outs[0].stat().st_nlink == 2
    edit_params(project, lambda all_params: all_params["demo"]["download"].update(copy_images=True))
    assert run(project, "dvc", "repro", "prepare").returncode == 0  # replaces protected files
    assert [path.read_bytes() for path in outs] == references
    edit_params(project, lambda all_params: all_params["demo"]["download"].update(copy_images=False))
    (folder / "train/train/a000.jpg").write_bytes(b"changed")
    edit_params(project, lambda all_params: all_params["demo"]["prepare"].update(resize="pad"))
    result = run(project, "dvc", "repro", "prepare")
    assert result.returncode != 0
    assert "train/train/a000.jpg" in result.stdout + result.stderr
