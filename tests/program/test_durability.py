"""Malicious or damaged checkpoints, in every command that reads one."""

import contextlib
import io
import os
import shutil
import subprocess

import pytest
import torch

from tests.support.damage import damage_each
from topoflow import cli
from topoflow.checkpoint import file as checkpoint_file
from topoflow.checkpoint.directory import CheckpointDirectory


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def evaluate(path):
    output = io.StringIO()
    with contextlib.redirect_stderr(output):
        status = cli.main(["evaluate", str(path)])
    return subprocess.CompletedProcess("evaluate", status, stderr=output.getvalue())


@pytest.fixture
def checkpoints(program):
    """The folder of two intact checkpoints of a run."""
    done = program.train("train.max_steps=2", "checkpoint.every_steps=1", "train.validate_every_steps=1")
    assert done.returncode == 0, done.stderr
    return CheckpointDirectory(program.folder / "run" / "checkpoints")


def test_a_malicious_checkpoint_is_refused_by_every_command(program, checkpoints, monkeypatch):
    """Its manifest is correct, because the program itself wrote it."""
    trap, whole = program.folder / "trap", torch.save
    state = program.state(step=2)
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint_file.torch, "save", lambda tree, file: whole({**tree, "config": Malicious(trap)}, file)
        )
        checkpoints.save(state, is_best=True)
    newest = checkpoints.folder(2)
    options = ("train.max_steps=3", "train.validate_every_steps=1")
    for done in (
        program.train(*options, f"checkpoint.resume={newest}"),
        program.train(*options, f"checkpoint.resume={program.folder / 'run'}"),
        program.train(*options, f"checkpoint.init_from={newest}", run="tuned"),
        evaluate(newest),
        evaluate(program.folder / "run"),
    ):
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr
        assert f"{newest}: state.pt holds more than tensors and plain values" in done.stderr.splitlines()[-1]
    resumed = program.train(*options)
    assert resumed.returncode == 0, resumed.stderr
    assert (
        "more than tensors and plain values: not loaded, none of its code ran; taking the next older" in resumed.stderr
    )
    assert not trap.exists()
    torch.load(checkpoints.path / "abandoned-step-00000002" / "state.pt", weights_only=False)
    assert trap.exists()  # unrestricted loading would run it


def test_what_a_run_does_with_damaged_pointers(program, checkpoints):
    for name in ("last", "best"):
        (checkpoints.path / name).write_text("step-00000001\n")
    options = ("train.max_steps=3", "train.validate_every_steps=1")
    named = program.train(*options, f"checkpoint.resume={program.folder / 'run'}")
    assert named.returncode == 3
    assert "checkpoints/last: does not match its own hash" in named.stderr.splitlines()[-1]
    evaluated = evaluate(program.folder / "run")
    assert evaluated.returncode == 3
    for name, line in zip(("best", "last"), evaluated.stderr.splitlines()[-2:], strict=True):
        assert f"checkpoints/{name}: does not match its own hash" in line
    resumed = program.train(*options)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("last", "best"):
        assert f"warning: checkpoint pointer {checkpoints.path / name}: does not match its own hash" in resumed.stderr
    assert sorted(program.losses()) == [1, 2, 3]
    assert checkpoints.pointer("last") == checkpoints.folder(3)
    assert checkpoints.pointer("best") is not None


def test_a_run_whose_checkpoints_are_gone_does_not_start_again(program, checkpoints):
    for step in checkpoints.steps():
        shutil.rmtree(checkpoints.folder(step))
    for resume, status in (("auto", 3), ("never", 2)):
        done = program.train(f"checkpoint.resume={resume}")
        assert done.returncode == status
        assert "holds best, last" in done.stderr.splitlines()[-1]


def test_each_of_sixty_damages_is_found_and_named(checkpoints, tmp_path):
    rows = damage_each(checkpoints.path, tmp_path / "damaged", flips=60, others=12, seed=1)
    assert sum(row.damages for row in rows) == 72
    assert [row for row in rows if row.found < row.damages] == []
    assert sum(row.noticed_by_torch for row in rows) < 60


@pytest.mark.parametrize("how", ["missing", "empty", "dangling"])
def test_a_run_whose_file_system_is_not_mounted_does_not_start_again(program, checkpoints, how):
    run = checkpoints.path.parent
    checkpoints.path.rename(run.parent / "scratch")
    if how == "empty":
        checkpoints.path.mkdir()
    elif how == "dangling":
        checkpoints.path.symlink_to(run.parent / "not mounted")
    before = (run / "metrics.jsonl").read_bytes()
    others = str(run.parent / "scratch" / "step-00000002")
    for override in ("resume=auto", "resume=never", f"init_from={others}", f"resume={others}"):
        done = program.train("train.max_steps=3", f"checkpoint.{override}")
        assert done.returncode == 3, (override, done.stderr)
        assert f"{checkpoints.path}: " in done.stderr.splitlines()[-1]
        assert "mounted" in done.stderr.splitlines()[-1]
        assert (run / "metrics.jsonl").read_bytes() == before
    if how == "dangling":
        checkpoints.path.unlink()
    (run / "metrics.jsonl").unlink()
    again = program.train("train.max_steps=2", "checkpoint.every_steps=1")
    assert again.returncode == 0, again.stderr


def test_a_run_stopped_before_its_first_checkpoint_starts_again(program, checkpoints):
    shutil.rmtree(checkpoints.path)
    metrics = checkpoints.path.parent / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.open() if '"event": "train"' in line))
    again = program.train("train.max_steps=2", "checkpoint.every_steps=1")
    assert again.returncode == 0, again.stderr
    assert sorted(program.losses()) == [1, 2]


def test_a_damaged_best_is_reported_at_the_start_and_replaced(program, checkpoints):
    options = ("train.max_steps=4", "checkpoint.every_steps=1", "train.validate_every_steps=100")
    assert program.train(*options).returncode == 0
    shutil.rmtree(checkpoints.folder(4))  # as if killed after step 3
    checkpoints.point("last", checkpoints.folder(3))
    checkpoints.point("best", checkpoints.folder(2))
    damaged = checkpoints.folder(2) / "state.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = program.train(*options)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    (warned,) = [number for number, line in enumerate(lines) if "best checkpoint (step 2) is damaged: " in line]
    assert "state.pt has" in lines[warned]
    assert "the next validation sets a new best" in lines[warned]
    assert not any("validation after step" in line for line in lines[:warned])
    assert checkpoints.pointer("best") == checkpoints.folder(4)
