"""`topoflow inspect A [B]`: report what a checkpoint or a run holds, whole or damaged; compare two checkpoints."""

import hashlib
import json
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from topoflow.checkpoint.directory import POINTERS, CheckpointDirectory, find_checkpoint, find_directory
from topoflow.checkpoint.file import MANIFEST, STATE, map_tensors, read_checkpoint, read_manifest
from topoflow.checkpoint.fingerprint import MOMENTS, captured_tensors
from topoflow.checkpoint.state import groups_by_parameter
from topoflow.data.contents import Contents
from topoflow.data.grid import Grid
from topoflow.errors import ResumeRefused
from topoflow.text import format_table, shorten

WIDTH, LABEL_WIDTH = 120, 21
HEADINGS = {"exp_avg_norm": "|avg|", "exp_avg_sq_norm": "|avg_sq|"}
COMPARED = ("scheduler", "progress", "random", "data", "config", "software")
MOST_DIFFERENCES = 20
PROGRESS = (
    "step {step} ({updates} updates), epoch {epoch}, {samples_in_epoch} samples into the epoch; validation loss "
    "{validation_loss}, best {best_validation_loss} at step {best_step}, {validations_since_best} validation(s) since"
)
UNEXPECTED_CONTENTS = (KeyError, TypeError, AttributeError, ValueError, IndexError)
"""What the functions below raise on a state that has our format but other contents than we write."""


@dataclass(frozen=True)
class Findings:
    """Results as plain values (`report`) and as text (`lines`); `damage`: one line, None if everything is intact."""

    report: dict[str, Any]
    lines: list[str]
    damage: str | None = None

    def as_json(self) -> str:
        """Return the report as JSON, with null for a number that is not finite."""
        plain = json.loads(json.dumps(self.report, default=str), parse_constant=lambda not_finite: None)
        return json.dumps(plain, indent=1)


def inspect(path: Path) -> Findings:
    """Describe a checkpoint (its folder or its state.pt) or a run directory.

    Raises:
        MissingPath: the path does not exist, or holds no checkpoint.
        ResumeRefused: the path is another kind of file, or a folder that cannot be read.
    """
    directory = find_directory(path)
    return _describe_run(directory) if directory.traces() else _describe_checkpoint(find_checkpoint(path))


def compare(path_a: Path, path_b: Path) -> Findings:
    """Compare two checkpoints by name, tensors as bits; of a run its last one. If one is damaged, describe that one.

    In the report, a relative difference is the largest absolute one over the largest magnitude in either tensor.

    Raises:
        MissingPath: a path does not exist, or holds no checkpoint.
        ResumeRefused: the two cannot be compared.
    """
    a, b = (find_checkpoint(path, prefer_best=False) for path in (path_a, path_b))
    try:
        report = {"a": str(a), "b": str(b), **_compare_states(read_checkpoint(a), read_checkpoint(b))}
    except (ResumeRefused, *UNEXPECTED_CONTENTS) as error:
        for findings in map(_describe_checkpoint, (a, b)):
            if findings.damage is not None:
                return findings
        raise ResumeRefused(f"{a} and {b} cannot be compared: {type(error).__name__}: {error}") from None
    return Findings(report, _show_comparison(report))


def _describe_checkpoint(folder: Path, tables: bool = True) -> Findings:
    """Describe a checkpoint; `tables`: list every parameter and buffer in the text.

    Raises:
        MissingPath: the folder does not exist.
    """
    stats = {path.name: path.stat() if os.path.isfile(path) else None for path in (folder / STATE, folder / MANIFEST)}
    sizes, state = {name: stat and stat.st_size for name, stat in stats.items()}, stats[STATE]
    written = state and datetime.fromtimestamp(state.st_mtime, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    report: dict[str, Any] = {"path": str(folder), "written": written or "unknown", "files": sizes}
    try:
        found = {**report, "whole": True, **_describe_state(read_checkpoint(folder))}
        return Findings(found, _show_checkpoint(found) + (_show_tensors(found) if tables else []))
    except ResumeRefused as refusal:
        damage = str(refusal)
    except UNEXPECTED_CONTENTS as error:
        damage = f"checkpoint {folder}: {STATE} has unexpected contents: {type(error).__name__}: {error}"
    report |= {"whole": False, "damage": damage, "manifest": _describe_manifest(folder)}
    facts = {"damaged": damage}
    facts |= {name: "missing or not a file" if size is None else f"{size:,} bytes" for name, size in sizes.items()}
    facts |= {"written": report["written"], "manifest": _text(report["manifest"] or "damaged or missing")}
    return Findings(report, [f"checkpoint {folder}", *_show_facts(facts)], damage)


def _describe_state(state: dict[str, Any]) -> dict[str, Any]:
    groups, moments = state["optimizer"]["groups"], state["optimizer"]["state"]
    data = map_tensors(state["data"], _summary)
    if "contents" in data:  # without the hashes of each day
        data["contents"] = Contents.from_dict(data["contents"]).describe()
    if "grid" in data:  # without the position of each cell
        data["grid"] = Grid.from_dict(data["grid"]).describe()
    tensors = {name: {"name": name, **_describe_tensor(tensor)} for name, tensor in state["model"].items()}
    group_of = groups_by_parameter(groups)
    shown_groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"tensors": len(group["params"]), "elements": sum(tensors[name]["elements"] for name in group["params"])}
        for group in groups
    ]
    return {
        "format": ".".join(map(str, state["format"])),
        **{key: state[key] for key in ("progress", "software", "random", "scheduler", "config")},
        "data": data,
        "config_sha256": hashlib.sha256(json.dumps(state["config"], sort_keys=True).encode()).hexdigest(),
        "certificate": state.get("certificate"),
        "groups": shown_groups,
        "parameters": [
            {**tensors[name], "group": group, **_describe_moments(moments.get(name))}
            for name, group in group_of.items()
        ],
        "buffers": [tensor for name, tensor in tensors.items() if name not in group_of],
    }


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
    norms = {f"{key}_norm": moments and moments[key].double().norm().item() for key in MOMENTS[1:]}
    return {"step": moments and int(moments["step"]), **norms}


def _describe_manifest(folder: Path) -> dict[str, Any] | None:
    """Return what the manifest lists, None if the manifest is damaged too."""
    with suppress(ResumeRefused, OSError, *UNEXPECTED_CONTENTS):
        manifest = read_manifest(folder)
        shapes = [entry["shape"] for entry in manifest["tensors"].values()]
        return {
            "format": ".".join(map(str, manifest["format"])),
            "step": manifest["step"],
            "bytes": manifest["files"][STATE]["size"],
            "tensors": len(shapes),
            "elements": sum(map(math.prod, shapes)),
        }


def _describe_run(directory: CheckpointDirectory) -> Findings:
    """Read and verify all checkpoints of a run, and its pointers; those that a running job deletes are left out."""
    pointers, damage, found = {}, [], {}
    for name in POINTERS:
        try:
            target = directory.pointer(name)
            pointers[name] = target and target.name
        except ResumeRefused as refusal:
            pointers[name] = "damaged"
            damage.append(str(refusal))
    for folder in map(directory.folder, directory.steps()):
        with suppress(FileNotFoundError):
            findings = _describe_checkpoint(folder, tables=False)
            if os.path.exists(folder):
                found[folder.name] = findings
    damage += [findings.damage for findings in found.values() if findings.damage is not None]
    report = {
        "run": str(directory.path),
        "pointers": pointers,
        "checkpoints": [findings.report for findings in found.values()],
        "others": sorted(entry for entry in os.listdir(directory.path) if entry not in {*found, *POINTERS}),
        "damage": damage,
    }
    lines = _show_run(report)
    for name in [name for name in found if name in pointers.values()]:
        lines += ["", *found[name].lines]
    return Findings(report, lines, shorten(damage, 1) if damage else None)


def _compare_states(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    in_a, in_b = captured_tensors(a), captured_tensors(b)
    settings_a, settings_b = _settings(a), _settings(b)
    report: dict[str, Any] = {
        "only_in_a": [name for name in in_a if name not in in_b],
        "only_in_b": [name for name in in_b if name not in in_a],
        "other_layout": [],
        "differing": [],
        "settings": {name: list(_different_values(settings_a[name], settings_b[name])) for name in settings_a},
        "tensors": len(in_a.keys() | in_b.keys()),
    }
    for name in [name for name in in_a if name in in_b]:
        pair = in_a[name], in_b[name]
        layouts = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in pair]
        if layouts[0] != layouts[1]:
            report["other_layout"].append(f"{name}: {' | '.join(layouts)}")
        elif not torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in pair)):
            report["differing"].append({"name": name, **_difference(torch.stack(pair).double())})
    return {**report, "verdict": _verdict(report)}


def _difference(both: torch.Tensor) -> dict[str, float]:
    """Return the largest absolute difference of two tensors, [2, ...], also relative to the largest magnitude in them.

    inf if not finite. Both are 0 where only bits differ (0 and -0).
    """
    same = (both[0] == both[1]) | both.isnan().all(dim=0)
    absolute = torch.where(same, 0.0, both[0] - both[1]).abs().max().item()
    if not math.isfinite(absolute):
        return {"absolute": math.inf, "relative": math.inf}
    largest = both.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    return {"absolute": absolute, "relative": absolute / largest if absolute else 0.0}


def _settings(state: dict[str, Any]) -> dict[str, Any]:
    """Return everything that is compared as plain values."""
    groups = {group["name"]: {**group, "params": None} for group in state["optimizer"]["groups"]}
    groups["group of"] = groups_by_parameter(state["optimizer"]["groups"])
    return {"groups": groups, **{name: map_tensors(state[name], _summary) for name in COMPARED}}


def _summary(tensor: torch.Tensor) -> str:
    """Return `float32[2, 3] 1b4f0e98`: type, shape and the begin of the SHA-256 of the contents."""
    kind = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    return f"{kind} {hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:8]}"


def _different_values(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Yield `key: value | value` for each difference between two nested dicts."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            below = f"{path}.{key}" if path else str(key)
            yield from _different_values(a.get(key, "absent"), b.get(key, "absent"), below)
    elif json.dumps(a) != json.dumps(b):
        yield f"{path}: {_text(a, 45)} | {_text(b, 45)}"


def _verdict(compared: dict[str, Any]) -> str:
    count = sum(len(compared[key]) for key in ("only_in_a", "only_in_b", "other_layout", "differing"))
    if count == 0:
        others = [name for name, different in compared["settings"].items() if different]
        differ = f"; {', '.join(others)} differ" if others else ""
        return f"all {compared['tensors']} tensors are bit-identical{differ}"
    verdict = f"{count} of {compared['tensors']} tensors differ"
    if not compared["differing"]:
        return verdict
    worst = max(compared["differing"], key=lambda item: item["relative"])
    return f"{verdict}, largest relative difference {_number(worst['relative'])} in {worst['name']}"


def _show_checkpoint(report: dict[str, Any]) -> list[str]:
    config = {
        section: ", ".join(f"{key}={json.dumps(value)}" for key, value in keys.items())  # in full
        for section, keys in report["config"].items()
    }
    certificate = report["certificate"] or {"missing": "training will not resume from this checkpoint"}
    facts = {
        "whole": f"{STATE} ({report['files'][STATE]:,} bytes) and {MANIFEST} match their hashes",
        "format": f"{report['format']}, written {report['written']}",
        "progress": PROGRESS.format(**report["progress"]),
        **{name: _text(report[name]) for name in ("software", "random", "scheduler")},
        "data": {key: _text(value) for key, value in report["data"].items()},
        f"config (sha256 {report['config_sha256'][:16]})": config,
        "certificate": {key: _text(value, most_entries=12) for key, value in certificate.items()},
    }
    total = {key: sum(group[key] for group in report["groups"]) for key in ("tensors", "elements")}
    columns = ("tensors", "elements", "lr", "initial_lr", "weight_decay", "betas", "eps")
    table = _show_table("group", [*report["groups"], {"name": "all", **total}], columns, digits=6)
    return [f"checkpoint {report['path']}", *_show_facts(facts), "", *table]


def _show_tensors(report: dict[str, Any]) -> list[str]:
    columns, lines = ("dtype", "shape", "elements", "mean", "std"), []
    for group in (group["name"] for group in report["groups"]):
        parameters = [parameter for parameter in report["parameters"] if parameter["group"] == group]
        lines += ["", *_show_table(f"parameters: {group}", parameters, (*columns, "step", *HEADINGS))]
    if report["buffers"]:
        lines += ["", *_show_table("buffers", report["buffers"], columns)]
    return lines + [
        f"not finite: {tensor['not_finite']} of {tensor['elements']} elements of {tensor['name']}"
        for tensor in (*report["parameters"], *report["buffers"])
        if tensor["not_finite"]
    ]


def _show_run(report: dict[str, Any]) -> list[str]:
    pointers, rows = report["pointers"], []
    for checkpoint in report["checkpoints"]:
        name, state = Path(checkpoint["path"]).name, "whole" if checkpoint["whole"] else "DAMAGED"
        pointer = ", ".join(pointer for pointer, target in pointers.items() if target == name)
        facts = {"bytes": checkpoint["files"][STATE], "written": checkpoint["written"], "state": state}
        rows.append({"name": name, **checkpoint.get("progress", {}), **facts, "pointer": pointer})
    columns = ("step", "epoch", "validation_loss", "bytes", "written", "state", "pointer")
    lines = [f"checkpoints in {report['run']}", "", *_show_table("checkpoint", rows, columns, digits=6)]
    lines += [f"pointer {name}: missing" for name, target in pointers.items() if target is None]
    lines += [f"other entries: {', '.join(report['others'])}"] if report["others"] else []
    return lines + [f"damaged: {damage}" for damage in report["damage"]]


def _show_comparison(report: dict[str, Any]) -> list[str]:
    names = {key.replace("_", " "): ", ".join(report[key]) for key in ("only_in_a", "only_in_b", "other_layout")}
    lines = [f"A  {report['a']}", f"B  {report['b']}"]
    lines += _show_facts({label: text for label, text in names.items() if text})
    differing = sorted(report["differing"], key=lambda item: item["relative"], reverse=True)
    if differing:
        lines += ["", *_show_table("differing", differing[:MOST_DIFFERENCES], ("absolute", "relative"))]
    if len(differing) > MOST_DIFFERENCES:
        lines.append(f"... and {len(differing) - MOST_DIFFERENCES} smaller differences (all with --json)")
    for name, different in report["settings"].items():
        lines += ["", f"{name}: " + ("A | B" if different else "same"), *(f"  {line}" for line in different)]
    return [*lines, "", report["verdict"]]


def _show_facts(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    """Return each label and its text, wrapped; a dict of facts is shown below its label."""
    lines = []
    for label, text in facts.items():
        if isinstance(text, dict):
            lines += [label, *_show_facts(text, "  ")]
        else:
            wrapped = textwrap.wrap(text, WIDTH - LABEL_WIDTH, break_on_hyphens=False) or [""]
            labels = [indent + label, *[""] * (len(wrapped) - 1)]
            lines += [
                f"{label:<{LABEL_WIDTH - 1}} {line}".rstrip() for label, line in zip(labels, wrapped, strict=True)
            ]
    return lines


def _show_table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], digits: int = 3) -> list[str]:
    """Return a table of the values that `rows` have for `columns`; `digits`: significant ones of a float."""
    cells = [[row["name"], *(_number(row.get(key), digits) for key in columns)] for row in rows]
    return format_table((title, *(HEADINGS.get(column, column) for column in columns)), cells)


def _text(value: Any, longest: int = 64, most_entries: int | None = None) -> str:
    """Return a plain value on one line, with texts and lists cut; of a dict that is too large, only the first entry."""
    if isinstance(value, dict):
        entries = [f"{key} {_text(item, longest)}" for key, item in value.items()]
        return shorten(entries, len(entries) if most_entries is None or len(entries) <= most_entries else 1)
    if isinstance(value, list | tuple):
        return f"[{shorten((_text(item, longest) for item in value), 4)}]"
    text = str(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _number(value: Any, digits: int = 3) -> str:
    """Return the text of a table cell: a float with some significant digits, an integer with thousands separators."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
