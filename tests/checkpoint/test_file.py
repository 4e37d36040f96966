import os
import pickle

import pytest
import torch

from topoflow.checkpoint import file as checkpoint_file
from topoflow.checkpoint import read_checkpoint, write_checkpoint
from topoflow.errors import MissingPath, ResumeRefused


def make_state(step=3):
    return {
        "format": checkpoint_file.FORMAT,
        "model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5, dtype=torch.bfloat16)},
        "optimizer": {"groups": [{"name": "g", "betas": [0.9, 0.99]}], "state": {"w": {"step": torch.tensor(3.0)}}},
        "progress": {"step": step, "best_validation_loss": None},
    }


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "step-00000003", make_state())
    return tmp_path / "step-00000003"


def test_what_is_written_is_read(folder):
    state = read_checkpoint(folder)
    assert torch.equal(state["model"]["w"], torch.arange(6.0).reshape(2, 3))
    assert state["model"]["b"].dtype == torch.bfloat16
    assert state["optimizer"]["groups"] == [{"name": "g", "betas": [0.9, 0.99]}]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "state.pt"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_every_flipped_byte_is_found(folder, name):
    path = folder / name
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 97)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ResumeRefused, match=name):
            read_checkpoint(folder)
    path.write_bytes(whole)
    read_checkpoint(folder)


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_truncation_and_absence_are_found(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ResumeRefused, match=name):
        read_checkpoint(folder)
    path.unlink()
    with pytest.raises(ResumeRefused, match=f"{name} is missing"):
        read_checkpoint(folder)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(MissingPath, match="step-00000009"):
        read_checkpoint(tmp_path / "step-00000009")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_no_code_of_a_checkpoint_runs(tmp_path, folder, monkeypatch):
    trap = tmp_path / "trap"
    monkeypatch.setattr(checkpoint_file.torch, "save", lambda state, file: pickle.dump(Malicious(str(trap)), file))
    write_checkpoint(tmp_path / "step-00000004", make_state(4))
    with pytest.raises(ResumeRefused, match="more than tensors and plain values"):
        read_checkpoint(tmp_path / "step-00000004")
    assert not trap.exists()


def test_another_format_is_refused(tmp_path):
    write_checkpoint(tmp_path / "step-00000004", {**make_state(4), "format": (2, 0)})
    with pytest.raises(ResumeRefused, match=r"format \(2, 0\)"):
        read_checkpoint(tmp_path / "step-00000004")


@pytest.mark.parametrize("function", ["save", "rename"])
def test_a_failed_write_leaves_what_was_there(folder, monkeypatch, function):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_file.torch if function == "save" else checkpoint_file.os, function, fail)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(folder.with_name("step-00000004"), make_state(4))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    monkeypatch.undo()
    assert read_checkpoint(folder)["progress"]["step"] == 3


def test_a_checkpoint_of_the_same_step_is_replaced(folder):
    state = make_state()
    state["model"]["w"] += 1
    write_checkpoint(folder, state)
    assert torch.equal(read_checkpoint(folder)["model"]["w"], torch.arange(6.0).reshape(2, 3) + 1)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
