"""`topoflow inspect PATH`: report what a checkpoint or a run holds, whole or damaged."""

import hashlib
import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from topoflow.checkpoint.directory import CheckpointDirectory, find_checkpoint
from topoflow.checkpoint.file import MANIFEST, STATE, read_checkpoint, read_manifest
from topoflow.errors import MissingPath, ResumeRefused
from topoflow.text import format_table, shorten

WIDTH, LABEL_WIDTH = 120, 21
HEADINGS = {"exp_avg_norm": "|avg|", "exp_avg_sq_norm": "|avg_sq|"}
POINTERS = ("last", "best")
UNEXPECTED_CONTENTS = (KeyError, TypeError, AttributeError, ValueError, IndexError)
"""What the functions below raise on a state that has our format but other contents than we write."""


@dataclass(frozen=True)
class Findings:
    """Results as plain values (`report`) and as text (`lines`); `damage`: one line, None if everything is whole."""

    report: dict[str, Any]
    lines: list[str]
    damage: str | None = None

    def as_json(self) -> str:
        """Return the report as JSON, with null for a number that is not finite."""
        return json.dumps(_replace_not_finite(self.report), indent=1, allow_nan=False, default=str)


def inspect(path: Path) -> Findings:
    """Describe a checkpoint (its folder or its state.pt) or a run directory.

    Raises:
        MissingPath: the path does not exist, or holds no checkpoint.
        ResumeRefused: the path is another kind of file, or a folder that cannot be read.
    """
    directory = checkpoints_of(path)
    return describe_checkpoint(find_checkpoint(path)) if directory is None else _describe_run(directory)


def checkpoints_of(path: Path) -> CheckpointDirectory | None:
    """Return the checkpoint directory if `path` is one or is a run directory, else None."""
    # os.path returns False where Path raises: on a folder that we may not read
    if os.path.isdir(path / "checkpoints"):
        return CheckpointDirectory(path / "checkpoints")
    directory = CheckpointDirectory(path)
    return directory if os.path.exists(path) and directory.traces() else None


def describe_checkpoint(folder: Path, tables: bool = True) -> Findings:
    """Describe a checkpoint; `tables`: list every parameter and buffer in the text.

    Raises:
        MissingPath: the folder does not exist.
    """
    report: dict[str, Any] = {"path": str(folder), "files": {name: _size(folder / name) for name in (STATE, MANIFEST)}}
    report["written"] = _time_written(folder / STATE)
    try:
        found = {**report, "whole": True, **_describe_state(read_checkpoint(folder))}
        return Findings(found, _show_checkpoint(found) + (_show_tensors(found) if tables else []))
    except ResumeRefused as refusal:
        damage = str(refusal)
    except UNEXPECTED_CONTENTS as error:
        damage = f"checkpoint {folder}: {STATE} has unexpected contents: {type(error).__name__}: {error}"
    report |= {"whole": False, "damage": damage, "manifest": _describe_manifest(folder)}
    return Findings(report, _show_damaged(report), damage)


def _describe_state(state: dict[str, Any]) -> dict[str, Any]:
    group_of, moments = groups_by_parameter(state), state["optimizer"]["state"]
    tensors = {name: _describe_tensor(tensor) for name, tensor in state["model"].items()}
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"tensors": len(group["params"]), "elements": sum(tensors[name]["elements"] for name in group["params"])}
        for group in state["optimizer"]["groups"]
    ]
    return {
        "format": ".".join(map(str, state["format"])),
        **{key: state[key] for key in ("progress", "software", "random", "scheduler", "data", "config")},
        "config_sha256": hashlib.sha256(json.dumps(state["config"], sort_keys=True).encode()).hexdigest(),
        "certificate": state.get("certificate"),
        "groups": groups,
        "parameters": [
            {"name": name, "group": group, **tensors[name], **_describe_moments(moments.get(name))}
            for name, group in group_of.items()
        ],
        "buffers": [{"name": name, **tensor} for name, tensor in tensors.items() if name not in group_of],
    }


def groups_by_parameter(state: dict[str, Any]) -> dict[str, str]:
    """Return the parameter group of each parameter, by name."""
    return {name: group["name"] for group in state["optimizer"]["groups"] for name in group["params"]}


def _describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    values = tensor.double()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "elements": tensor.numel(),
        "mean": values.mean().item(),
        "std": values.std(correction=0).item(),
        "not_finite": int((~values.isfinite()).sum()),
    }


def _describe_moments(moments: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    """Return the number of updates and the Euclidean norms of the moments; None for a parameter never updated."""
    if moments is None:
        return {"step": None, "exp_avg_norm": None, "exp_avg_sq_norm": None}
    norms = {f"{key}_norm": moments[key].double().norm().item() for key in ("exp_avg", "exp_avg_sq")}
    return {"step": int(moments["step"]), **norms}


def _describe_manifest(folder: Path) -> dict[str, Any] | None:
    """Return what the manifest lists, None if the manifest is damaged too."""
    try:
        manifest = read_manifest(folder)
        shapes = [entry["shape"] for entry in manifest["tensors"].values()]
        return {
            "format": ".".join(map(str, manifest["format"])),
            "step": manifest["step"],
            "bytes": manifest["files"][STATE]["size"],
            "tensors": len(shapes),
            "elements": sum(map(math.prod, shapes)),
        }
    except (ResumeRefused, OSError, *UNEXPECTED_CONTENTS):
        return None


def _show_damaged(report: dict[str, Any]) -> list[str]:
    lines = [f"checkpoint {report['path']}", *format_fact("damaged", report["damage"])]
    for name, size in report["files"].items():
        lines += format_fact(name, "missing or not a file" if size is None else f"{size:,} bytes")
    lines += format_fact("written", report["written"])
    manifest = report["manifest"]
    return lines + format_fact("manifest", "damaged or missing" if manifest is None else format_value(manifest))


def _show_checkpoint(report: dict[str, Any]) -> list[str]:
    lines = [f"checkpoint {report['path']}"]
    lines += format_fact("whole", f"{STATE} ({report['files'][STATE]:,} bytes) and {MANIFEST} match their hashes")
    lines += format_fact("format", f"{report['format']}, written {report['written']}")
    lines += _show_progress(report["progress"])
    for name in ("software", "random", "scheduler"):
        lines += format_fact(name, format_value(report[name]))
    lines.append("data")
    for name, value in report["data"].items():
        if name == "normalization":
            value = ", ".join(f"{variable} {mean:g} +- {std:g}" for variable, (mean, std) in value.items())
        lines += format_fact(f"  {name.replace('_fingerprint', ' hash')}", str(value))
    lines += format_fact("config", f"sha256 {report['config_sha256'][:16]}")
    for section, values in report["config"].items():
        lines += format_fact(f"  {section}", ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items()))
    if isinstance(report["certificate"], dict):
        lines.append("certificate")
        for name, value in report["certificate"].items():
            lines += format_fact(f"  {name}", format_value(value, most_entries=12))
    else:
        lines += format_fact("certificate", "missing: training will not resume from this checkpoint")
    total = {key: sum(group[key] for group in report["groups"]) for key in ("tensors", "elements")}
    columns = ("tensors", "elements", "lr", "initial_lr", "weight_decay", "betas", "eps")
    return [*lines, "", *_show_table("group", [*report["groups"], {"name": "all", **total}], columns, digits=6)]


def _show_progress(progress: dict[str, Any]) -> list[str]:
    now = f"step {progress['step']} ({progress['updates']} updates), epoch {progress['epoch']}"
    lines = format_fact("progress", f"{now}, {progress['samples_in_epoch']} samples into the epoch")
    if progress["validation_loss"] is None:
        return lines + format_fact("validation loss", "none yet")
    last, best = (float(progress[key]) for key in ("validation_loss", "best_validation_loss"))
    since = f"{progress['validations_since_best']} validation(s) since"
    return lines + format_fact("validation loss", f"{last!r}; best {best!r} at step {progress['best_step']}, {since}")


def _show_tensors(report: dict[str, Any]) -> list[str]:
    columns, lines = ("dtype", "shape", "elements", "mean", "std"), []
    for group in (group["name"] for group in report["groups"]):
        parameters = [parameter for parameter in report["parameters"] if parameter["group"] == group]
        lines += ["", *_show_table(f"parameters: {group}", parameters, (*columns, "step", *HEADINGS))]
    if report["buffers"]:
        lines += ["", *_show_table("buffers", report["buffers"], columns)]
    for tensor in (*report["parameters"], *report["buffers"]):
        if tensor["not_finite"]:
            lines.append(f"not finite: {tensor['not_finite']} of {tensor['elements']} elements of {tensor['name']}")
    return lines


def _describe_run(directory: CheckpointDirectory) -> Findings:
    """Read and verify all checkpoints of a run, and its pointers; those that a running job deletes are left out.

    Raises:
        MissingPath: there is no checkpoint, nor a trace of one.
    """
    if not directory.traces():
        raise MissingPath(f"{directory.path}: holds no checkpoint: expected a checkpoint or a run directory")
    pointers, damage = {}, []
    for name in POINTERS:
        try:
            target = directory.pointer(name)
            pointers[name] = None if target is None else target.name
        except ResumeRefused as refusal:
            pointers[name] = "damaged"
            damage.append(str(refusal))
    found = {}
    for folder in map(directory.folder, directory.steps()):
        try:
            findings = describe_checkpoint(folder, tables=False)
        except MissingPath:
            continue
        if findings.damage is None or os.path.exists(folder):
            found[folder.name] = findings
    damage += [findings.damage for findings in found.values() if findings.damage is not None]
    report = {
        "run": str(directory.path),
        "pointers": pointers,
        "checkpoints": [findings.report for findings in found.values()],
        "others": sorted(e.name for e in directory.path.iterdir() if e.name not in {*found, *POINTERS}),
        "damage": damage,
    }
    lines = _show_run(report)
    for name in found:
        if name in pointers.values():
            lines += ["", *found[name].lines]
    return Findings(report, lines, shorten(damage, 1) if damage else None)


def _show_run(report: dict[str, Any]) -> list[str]:
    rows = [
        {
            "name": Path(checkpoint["path"]).name,
            **checkpoint.get("progress", {}),
            "bytes": checkpoint["files"][STATE],
            "written": checkpoint["written"],
            "state": "whole" if checkpoint["whole"] else "DAMAGED",
        }
        for checkpoint in report["checkpoints"]
    ]
    for row in rows:
        row["pointer"] = ", ".join(name for name, target in report["pointers"].items() if target == row["name"])
    columns = ("step", "epoch", "validation_loss", "bytes", "written", "state", "pointer")
    lines = [f"checkpoints in {report['run']}", "", *_show_table("checkpoint", rows, columns, digits=6)]
    lines += [f"pointer {name}: missing" for name, target in report["pointers"].items() if target is None]
    lines += [f"other entries: {', '.join(report['others'])}"] if report["others"] else []
    return lines + [f"damaged: {damage}" for damage in report["damage"]]


def _show_table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], digits: int = 3) -> list[str]:
    """Return a table of the values that `rows` have for `columns`; `digits`: significant ones of a float."""
    cells = [[row["name"], *(format_number(row.get(key), digits) for key in columns)] for row in rows]
    return format_table((title, *(HEADINGS.get(column, column) for column in columns)), cells)


def format_fact(label: str, text: str) -> list[str]:
    """Return a label and its text, wrapped and indented."""
    wrapped = textwrap.wrap(text, WIDTH - LABEL_WIDTH, break_on_hyphens=False) or [""]
    return [f"{'' if i else label:<{LABEL_WIDTH}}{line}".rstrip() for i, line in enumerate(wrapped)]


def format_value(value: Any, longest: int = 64, most_entries: int | None = None) -> str:
    """Return a plain value on one line, with texts and lists cut; of a dict that is too large, only the first entry."""
    if isinstance(value, dict):
        entries = [f"{key} {format_value(item, longest)}" for key, item in value.items()]
        return shorten(entries, len(entries) if most_entries is None or len(entries) <= most_entries else 1)
    if isinstance(value, list | tuple):
        return f"[{shorten((format_value(item, longest) for item in value), 4)}]"
    text = str(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def format_number(value: Any, digits: int = 3) -> str:
    """Return the text of a table cell: a float with some significant digits, an integer with thousands separators."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _replace_not_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _replace_not_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_not_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _time_written(path: Path) -> str:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except OSError:
        return "unknown"
