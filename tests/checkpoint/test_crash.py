"""Killed before each call that changes the file system: either the old or the new checkpoint is there, intact.

A kill loses nothing that the kernel has; the test of the order of flushes covers power failures.
"""

import builtins
import functools
import itertools
import os
import re
import shutil
import signal
import sys

import pytest
import torch

from topoflow.checkpoint.directory import CheckpointDirectory, find_checkpoint
from topoflow.checkpoint.file import FORMAT, read_checkpoint


def progress():
    """Called by a save after each write of state.pt."""


CALLS = [
    *((os, name) for name in ("mkdir", "open", "rename", "replace", "unlink", "rmdir", "fsync")),
    (builtins, "open"),
    (sys.modules[__name__], "progress"),
]


def save(directory, step, value=None, is_best=True):
    weight = torch.full((3,), float(step if value is None else value))
    return directory.save({"format": FORMAT, "model": {"w": weight}, "progress": {"step": step}}, is_best)


def value_of(state):
    return state["model"]["w"][0].item()


def is_killed(action, number):
    """Run `action` in a process that dies before its `number`-th call of CALLS; return whether it got that far."""
    process = os.fork()
    if process == 0:
        count = itertools.count(1)

        def wrap(call):
            def counted(*arguments, **more):
                if next(count) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **more)

            return counted

        try:
            for owner, name in CALLS:
                setattr(owner, name, wrap(getattr(owner, name)))
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


def killed_everywhere(template, action, check):
    """Kill `action(directory)` at its first call, its second, ..., and `check(directory)`; return the number."""
    for number in itertools.count(1):
        path = template.with_name("killed")
        shutil.copytree(template, path)
        directory = CheckpointDirectory(path, on_progress=lambda: progress())
        survived = not is_killed(lambda directory=directory: action(directory), number)
        check(directory)
        shutil.rmtree(path)
        if survived:
            return number - 1


@pytest.fixture
def template(tmp_path):
    (tmp_path / "template").mkdir()
    for step in (5, 10):
        save(CheckpointDirectory(tmp_path / "template"), step)
    return tmp_path / "template"


def require_orderly(directory):
    """Check that all checkpoints are intact, the pointers work, and nothing is left over."""
    directory.clean_up()
    assert not list(directory.path.glob(".*"))
    for step in directory.steps():
        read_checkpoint(directory.folder(step))
    for name in ("last", "best"):
        assert directory.pointer(name) in map(directory.folder, directory.steps())


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(template):
    newest = []

    def check(directory):
        # without a start in between: an evaluation reads the folder as it is
        assert value_of(read_checkpoint(find_checkpoint(directory.path))) in (10, 15)
        require_orderly(directory)
        path, state = directory.newest_whole()
        assert path == directory.folder(int(value_of(state)))
        newest.append(value_of(state))
        assert directory.steps() == [5, 10] + [15] * (newest[-1] == 15)
        save(directory, 20)
        assert directory.pointer("last") == directory.pointer("best") == directory.folder(20)

    calls = killed_everywhere(template, lambda directory: save(directory, 15), check)
    assert calls > 30
    assert newest == sorted(newest)  # once the new one exists, it stays
    assert set(newest) == {10, 15}


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_replaced(template):
    values = []

    def check(directory):
        require_orderly(directory)
        path, state = directory.newest_whole()
        assert path == directory.folder(10)
        values.append(value_of(state))
        assert directory.steps() == [5, 10]

    killed_everywhere(template, lambda directory: save(directory, 10, value=11), check)
    assert values == sorted(values)
    assert set(values) == {10, 11}


def test_killed_while_old_checkpoints_or_leftovers_are_removed(template):
    for step in (15, 20):
        save(CheckpointDirectory(template), step, is_best=step == 15)

    def check(directory):
        assert directory.newest_whole()[0] == directory.folder(20)
        for step in directory.steps():
            read_checkpoint(directory.folder(step))  # no incomplete checkpoint under its name
        require_orderly(directory)
        directory.prune(1)
        assert directory.steps() == [15, 20]

    assert killed_everywhere(template, lambda directory: directory.prune(1), check) > 8
    shutil.copytree(template / "step-00000005", template / ".replaced-step-00000005-1")
    (template / "step-00000010").rename(template / ".replaced-step-00000010-2")
    shutil.copytree(template / "step-00000005", template / ".writing-step-00000025-3")
    assert killed_everywhere(template, lambda directory: directory.clean_up(), check) > 8


def test_killed_while_later_checkpoints_are_archived(template):
    for step in (15, 20):
        save(CheckpointDirectory(template), step)

    def check(directory):
        directory.clean_up()
        directory.archive_after(10)
        assert directory.steps() == [5, 10]
        assert sorted(path.name for path in directory.path.glob("abandoned-*")) == [
            "abandoned-step-00000015",
            "abandoned-step-00000020",
        ]
        assert directory.pointer("last") == directory.folder(10)
        assert directory.pointer("best") is None

    killed_everywhere(template, lambda directory: directory.archive_after(10), check)


def test_all_is_flushed_before_it_is_relied_on(tmp_path, monkeypatch):
    """A power failure may lose what was not flushed. So files and folder are flushed before the rename, its parent
    before the pointers, and each pointer before its rename."""
    done, sizes = [], {}
    rename, replace, flush = os.rename, os.replace, os.fsync

    def named(path):
        """Return the relative path, without numbers."""
        return re.sub(r"(-[0-9a-f]{8})+(?=/|$)", "", os.path.relpath(path, tmp_path))

    def moved(move, source, target):
        move(source, target)
        done.append(f"move to {named(target)}")

    def flushed(descriptor):
        flush(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append(f"flush {named(path)}")
        sizes[os.path.basename(path)] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "rename", functools.partial(moved, rename))
    monkeypatch.setattr(os, "replace", functools.partial(moved, replace))
    monkeypatch.setattr(os, "fsync", flushed)
    folder = save(CheckpointDirectory(tmp_path / "checkpoints"), 5)
    assert done == [
        "flush .",  # the folder `checkpoints` was created
        "flush checkpoints/.writing-step/state.pt",
        "flush checkpoints/.writing-step/manifest.json",
        "flush checkpoints/.writing-step",
        "move to checkpoints/step",
        "flush checkpoints",
        "flush checkpoints/.writing-best",
        "move to checkpoints/best",
        "flush checkpoints",
        "flush checkpoints/.writing-last",
        "move to checkpoints/last",
        "flush checkpoints",
    ]
    for name in ("state.pt", "manifest.json"):
        assert sizes[name] == (folder / name).stat().st_size  # nothing was written after the flush
