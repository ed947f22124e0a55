"""A checkpoint is whole, or is set aside."""

import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.training.checkpoint import Checkpoint

OWN, FOREIGN = "a" * 64, "b" * 64
STATE = {"epoch": 3, "weights": {"w": torch.arange(1000.0)}, "words": ["x", None]}


def equal(one: dict, other: dict) -> bool:
    weights = one["weights"]["w"], other["weights"]["w"]
    return torch.equal(*weights) and {**one, "weights": 0} == {**other, "weights": 0}


def test_what_was_saved_is_loaded_until_it_is_removed(tmp_path):
    checkpoint = Checkpoint(tmp_path, OWN)
    assert checkpoint.load() is None
    checkpoint.save({"epoch": 2})
    checkpoint.save(STATE)
    assert equal(checkpoint.load(), STATE)
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_run_is_set_aside_with_a_warning(tmp_path, caplog):
    Checkpoint(tmp_path, FOREIGN).save(STATE)
    (tmp_path / f"{FOREIGN}.pt").rename(tmp_path / f"{OWN}.pt")
    assert Checkpoint(tmp_path, OWN).load() is None
    assert f"it is of the run {FOREIGN}" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [f"{OWN}.unusable"]


@given(st.floats(0, 1, exclude_max=True), st.sampled_from(["cut", "flip"]))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_or_changed_anywhere_is_never_loaded_as_something_else(tmp_path, where, how):
    checkpoint = Checkpoint(tmp_path, OWN)
    checkpoint.save(STATE)
    content = bytearray(checkpoint.path.read_bytes())
    place = int(where * len(content))
    if how == "cut":
        del content[place:]
    else:
        content[place] ^= 1
    checkpoint.path.write_bytes(content)
    logging.disable(logging.WARNING)
    loaded = checkpoint.load()
    logging.disable(logging.NOTSET)
    assert loaded is None or (how == "flip" and equal(loaded, STATE))  # a change of padding changes nothing
    assert checkpoint.path.exists() == (loaded is not None)


def test_a_checkpoint_that_cannot_be_read_at_all_is_left_alone(tmp_path):
    (tmp_path / f"{OWN}.pt").mkdir()
    with pytest.raises(IsADirectoryError):
        Checkpoint(tmp_path, OWN).load()
