"""Where a run can be killed: the process sends itself SIGKILL at a named point, at a chosen step.

The program has no hooks for this. Arming a point wraps a function of torch, of the operating system or of the program
in the process that is to die, which then dies inside it. It leaves a note with its stack, so that no other exit is
mistaken for this one.
"""

import json
import os
import re
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from topoflow import trainer
from topoflow.checkpoint.saver import CheckpointSaver
from topoflow.data.dataset import ForecastDataset
from topoflow.logs import MetricsWriter
from topoflow.model.attention import Block
from topoflow.resume import Resume


@dataclass(frozen=True)
class Kill:
    """Die when `point` is passed for the `count`-th time in step `step` (counted from 1) or later."""

    point: str
    step: int = 0
    count: int = 1


class Trigger:
    """Counts how often a point is passed from a step on, and kills the process at the last time."""

    def __init__(self, kill: Kill, note: Path):
        self.kill, self.note = kill, str(note)
        self.step, self.left = 0, kill.count

    def hit(self) -> bool:
        """Count one pass; return whether the process is to die here."""
        if self.step >= self.kill.step:
            self.left -= 1
        return self.step >= self.kill.step and self.left == 0

    def end(self) -> None:
        """Write the note and die."""
        stack = [f"{Path(frame.filename).name}:{frame.name}" for frame in traceback.extract_stack()]
        text = json.dumps({"point": self.kill.point, "step": self.step, "pid": os.getpid(), "stack": stack})
        note = os.open(self.note, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(note, text.encode())
        os.close(note)
        os.kill(os.getpid(), signal.SIGKILL)

    def pass_by(self, *_: Any, **__: Any) -> None:
        if self.hit():
            self.end()


def arm(kill: Kill, note: Path) -> None:
    """Make this process die at `kill` and write its stack to `note`. This cannot be undone."""
    attach(Trigger(kill, note), POINTS[kill.point])


def attach(trigger: Trigger, point: "Point") -> None:
    """Install `trigger` at `point`."""

    def count_step(self, *_, **__):
        trigger.step = self.state.progress.step + 1

    wrap(trainer.Trainer, "train_step", before=count_step)
    point.install(trigger)


def wrap(
    owner: Any, name: str, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
) -> None:
    """Make owner.name call `before` first and `after` last, with its own arguments."""
    wrapped = getattr(owner, name)

    def call(*arguments, **more):
        if before is not None:
            before(*arguments, **more)
        result = wrapped(*arguments, **more)
        if after is not None:
            after(*arguments, **more)
        return result

    setattr(owner, name, call)


# ---- in a step


def _in_forward(trigger: Trigger) -> None:
    def before(block, *_):
        if block.training:
            trigger.pass_by()

    wrap(Block, "forward", before=before)


def _in_backward(trigger: Trigger) -> None:
    whole = Block.forward

    def forward(block, *arguments):
        out = whole(block, *arguments)
        if block.training:
            out.register_hook(trigger.pass_by)
        return out

    Block.forward = forward


def _in_optimizer_step(trigger: Trigger) -> None:
    """Fused AdamW updates all parameters in one call; before it, only the step counts have changed."""
    wrap(torch, "_fused_adamw_", before=trigger.pass_by, after=trigger.pass_by)


def _between_steps(trigger: Trigger) -> None:
    wrap(MetricsWriter, "train_step", after=trigger.pass_by)


def _at_the_end_of_an_epoch(trigger: Trigger) -> None:
    def before(running):
        progress = running.state.progress
        if progress.epoch > 0 and progress.samples_in_epoch == 0:
            trigger.pass_by()

    wrap(trainer.Trainer, "_steps_of_epoch", before=before)


def _after_validation(trigger: Trigger) -> None:
    wrap(MetricsWriter, "validation", after=trigger.pass_by)


def _in_a_loader_thread(trigger: Trigger) -> None:
    def before(*_):
        if threading.current_thread() is not threading.main_thread():
            trigger.pass_by()

    wrap(ForecastDataset, "fill", before=before)


# ---- in a save


def _while_writing_the_state(trigger: Trigger) -> None:
    """Each write by torch.save is a pass."""
    whole = torch.save

    def save(state, file, *arguments, **more):
        whole(state, DyingFile(file, trigger), *arguments, **more)

    torch.save = save


class DyingFile:
    """A file in which a process can die after half of a write."""

    def __init__(self, file: Any, trigger: Trigger):
        self.file, self.trigger = file, trigger

    def write(self, data: bytes | memoryview) -> int:
        if self.trigger.hit():
            self.file.write(memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
            self.file.flush()
            self.trigger.end()
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _before_the_manifest(trigger: Trigger) -> None:
    def after(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/state.pt"):
            trigger.pass_by()

    wrap(os, "fsync", after=after)


def _on_move(trigger: Trigger, function: str, target: str, when: str) -> None:
    """Pass before or after os.rename or os.replace gives a file or folder the name `target` (a regular expression)."""

    def pass_by(source, destination, **_):
        if re.fullmatch(target, Path(destination).name):
            trigger.pass_by()

    wrap(os, function, **{when: pass_by})


def _while_deleting_an_old_checkpoint(trigger: Trigger) -> None:
    def after(name, **_):
        if Path(name).name in ("state.pt", "manifest.json"):
            trigger.pass_by()

    wrap(os, "unlink", after=after)


# ---- in a resume


def _after_reading(trigger: Trigger) -> None:
    wrap(torch, "load", after=trigger.pass_by)


def _within(trigger: Trigger, owner: Any, name: str, passed_owner: Any, passed: str) -> None:
    """Each call of passed_owner.passed while owner.name runs is a pass."""
    inside = []

    def before(*_, **__):
        if inside:
            trigger.pass_by()

    wrap(owner, name, before=lambda *_, **__: inside.append(True), after=lambda *_, **__: inside.clear())
    wrap(passed_owner, passed, before=before)


@dataclass(frozen=True)
class Point:
    """A place where a process can die. times: about how often a step, a save or a resume passes it."""

    install: Callable[[Trigger], None]
    times: int = 1
    only_on_rank_0: bool = False
    before_the_first_step: bool = False


def _move(function: str, target: str, when: str, **more: Any) -> Point:
    return Point(lambda trigger: _on_move(trigger, function, target, when), only_on_rank_0=True, **more)


def _within_save(owner: Any, name: str, times: int) -> Point:
    return Point(
        lambda trigger: _within(trigger, CheckpointSaver, "save", owner, name), times=times, only_on_rank_0=True
    )


def _within_resume(phase: str, owner: Any, name: str, times: int) -> Point:
    return Point(lambda trigger: _within(trigger, Resume, phase, owner, name), times=times, before_the_first_step=True)


STEP_FOLDER = r"step-\d+"
POINTS = {
    "in the forward pass": Point(_in_forward, times=4),
    "in the backward pass": Point(_in_backward, times=4),
    "in the optimizer's step": Point(_in_optimizer_step, times=2),
    "between two steps": Point(_between_steps),
    "at the end of an epoch": Point(_at_the_end_of_an_epoch),
    "in a loader thread": Point(_in_a_loader_thread, times=4),
    "in validation": Point(lambda trigger: _within(trigger, trainer.Trainer, "validate", Block, "forward"), times=8),
    "after validation, before its save": Point(_after_validation),
    "in the probe of a save": _within_save(Block, "forward", times=2),
    "while the state is copied": _within_save(torch.Tensor, "copy_", times=90),
    "while state.pt is written": Point(_while_writing_the_state, times=60, only_on_rank_0=True),
    "between state.pt and the manifest": Point(_before_the_manifest, only_on_rank_0=True),
    "between manifest and rename": _move("rename", STEP_FOLDER, "before"),
    "between rename and pointers": _move("rename", STEP_FOLDER, "after"),
    "between the pointers": _move("replace", "best", "after"),
    "in the move of a pointer": _move("replace", "last", "before"),
    "while an old checkpoint is deleted": Point(_while_deleting_an_old_checkpoint, times=2, only_on_rank_0=True),
    "after the file was read": Point(_after_reading, only_on_rank_0=True, before_the_first_step=True),
    "in the restore": _within_resume("restore", torch.Tensor, "copy_", times=48),
    "in the proof of the resume": _within_resume("prove", Block, "forward", times=2),
    "while metrics.jsonl is cut": _move("replace", r"metrics\.jsonl", "before", before_the_first_step=True),
}
