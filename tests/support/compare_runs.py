"""Compare a run that was killed and resumed with one that never stopped, bit for bit."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.checkpoint.file import read_checkpoint


def differences(run: Path, untouched: Path, steps: int) -> list[str]:
    """Return what differs, by name, between a finished run of `steps` steps and one that never stopped."""
    found = []
    ours, theirs = losses(run), losses(untouched)
    if ours != theirs:
        first = next((a, b) for a, b in itertools.zip_longest(ours, theirs) if a != b)
        found.append(f"loss {first[0]}: expected {first[1]}")
    ours, theirs = (
        read_checkpoint(CheckpointDirectory(path / "checkpoints").folder(steps)) for path in (run, untouched)
    )
    for part in ("model", "optimizer", "scheduler", "progress"):
        found += [f"{part}/{name}" for name in different_leaves(ours[part], theirs[part])]
    return found


def losses(run: Path) -> list[tuple[str, int, str]]:
    """Return (event, step, loss as bits) of each training and validation line of metrics.jsonl, in file order."""
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(e["event"], e["step"], e["loss_hex"]) for e in events if e["event"] in ("train", "validation")]


def different_leaves(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Yield the path of each tensor (compared as bits) and plain value that differs between two nested dicts."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from different_leaves(one.get(key), other.get(key), f"{path}/{key}" if path else str(key))
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same_kind = (one.shape, one.dtype) == (other.shape, other.dtype)
        if not same_kind or not torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
            yield path
    elif one != other:
        yield path


def newest_step(run: Path) -> int | None:
    """Return the step of the newest checkpoint of a run, or None."""
    return max(CheckpointDirectory(run / "checkpoints").steps(), default=None)
