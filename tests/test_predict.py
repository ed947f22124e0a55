"""`cxr predict`: rows are written as they come, and no file name or number of files stops it."""

import errno
import functools
import gc
import gzip
import http.server
import io
import json
import multiprocessing
import os
import pty
import select
import shlex
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch
from conftest import error_line_of, error_message, invoke, output_of, run_s3_server, write_zip
from fsspec.implementations.memory import MemoryFileSystem
from odd_files import chest, encode
from PIL import Image
from test_served import make_candidate

from pipeline.core import config as config_module
from pipeline.core.config import FindingParams
from pipeline.data import image_checks, images
from pipeline.data.dicom import NO_IMAGE
from pipeline.data.image_checks import UnusableError
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference import candidate as candidate_module
from pipeline.inference import files as inference_files
from pipeline.inference import image_files, prediction_table
from pipeline.inference.image_files import ImageFile, ImageFiles
from pipeline.tracking import model_folder
from pipeline.tracking.model_folder import ModelFolder
from pipeline.training import determinism
from stages.cli import cxr

SIZE = 16


class FakeCandidate:
    """Stands for a trained model: an image's probability is its mean gray level."""

    packed_size, resize, finding, batch_size = SIZE, "stretch", FindingParams(), 32
    config = EnsembleConfig(["seed-0"], "mean", "mean", [1.0], 0.5)

    def __init__(self, before_predict=lambda: None) -> None:
        self.before_predict = before_predict

    def predict_batches(self, batches) -> Iterator[pd.DataFrame]:
        for pixels in batches:
            self.before_predict()
            probability = pixels.float().mean(dim=(1, 2)).numpy() / 255
            label = (probability >= 0.5).astype(int)
            yield pd.DataFrame(
                {"score": probability, "probability": probability, "label": label, "seed-0": probability}
            )


@pytest.fixture
def use_model(monkeypatch, tmp_path):
    """Returns a function that makes `cxr predict`, in an empty folder, use a candidate."""

    def use(candidate) -> None:
        @contextmanager
        def folder(_config, name: str):
            yield ModelFolder(tmp_path, "models/", name, "hash", "")

        monkeypatch.setattr(model_folder, "open_model_folder", folder)
        monkeypatch.setattr(candidate_module, "load_candidate", lambda *_: candidate)

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(config_module, "load_config", lambda: None)
    return use


@pytest.fixture
def use_candidate(use_model, monkeypatch):
    """As `use_model`, with a fake one to begin with; files are pictures whose first byte is the gray level."""

    def decode(data: bytes) -> np.ndarray:
        if not data:
            raise UnusableError("the file is empty")
        if data.startswith(b"text"):
            raise UnusableError(NO_IMAGE)
        return np.full((SIZE, SIZE), data[0], np.uint8)

    monkeypatch.setattr(images, "decode_gray", decode)
    monkeypatch.setattr(images, "resize_to_square", lambda gray, *_: gray)
    use_model(FakeCandidate())
    return use_model


def paths_of(*names: str) -> list[Path]:
    return [Path(file.path) for file in ImageFiles(names)]


def write_files(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        (folder / f"{index:04}.png").write_bytes(bytes([index % 256]))
    return folder


def test_rows_are_in_the_table_before_the_next_images_are_classified(use_candidate):
    write_files(Path("images"), 200)
    sizes = []

    def stop_after_three_batches() -> None:
        sizes.append(len(Path("out/table.csv").read_text().splitlines()))
        if len(sizes) == 4:
            raise KeyboardInterrupt

    use_candidate(FakeCandidate(stop_after_three_batches))
    assert invoke("cxr predict images --csv out/table.csv").exit_code == 130
    assert sizes == [0, 33, 65, 97]
    table = pd.read_csv("out/table.csv", keep_default_na=False)
    assert list(table["file"]) == [f"images/{index:04}.png" for index in range(96)]
    use_candidate(FakeCandidate())
    assert "out/table.csv: 200 files, 72 positive" in output_of("cxr predict images --csv out/table.csv")
    pd.testing.assert_frame_equal(pd.read_csv("out/table.csv", keep_default_na=False)[:96], table)
    assert len(pd.read_csv("out/table.csv")) == 200


def test_a_table_that_cannot_be_written_is_an_error_before_the_model_is_loaded(use_candidate, monkeypatch):
    write_files(Path("images"), 1)
    Path("file").touch()
    monkeypatch.setattr(candidate_module, "load_candidate", lambda *_: pytest.fail("loaded"))
    Path("circle").symlink_to("circle")
    for arguments, message in {
        "images --csv file/table.csv": "file: File exists; correct the path, or check the file or folder there",
        "images --csv circle": "circle: symbolic links that lead in a circle; give another name",
        "images --csv /proc/t.csv": "/proc: no file can be created there; give another name",
        "images --heatmaps /proc/h": "/proc/h: no file can be created there; give another name",
        "''": "'': no files found; give radiographs, folders, patterns, zips or tars",
        "images/*.png --heatmaps ./images": "images/*.png: results go to this folder; give another folder for them",
    }.items():
        if "/proc" not in arguments or sys.platform == "linux":
            assert error_line_of(f"cxr predict {arguments}") == f"Error: {message}"
    assert "is a directory" in error_line_of("cxr predict images --csv images")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_named(use_candidate):
    write_files(Path("images"), 1)
    assert error_line_of("cxr predict images --csv /dev/full").startswith("Error: the disk is full")


def test_a_model_that_cannot_be_loaded_leaves_everything_as_it_was(use_candidate, monkeypatch):
    write_files(Path("images"), 1)
    output_of("cxr predict images --csv old.csv")
    before = Path("old.csv").read_bytes()
    Path("link.csv").symlink_to("nothing.csv")
    monkeypatch.setattr(candidate_module, "load_candidate", lambda *_: (_ for _ in ()).throw(FileNotFoundError("x")))
    for options in ("--csv old.csv", "--json new.json", "--csv link.csv", "--parquet n1/n2/t --heatmaps h1/h2/h3"):
        assert error_line_of(f"cxr predict images {options}") == "Error: x: not found; run: dvc repro"
    assert Path("old.csv").read_bytes() == before
    assert sorted(path.name for path in Path().iterdir()) == ["images", "link.csv", "old.csv"]
    assert Path("link.csv").is_symlink()


def test_a_file_that_is_no_table_of_predictions_is_kept(use_candidate):
    write_files(Path("images"), 3)
    Path("manifest.csv").write_text("file,label,patient\nx.png,1,A\n")
    Path("list.json").write_text('{"file": "x.png", "label": 1}\n')
    Path("number.json").write_text("1")
    pd.DataFrame({"file": ["x.png"]}).to_parquet("other.parquet")
    files = ["images/0001.png", "manifest.csv", "list.json", "number.json", "other.parquet"]
    contents = [Path(file).read_bytes() for file in files]
    for name in ("csv", "json", "parquet"):
        for file in files:
            assert error_line_of(f"cxr predict --{name} {file} images/0002.png") == (
                f"Error: {file}: no table of cxr predict in this format; delete it, or give --{name} another name"
            )
    assert [Path(file).read_bytes() for file in files] == contents


def test_a_disk_that_becomes_full_leaves_whole_rows(use_candidate, monkeypatch):
    class FullDisk(io.BytesIO):
        def write(self, data) -> int:
            if self.tell() >= 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:4])

    disk = FullDisk(b"a,1\n")
    disk.seek(0, 2)
    with pytest.raises(OSError, match="No space"):
        prediction_table._write_rows(disk, b"b,2\nc,3\n", can_truncate=True)
    assert disk.getvalue() == b"a,1\n"
    pipe = FullDisk()
    with pytest.raises(OSError, match="No space"):
        prediction_table._write_rows(pipe, b"b,2\nc,3\n", can_truncate=False)
    assert pipe.getvalue() == b"b,2\n"


def test_a_carriage_return_in_a_file_name_ends_no_row(use_candidate):
    write_files(Path("images"), 1).joinpath("Icon\r").touch()
    invoke("cxr predict images --csv t.csv")
    assert list(pd.read_csv("t.csv")["file"]) == ["images/0000.png", r"images/Icon\r"]


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="no /dev/stdout")
def test_the_table_may_be_added_to_standard_output(use_candidate, tmp_path):
    write_files(Path("images"), 1)
    with (tmp_path / "log").open("w+") as log:
        log.write("before\n")
        log.flush()
        output_of(f"cxr predict images --csv /dev/fd/{log.fileno()}")
    assert (tmp_path / "log").read_text().splitlines() == [
        "before", "file,probability,label,reason,agreement,model,version,threshold,prevalence",
        "images/0000.png,0,0,,1,models/,champion,0.5,",
    ]  # fmt: skip


def test_the_table_is_not_taken_for_an_image(use_candidate):
    folder = write_files(Path("images"), 2)
    for _ in range(2):
        assert "2 files" in output_of(f"cxr predict images --csv {folder}/table.csv")


def test_few_images_are_decoded_ahead_of_the_network(use_candidate, monkeypatch):
    paths, decode = ImageFiles([str(write_files(Path("images"), 640))]), images.decode_gray
    decoded, ahead = [], []
    monkeypatch.setattr(images, "decode_gray", lambda data: (decoded.append(1), decode(data))[1])
    monkeypatch.setattr(inference_files, "cpu_count", lambda: 2)
    for batch in inference_files.predict_files(FakeCandidate(), paths):
        ahead.append(len(decoded) - len(ahead) * len(batch))
    assert len(ahead) == 20
    assert max(ahead) <= 3 * FakeCandidate.batch_size


def test_prediction_is_as_deterministic_as_evaluation(use_candidate, monkeypatch):
    write_files(Path("images"), 1)
    calls = []
    monkeypatch.setattr(determinism, "make_deterministic", lambda **settings: calls.append(settings))
    monkeypatch.setattr(candidate_module, "load_candidate", lambda *_: (calls.append("load"), FakeCandidate())[1])
    output_of("cxr predict images")
    assert calls == [{"cpu_threads": 1}, "load"]


def test_bfloat16_is_refused_where_the_processor_has_no_instructions_for_it(use_candidate, monkeypatch):
    write_files(Path("images"), 1)
    precisions = []
    monkeypatch.setattr(
        candidate_module, "load_candidate", lambda *args: (precisions.append(args[2]), FakeCandidate())[1]
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    output_of("cxr predict images --precision bfloat16")
    output_of("cxr predict images")
    assert precisions == ["bfloat16", "float32"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "avx2": True})
    assert error_line_of("cxr predict images --precision bfloat16") == (
        "Error: --precision bfloat16: this processor has no instructions for it; leave the option out"
    )


def test_files_are_in_the_order_of_their_paths_and_occur_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["b/2.png", "a.png", "a/1.png", "a/10.png", "a/c/3.png", "b.png", "a-.png", ".hidden.png", "b/.DS_Store"]
    for name in names:
        Path("x", name).parent.mkdir(parents=True, exist_ok=True)
        Path("x", name).touch()
    Path("x/link.png").symlink_to("a.png")
    Path("x/loop").symlink_to(".")
    expected = [path for path in sorted(Path("x").rglob("*")) if path.is_file() and not path.name.startswith(".")]
    assert paths_of("x") == expected
    assert ImageFiles(["x"]).count() == 8
    Path("x/loop").unlink()  # which patterns follow
    overlapping = paths_of("x/a/1.png", "x", "x/*.png", "x/**/*.png")
    assert overlapping[0] == Path("x/a/1.png")
    assert sorted(overlapping) == expected
    assert paths_of("x/.hidden.png") == [Path("x/.hidden.png")]
    assert error_message(ImageFiles, ["x", "x/*.jpg"]) == (
        "x/*.jpg: no files found; give radiographs, folders, patterns, zips or tars"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a path's length is that of Linux")
def test_a_folder_that_cannot_be_read_is_a_row(use_candidate, monkeypatch):
    folder = write_files(Path("x"), 2).resolve()
    monkeypatch.chdir(folder)
    for name in (*["d"] * 1100, *["n" * 250] * 10):
        Path(name).mkdir()
        os.chdir(name)
    os.chdir(folder.parent)
    try:
        *images, (name, _, reason) = table_of("x")
    finally:
        subprocess.run(["rm", "-rf", "x"], check=True)  # shutil.rmtree is recursive
    assert images == [("x/0000.png", 0, ""), ("x/0001.png", 0.004, "")]
    assert name.startswith("x/d/d/d/")
    assert reason == "cannot be read: File name too long"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no file names that are no UTF-8")
def test_a_file_name_that_is_no_utf_8_costs_neither_the_run_nor_the_row(use_candidate):
    folder = write_files(Path("images"), 1)
    undecodable = [os.fsdecode(os.fsencode(folder) + name) for name in (b"/M\xfcller.jpg", b"/leer\xff.jpg")]
    Path(undecodable[0]).write_bytes(b"\x80")
    Path(undecodable[1]).touch()
    result = invoke("cxr predict images --csv t.csv")
    assert result.stderr.strip().endswith("1 of 3 files are not usable radiographs; the table has the reasons")
    table = pd.read_csv("t.csv", keep_default_na=False)
    assert sorted(table["file"]) == ["images/0000.png", r"images/M\xfcller.jpg", r"images/leer\xff.jpg"]
    for name in undecodable:
        result = invoke(shlex.join(["cxr", "predict", name]))
        assert name.encode(errors="surrogateescape").decode(errors="backslashreplace") in result.stdout
    assert r"images/?\xff.png: no files found" in error_line_of(
        shlex.join(["cxr", "predict", os.fsdecode(b"images/?\xff.png")])
    )


# Archives and URLs


def write_archives(folder: Path, members: dict[str, bytes]) -> Path:
    """Write the members to a zip and to tars, in every way that they can be compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_zip(folder / "a.zip", members)
    for name, mode in {
        "b.tar": "w",
        "c.tar.gz": "w:gz",
        "d.TGZ": "w:gz",
        "e.tar.bz2": "w:bz2",
        "f.txz": "w:xz",
    }.items():
        with tarfile.open(folder / name, mode) as archive:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return folder


def table_of(*names: str, columns: tuple[str, ...] = ("file", "probability", "reason")) -> list[tuple]:
    """Return rows of the table of the files; the fake candidate's probability is the gray level."""
    table = pd.concat(inference_files.predict_files(FakeCandidate(), ImageFiles(names)))
    return list(table[list(columns)].round(3).itertuples(index=False, name=None))


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Python's file server, with ranges."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if "Range" not in self.headers or self.headers["Range"].endswith("-"):
            return super().do_GET()
        start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        data = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(206)
        self.send_header("Content-Length", str(len(data[start : end + 1])))
        self.end_headers()
        self.wfile.write(data[start : end + 1])
        return None


@contextmanager
def serve(folder: Path, handler: type[http.server.SimpleHTTPRequestHandler]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["local", "file", "memory", "s3", "http"])
def place(request, tmp_path) -> Iterator[Callable[[Path], str]]:
    """Returns a function that puts a folder behind a URL, and returns the URL."""
    if request.param == "s3":
        with run_s3_server() as client:

            def upload(folder: Path) -> str:
                client.create_bucket(Bucket="radiographs")
                for path in folder.rglob("*.*"):
                    client.upload_file(str(path), "radiographs", f"x/{path.relative_to(folder)}")
                return "s3://radiographs/x"

            yield upload
    elif request.param == "http":
        with serve(tmp_path, RangeHandler) as url:
            yield lambda folder: f"{url}/{folder.relative_to(tmp_path)}"
    elif request.param == "memory":

        def put(folder: Path) -> str:
            fsspec.filesystem("memory").put(str(folder), f"/{tmp_path.name}", recursive=True)
            return f"memory:///{tmp_path.name}"

        yield put
    else:
        yield lambda folder: str(folder) if request.param == "local" else folder.as_uri()


def test_archives_here_and_behind_urls_are_as_their_files(use_candidate, place, tmp_path):
    folder = write_archives(
        tmp_path / "x", {f"m/{index}.png": bytes([51 * index]) for index in range(1, 5)} | {"m/README": b"text"}
    )
    write_files(folder / "folder", 3)
    url = place(folder)
    of_archives = {
        archive: [(f"{url}/{archive}/m/{index}.png", index / 5, "") for index in range(1, 5)]
        for archive in ("a.zip", "b.tar", "c.tar.gz", "d.TGZ", "e.tar.bz2", "f.txz")
    }
    for archive, rows in of_archives.items():
        assert table_of(f"{url}/{archive}") == rows
    of_folder = [(f"{url}/folder/{index:04}.png", round(index / 255, 3), "") for index in range(3)]
    assert table_of(f"{url}/folder/0001.png") == of_folder[1:2]
    if not url.startswith("http"):  # whose servers list nothing
        assert table_of(f"{url}/folder") == table_of(f"{url}/folder/*.png") == of_folder
        rows = [row for rows in of_archives.values() for row in rows] + of_folder
        assert table_of(url) == table_of(url, f"{url}/*.tar", f"{url}/folder") == rows
        message = error_message(ImageFiles, [url, f"{url}/none"])
        assert message.endswith("/none: no files found; give radiographs, folders, patterns, zips or tars")


def test_urls_that_cannot_be_read_are_an_error_before_the_model_is_loaded(use_candidate, monkeypatch, tmp_path):
    monkeypatch.setattr(candidate_module, "load_candidate", lambda *_: pytest.fail("loaded"))
    write_archives(tmp_path / "x", {"a.png": b"a"})
    with serve(tmp_path / "x", http.server.SimpleHTTPRequestHandler) as url:
        secret = url.replace("//", "//user:secret@")
        assert table_of(f"{secret}/b.tar?token=secret") == [(f"{url}/b.tar/a.png", 0.38, "")]
        for name, message in {
            f"{secret}/none.png?token=secret": f"{url}/none.png: not found; correct the URL",
            f"{secret}/a.zip": f"{url}/a.zip: the server sends no parts of a file, which a zip needs; download it",
            "none://x": "none://x: Protocol not known: none; correct the URL",
            "zip://a::file://x.zip": "zip://a::file://x.zip: a chain of URLs; give the URL of the zip, tar, folder or",
        }.items():
            assert error_line_of(f"cxr predict {name}").startswith(f"Error: {message}")
    assert error_line_of(f"cxr predict {url}/a.png").startswith(f"Error: {url}/a.png: no connection (")


def test_a_server_that_fails_ends_the_run_and_leaves_the_rows(use_candidate, monkeypatch):
    for index in range(100):
        fsspec.filesystem("memory").pipe_file(f"/failing/{index:03}.png", b"a")
    read = MemoryFileSystem.cat_file

    def fail(self, path: str) -> bytes:
        if "050" in path:
            raise ConnectionResetError("connection reset")
        return read(self, path)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    message = error_line_of("cxr predict memory://failing --csv t.csv")
    assert message.startswith("Error: memory:///failing/050.png: no connection (connection reset)")
    assert len(pd.read_csv("t.csv")) == 32


def test_hostile_archives_harm_nothing(use_candidate, tmp_path):
    Path("x").mkdir()
    Path("secret.png").write_bytes(b"s")
    with zipfile.ZipFile("x/a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(10**7))
        archive.writestr("../up.png", b"a")
        archive.writestr("good.png", b"3")
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "../secret.png")
        archive.writestr("twice.png", b"1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("twice.png", b"2")
    with tarfile.open("x/b.tar", "w") as archive:
        for name, kind in {"../../up.png": tarfile.REGTYPE, "s.png": tarfile.SYMTYPE, "h.png": tarfile.LNKTYPE,
                           "null.png": tarfile.CHRTYPE, "s.txt": tarfile.SYMTYPE}.items():  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, str(Path("secret.png").resolve()), int(name[0] == ".")
            archive.addfile(member, io.BytesIO(b"3"))
    whole = Path("x/b.tar").read_bytes()
    huge = tarfile.TarInfo("huge.png")
    huge.size = 2**40
    Path("x/c.tar").write_bytes(whole[:1024] + huge.tobuf())
    header = tarfile.TarInfo("header")
    header.type, header.size = tarfile.XHDTYPE, 2**34
    Path("x/d.tar").write_bytes(whole[:1024] + header.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    Path("x/e.tar.gz").write_bytes(gzip.compress(whole + bytes(10**8)))
    Path("x/f.tar.gz").write_bytes(gzip.compress(whole)[:-20])
    Path("x/g.tar").write_bytes(whole + b"more")
    Path("x/h.zip").write_bytes(b"no zip")
    Path("x/i.tar").write_bytes(b"no tar")
    rows = table_of("x")
    reasons = {row[0].removeprefix("x/"): row[2].partition(" (")[0] for row in rows}
    assert [row[2] for row in rows if row[0] == "x/a.zip/twice.png"] == ["occurs twice", ""]
    up = "/../../up.png"
    of_tar = {"/s.png": "is a link", "/h.png": "is a link", "/null.png": "is not a regular file", up: ""}
    assert reasons == {
        "a.zip/bomb.png": "is a decompression bomb",
        "a.zip/../up.png": "has a path outside of the zip",
        "a.zip/good.png": "",
        "a.zip/link.png": "is a symbolic link",
        "a.zip/twice.png": "",
        **{f"{tar}{name}": reason for tar in ("b.tar", "e.tar.gz", "g.tar") for name, reason in of_tar.items()},
        f"c.tar{up}": "",
        "c.tar/huge.png": "is too large",
        "c.tar": "damaged tar: unexpected end of data",
        f"d.tar{up}": "",
        "d.tar": "damaged tar: invalid header",
        "e.tar.gz": "damaged tar: a decompression bomb",
        "f.tar.gz": "damaged tar: unexpected end of file",
        "g.tar": "damaged tar: it goes on after its end",
        "h.zip": "damaged zip: File is not a zip file",
        "i.tar": "damaged tar: truncated header",
    }
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["secret.png"]


def test_contents_are_released_when_they_are_decoded(use_candidate):
    write_archives(Path("x"), {"a.png": b"a", "broken.png": b""})
    files = list(ImageFiles(["x/c.tar.gz"]))
    options = {"with_preview": False, "with_description": False}
    decoded = list(inference_files._decode_files(files, FakeCandidate(), None, **options))
    assert [file.content for file in files] == [b"a", b""]
    assert [one.file.content for one in decoded] == [None, None]


def test_files_that_are_too_large_are_not_read(use_candidate, monkeypatch, tmp_path):
    monkeypatch.setattr(image_checks, "MAX_BYTES", 9)
    Path("large.png").write_bytes(bytes(10))
    Path("small.png").write_bytes(bytes(9))
    os.mkfifo("pipe.png")
    threading.Thread(target=Path("pipe.png").write_bytes, args=[bytes(20)]).start()
    rows = table_of("large.png", "small.png", "pipe.png")
    assert [row[2] for row in rows] == ["too large: more than 9 bytes", "", "too large: more than 9 bytes"]


# What is no image


def test_what_is_plainly_no_image_is_skipped_with_a_count(use_candidate):
    folder = write_files(Path("x"), 3)
    for name in ("notes.txt", "table.CSV", "a/README", "a/000.cls", "report.pdf"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"text")
    (folder / "empty.json").touch()
    write_archives(folder, {"a.png": b"a", "a.txt": b"text"})
    result = invoke("cxr predict x --csv t.csv")
    assert result.exit_code == 0
    assert "12 skipped: no image (7 × .txt, 1 × " in result.stderr
    assert "t.csv: 9 files" in result.stdout
    assert set(pd.read_csv("t.csv")["probability"].round(3)) == {0, 0.004, 0.008, 0.38}
    # What has the name of an image, or that the user names, is a row.
    (folder / "a/broken.png").write_bytes(b"text")
    result = invoke("cxr predict x x/notes.txt --csv t.csv")
    assert result.exit_code == 2
    assert result.stderr.endswith("2 of 11 files are not usable radiographs; the table has the reasons\n")
    table = pd.read_csv("t.csv").set_index("file")
    assert list(table.index[table["reason"].notna()]) == ["x/a/broken.png", "x/notes.txt"]
    # A folder with nothing else gives a table without rows.
    assert "1 skipped: no image (1 × no ending)" in invoke("cxr predict x/a/R* --csv -").stderr
    output = output_of("cxr predict x/a/R* --csv t.csv --json t.jsonl --parquet t.parquet")
    assert "t.csv, t.jsonl, t.parquet: 0 files" in output
    for table in (pd.read_csv("t.csv"), pd.read_parquet("t.parquet")):
        assert len(table) == 0
        assert list(table) == COLUMNS
    assert Path("t.jsonl").read_text() == ""


# Outputs

COLUMNS = ["file", "probability", "label", "reason", "agreement", "model", "version", "threshold", "prevalence"]


def test_all_formats_have_the_same_rows(use_candidate, monkeypatch):
    monkeypatch.setattr(prediction_table, "ROWS_PER_GROUP", 64)
    (write_files(Path("x"), 150) / "a broken.png").touch()
    result = invoke("cxr predict x --csv t.csv --json t.jsonl --parquet t.parquet")
    assert result.exit_code == 2
    assert "t.csv, t.jsonl, t.parquet: 151 files, 22 positive" in result.stdout
    parquet = pyarrow.parquet.ParquetFile("t.parquet")
    types = ["string", "double", "int64", "string", "double", "string", "string", "double", "double"]
    assert list(map(str, parquet.schema_arrow.types)) == types
    assert parquet.num_row_groups == 3
    table = pd.read_parquet("t.parquet")
    assert list(table) == COLUMNS
    records = [json.loads(line) for line in Path("t.jsonl").read_text().splitlines()]
    for other in (pd.DataFrame(records), pd.read_csv("t.csv")):
        pd.testing.assert_frame_equal(other.fillna({"reason": ""}).astype(table.dtypes), table)
    assert records[0] | {"probability": 0, "agreement": 0} == {
        "file": "x/0000.png", "probability": 0, "label": 0, "reason": "", "agreement": 0, "model": "models/",
        "version": "champion", "threshold": 0.5, "prevalence": None,
    }  # fmt: skip
    assert records[-1]["reason"] == "the file is empty"
    assert records[-1]["probability"] is records[-1]["label"] is records[-1]["agreement"] is None


def test_a_run_that_is_stopped_leaves_no_half_of_a_parquet_file(use_candidate, monkeypatch):
    write_files(Path("x"), 100)
    output_of("cxr predict x/0000.png --parquet t.parquet")
    before = Path("t.parquet").read_bytes()
    batches = iter([None, None])

    def stop() -> None:
        if next(batches, 0) == 0:
            raise KeyboardInterrupt

    use_candidate(FakeCandidate(stop))
    assert invoke("cxr predict x --parquet t.parquet --json t.jsonl").exit_code == 130
    assert Path("t.parquet").read_bytes() == before
    batches = iter([None, None])
    monkeypatch.setattr(prediction_table, "ROWS_PER_GROUP", 32)
    result = invoke("cxr predict x --parquet -")
    gc.collect()
    assert result.exit_code == 130
    assert result.stdout_bytes == b""
    assert len(Path("t.jsonl").read_text().splitlines()) == 64
    assert sorted(path.name for path in Path().iterdir()) == ["t.jsonl", "t.parquet", "x"]


@pytest.mark.parametrize("name", ["csv", "json", "parquet"])
def test_what_is_no_regular_file_is_written_to_and_never_replaced(use_candidate, name, tmp_path):
    write_files(Path("x"), 3)
    output_of(f"cxr predict x --{name} expected")
    expected = Path("expected").read_bytes()
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    for target in ("pipe", "link"):
        received = []
        reader = threading.Thread(target=lambda received=received: received.append(Path("pipe").read_bytes()))
        reader.start()
        output_of(f"cxr predict x --{name} {target}")
        reader.join()
        assert received == [expected]
        assert stat.S_ISFIFO(Path("pipe").stat().st_mode)
        assert Path("link").is_symlink()
    with (tmp_path / "log").open("wb") as log:
        log.write(b"before\n")
        log.flush()
        for target in (f"/dev/fd/{log.fileno()}", f"/proc/self/fd/{log.fileno()}"):
            output_of(f"cxr predict x --{name} {target}")
    assert (tmp_path / "log").read_bytes() == b"before\n" + 2 * expected
    output_of(f"cxr predict x --{name} /dev/null")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert invoke(f"cxr predict x --{name} -").stdout_bytes == expected
    assert not Path("-").exists()
    # A symbolic link to a file stays one, and the file is replaced.
    Path("table").write_bytes(b"")
    Path("to-table").symlink_to("table")
    output_of(f"cxr predict x --{name} to-table")
    assert Path("to-table").is_symlink()
    assert Path("table").read_bytes() == expected


@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="no /dev/shm")
@pytest.mark.parametrize(("name", "read"), [("csv", pd.read_csv), ("parquet", pd.read_parquet)])
def test_a_file_in_memory_is_replaced(use_candidate, name, read):
    write_files(Path("x"), 3)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for files in ("x", "x/0001.png"):
            output_of(f"cxr predict {files} --{name} {folder}/table")
        assert list(read(f"{folder}/table")["file"]) == ["x/0001.png"]
        assert len(list(Path(folder).iterdir())) == 1


def run_in_terminal(command: str, stdout: Path | None) -> str:
    """Run a command of this process' `cxr` in a terminal; return what the terminal got."""

    def run() -> None:
        os.dup2(slave, 2)
        if stdout:
            os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT), 1)
        else:
            os.dup2(slave, 1)
        sys.stdout, sys.stderr = os.fdopen(1, "w", encoding="utf-8"), os.fdopen(2, "w", encoding="utf-8")
        cxr.main(shlex.split(command)[1:], standalone_mode=False)
        sys.stdout.flush()

    terminal, slave = pty.openpty()
    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    os.close(slave)
    shown = b""
    while select.select([terminal], [], [], 60)[0]:
        try:
            shown += os.read(terminal, 2**16)
        except OSError:  # the end
            break
    os.close(terminal)
    process.join(60)
    assert process.exitcode == 0
    return shown.decode().replace("\r\n", "\n")


def test_a_terminal_changes_no_row(use_candidate, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    folder = write_files(Path("x"), 150)
    (folder / f"{'n' * 200}.png").write_bytes(b"a")
    expected = invoke("cxr predict x").stdout
    shown = run_in_terminal("cxr predict x", Path("out.txt"))
    assert Path("out.txt").read_text() == expected
    assert "predicting" in shown
    assert run_in_terminal("cxr predict x", None) == f"{expected}all: 151 files, 22 positive\n"


def test_the_table_of_a_terminal_has_every_row_and_whole_names(use_candidate):
    folder = write_files(Path("x"), 200)
    (folder / f"{'n' * 200}.png").touch()
    (folder / "\x1b[31m.png").write_bytes(b"\xff")
    result = invoke("cxr predict x")
    caption, header, *rows = result.stdout.splitlines()
    assert caption.startswith("models/champion: probability of COVID-19; label 1 (COVID-19 positive) means")
    assert header.split() == ["probability", "label", "agreement", "file"]
    assert len(rows) == 202
    assert "     1.0000      1       100%  x/\\x1b[31m.png" in rows
    assert f"          –      –          –  x/{'n' * 200}.png: the file is empty" in rows


def test_options_that_do_not_fit_are_an_error_before_anything_is_read(use_candidate, monkeypatch):
    monkeypatch.setattr(image_files, "ImageFiles", lambda *_: pytest.fail("read"))
    Path("link").symlink_to("t")
    for options, message in {
        "--prevalence 0": "--prevalence 0: must be between 0 and 1, such as 0.05",
        "--prevalence nan": "--prevalence nan: must be between 0 and 1, such as 0.05",
        "--referral 1.5": "--referral 1.5: must be above 0 and at most 1, such as 0.2",
        f"--csv t --json {Path('t').absolute()}": "--csv and --json: the same file; give each its own",
        "--parquet link --log t": "--parquet and --log: the same file; give each its own",
        "--ray auto": "--ray: give what is to be classified, and last the folder for the predictions",
        "out --ray auto --csv t": "--ray: leave --csv out; the predictions become Parquet files in the last of FILES",
        "out --ray auto --log t": "--ray: leave --log out; the predictions become Parquet files in the last of FILES",
    }.items():
        assert error_line_of(f"cxr predict x {options}") == f"Error: {message}"


# Prevalence, referral, heatmaps


def test_a_prevalence_changes_probabilities_and_threshold_but_no_label(use_candidate):
    write_files(Path("x"), 256)
    message = error_line_of("cxr predict x --prevalence 0.5")
    assert message == "Error: --prevalence: the probabilities of this model are not calibrated; leave the option out"
    calibrated = FakeCandidate()
    calibrated.config = replace(FakeCandidate.config, prevalence=0.2)
    use_candidate(calibrated)
    output_of("cxr predict x --csv a.csv")
    assert "and converted to 50.0% positives, where the label is 1 from 0.800" in output_of(
        "cxr predict x --csv b.csv --prevalence 0.5"
    )
    before, after = (pd.read_csv(name) for name in ("a.csv", "b.csv"))
    assert set(before["prevalence"]) == {0.2}
    assert set(after["prevalence"]) == {0.5}
    odds = before["probability"] / (1 - before["probability"])
    expected = 4 * odds / (1 + 4 * odds)
    assert after["probability"].to_numpy() == pytest.approx(expected.fillna(1).to_numpy(), abs=1e-7)
    assert (after["label"] == before["label"]).all()
    assert ((after["probability"] >= after["threshold"]) == (after["label"] == 1)).all()


def test_referral_marks_the_least_certain_and_the_unusable(use_candidate):
    folder = write_files(Path("x"), 256)
    (folder / "0003.png").write_bytes(b"")
    result = invoke("cxr predict x --csv t.csv --referral 0.1")
    assert result.exit_code == 2
    table = pd.read_csv("t.csv").set_index("file")
    referred = table.index[table["referred"] == 1]
    assert list(referred) == ["x/0003.png", *(f"x/{gray:04}.png" for gray in range(115, 141))]  # 26 of 255 around 127.5
    result = invoke("cxr predict x --referral 0.1")
    assert result.stdout.splitlines()[1].split() == ["probability", "label", "agreement", "referred", "file"]
    assert sum(line.split()[3] == "yes" for line in result.stdout.splitlines()[2:]) == 27


def test_heatmaps_are_overlays_at_the_radiographs_own_proportions(use_model):
    for folder, size in {"a": (90, 60), "b": (60, 90), "c": (1500, 1000)}.items():
        Path(folder).mkdir()
        Path(folder, "same ü.png").write_bytes(encode(Image.fromarray(chest(max(size))).resize(size)))
    Path("a/broken.png").touch()
    write_zip(Path("d.zip"), {"same ü.png": Path("a/same ü.png").read_bytes()})
    use_model(make_candidate(2))
    result = invoke("cxr predict a b c d.zip --heatmaps a/h --log log.jsonl --csv t.csv")
    assert result.stderr.endswith("1 of 5 files are not usable radiographs; the table has the reasons\n")
    table = pd.read_csv("t.csv", keep_default_na=False).set_index("file")
    assert table["heatmap"]["a/broken.png"] == ""
    table = table.drop("a/broken.png")
    names = list(table["heatmap"])
    assert sorted(names) == sorted(path.name for path in Path("a/h").iterdir())
    assert len(set(names)) == 4
    assert all(name.startswith("same_-") for name in names)
    sizes = [Image.open(f"a/h/{name}").size for name in names]
    assert sizes == [(90, 60), (60, 90), (1024, 683), (90, 60)]
    pixels = np.asarray(Image.open(f"a/h/{names[0]}").convert("RGB")).astype(int)
    assert (pixels.max(axis=2) - pixels.min(axis=2)).max() > 30  # colors
    assert len(Path("log.jsonl").read_text().splitlines()) == 4
    assert set(table["agreement"].astype(float)) <= {0.5, 1}
    # The next run takes no overlay for a radiograph.
    paths = [file.path for file in ImageFiles(["a/**/*"], [Path("a/h")])]
    assert paths == [file.path for file in ImageFiles(["a"], [Path("a/h")])] == ["a/broken.png", "a/same ü.png"]


def test_heatmaps_of_urls_that_differ_in_their_query_are_two():
    names = [inference_files._heatmap_name(ImageFile(f"https://host/a.png?key={key}")) for key in ("secret", "other")]
    assert names[0] != names[1]
    assert all(name.startswith("a-") for name in names)


# Start

IMPORTS = """
import sys
from pipeline.inference import candidate, files, image_files, prediction_table
from pipeline.models import backbones
from pipeline.tracking import model_folder
backbones.build_network("timm/tf_efficientnet_lite0")
backbones.SimpleNamespace = None  # nothing stands for the compiler when another network is built
backbones.build_network("squeezenet1_0")
print([name for name in ("torch._dynamo", "scipy.stats", "sklearn", "mlflow", "matplotlib") if name in sys.modules])
from pipeline.tracking import registry, store
print([name for name in ("torch._dynamo", "alembic") if name in sys.modules])
import torch, torch._dynamo.utils
print(torch.compile(lambda x: x + 1, backend="eager")(torch.tensor(1)).item(), torch.compiler.disable.__module__)
"""


def test_the_start_imports_nothing_that_is_not_needed_and_slow():
    output = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True).stdout
    assert output == "[]\n[]\n2 torch.compiler\n"
