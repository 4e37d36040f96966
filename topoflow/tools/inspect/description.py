"""One checkpoint as plain values, and as text."""

import hashlib
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from topoflow.checkpoint.file import MANIFEST, STATE, read_checkpoint, read_manifest, state_record
from topoflow.errors import ResumeRefused
from topoflow.tools.inspect.text import brief, fact, number, table

NOT_OURS = (KeyError, TypeError, AttributeError, ValueError, IndexError)
"""What a state of our format, but with other contents than we write, makes the code that looks into it raise."""


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """A checkpoint as plain values: `whole`, and what is in it, or `damage` and what can be known all the same.

    Raises:
        MissingPath: no such folder.
    """
    about = {"path": str(folder), "files": {name: _size(folder / name) for name in (STATE, MANIFEST)}}
    about["written"] = _written(folder / STATE)
    try:
        found = {**about, "whole": True, **_describe_state(read_checkpoint(folder))}
        show_checkpoint(found)  # what cannot be shown is not laid out as ours either
        return found
    except ResumeRefused as refusal:
        damage = str(refusal)
    except NOT_OURS as error:
        damage = f"checkpoint {folder}: {STATE} is not laid out as ours are: {type(error).__name__}: {error}"
    return {**about, "whole": False, "damage": damage, "manifest": _describe_manifest(folder)}


def show_checkpoint(about: dict[str, Any], tables: bool = True) -> list[str]:
    """The text of what `describe_checkpoint` returns; `tables`: with every parameter and buffer."""
    lines = [f"checkpoint {about['path']}"]
    if not about["whole"]:
        return lines + _show_damaged(about)
    size = about["files"][STATE]
    lines += fact("whole", f"{STATE} of {size:,} bytes has the content hashes of {MANIFEST}, and that its own")
    lines += fact("format", f"{about['format']}, written {about['written']}")
    lines += _show_progress(about["progress"])
    for name in ("software", "random", "scheduler"):
        lines += fact(name, brief(about[name]))
    lines += _show_data(about["data"])
    lines += fact("config", f"sha256 {about['config_sha256'][:16]}")
    for section, values in about["config"].items():
        lines += fact(f"  {section}", ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items()))
    lines += _show_certificate(about["certificate"])
    lines += ["", *_show_groups(about["groups"])]
    return lines + (_show_tensors(about) if tables else [])


def groups_of(state: dict[str, Any]) -> dict[str, str]:
    """The parameter group of each parameter, by name."""
    return {name: group["name"] for group in state["optimizer"]["groups"] for name in group["params"]}


def _describe_state(state: dict[str, Any]) -> dict[str, Any]:
    group_of, moments = groups_of(state), state["optimizer"]["state"]
    tensors = {name: _describe_tensor(tensor) for name, tensor in state["model"].items()}
    parameters = [
        {"name": name, "group": group, **tensors[name], **_describe_moments(moments.get(name))}
        for name, group in group_of.items()
    ]
    return {
        "format": ".".join(map(str, state["format"])),
        **{key: state[key] for key in ("progress", "software", "random", "scheduler", "data", "config")},
        "config_sha256": hashlib.sha256(json.dumps(state["config"], sort_keys=True).encode()).hexdigest(),
        "certificate": state.get("certificate"),
        "groups": [_describe_group(group, tensors) for group in state["optimizer"]["groups"]],
        "parameters": parameters,
        "buffers": [{"name": name, **tensor} for name, tensor in tensors.items() if name not in group_of],
    }


def _describe_group(group: dict[str, Any], tensors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    settings = {key: value for key, value in group.items() if key != "params"}
    names = group["params"]
    return {**settings, "tensors": len(names), "elements": sum(tensors[name]["elements"] for name in names)}


def _describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    """std: over all elements (not of a sample)."""
    values = tensor.double()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "elements": tensor.numel(),
        "mean": _finite(values.mean()),
        "std": _finite(values.std(correction=0)),
        "not_finite": int((~values.isfinite()).sum()),
    }


def _describe_moments(moments: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    """Step count, and Euclidean norms of the two moments; nothing for a parameter that was never updated."""
    if moments is None:
        return {"step": None, "exp_avg_norm": None, "exp_avg_sq_norm": None}
    norms = {f"{key}_norm": _finite(moments[key].double().norm()) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": int(moments["step"]), **norms}


def _describe_manifest(folder: Path) -> dict[str, Any] | None:
    """What the manifest promises, if the manifest itself is whole."""
    try:
        manifest = read_manifest(folder)
        shapes = [entry["shape"] for entry in manifest["tensors"].values()]
        return {
            "format": ".".join(map(str, manifest["format"])),
            "step": manifest["step"],
            "bytes": state_record(manifest, folder).size,
            "tensors": len(shapes),
            "elements": sum(map(math.prod, shapes)),
        }
    except (ResumeRefused, OSError, *NOT_OURS):
        return None


def _show_damaged(about: dict[str, Any]) -> list[str]:
    lines = fact("damaged", about["damage"])
    for name, size in about["files"].items():
        lines += fact(name, "no such file" if size is None else f"{size:,} bytes")
    lines += fact("written", about["written"])
    manifest = about["manifest"]
    if manifest is None:
        return lines + fact("manifest", "says nothing that can be relied on")
    return lines + fact(
        "manifest",
        f"is whole: format {manifest['format']}, step {manifest['step']}, {STATE} of {manifest['bytes']:,} bytes with "
        f"{manifest['tensors']} tensors of {manifest['elements']:,} elements",
    )


def _show_progress(progress: dict[str, Any]) -> list[str]:
    now = f"step {progress['step']} ({progress['updates']} updates)"
    now += f", epoch {progress['epoch']}, {progress['samples_in_epoch']} samples of it done"
    lines = fact("progress", now)
    if progress["validation_loss"] is None:
        return lines + fact("validation loss", "none yet")
    last, best = (float(progress[key]) for key in ("validation_loss", "best_validation_loss"))
    since = f"{progress['validations_since_best']} validation(s) since"
    return lines + fact("validation loss", f"{last!r}; best {best!r} at step {progress['best_step']}, {since}")


def _show_data(data: dict[str, Any]) -> list[str]:
    lines = ["data"]
    for name, value in data.items():
        if name == "normalization":
            value = ", ".join(f"{variable} {mean:g} +- {deviation:g}" for variable, (mean, deviation) in value.items())
        lines += fact(f"  {name.replace('_fingerprint', ' hash')}", str(value))
    return lines


def _show_certificate(certificate: Any) -> list[str]:
    if not isinstance(certificate, dict):
        return fact("certificate", "none: this program will not resume from it")
    lines = ["certificate"]
    for name, value in certificate.items():
        many = isinstance(value, dict) and len(value) > 12
        text = f"{len(value)} entries, the first {brief(dict(list(value.items())[:1]))}" if many else brief(value)
        lines += fact(f"  {name}", text)
    return lines


def _show_groups(groups: list[dict[str, Any]]) -> list[str]:
    header = ("group", "tensors", "elements", "rate", "initial rate", "weight decay", "betas", "eps")
    rows = [
        (
            group["name"],
            f"{group['tensors']}",
            f"{group['elements']:,}",
            f"{group['lr']:.6e}",
            f"{group['initial_lr']:g}",
            f"{group['weight_decay']:g}",
            f"{group['betas']}",
            f"{group['eps']:g}",
        )
        for group in groups
    ]
    rows.append(("all", str(sum(g["tensors"] for g in groups)), f"{sum(g['elements'] for g in groups):,}", *[""] * 5))
    return table(header, rows)


def _show_tensors(about: dict[str, Any]) -> list[str]:
    columns, lines = ("dtype", "shape", "elements", "mean", "std"), []
    for group in (group["name"] for group in about["groups"]):
        rows = [(*_cells(p), *_moment_cells(p)) for p in about["parameters"] if p["group"] == group]
        lines += ["", *table((f"parameters: {group}", *columns, "step", "|avg|", "|avg_sq|"), rows)]
    if about["buffers"]:
        lines += ["", *table(("buffers", *columns), [_cells(buffer) for buffer in about["buffers"]])]
    for tensor in (*about["parameters"], *about["buffers"]):
        if tensor["not_finite"]:
            lines.append(f"not finite: {tensor['not_finite']} of {tensor['elements']} elements of {tensor['name']}")
    return lines


def _cells(tensor: dict[str, Any]) -> tuple[str, ...]:
    mean, std = number(tensor["mean"]), number(tensor["std"])
    return (tensor["name"], tensor["dtype"], f"{tensor['shape']}", f"{tensor['elements']:,}", mean, std)


def _moment_cells(parameter: dict[str, Any]) -> tuple[str, ...]:
    step = "" if parameter["step"] is None else str(parameter["step"])
    return (step, number(parameter["exp_avg_norm"]), number(parameter["exp_avg_sq_norm"]))


def _finite(value: torch.Tensor) -> float | None:
    return value.item() if math.isfinite(value) else None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _written(path: Path) -> str:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except OSError:
        return "unknown"
