import pytest
import torch

from topoflow.checkpoint import FORMAT, CheckpointDirectory, find_checkpoint
from topoflow.errors import MissingPath, ResumeRefused


def save(directory, step, is_best=False):
    state = {"format": FORMAT, "model": {"w": torch.tensor(float(step))}, "progress": {"step": step}}
    return directory.save(state, is_best)


@pytest.fixture
def directory(tmp_path):
    directory = CheckpointDirectory(tmp_path / "run" / "checkpoints")
    for step in (5, 10, 15):
        save(directory, step, is_best=step == 10)
    return directory


def test_pointers(directory):
    assert directory.steps() == [5, 10, 15]
    assert directory.pointer("last") == directory.folder(15)
    assert directory.pointer("best") == directory.folder(10)
    assert (directory.path / "last").read_text() == "step-00000015\n"


def test_an_empty_directory_has_nothing(tmp_path):
    directory = CheckpointDirectory(tmp_path / "nothing")
    assert directory.steps() == []
    assert directory.pointer("best") is None
    assert directory.newest_whole() is None


def test_a_damaged_newest_is_passed_over_loudly(directory, caplog):
    (directory.folder(15) / "state.pt").write_bytes(b"x")
    path, state = directory.newest_whole()
    assert path == directory.folder(10)
    assert state["progress"]["step"] == 10
    assert "step-00000015" in caplog.text


def test_none_whole_is_refused(directory):
    for step in directory.steps():
        (directory.folder(step) / "manifest.json").unlink()
    with pytest.raises(ResumeRefused, match="none of 3 checkpoints is whole"):
        directory.newest_whole()


def test_a_damaged_pointer_is_refused(directory):
    for text in ("step-00000099\n", "../elsewhere\n", "", "\xff"):
        (directory.path / "best").write_text(text, encoding="latin-1")
        with pytest.raises(ResumeRefused, match="best"):
            directory.pointer("best")


def test_pruning_keeps_the_newest_the_best_and_what_it_is_told(directory):
    save(directory, 20)
    assert directory.prune(1, {directory.folder(5)}) == [directory.folder(15)]
    assert directory.steps() == [5, 10, 20]


def test_later_checkpoints_are_set_aside(directory):
    assert [path.name for path in directory.set_aside_after(5)] == [
        "abandoned-step-00000010",
        "abandoned-step-00000015",
    ]
    assert directory.steps() == [5]
    assert directory.pointer("best") is None
    assert directory.newest_whole()[0] == directory.folder(5)


def test_a_run_means_its_best_else_its_last(directory):
    run = directory.path.parent
    assert find_checkpoint(run) == directory.folder(10)
    (directory.path / "best").unlink()
    assert find_checkpoint(run) == directory.folder(15)
    assert find_checkpoint(directory.folder(5)) == directory.folder(5)
    assert find_checkpoint(directory.folder(5) / "state.pt") == directory.folder(5)


def test_a_path_without_checkpoints(tmp_path):
    with pytest.raises(MissingPath, match="not found"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(MissingPath, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
