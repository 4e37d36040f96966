"""The optimizer's state in a file, by name. Lightning has it by number, counted through groups; FSDP by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topoflow.errors import ResumeRefused
from topoflow.text import shorten
from topoflow.tools.lightning.names import Weights
from topoflow.tools.lightning.reading import is_kind, show, take

MOMENTS = ("exp_avg", "exp_avg_sq")
REQUIRED = {"params", "lr", "betas", "eps", "weight_decay", "amsgrad"}
OPTIONAL = {"name", "initial_lr", "param_names", "maximize", "foreach", "capturable", "differentiable", "fused",
            "decoupled_weight_decay"}  # fmt: skip
"""Keys of an AdamW group. The last tells Adam from AdamW; older versions of torch lack it."""


@dataclass(frozen=True)
class FileGroup:
    """A parameter group of the file: which of our groups it holds (all, where it is the only one), and its settings."""

    ours: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Moments:
    """`by_name` {name in the file: {step, exp_avg, exp_avg_sq}}, and the groups in the file's order."""

    by_name: Mapping[str, Mapping[str, Tensor]]
    groups: Sequence[FileGroup]


def read_moments(checkpoint: Mapping[str, Any], weights: Weights, home: Mapping[str, str]) -> Moments:
    """Return moments and groups of a file's one optimizer.

    Numbers run through the file's groups; within a group they are in the order in which the network registers its
    parameters, which the state dict keeps. What can be checked is: counts, names of groups, shapes, values, steps.

    Args: home, {name of a parameter here: our group of it}.

    Raises:
        ResumeRefused: not one AdamW, groups or shapes that do not fit the weights, or moments that are missing or
            impossible after `global_step` steps.
    """
    optimizers, global_step = take(checkpoint, list, "optimizer_states"), take(checkpoint, int, "global_step")
    if len(optimizers) != 1:
        raise ResumeRefused(f"optimizer_states: {len(optimizers)} optimizers in the file: expected one, AdamW")
    state, groups = take(optimizers[0], Mapping, "state"), take(optimizers[0], list, "param_groups")
    for group in groups:
        _require_adamw(group)
    keys, sources = [key for group in groups for key in group["params"]], weights.parameters
    by_number = not all(isinstance(key, str) for key in keys)
    if len(keys) != len(sources) or set(keys) != set(range(len(sources)) if by_number else sources):
        raise ResumeRefused(
            f"optimizer groups: {len(keys)} parameters, {len(set(keys))} of them different, in {len(groups)} "
            f"group(s): expected each of the {len(sources)} parameters in the file's weights once"
        )
    for key in state:
        more = [show(name) for name in take(state, Mapping, key) if name not in ("step", *MOMENTS)]
        if more or key not in keys:
            found = f"has {shorten(more)}: expected AdamW's" if more else "is in no group"
            raise ResumeRefused(f"optimizer state of parameter {show(key)} {found}")

    left: dict[tuple[str, ...], list[str]] = {}
    for source in sources:
        left.setdefault((home[weights.names[source]],), []).append(source)
    if len(groups) == 1:
        left = {tuple(name for (name,) in left): sources}
    by_name, found = {}, []
    for group in groups:
        ours = _match_group(group, left, state, weights)
        members = left.pop(ours)
        found.append(FileGroup(ours, group))
        for key, source in zip(group["params"], members if by_number else group["params"], strict=True):
            if len(state.get(key, ())) == 1 + len(MOMENTS):
                by_name[source] = _read_entry(state[key], source, global_step)
    if global_step > 0 and not any(entry["exp_avg_sq"].any() for entry in by_name.values()):
        raise ResumeRefused(
            f"optimizer_states: no moments (exp_avg, exp_avg_sq) other than zero, but global_step is {global_step}: "
            f"expected those of {len(sources)} parameters: use a checkpoint of the run that was saved with its "
            "optimizer (checkpoint.allow_new is for single names)"
        )
    return Moments(by_name, found)


def _require_adamw(group: Any) -> None:
    group = group if isinstance(group, Mapping) else {}
    variants = [group.get("amsgrad"), group.get("maximize"), group.get("decoupled_weight_decay") is False]
    if set(group) - OPTIONAL != REQUIRED or not all(value is None or value is False for value in variants):
        found = ", ".join(f"{show(key)}: {show(group[key])}" for key in group if key != "params")
        raise ResumeRefused(
            f"optimizer group with {found or 'nothing'}: expected torch's AdamW, without amsgrad or maximize"
        )
    for key in {"lr", "initial_lr", "eps", "weight_decay"} & set(group):
        take(group, float, key)
    for key, kinds in (("betas", (float,)), ("params", (int, str))):
        values = group[key]
        if not isinstance(values, list | tuple) or not all(any(is_kind(v, kind) for kind in kinds) for v in values):
            raise ResumeRefused(f"optimizer group: {key} {show(values)}: expected a list of numbers")


def _match_group(
    group: Mapping[str, Any], left: Mapping[tuple[str, ...], list[str]], state: Mapping[Any, Any], weights: Weights
) -> tuple[str, ...]:
    """Return the key in `left` {our groups: parameters} of a group of the file, by its name, else by its shapes."""
    label = group.get("name")
    misfits = {
        ours: _find_misfit(group["params"], sources, state, weights)
        for ours, sources in left.items()
        if label is None or ours == (label,) or len(ours) > 1
    }
    fitting = [ours for ours, misfit in misfits.items() if misfit is None]
    if not fitting:
        sizes = shorten(f"{' + '.join(ours)} ({len(sources)})" for ours, sources in left.items())
        reason = next(iter(misfits.values())) if len(misfits) == 1 else f"expected one of {sizes or 'none'}, each once"
        what = "without a name" if label is None else show(label)
        raise ResumeRefused(f"optimizer group {what}: {len(group['params'])} parameters: {reason}")
    return fitting[0]


def _find_misfit(keys: Sequence[Any], sources: Sequence[str], state: Mapping[Any, Any], weights: Weights) -> str | None:
    """Return why parameters of a group of the file cannot be these sources; None if they can."""
    by_name = all(isinstance(key, str) for key in keys)
    if len(keys) != len(sources) or (by_name and set(keys) != set(sources)):
        return f"expected {len(sources)}, {shorten(sources, 3)}"
    for key, source in zip(keys, keys if by_name else sources, strict=True):
        expected = weights.tensors[source].shape
        for moment in [name for name in MOMENTS if name in state.get(key, ())]:
            shape = getattr(state[key][moment], "shape", None)
            if shape != expected:
                return f"{moment} of {key} is {tuple(shape or ())}: expected {tuple(expected)} for {source}"
    return None


def _read_entry(entry: Mapping[str, Any], source: str, global_step: int) -> dict[str, Tensor]:
    """Return the moments of one parameter, its step count as a float32 scalar."""
    step = entry["step"]
    step = step.item() if is_kind(step, Tensor) and step.numel() == 1 else step
    if not is_kind(step, float) or step != int(step) or not 1 <= step <= global_step:
        raise ResumeRefused(f"step count of {source}: {show(step)}: expected 1 to global_step, which is {global_step}")
    moments = {key: take({source: entry}, Tensor, source, key) for key in MOMENTS}
    if bool((moments["exp_avg_sq"] < 0).any()):
        raise ResumeRefused(f"exp_avg_sq of {source}: below 0: expected a mean of squares")
    return {"step": torch.tensor(float(step)), **moments}
