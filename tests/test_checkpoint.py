"""A checkpoint is loaded intact, or set aside."""

import logging
import os
import resource
import stat

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.training.checkpoint import Checkpoint

FINGERPRINT, OTHER_FINGERPRINT = "a" * 64, "b" * 64
STATE = {"epoch": 3, "weights": {"w": torch.arange(1000.0)}, "strings": ["x", None]}


def states_equal(first: dict, second: dict) -> bool:
    weights = first["weights"]["w"], second["weights"]["w"]
    return torch.equal(*weights) and {**first, "weights": 0} == {**second, "weights": 0}


def test_a_saved_state_is_loaded_until_it_is_removed(tmp_path):
    checkpoint = Checkpoint(tmp_path, FINGERPRINT)
    assert checkpoint.load() is None
    checkpoint.save({"epoch": 2})
    checkpoint.save(STATE)
    assert states_equal(checkpoint.load(), STATE)
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_run_is_set_aside_with_a_warning(tmp_path, caplog):
    Checkpoint(tmp_path, OTHER_FINGERPRINT).save(STATE)
    (tmp_path / f"{OTHER_FINGERPRINT}.pt").rename(tmp_path / f"{FINGERPRINT}.pt")
    assert Checkpoint(tmp_path, FINGERPRINT).load() is None
    assert f"it belongs to run {OTHER_FINGERPRINT}" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [f"{FINGERPRINT}.unusable"]


@given(st.floats(0, 1, exclude_max=True), st.sampled_from(["cut", "flip"]))
@example(0.9921875, "flip")  # makes an offset negative
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_or_changed_file_is_never_loaded_as_another_state(tmp_path, position, change):
    checkpoint = Checkpoint(tmp_path, FINGERPRINT)
    checkpoint.save(STATE)
    content = bytearray(checkpoint.path.read_bytes())
    index = int(position * len(content))
    if change == "cut":
        del content[index:]
    else:
        content[index] ^= 1
    checkpoint.path.write_bytes(content)
    logging.disable(logging.WARNING)
    loaded = checkpoint.load()
    logging.disable(logging.NOTSET)
    assert loaded is None or (change == "flip" and states_equal(loaded, STATE))  # a flip in the padding has no effect
    assert checkpoint.path.exists() == (loaded is not None)


def test_a_write_that_fails_is_an_error_of_the_disk_and_keeps_the_last_checkpoint(tmp_path):
    checkpoint = Checkpoint(tmp_path, FINGERPRINT)
    checkpoint.save(STATE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes per file, in place of a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save({"weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert states_equal(checkpoint.load(), STATE)
    assert [path.name for path in tmp_path.iterdir()] == [f"{FINGERPRINT}.pt"]


def test_the_content_is_on_the_disk_before_its_name_and_the_name_before_training_goes_on(tmp_path, monkeypatch):
    checkpoint, synced, fsync = Checkpoint(tmp_path, FINGERPRINT), [], os.fsync

    def record(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), checkpoint.path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    checkpoint.save(STATE)
    assert synced == [(False, False), (True, True)]  # the file without its name, then the folder with it


def test_a_checkpoint_that_cannot_be_read_is_kept(tmp_path):
    (tmp_path / f"{FINGERPRINT}.pt").mkdir()
    with pytest.raises(IsADirectoryError):
        Checkpoint(tmp_path, FINGERPRINT).load()
