"""Places where a signal can hit a run, by phase: most are those of the kill campaign."""

import time
from collections.abc import Callable
from pathlib import Path

import train as program
from tests.support.kill_points import POINTS, Kill, Point, Trigger, attach, wrap
from tests.support.pausing import BEFORE_IMPORTS, Plan
from topoflow import trainer


def _around(when: str, name: str) -> Point:
    """Return the point before or after a function that train.py calls once."""
    return Point(lambda trigger: wrap(program, name, **{when: trigger.pass_by}), before_the_first_step=True)


SET_UP = {
    "before the signals are caught": _around("before", "read_launch"),
    "before the ranks connect": _around("before", "distributed_context"),
    "while data are opened": _around("before", "build_plan"),
    "while the model is built": _around("after", "build_state"),
    "before the first step": _around("after", "describe_run"),
}
OF_KILLS = {
    "training step": (
        "in the forward pass",
        "in the backward pass",
        "in the optimizer's step",
        "between two steps",
        "at the end of an epoch",
    ),
    "data loader": ("in a loader thread",),
    "validation": ("in validation", "after validation, before its save"),
    "saving": (
        "in the probe of a save",
        "while the state is copied",
        "between state.pt and the manifest",
        "between manifest and rename",
        "between rename and pointers",
        "in the move of a pointer",
        "while an old checkpoint is deleted",
    ),
    "loading": (
        "after the file was read",
        "in the restore",
        "in the proof of the resume",
        "while metrics.jsonl is cut",
    ),
}
PLACES: dict[str, dict[str, Point]] = {
    "set-up": {BEFORE_IMPORTS: Point(lambda trigger: None, before_the_first_step=True), **SET_UP},
    **{phase: {name: POINTS[name] for name in names} for phase, names in OF_KILLS.items()},
}
"""Phase -> name of a place -> its point."""


class PausingTrigger(Trigger):
    """A trigger at which the process pauses and then continues."""

    def __init__(self, kill: Kill, pause: Callable[[], None]):
        super().__init__(kill, Path())
        self._pause = pause

    def end(self) -> None:
        self._pause()


def install(plan: Plan, pause: Callable[[], None], pauses_here: bool) -> None:
    """Make this process follow `plan`; pauses_here: whether it is the rank that pauses."""
    if plan.step_seconds:
        wrap(trainer.Trainer, "train_step", before=lambda *_, **__: time.sleep(plan.step_seconds))
    if pauses_here and plan.point is not None:
        [point] = [points[plan.point] for points in PLACES.values() if plan.point in points]
        attach(PausingTrigger(Kill(plan.point, plan.step, plan.count), pause), point)
