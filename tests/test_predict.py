"""`cxr predict`: rows are written as they come, and no file name or number of files stops it."""

import errno
import io
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import error_line_of, error_message, invoke, output_of

from pipeline.core.config import FindingParams
from pipeline.data import images
from pipeline.data.image_checks import UnusableError
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference import candidate as candidate_module
from pipeline.inference import files as inference_files
from pipeline.inference.files import ImageFiles
from pipeline.training import determinism
from stages import predict as stage

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
            yield pd.DataFrame(
                {"score": probability, "probability": probability, "label": (probability >= 0.5).astype(int)}
            )


@pytest.fixture
def use_candidate(monkeypatch, tmp_path):
    """Make `cxr predict` in an empty folder use a candidate; files are pictures whose first byte is the gray level."""

    def decode(data: bytes, size: int, _: str) -> tuple[np.ndarray, tuple[int, int]]:
        if not data:
            raise UnusableError("the file is empty")
        return np.full((size, size), data[0], np.uint8), (size, size)

    def use(candidate) -> None:
        @contextmanager
        def folder(_: str):
            yield tmp_path

        monkeypatch.setattr(stage, "_candidate_folder", folder)
        monkeypatch.setattr(candidate_module, "load_candidate", lambda *_: candidate)

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(images, "decode_radiograph", decode)
    use(FakeCandidate())
    return use


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
    assert error_line_of("cxr predict images --csv file/table.csv").startswith("Error: file")
    assert "is a directory" in error_line_of("cxr predict images --csv images")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_named(use_candidate):
    write_files(Path("images"), 1)
    assert error_line_of("cxr predict images --csv /dev/full").startswith("Error: the disk is full")


def test_a_model_that_cannot_be_loaded_leaves_tables_as_they_were(use_candidate, monkeypatch):
    write_files(Path("images"), 1)
    Path("old.csv").write_text("file,of an earlier run")
    monkeypatch.setattr(candidate_module, "load_candidate", lambda *_: (_ for _ in ()).throw(FileNotFoundError("x")))
    for name in ("old.csv", "new.csv"):
        assert error_line_of(f"cxr predict images --csv {name}")
    assert Path("old.csv").read_text() == "file,of an earlier run"
    assert not Path("new.csv").exists()


def test_an_image_that_is_taken_for_the_table_is_kept(use_candidate):
    write_files(Path("images"), 3)
    message = error_line_of("cxr predict --csv images/0001.png images/0002.png")
    assert message == "Error: images/0001.png: no table of cxr predict; delete it, or give --csv another name"
    assert Path("images/0001.png").read_bytes() == b"\x01"


def test_a_disk_that_becomes_full_leaves_whole_rows(use_candidate, monkeypatch):
    class FullDisk(io.BytesIO):
        def write(self, data) -> int:
            if self.tell() >= 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:4])

    disk = FullDisk(b"a,1\n")
    disk.seek(0, 2)
    with pytest.raises(OSError, match="No space"):
        stage._write_rows(disk, b"b,2\nc,3\n", can_truncate=True)
    assert disk.getvalue() == b"a,1\n"
    pipe = io.BytesIO()
    stage._write_rows(pipe, b"b,2\nc,3\n", can_truncate=False)
    assert pipe.getvalue() == b"b,2\nc,3\n"


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
        "before", "file,probability,label,reason", "images/0000.png,0,0,",
    ]  # fmt: skip


def test_the_table_is_not_taken_for_an_image(use_candidate):
    folder = write_files(Path("images"), 2)
    for _ in range(2):
        assert "2 files" in output_of(f"cxr predict images --csv {folder}/table.csv")


def test_few_images_are_decoded_ahead_of_the_network(use_candidate, monkeypatch):
    paths, decode = ImageFiles([str(write_files(Path("images"), 640))]), images.decode_radiograph
    decoded, ahead = [], []
    monkeypatch.setattr(images, "decode_radiograph", lambda *args: (decoded.append(1), decode(*args))[1])
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
    assert list(ImageFiles(["x"])) == expected
    assert len(ImageFiles(["x"])) == 8
    Path("x/loop").unlink()  # which patterns follow
    overlapping = list(ImageFiles(["x/a/1.png", "x", "x/*.png", "x/**/*.png"]))
    assert overlapping[0] == Path("x/a/1.png")
    assert sorted(overlapping) == expected
    assert list(ImageFiles(["x/.hidden.png"])) == [Path("x/.hidden.png")]
    assert (
        error_message(ImageFiles, ["x", "x/*.jpg"]) == "x/*.jpg: no files found; give radiographs, folders or patterns"
    )


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
