"""The optimizer's state in a file, by name: Lightning has it by number, counted through groups and parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from topoflow.errors import ResumeRefused
from topoflow.tools.lightning.dialects import Weights, shorten

KEYS = ("step", "exp_avg", "exp_avg_sq")


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


def read_moments(states: Sequence[Any], weights: Weights, home: Mapping[str, str]) -> Moments:
    """Moments and groups of a file's one optimizer.

    Numbers run through the file's groups; within a group they are in the order in which the network registers its
    parameters, which the state dict keeps. Whatever of this can be checked is: counts, names of groups, shapes.

    Args: home, {name of a parameter here: our group of it}.

    Raises:
        ResumeRefused: not one AdamW, or groups, counts or shapes that do not fit the weights.
    """
    if len(states) != 1 or not {"state", "param_groups"} <= set(states[0]):
        raise ResumeRefused(f"optimizer_states: {len(states)} optimizers in the file: expected one, AdamW")
    state, groups = states[0]["state"], states[0]["param_groups"]
    for group in groups:
        _require_adamw(group)
    members: dict[str, list[str]] = {}
    for source in weights.parameters:
        members.setdefault(home[weights.names[source]], []).append(source)
    numbers = [number for group in groups for number in group["params"]]
    if sorted(numbers) != list(range(len(weights.parameters))):
        raise ResumeRefused(
            f"optimizer groups: {len(numbers)} parameters, {len(set(numbers))} of them different, in {len(groups)} "
            f"group(s): expected each of the {len(weights.parameters)} parameters in the file's weights once"
        )
    strangers = [str(number) for number in state if number not in set(numbers)]
    if strangers:
        raise ResumeRefused(f"optimizer state of parameters {shorten(strangers)}: in no parameter group")
    by_name: dict[str, Mapping[str, Tensor]] = {}
    found = []
    for group in groups:
        ours, sources = tuple(members), weights.parameters
        if len(groups) > 1:
            ours = (_name_of(group, members, state, weights),)
            sources = members.pop(*ours)
        _require_shapes(group, ours, sources, state, weights)
        by_name.update({s: state[n] for n, s in zip(group["params"], sources, strict=True) if _has_moments(state, n)})
        found.append(FileGroup(ours, group))
    return Moments(by_name, found)


def _require_adamw(group: Mapping[str, Any]) -> None:
    wrong = [key for key in ("amsgrad", "maximize") if group.get(key)]
    if wrong or "betas" not in group or group.get("decoupled_weight_decay") is False:
        found = ", ".join(f"{key}: {group[key]}" for key in group if key != "params")
        raise ResumeRefused(f"optimizer group with {found}: expected AdamW, neither amsgrad nor maximize")


def _name_of(
    group: Mapping[str, Any], left: Mapping[str, Sequence[str]], state: Mapping[int, Any], weights: Weights
) -> str:
    """Which of our groups `left`, {name: parameters}, one of the file is: the one it names, or that has its shapes."""
    sizes = ", ".join(f"{name} ({len(sources)})" for name, sources in left.items())
    if group.get("name") is not None:
        if group["name"] not in left:
            raise ResumeRefused(f"optimizer group {group['name']!r}: expected one of {sizes or 'none'}, each once")
        return group["name"]
    for name, sources in left.items():
        if len(group["params"]) == len(sources) and not _first_misfit(group, sources, state, weights):
            return name
    raise ResumeRefused(
        f"optimizer group without a name: {len(group['params'])} parameters with the shapes of no group: "
        f"expected one of {sizes or 'none'}"
    )


def _require_shapes(
    group: Mapping[str, Any], ours: tuple[str, ...], sources: Sequence[str], state: Mapping[int, Any], weights: Weights
) -> None:
    name = ours[0] if len(ours) == 1 else "(single)"
    if len(group["params"]) != len(sources):
        raise ResumeRefused(
            f"optimizer group {name}: {len(group['params'])} parameters in it: expected {len(sources)}, "
            "as many as the file's weights have"
        )
    misfit = _first_misfit(group, sources, state, weights)
    if misfit:
        raise ResumeRefused(f"optimizer group {name}: {misfit}")


def _first_misfit(
    group: Mapping[str, Any], sources: Sequence[str], state: Mapping[int, Any], weights: Weights
) -> str | None:
    """The first parameter whose moments have not its shape, in words."""
    for number, source in zip(group["params"], sources, strict=True):
        if _has_moments(state, number):
            expected = weights.tensors[source].shape
            for key in KEYS[1:]:
                shape = state[number][key].shape
                if shape != expected:
                    return f"{key} of parameter {number} is {tuple(shape)}: expected {tuple(expected)} for {source}"
    return None


def _has_moments(state: Mapping[int, Any], number: int) -> bool:
    return number in state and all(key in state[number] for key in KEYS)
