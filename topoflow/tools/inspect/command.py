"""What `topoflow inspect` looks at, and what it finds."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topoflow.checkpoint.directory import find_checkpoint
from topoflow.errors import ResumeRefused
from topoflow.tools.inspect.comparison import compare_checkpoints, show_comparison
from topoflow.tools.inspect.description import describe_checkpoint, show_checkpoint
from topoflow.tools.inspect.run import checkpoints_of, describe_run, show_run


@dataclass(frozen=True)
class Findings:
    """report: plain values; lines: the same as text; damage: what is damaged, in a line, or None."""

    report: dict[str, Any]
    lines: list[str]
    damage: str | None = None

    def as_json(self) -> str:
        """The report; a number that is not finite is null."""
        return json.dumps(_finite(self.report), indent=1, allow_nan=False, default=str)


def inspect(path: Path, other: Path | None = None) -> Findings:
    """Look into a checkpoint (its folder or its state.pt) or a run directory, or compare two checkpoints.

    Raises:
        MissingPath: there is no such path, or no checkpoint in it.
        ResumeRefused: a file that is no checkpoint of ours, or a folder that cannot be read.
    """
    if other is not None:
        return _compare(_one_checkpoint(path), _one_checkpoint(other))
    directory = checkpoints_of(path)
    if directory is not None:
        report = describe_run(directory)
        damage = report["damage"]
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        return Findings(report, show_run(report), damage[0] + more if damage else None)
    return _look_into(find_checkpoint(path))


def _look_into(folder: Path) -> Findings:
    report = describe_checkpoint(folder)
    return Findings(report, show_checkpoint(report), None if report["whole"] else report["damage"])


def _compare(a: Path, b: Path) -> Findings:
    try:
        report = compare_checkpoints(a, b)
    except ResumeRefused:  # show the damaged one
        for found in map(_look_into, (a, b)):
            if found.damage is not None:
                return found
        raise
    return Findings(report, show_comparison(report))


def _one_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means; of a run its last."""
    directory = checkpoints_of(path)
    if directory is None:
        return find_checkpoint(path)
    steps = directory.steps()
    return directory.pointer("last") or (directory.folder(steps[-1]) if steps else find_checkpoint(path))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
