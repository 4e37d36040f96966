"""Two checkpoints, compared by name: tensors as bits, everything else as values."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from topoflow.checkpoint.file import read_checkpoint
from topoflow.errors import ResumeRefused
from topoflow.tools.inspect.description import NOT_OURS, groups_of
from topoflow.tools.inspect.text import brief, fact, number, table

KINDS = ("weight", "buffer", "exp_avg", "exp_avg_sq", "step")
SETTINGS = ("groups", "scheduler", "progress", "random", "data", "config", "software")
MOST_ROWS = 20


def compare_checkpoints(a: Path, b: Path) -> dict[str, Any]:
    """How checkpoint b differs from a, as plain values; `verdict` says it in a line.

    A relative difference is the largest absolute one in a tensor over the largest magnitude in either; None stands for
    one that is not finite.

    Raises:
        MissingPath, ResumeRefused: one of the two cannot be read.
    """
    states = [read_checkpoint(folder) for folder in (a, b)]
    try:
        report = {"a": str(a), "b": str(b), **_compare_states(*states)}
    except NOT_OURS as error:
        raise ResumeRefused(f"{a} or {b}: not laid out as ours are: {type(error).__name__}: {error}") from None
    return {**report, "verdict": _verdict(report)}


def show_comparison(report: dict[str, Any]) -> list[str]:
    """The text of what `compare_checkpoints` returns; its last line is the verdict."""
    lines = [f"A  {report['a']}", f"B  {report['b']}"]
    for side in ("a", "b"):
        if report[f"only_in_{side}"]:
            lines += fact(f"only in {side.upper()}", ", ".join(report[f"only_in_{side}"]))
    for line in report["unlike"]:
        lines += fact("unlike", line)
    lines += ["", *_show_kinds(report)]
    if report["differing"]:
        lines += ["", *_show_differing(report["differing"])]
    for name, different in report["settings"].items():
        lines += ["", f"{name}: " + ("A | B" if different else "the same"), *(f"  {line}" for line in different)]
    return [*lines, "", report["verdict"]]


def _compare_states(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = _named_tensors(one), _named_tensors(other)
    common = [key for key in ours if key in theirs]
    unlike = [key for key in common if _layout(ours[key]) != _layout(theirs[key])]
    differing = [
        {"kind": kind, "name": name, **_difference(ours[kind, name], theirs[kind, name])}
        for kind, name in common
        if (kind, name) not in unlike and not _same_bits(ours[kind, name], theirs[kind, name])
    ]
    values, others = _settings(one), _settings(other)
    return {
        "only_in_a": [" ".join(key) for key in ours if key not in theirs],
        "only_in_b": [" ".join(key) for key in theirs if key not in ours],
        "unlike": [f"{' '.join(key)}: {_layout(ours[key])} | {_layout(theirs[key])}" for key in unlike],
        "compared": {kind: sum(key[0] == kind for key in common) for kind in KINDS},
        "differing": differing,
        "settings": {name: list(_different_values(values[name], others[name])) for name in SETTINGS},
        "tensors": len(ours.keys() | theirs.keys()),
    }


def _named_tensors(state: dict[str, Any]) -> dict[tuple[str, str], torch.Tensor]:
    parameters = groups_of(state)
    named = {("weight" if name in parameters else "buffer", name): tensor for name, tensor in state["model"].items()}
    for name, moments in state["optimizer"]["state"].items():
        named.update({(kind, name): moments[kind] for kind in KINDS[2:]})
    return named


def _settings(state: dict[str, Any]) -> dict[str, Any]:
    """What is compared as values."""
    groups = {group["name"]: group for group in state["optimizer"]["groups"]}
    settings = {name: {k: v for k, v in group.items() if k not in ("name", "params")} for name, group in groups.items()}
    return {"groups": {**settings, "group of": groups_of(state)}, **{name: state[name] for name in SETTINGS[1:]}}


def _different_values(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """`key: value | value` for all that differ in two nested dicts."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            below = f"{path}.{key}" if path else str(key)
            yield from _different_values(one.get(key, "absent"), other.get(key, "absent"), below)
    elif json.dumps(one) != json.dumps(other):
        yield f"{path}: {brief(one, 45)} | {brief(other, 45)}"


def _layout(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*as_bytes)


def _difference(one: torch.Tensor, other: torch.Tensor) -> dict[str, float | None]:
    """Largest absolute difference, and relative to the largest magnitude. Bits may differ where values do not (-0)."""
    x, y = one.double().reshape(-1), other.double().reshape(-1)
    differs = (x != y) & ~(x.isnan() & y.isnan())
    if not differs.any():
        return {"absolute": 0.0, "relative": 0.0}
    absolute = (x - y)[differs].abs().max().item()
    if not math.isfinite(absolute):
        return {"absolute": None, "relative": None}
    both = torch.cat([x, y])
    return {"absolute": absolute, "relative": absolute / both[both.isfinite()].abs().max().item()}


def _size_of(difference: dict[str, Any]) -> float:
    return math.inf if difference["relative"] is None else difference["relative"]


def _verdict(report: dict[str, Any]) -> str:
    count = sum(len(report[key]) for key in ("only_in_a", "only_in_b", "unlike", "differing"))
    if count == 0:
        others = [name for name, different in report["settings"].items() if different]
        return f"same bits in all {report['tensors']} tensors" + (f"; {', '.join(others)} differ" if others else "")
    verdict = f"{count} of {report['tensors']} tensors differ"
    if not report["differing"]:
        return verdict
    worst = max(report["differing"], key=_size_of)
    size = number(worst["relative"]) or "not finite"
    return f"{verdict}, largest relative difference {size} in {worst['kind']} {worst['name']}"


def _show_kinds(report: dict[str, Any]) -> list[str]:
    rows = []
    for kind, compared in report["compared"].items():
        differing = [item for item in report["differing"] if item["kind"] == kind]
        worst = max(differing, key=_size_of) if differing else None
        largest = "" if worst is None else (number(worst["relative"]) or "not finite")
        rows.append((kind, str(compared), str(len(differing)), largest, worst["name"] if worst else ""))
    return table(("tensors", "in both", "differ", "largest relative", "in"), rows)


def _show_differing(differing: list[dict[str, Any]]) -> list[str]:
    largest_first = sorted(differing, key=_size_of, reverse=True)
    rows = [
        (f"{item['kind']} {item['name']}", number(item["absolute"]), number(item["relative"]))
        for item in largest_first[:MOST_ROWS]
    ]
    left_out = len(differing) - len(rows)
    lines = table(("differing", "largest absolute", "largest relative"), rows)
    return lines + ([f"... and {left_out} more, each by less (all with --json)"] if left_out else [])
