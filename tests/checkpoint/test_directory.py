import errno
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from topoflow.checkpoint.directory import CheckpointDirectory, find_checkpoint
from topoflow.checkpoint.file import FORMAT
from topoflow.errors import CheckpointUnreadable, MissingPath, ResumeRefused, RunDirectoryError


def save(directory, step, is_best=False):
    state = {"format": FORMAT, "model": {"w": torch.tensor(float(step))}, "progress": {"step": step}}
    return directory.save(state, is_best)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "run").mkdir()
    directory = CheckpointDirectory(tmp_path / "run" / "checkpoints")
    for step in (5, 10, 15):
        save(directory, step, is_best=step == 10)
    return directory


def test_pointers(directory):
    assert directory.steps() == [5, 10, 15]
    assert directory.pointer("last") == directory.folder(15)
    assert directory.pointer("best") == directory.folder(10)
    name, check = (directory.path / "last").read_text().splitlines()
    assert name == "step-00000015"
    assert check == hashlib.sha256(name.encode()).hexdigest()


def test_an_empty_directory_has_nothing(tmp_path):
    directory = CheckpointDirectory(tmp_path / "nothing")
    assert directory.steps() == []
    assert directory.pointer("best") is None
    assert directory.newest_whole() is None


def test_a_damaged_newest_is_skipped_with_a_warning(directory, caplog):
    (directory.folder(15) / "state.pt").write_bytes(b"x")
    path, state = directory.newest_whole()
    assert path == directory.folder(10)
    assert state["progress"]["step"] == 10
    assert "step-00000015" in caplog.text


def test_none_whole_is_refused(directory):
    for step in directory.steps():
        (directory.folder(step) / "manifest.json").unlink()
    with pytest.raises(ResumeRefused, match="none of 3 checkpoints is intact"):
        directory.newest_whole()


def test_every_flipped_bit_and_every_truncation_of_a_pointer_is_found(directory, caplog):
    path = directory.path / "best"
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))] + [whole + b"\n", whole.upper(), b"step-00000005\n"]
    for position in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ResumeRefused, match=r"best: does not match its own hash: it is damaged"):
            directory.pointer("best")
    assert find_checkpoint(directory.path.parent) == directory.folder(15)


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_damaged_pointer_is_named_though_the_newest_is_found_without_it(directory, name, caplog):
    (directory.path / name).write_text("step-00000005\n")
    assert directory.newest_whole()[0] == directory.folder(15)
    assert f"{directory.path / name}: does not match its own hash" in caplog.text
    with pytest.raises(ResumeRefused, match=name):
        directory.newest_whole(strict=True)


def test_a_missing_checkpoint_or_pointer_is_named(directory, caplog):
    shutil.rmtree(directory.folder(15))
    assert directory.newest_whole()[0] == directory.folder(10)
    assert "last: names 'step-00000015', which does not exist" in caplog.text
    (directory.path / "last").unlink()
    caplog.clear()
    assert directory.newest_whole()[0] == directory.folder(10)
    assert "last: is missing" in caplog.text


def test_a_named_run_whose_newest_is_damaged_is_refused(directory):
    (directory.folder(15) / "manifest.json").unlink()
    with pytest.raises(ResumeRefused, match=r"step-00000015: manifest\.json is missing"):
        directory.newest_whole(strict=True)


def test_nothing_starts_from_scratch_where_checkpoints_were(directory):
    directory.archive_after(0)
    with pytest.raises(ResumeRefused, match=r"holds abandoned-step-00000005, .*but no checkpoint to resume from"):
        directory.newest_whole()
    for entry in directory.path.iterdir():
        shutil.rmtree(entry)
    (directory.path / "last").write_text("step-00000015\n")
    with pytest.raises(ResumeRefused, match="holds last, but no"):
        directory.newest_whole()
    # leftovers of a killed first save were never committed
    (directory.path / "last").unlink()
    (directory.path / ".writing-step-00000005-1a2b3c4d").mkdir()
    assert directory.newest_whole() is None


def write_metrics(directory, *events):
    lines = [json.dumps({"step": 5, **event}) for event in events]
    (directory.path.parent / "metrics.jsonl").write_text("\n".join(lines) + '\n{"event": "tra')


TRAINED, SAVED = {"event": "train"}, {"event": "checkpoint", "path": "run/checkpoints/step-00000005"}


def unmount(directory, how):
    directory.path.rename(directory.path.with_name("elsewhere"))
    if how == "an empty folder":
        directory.path.mkdir()
    elif how == "a dangling link":
        directory.path.symlink_to("/mnt/scratch/checkpoints")
    elif how == "a file":
        directory.path.write_text("")


@pytest.mark.parametrize("how", ["missing", "an empty folder", "a dangling link", "a file"])
def test_checkpoints_that_the_metrics_record_and_that_are_gone_are_a_refusal(directory, how):
    write_metrics(directory, TRAINED, SAVED, TRAINED)
    unmount(directory, how)
    with pytest.raises(ResumeRefused, match=r"run/checkpoints: .* mounted.*another run\.dir"):
        directory.newest_whole()
    with pytest.raises(ResumeRefused):
        directory.require_not_lost()


@pytest.mark.parametrize("how", ["missing", "an empty folder"])
def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_again(directory, how):
    write_metrics(directory, TRAINED, {"event": "validation"}, TRAINED)
    unmount(directory, how)
    assert directory.newest_whole() is None


def test_a_dangling_link_is_refused_also_before_the_first_checkpoint(directory):
    unmount(directory, "a dangling link")
    for read in (directory.newest_whole, directory.clean_up, directory.steps, directory.require_not_lost):
        with pytest.raises(ResumeRefused, match="a link to /mnt/scratch/checkpoints, which does not exist"):
            read()


def test_a_resume_of_own_checkpoints_is_a_record_and_one_of_another_run_is_not(directory):
    report = directory.path.parent / "resume.json"
    unmount(directory, "missing")
    report.write_text(json.dumps({"from": "/elsewhere/run/checkpoints/step-00000005"}))
    assert directory.newest_whole() is None  # stopped before its own first checkpoint
    report.write_text(json.dumps({"from": str(directory.folder(5))}))
    with pytest.raises(ResumeRefused, match=r"resume\.json records a resume from step-00000005"):
        directory.newest_whole()


@contextmanager
def as_another_user(folder):
    """Run without permission to read `folder`; root, which ignores permissions, becomes another user."""
    folder.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_folder_that_cannot_be_read_is_not_an_empty_one():
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        directory = CheckpointDirectory(Path(name) / "checkpoints")
        save(directory, 5)
        with as_another_user(directory.path):
            for read in (directory.clean_up, directory.newest_whole, directory.require_not_lost, directory.steps):
                with pytest.raises(ResumeRefused, match="checkpoints: cannot be read: Permission denied"):
                    read()


def test_the_best_is_chosen_or_the_last_where_the_best_is_gone(directory, caplog):
    assert directory.choose_best_or_last() == directory.folder(10)
    (directory.folder(10) / "state.pt").write_bytes(b"x")
    assert directory.choose_best_or_last() == directory.folder(15)
    assert "step-00000010: state.pt has 1 bytes" in caplog.text
    assert "using the last one instead" in caplog.text
    shutil.rmtree(directory.folder(10))
    assert directory.choose_best_or_last() == directory.folder(15)
    (directory.path / "best").unlink()
    assert directory.choose_best_or_last() == directory.folder(15)
    (directory.path / "last").unlink()
    assert directory.choose_best_or_last() == directory.folder(15)


def test_a_renamed_checkpoint_is_named_and_not_resumed_from(directory, caplog):
    directory.folder(10).rename(directory.folder(20))
    (directory.path / "best").unlink()
    with pytest.raises(
        ResumeRefused, match=r"folder step-00000020, manifest\.json of step 10 and state\.pt of step 10"
    ):
        directory.newest_whole(strict=True)
    assert directory.newest_whole()[0] == directory.folder(15)
    assert "folder step-00000020, manifest.json of step 10" in caplog.text


def test_a_file_in_the_place_of_a_checkpoint_is_damage(directory, caplog):
    shutil.rmtree(directory.folder(15))
    directory.folder(15).write_text("")
    assert directory.newest_whole()[0] == directory.folder(10)
    assert "step-00000015: is a file: expected a folder" in caplog.text


def test_pruning_keeps_the_newest_and_the_best(directory):
    for step in (20, 25):
        save(directory, step)
    assert directory.prune(2) == [directory.folder(5), directory.folder(15)]
    assert directory.steps() == [10, 20, 25]
    assert sorted(entry.name for entry in directory.path.iterdir() if entry.is_file()) == ["best", "last"]


def test_nothing_is_deleted_while_the_best_is_unknown(directory, caplog):
    (directory.path / "best").write_text("step-00000015\n")
    assert directory.prune(1) == []
    assert directory.steps() == [5, 10, 15]
    assert "best: does not match its own hash" in caplog.text


def test_later_checkpoints_are_archived(directory):
    assert [path.name for path in directory.archive_after(5)] == [
        "abandoned-step-00000010",
        "abandoned-step-00000015",
    ]
    assert directory.steps() == [5]
    assert directory.pointer("best") is None
    assert directory.pointer("last") == directory.folder(5)
    assert directory.newest_whole()[0] == directory.folder(5)
    save(directory, 10)
    assert [path.name for path in directory.archive_after(5)] == ["abandoned-step-00000010-2"]


def test_leftovers_of_a_killed_process_are_removed_and_what_it_was_replacing_is_restored(directory):
    for name in (".writing-step-00000020-1", ".deleting-step-00000001-2", ".replaced-step-00000010-3"):
        (directory.path / name).mkdir()
    (directory.path / ".writing-last-4").write_text("step-0000")
    directory.folder(15).rename(directory.path / ".replaced-step-00000015-5")
    directory.clean_up()
    assert sorted(entry.name for entry in directory.path.iterdir()) == [
        "best",
        "last",
        "step-00000005",
        "step-00000010",
        "step-00000015",
    ]
    assert directory.newest_whole()[0] == directory.folder(15)


CHANGES = ("rename", "replace", "unlink", "rmdir")


def test_every_visible_change_is_guarded(directory, monkeypatch):
    held, changes = [], []

    @contextmanager
    def guard():
        held.append(True)
        yield
        held.pop()

    def watch(name):
        change = getattr(os, name)

        def watched(path, *arguments, **more):
            changes.append((name, os.path.basename(path), bool(held)))
            return change(path, *arguments, **more)

        monkeypatch.setattr(os, name, watched)

    for name in CHANGES:
        watch(name)
    guarded = CheckpointDirectory(directory.path, guard)
    (directory.path / ".writing-step-00000001-1").mkdir()
    directory.folder(5).rename(directory.path / ".replaced-step-00000005-5")
    changes.clear()
    guarded.clean_up()
    save(guarded, 20, is_best=True)
    save(guarded, 20)
    guarded.prune(1)
    save(guarded, 25)
    guarded.archive_after(20)
    guarded.point("best", None)
    assert {name for name, _, _ in changes} == set(CHANGES)
    assert [change for change in changes if not change[2]] == []


def test_a_guard_that_refuses_prevents_every_change(directory):
    @contextmanager
    def refuse():
        raise RunDirectoryError("run: taken over")
        yield

    before = sorted(path for path in directory.path.rglob("*"))
    guarded = CheckpointDirectory(directory.path, refuse)
    for change in (
        lambda: save(guarded, 15),
        lambda: save(guarded, 20),
        lambda: guarded.prune(1),
        lambda: guarded.archive_after(5),
        lambda: guarded.point("last", guarded.folder(5)),
    ):
        with pytest.raises(RunDirectoryError, match="taken over"):
            change()
    assert sorted(path for path in directory.path.rglob("*")) == before
    assert directory.pointer("last") == directory.folder(15)


def test_a_run_directory_that_vanished_is_not_created_again(directory):
    shutil.rmtree(directory.path.parent)
    with pytest.raises(FileNotFoundError):
        save(directory, 20)
    assert not directory.path.parent.exists()


def test_a_start_that_cannot_change_the_folder_is_refused_in_one_line(directory, monkeypatch):
    def fail(*arguments, **more):
        raise OSError(30, "Read-only file system")

    for name in CHANGES:
        monkeypatch.setattr(os, name, fail)
    for change in (lambda: directory.archive_after(5), lambda: directory.point("best", None)):
        with pytest.raises(RunDirectoryError, match=r"checkpoints: a checkpoint cannot be .*: Read-only file system"):
            change()


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


def test_what_is_temporarily_unreadable_is_not_skipped(directory, monkeypatch):
    """A file system that is briefly unavailable, or a newer program's format, is not damage."""
    stale = OSError(errno.ESTALE, "Stale file handle")
    with monkeypatch.context() as patch:
        patch.setattr("topoflow.checkpoint.file.torch.load", mock.Mock(side_effect=MemoryError))
        with pytest.raises(CheckpointUnreadable, match=r"step-00000015: .* does not fit into memory"):
            directory.newest_whole()
    with monkeypatch.context() as patch:
        patch.setattr("topoflow.checkpoint.file.read_manifest", mock.Mock(side_effect=stale))
        with pytest.raises(CheckpointUnreadable, match="step-00000015: cannot be read: Stale file handle"):
            directory.newest_whole()
    state = {"format": (2, 0), "model": {}, "progress": {"step": 20}}
    directory.save(state, is_best=False)
    with pytest.raises(CheckpointUnreadable, match=r"step-00000020: format \(2, 0\): expected 1\.x"):
        directory.newest_whole()
