"""Every reader of zips detects damaged files, and does not mistake a failing disk for one."""

import errno
import io
import logging
import os
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest
import torch
from conftest import archive_members, write_zip
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.core.config import ArchiveParams, KaggleParams
from pipeline.core.errors import UserError
from pipeline.core.files import DamagedFileError, check_zip, detect_damage
from pipeline.data import layout
from pipeline.data.sources import archive, kaggle
from pipeline.models import backbones, pretrained
from pipeline.training.checkpoint import Checkpoint

FINGERPRINT = "a" * 64
STATE = {"epoch": 3, "weights": torch.arange(100.0)}
BACKBONE = "squeezenet1_1"
END_RECORD, ZIP64_END_RECORD = b"PK\x05\x06", b"PK\x06\x06"  # torch writes both, zipfile only the first
SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Anywhere (a share of the length), or among the first or last bytes (an index), where most of the structure is.
places = st.floats(0, 1, exclude_max=True) | st.integers(0, 200) | st.integers(-400, -1)
damage = st.tuples(places, st.sampled_from(["cut", *range(8)]))  # the rest is cut off, or one bit is flipped


def damaged(content: bytes, place: float, change: str | int) -> bytes:
    index = int(place * len(content)) if isinstance(place, float) else place % len(content)
    if change == "cut":
        return content[:index]
    return content[:index] + bytes([content[index] ^ 1 << int(change)]) + content[index + 1 :]


def error_of(read: Callable[[], object]) -> str:
    """Return the one line of the error that `read` raises for a damaged file, or nothing if it succeeds."""
    message = ""
    try:
        read()
    except (UserError, DamagedFileError) as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
    return message


# One function per format: it writes the content as a file, reads the file as the pipeline does, and checks the result.


def check_checkpoint(folder: Path, content: bytes) -> None:
    checkpoint = Checkpoint(folder, FINGERPRINT)
    checkpoint.path.write_bytes(content)
    logging.disable(logging.WARNING)
    state = checkpoint.load()
    logging.disable(logging.NOTSET)
    assert state is None or (state["epoch"] == 3 and torch.equal(state["weights"], STATE["weights"]))
    assert checkpoint.path.exists() == (state is not None)


def check_archive(folder: Path, content: bytes) -> None:
    """Read every image of the archive; `prepare` would quarantine the damaged ones."""
    source, target, members = folder / "source.zip", folder / "raw.zip", archive_members(train=3, test=2)
    source.write_bytes(content)
    if error_of(lambda: archive.write_source(ArchiveParams(source="archive", path=source), target)):
        return
    if error_of(lambda: layout.read_layout(target)):
        return
    with zipfile.ZipFile(target) as opened:
        for member in filter(None, layout.read_layout(target).images["member"]):
            if not error_of(partial(layout.read_member, opened, member)):
                assert layout.read_member(opened, member) == members[member]


def check_kaggle_download(folder: Path, content: bytes) -> None:
    target = folder / "raw.zip"
    target.unlink(missing_ok=True)
    part = folder / ".competition.part"
    with patch.object(kaggle, "client", MagicMock()) as client:
        client.retry.side_effect = lambda *_: part.write_bytes(content)
        message = error_of(
            lambda: kaggle.write_source(KaggleParams(source="kaggle", competition="competition", dataset=None), target)
        )
    assert not part.exists()
    assert target.exists() == (message == "")
    if target.exists():
        check_zip(target)


def check_pretrained_weights(folder: Path, content: bytes) -> None:
    path = folder / "weights.pth"
    path.write_bytes(content)
    with patch.object(backbones, "build_backbone", lambda _: torch.nn.Linear(9, 9)):
        if not error_of(lambda: pretrained.write_pretrained_weights(BACKBONE, str(path), folder / "weights")):
            state = load_file(folder / "weights/backbone.safetensors")
            assert all(torch.equal(state[name], value) for name, value in linear_state().items())


def linear_state() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(81.0).view(9, 9), "bias": torch.arange(9.0)}


CHECKS = {
    "checkpoint": check_checkpoint,
    "archive": check_archive,
    "download from Kaggle": check_kaggle_download,
    "pretrained weights": check_pretrained_weights,
}


def content_of(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "checkpoint":
        torch.save({"fingerprint": FINGERPRINT, "state": STATE}, buffer)
    elif kind == "pretrained weights":
        torch.save(linear_state(), buffer)
    else:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
            for name, data in archive_members(train=3, test=2).items():
                opened.writestr(name, data)
    return buffer.getvalue()


CONTENTS = {kind: content_of(kind) for kind in CHECKS}


@pytest.mark.parametrize("kind", CHECKS)
@given(damage)
@example((0.9921875, 0))
@SETTINGS
def test_a_damaged_file_is_an_error_or_read_correctly(tmp_path, kind, change):
    CHECKS[kind](tmp_path, damaged(CONTENTS[kind], *change))


@pytest.mark.parametrize("kind", CHECKS)
def test_a_flip_of_any_bit_of_the_end_record_is_handled(tmp_path, kind):
    content = CONTENTS[kind]
    start = content.find(ZIP64_END_RECORD) if ZIP64_END_RECORD in content else content.index(END_RECORD)
    for index in range(start, len(content)):
        for bit in range(8):
            CHECKS[kind](tmp_path, damaged(content, index, bit))


@pytest.mark.parametrize("kind", CHECKS)
def test_a_cut_anywhere_in_the_central_directory_is_handled(tmp_path, kind):
    content = CONTENTS[kind]
    for index in range(content.index(b"PK\x01\x02") - len(content), 0, 3):
        CHECKS[kind](tmp_path, damaged(content, index, "cut"))


@pytest.mark.parametrize("kind", CHECKS)
def test_an_intact_file_is_read(tmp_path, kind):
    CHECKS[kind](tmp_path, CONTENTS[kind])
    assert {path.name for path in tmp_path.iterdir()} & {f"{FINGERPRINT}.pt", "raw.zip", "weights"}


def test_a_zip_whose_offsets_lie_before_its_start_is_damaged(tmp_path):
    path = write_zip(tmp_path / "raw.zip", {"a": b"a" * 100, "b": b"b"})
    content = bytearray(path.read_bytes())
    # Where the central directory starts; if it seems to start later, every member seems to start earlier.
    content[content.index(END_RECORD) + 16] += 60
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="an offset points outside of the file"):
        check_zip(path)


class FailingFile(io.BytesIO):
    """A file on a disk that fails after some reads."""

    def __init__(self, content: bytes, number: int, reads: int) -> None:
        super().__init__(content)
        self.number, self.reads = number, reads

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads -= 1
        if self.reads < 0:
            raise OSError(self.number, os.strerror(self.number))
        return super().read(size)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ESTALE])
@pytest.mark.parametrize("reads", [0, 1, 3, 5])
def test_a_failing_disk_is_not_a_damaged_file(number, reads):
    with pytest.raises(OSError, match=os.strerror(number)) as caught, detect_damage():
        zipfile.ZipFile(FailingFile(CONTENTS["archive"], number, reads)).testzip()
    assert caught.value.errno == number


@contextmanager
def opening_fails(error: OSError):
    with patch("io.open", side_effect=error), patch("builtins.open", side_effect=error):
        yield


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EINVAL])
def test_a_checkpoint_on_a_failing_disk_is_kept(tmp_path, number):
    checkpoint = Checkpoint(tmp_path, FINGERPRINT)
    checkpoint.save(STATE)
    failure = OSError(number, os.strerror(number), str(checkpoint.path))
    with opening_fails(failure), pytest.raises(OSError, match=os.strerror(number)):
        checkpoint.load()
    assert checkpoint.path.exists()
    assert checkpoint.load()["epoch"] == 3


@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize("method", [1, 9, 12, 14, 93, 255])
def test_a_damaged_compression_method_is_detected(tmp_path, kind, method):
    """A decompressor of another method raises errors of its own, some of them an OSError without a number."""
    content = CONTENTS[kind]
    for offset in (10, 11):  # the two bytes of the method in the first entry of the central directory
        index = content.index(b"PK\x01\x02") + offset
        CHECKS[kind](tmp_path, content[:index] + bytes([method]) + content[index + 1 :])


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_is_detected_with_every_compression(tmp_path, compression):
    buffer, path = io.BytesIO(), tmp_path / "archive.zip"
    with zipfile.ZipFile(buffer, "w", compression) as opened:
        opened.writestr("member", bytes(range(256)) * 20)
    content = buffer.getvalue()
    path.write_bytes(content)
    assert error_of(partial(check_zip, path)) == ""
    for index in range(len(content)):
        path.write_bytes(damaged(content, index, index % 8))
        error_of(partial(check_zip, path))  # any other exception fails the test
        path.write_bytes(damaged(content, index, "cut"))
        assert error_of(partial(check_zip, path)) != ""
