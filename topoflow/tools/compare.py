"""`topoflow inspect A B`: compare two checkpoints by name, tensors as bits and everything else as values."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from topoflow.checkpoint.directory import find_checkpoint
from topoflow.checkpoint.file import read_checkpoint
from topoflow.errors import ResumeRefused
from topoflow.text import format_table
from topoflow.tools.inspect import (
    UNEXPECTED_CONTENTS,
    Findings,
    checkpoints_of,
    describe_checkpoint,
    format_fact,
    format_number,
    format_value,
    groups_by_parameter,
)

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
KINDS = ("weight", "buffer", *MOMENTS)
SETTINGS = ("groups", "scheduler", "progress", "random", "data", "config", "software")
MOST_ROWS = 20


def compare(path_a: Path, path_b: Path) -> Findings:
    """Compare two checkpoints, of a run directory its last one; if one is damaged, describe that one instead.

    In the report, a relative difference is the largest absolute one over the largest magnitude in either tensor.

    Raises:
        MissingPath: a path does not exist, or holds no checkpoint.
        ResumeRefused: the two cannot be compared.
    """
    a, b = _find_one(path_a), _find_one(path_b)
    try:
        report = {"a": str(a), "b": str(b), **_compare_states(read_checkpoint(a), read_checkpoint(b))}
    except (ResumeRefused, *UNEXPECTED_CONTENTS) as error:
        for findings in map(describe_checkpoint, (a, b)):
            if findings.damage is not None:
                return findings
        raise ResumeRefused(f"{a} and {b} cannot be compared: {type(error).__name__}: {error}") from None
    report["verdict"] = _verdict(report)
    return Findings(report, _show_comparison(report))


def _find_one(path: Path) -> Path:
    directory = checkpoints_of(path)
    if directory is None:
        return find_checkpoint(path)
    steps = directory.steps()
    return directory.pointer("last") or (directory.folder(steps[-1]) if steps else find_checkpoint(path))


def _compare_states(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    in_a, in_b = _named_tensors(a), _named_tensors(b)
    common = [key for key in in_a if key in in_b]
    layouts = {key: (_layout(in_a[key]), _layout(in_b[key])) for key in common}
    settings_a, settings_b = _settings(a), _settings(b)
    return {
        "only_in_a": [" ".join(key) for key in in_a if key not in in_b],
        "only_in_b": [" ".join(key) for key in in_b if key not in in_a],
        "unlike": [f"{' '.join(key)}: {one} | {other}" for key, (one, other) in layouts.items() if one != other],
        "compared": {kind: sum(key[0] == kind for key in common) for kind in KINDS},
        "differing": [
            {"kind": key[0], "name": key[1], **_difference(in_a[key], in_b[key])}
            for key, (one, other) in layouts.items()
            if one == other and not _same_bits(in_a[key], in_b[key])
        ],
        "settings": {name: list(_different_values(settings_a[name], settings_b[name])) for name in SETTINGS},
        "tensors": len(in_a.keys() | in_b.keys()),
    }


def _named_tensors(state: dict[str, Any]) -> dict[tuple[str, str], torch.Tensor]:
    """Return all tensors of a checkpoint by kind and name."""
    parameters = groups_by_parameter(state)
    named = {("weight" if name in parameters else "buffer", name): tensor for name, tensor in state["model"].items()}
    for name, moments in state["optimizer"]["state"].items():
        named.update({(kind, name): moments[kind] for kind in MOMENTS})
    return named


def _settings(state: dict[str, Any]) -> dict[str, Any]:
    """Return everything that is compared as plain values."""
    groups = {group["name"]: group for group in state["optimizer"]["groups"]}
    settings = {name: {k: v for k, v in group.items() if k not in ("name", "params")} for name, group in groups.items()}
    return {
        "groups": {**settings, "group of": groups_by_parameter(state)},
        **{name: state[name] for name in SETTINGS[1:]},
    }


def _different_values(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Yield `key: value | value` for each difference between two nested dicts."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            below = f"{path}.{key}" if path else str(key)
            yield from _different_values(a.get(key, "absent"), b.get(key, "absent"), below)
    elif json.dumps(a) != json.dumps(b):
        yield f"{path}: {format_value(a, 45)} | {format_value(b, 45)}"


def _layout(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def _difference(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Return the largest absolute difference, also relative to the largest magnitude in a or b; inf if not finite.

    Both are 0 where bits differ and values do not (0 and -0).
    """
    a, b = a.double().reshape(-1), b.double().reshape(-1)
    differs = (a != b) & ~(a.isnan() & b.isnan())
    if not differs.any():
        return {"absolute": 0.0, "relative": 0.0}
    absolute = (a - b)[differs].abs().max().item()
    if not math.isfinite(absolute):
        return {"absolute": math.inf, "relative": math.inf}
    both = torch.cat([a, b])
    return {"absolute": absolute, "relative": absolute / both[both.isfinite()].abs().max().item()}


def _verdict(report: dict[str, Any]) -> str:
    count = sum(len(report[key]) for key in ("only_in_a", "only_in_b", "unlike", "differing"))
    if count == 0:
        others = [name for name, different in report["settings"].items() if different]
        return f"same bits in all {report['tensors']} tensors" + (f"; {', '.join(others)} differ" if others else "")
    verdict = f"{count} of {report['tensors']} tensors differ"
    if not report["differing"]:
        return verdict
    worst = max(report["differing"], key=lambda item: item["relative"])
    size = format_number(worst["relative"])
    return f"{verdict}, largest relative difference {size} in {worst['kind']} {worst['name']}"


def _show_comparison(report: dict[str, Any]) -> list[str]:
    lines = [f"A  {report['a']}", f"B  {report['b']}"]
    for side in ("a", "b"):
        if report[f"only_in_{side}"]:
            lines += format_fact(f"only in {side.upper()}", ", ".join(report[f"only_in_{side}"]))
    for line in report["unlike"]:
        lines += format_fact("other layout", line)
    differing = sorted(report["differing"], key=lambda item: item["relative"], reverse=True)
    rows = []
    for kind, compared in report["compared"].items():
        of_kind = [item for item in differing if item["kind"] == kind]
        worst = (format_number(of_kind[0]["relative"]), of_kind[0]["name"]) if of_kind else ("", "")
        rows.append((kind, f"{compared}", f"{len(of_kind)}", *worst))
    lines += ["", *format_table(("tensors", "in both", "differ", "largest relative", "in"), rows)]
    if differing:
        rows = [
            (f"{item['kind']} {item['name']}", format_number(item["absolute"]), format_number(item["relative"]))
            for item in differing[:MOST_ROWS]
        ]
        lines += ["", *format_table(("differing", "largest absolute", "largest relative"), rows)]
    if len(differing) > MOST_ROWS:
        lines.append(f"... and {len(differing) - MOST_ROWS} smaller differences (all with --json)")
    for name, different in report["settings"].items():
        lines += ["", f"{name}: " + ("A | B" if different else "same"), *(f"  {line}" for line in different)]
    return [*lines, "", report["verdict"]]
