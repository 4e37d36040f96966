"""The checkpoints of a run: which there are, which are whole, and what the pointers name."""

import os
from pathlib import Path
from typing import Any

from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.errors import MissingPath, ResumeRefused
from topoflow.tools.inspect.description import describe_checkpoint, show_checkpoint
from topoflow.tools.inspect.text import number, table

POINTERS = ("last", "best")


def checkpoints_of(path: Path) -> CheckpointDirectory | None:
    """The folder of checkpoints if `path` is that, or a run directory; else None."""
    # os.path: a place where we may not look is no place, as for `find_checkpoint`
    if not os.path.exists(path):
        return None
    if os.path.isdir(path / "checkpoints"):
        return CheckpointDirectory(path / "checkpoints")
    directory = CheckpointDirectory(path)
    return directory if directory.traces() else None


def describe_run(directory: CheckpointDirectory) -> dict[str, Any]:
    """All checkpoints of a run (each is read and verified), pointers, and what else lies there.

    A running job may delete some meanwhile: those are left out.

    Raises:
        MissingPath: there is no checkpoint, nor anything that says that there was one.
    """
    if not directory.traces():
        raise MissingPath(f"{directory.path}: holds no checkpoint: expected a checkpoint or a run directory")
    pointers, damage = {}, []
    for name in POINTERS:
        try:
            found = directory.pointer(name)
            pointers[name] = None if found is None else found.name
        except ResumeRefused as refusal:
            pointers[name] = "damaged"
            damage.append(str(refusal))
    described = (_describe_if_there(directory.folder(step)) for step in directory.steps())
    checkpoints = [checkpoint for checkpoint in described if checkpoint is not None]
    damage += [checkpoint["damage"] for checkpoint in checkpoints if not checkpoint["whole"]]
    names = {Path(checkpoint["path"]).name for checkpoint in checkpoints}
    others = sorted(entry.name for entry in directory.path.iterdir() if entry.name not in {*names, *POINTERS})
    return {
        "run": str(directory.path),
        "pointers": pointers,
        "checkpoints": checkpoints,
        "others": others,
        "damage": damage,
    }


def show_run(about: dict[str, Any]) -> list[str]:
    """The text of what `describe_run` returns: a table, then what `last` and `best` name, without their tables."""
    header = ("checkpoint", "step", "epoch", "validation loss", "bytes", "written", "", "")
    rows = [_row(checkpoint, about["pointers"]) for checkpoint in about["checkpoints"]]
    lines = [f"checkpoints in {about['run']}", "", *table(header, rows)]
    lines += [f"pointer {name}: there is none" for name, target in about["pointers"].items() if target is None]
    lines += [f"beside them: {', '.join(about['others'])}"] if about["others"] else []
    lines += [f"damaged: {damage}" for damage in about["damage"]]
    named = dict.fromkeys(about["pointers"][name] for name in POINTERS)
    for checkpoint in about["checkpoints"]:
        if Path(checkpoint["path"]).name in named:
            lines += ["", *show_checkpoint(checkpoint, tables=False)]
    return lines


def _describe_if_there(folder: Path) -> dict[str, Any] | None:
    """The checkpoint; None if it is gone, or went while it was read."""
    try:
        about = describe_checkpoint(folder)
    except MissingPath:
        return None
    return about if about["whole"] or os.path.exists(folder) else None


def _row(checkpoint: dict[str, Any], pointers: dict[str, str | None]) -> tuple[str, ...]:
    name = Path(checkpoint["path"]).name
    size = checkpoint["files"]["state.pt"]
    marks = ", ".join(pointer for pointer, target in pointers.items() if target == name)
    step = epoch = loss = ""
    if checkpoint["whole"]:
        progress = checkpoint["progress"]
        step, epoch = str(progress["step"]), str(progress["epoch"])
        loss = number(progress["validation_loss"], 5)
    state = "whole" if checkpoint["whole"] else "DAMAGED"
    return (name, step, epoch, loss, "" if size is None else f"{size:,}", checkpoint["written"], state, marks)
