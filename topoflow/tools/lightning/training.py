"""What a Lightning checkpoint holds of the training: parameter groups, moments, schedule and position.

Every function raises ResumeRefused where the file does not hold what it expects, naming what it found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import eq
from typing import Any

import torch
from torch import Tensor

from topoflow.checkpoint.fingerprint import MOMENTS
from topoflow.errors import ResumeRefused
from topoflow.text import matches, shorten
from topoflow.tools.lightning.reading import as_mapping, is_kind, require, same, show, take
from topoflow.tools.lightning.weights import Weights

ADAMW_KEYS = {"params", "lr", "betas", "eps", "weight_decay", "amsgrad"}
OPTIONAL_KEYS = {"name", "initial_lr", "param_names", "maximize", "foreach", "capturable", "differentiable", "fused",
                 "decoupled_weight_decay"}  # fmt: skip
"""Keys of an AdamW group. The last tells Adam from AdamW; older versions of torch lack it."""

GROUP_KINDS = {"lr": float, "initial_lr": float, "eps": float, "weight_decay": float, "betas": tuple, "params": tuple,
               "param_names": tuple}  # fmt: skip
SCHEDULE_KINDS = {"T_max": int, "eta_min": float, "base_lrs": tuple, "last_epoch": int, "_last_lr": tuple}
"""What values of a group, and of a CosineAnnealingLR, must be; see `reading.take`."""

Moments = dict[str, dict[str, Tensor]]
"""{our name of a parameter: {step, exp_avg, exp_avg_sq}}, in our shapes, the step count as a float32 scalar."""


@dataclass(frozen=True)
class Position:
    """step: optimizer steps. epoch: how many are complete. batches, steps: made since then.

    epoch_batches: batches of a whole epoch, where the counters tell.
    """

    step: int
    epoch: int
    batches: int
    steps: int
    epoch_batches: int | None


def read_optimizer(
    checkpoint: Mapping[str, Any], weights: Weights, home: Mapping[str, str]
) -> tuple[list[dict[str, Any]], Moments]:
    """Return the groups of a file's one AdamW, with our names as `params`, and the moments that the file has.

    Lightning numbers parameters through the groups. Names, where a group has them, decide. Without them, numbers within
    a group are in the order in which the network registers its parameters, which the state dict keeps.

    Args:
        home: {our name of a parameter: our group}.
    """
    optimizers, global_step = take(checkpoint, list, "optimizer_states"), take(checkpoint, int, "global_step")
    require(len(optimizers) == 1, f"optimizer_states: {len(optimizers)} optimizers in the file: expected one, AdamW")
    state, found = take(optimizers[0], Mapping, "state"), take(optimizers[0], list, "param_groups")
    for index, group in enumerate(found):
        _require_adamw(as_mapping(group), index)
    parameters = [name for name in weights.tensors if name in home]
    keys = [key for group in found for key in group["params"]]
    require(
        len(keys) == len(set(keys)) == len(parameters),
        f"optimizer groups: {len(keys)} parameters, {len(set(keys))} of them different, in {len(found)} group(s): "
        f"expected each of the {len(parameters)} parameters in the file's weights once",
    )
    left: dict[str, list[str]] = {}
    for name in parameters:
        left.setdefault(home[name] if len(found) > 1 else "all", []).append(name)
    groups = [{**group, "params": _pop_parameters(group, left, state, weights)} for group in found]
    names = dict(zip(keys, (name for group in groups for name in group["params"]), strict=True))
    moments = {}
    for key in state:
        entry = take(state, Mapping, key)
        more = [show(moment) for moment in entry if moment not in MOMENTS]
        require(key in names, f"optimizer state of parameter {show(key)} is in no group: expected one")
        require(not more, f"optimizer state of parameter {show(key)} has {shorten(more)}: expected AdamW's")
        if len(entry) == len(MOMENTS):
            moments[names[key]] = _read_entry(entry, names[key], global_step, weights)
    return groups, moments


def _require_adamw(group: Mapping[str, Any], index: int) -> None:
    label = f"optimizer group {show(group.get('name', index))}"
    variants = [group.get("amsgrad"), group.get("maximize"), group.get("decoupled_weight_decay") is False]
    fits = set(group) - OPTIONAL_KEYS == ADAMW_KEYS and all(value is None or value is False for value in variants)
    found = ", ".join(f"{show(key)}: {show(group[key])}" for key in group if key != "params")
    require(fits, f"{label} with {found or 'nothing'}: expected torch's AdamW, without amsgrad or maximize")
    for key in GROUP_KINDS.keys() & group.keys():
        take({label: group}, GROUP_KINDS[key], label, key)


def _pop_parameters(
    group: Mapping[str, Any], left: dict[str, list[str]], state: Mapping[Any, Any], weights: Weights
) -> list[str]:
    """Remove from `left` {our group: parameters} what a group of the file holds, and return it in the file's order.

    Which of ours it is depends on its name, if it has one, its size, and its parameters' names or shapes.
    """
    label, keys, named = group.get("name"), group["params"], _names_in(group, weights.names)
    possible = [
        ours
        for ours, parameters in left.items()
        if (label in (None, ours) or ours == "all") and len(parameters) == len(keys)
        if not named or set(named) == set(parameters)
    ]
    sizes = shorten(f"{ours} ({len(parameters)})" for ours, parameters in left.items())
    what = f"optimizer group {'without a name' if label is None else show(label)}: {len(keys)} parameters"
    require(bool(possible), f"{what}: expected one of {sizes or 'none'}, each once")
    shapes = [getattr(as_mapping(state.get(key)).get("exp_avg"), "shape", None) for key in keys]
    alike = {ours: sum(map(eq, shapes, [weights.tensors[name].shape for name in left[ours]])) for ours in possible}
    parameters = left.pop(max(possible, key=alike.__getitem__))  # the restore refuses a moment of another shape
    return named or parameters


def _names_in(group: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Return our names of a group's parameters, none where the group only numbers them; names: of the file's weights.

    FSDP names parameters in `params`; torch names them in `param_names`, if the optimizer was built from the
    named_parameters() of the training module or of a module in it, whose names lack the beginning.
    """
    found, count = group.get("param_names", group["params"]), len(group["params"])
    if not all(isinstance(name, str) for name in found):
        return []
    for beginning in ("", "model.", "model.climax."):
        if len(found) == count and all(beginning + name in names for name in found):
            return [names[beginning + name] for name in found]
    unknown = [show(name) for name in found if not any(source.endswith(name) for source in names)]
    raise ResumeRefused(
        f"optimizer group with {len(found)} names for {count} parameters, {shorten(unknown) or 'none'} of them "
        "unknown: expected names of the file's weights, one for each parameter"
    )


def _read_entry(entry: Mapping[str, Any], name: str, global_step: int, weights: Weights) -> dict[str, Tensor]:
    """Return the moments of one parameter in our shape, its step count as a float32 scalar."""
    step = entry["step"]
    step = step.item() if is_kind(step, torch.float32) and step.numel() == 1 else step
    fits = is_kind(step, float) and step == int(step) and 1 <= step <= global_step
    require(fits, f"step count of {name}: {show(step)}: expected 1 to global_step, which is {global_step}")
    moments = {key: take({name: entry}, torch.float32, name, key) for key in MOMENTS[1:]}
    require(bool((moments["exp_avg_sq"] >= 0).all()), f"exp_avg_sq of {name}: below 0: expected a mean of squares")
    return {"step": torch.tensor(float(step)), **{key: weights.adapt(name, moments[key]) for key in moments}}


def check_moments(checkpoint: Mapping[str, Any], moments: Moments, allow_new: Sequence[str]) -> list[str]:
    """Remove the moments that are all zero, which `allow_new` must list: they start fresh. Return warnings.

    The largest step count must be global_step. In half precision, a GradScaler skips steps whose gradients overflow,
    and Lightning counts them. A parameter that was frozen for a while, or had no gradient in some steps, has had fewer
    than the others.
    """
    step, warnings = take(checkpoint, int, "global_step"), []
    zero = {f"{key} of {name}": name for name in moments for key in MOMENTS[1:] if not moments[name][key].any()}
    require(
        step == 0 or set(zero.values()) != set(moments),
        f"optimizer_states: no moments (exp_avg, exp_avg_sq) other than zero, but global_step is {step}: "
        "expected those of every parameter: use a checkpoint of the run that was saved with its optimizer "
        "(checkpoint.allow_new is for single names)",
    )
    refused = [moment for moment, name in zero.items() if not matches(name, allow_new)]
    require(
        not refused,
        f"optimizer_states: {shorten(refused)}: all zero at global_step {step}: expected both moments of every "
        "parameter, or checkpoint.allow_new to list those that may start fresh (as without a gradient)",
    )
    if zero:
        fresh = dict.fromkeys(zero.values())
        warnings.append(f"moments of {shorten(fresh)}: all zero in the file: they start fresh")
        for name in fresh:
            del moments[name]
    counts = {name: int(entry["step"]) for name, entry in moments.items()}
    most = max(counts.values(), default=step)
    if most != step:
        found = f"the largest step count of the optimizer is {most}, but global_step is {step}"
        skips = any("_growth_tracker" in as_mapping(part) for part in checkpoint.values())
        require(skips, f"{found}: expected the same, or the state of a GradScaler, which skips steps")
        warnings.append(f"{found}: the GradScaler skipped the others")
    behind = [f"{name} ({count})" for name, count in counts.items() if count < most]
    if behind:
        warnings.append(f"step counts below {most}: {shorten(behind)}: parameters without a gradient in some steps")
    return warnings


def read_schedule(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the state of the file's one CosineAnnealingLR; None without a scheduler, which is a constant rate."""
    schedulers = take(checkpoint, list, "lr_schedulers")
    if not schedulers:
        return None
    found = as_mapping(schedulers[0]) if len(schedulers) == 1 else {}
    values = ", ".join(f"{show(key)}: {show(value)}" for key, value in found.items())
    require(
        all(is_kind(found.get(key), kind) for key, kind in SCHEDULE_KINDS.items()) and found["T_max"] > 0,
        f"lr_schedulers: {len(schedulers)}, {values or 'unreadable'}: expected one CosineAnnealingLR "
        f"({', '.join(SCHEDULE_KINDS)})",
    )
    return found


def require_consistent_schedule(
    schedule: Mapping[str, Any] | None, groups: Sequence[Mapping[str, Any]], position: Position, interval: str
) -> None:
    """Refuse a schedule that contradicts the groups' rates or the position."""
    done = f"after {position.step} steps and {position.epoch} whole epochs, for optim.schedule_interval={interval}"
    for key, expected, reason in (
        ("base_lrs", [group.get("initial_lr") for group in groups], "the groups' initial_lr"),
        ("_last_lr", [group["lr"] for group in groups], "the groups' lr"),
        ("last_epoch", position.epoch if interval == "epoch" else position.step, done),
    ):
        found = expected if schedule is None else schedule[key]
        require(same(found, expected), f"lr_schedulers: {key} {show(found)}: expected {show(expected)}, {reason}")


def read_position(checkpoint: Mapping[str, Any], accumulation: int | None) -> Position:
    """Return the position by Lightning's counters, which must not contradict each other.

    A save inside an epoch, one after its last batch, and one after the run have similar counters. (The last counts its
    epoch as completed even where max_steps cut it short, and Lightning resumes inside it.) So an epoch is complete when
    its last batch is done. After a resume from the last batch of an epoch, `started` may be one too small (Lightning
    2.6). So an epoch was also entered if one of its batches is not completed, or if it is processed and not completed.
    Older versions repeat the last batch after a resume, so each batch may be in the total twice, and a step may be made
    twice; accumulation, if known, gives the fewest steps in the epoch and the most batches in all.
    """
    loop = ("loops", "fit_loop")
    batch, epochs = (*loop, "epoch_loop.batch_progress"), (*loop, "epoch_progress", "current")
    optimizer = (*loop, "epoch_loop.automatic_optimization.optim_progress", "optimizer")
    step, epoch = take(checkpoint, int, "global_step"), take(checkpoint, int, "epoch")
    started, ended = take(checkpoint, int, *epochs, "started"), take(checkpoint, int, *epochs, "processed")
    processed, completed = (take(checkpoint, int, *batch, "current", key) for key in ("processed", "completed"))
    total = take(checkpoint, int, *batch, "total", "processed")
    steps = take(checkpoint, int, *optimizer, "step", "current", "completed")
    entered = max(started, epoch + (completed < processed or ended == epoch + 1))
    behind = max(entered - 1, 0)
    each = f"with accumulate_grad_batches={accumulation}"
    for fits, contradiction in (
        (started - 1 <= epoch <= started + 1, f"epoch {epoch}, but {started} epochs were started"),
        (steps <= processed <= total, f"{steps} steps, but {processed} batches in this epoch and {total} in all"),
        (behind + steps <= step <= total, f"global_step {step}, but {behind} epochs, {steps} steps, {total} batches"),
        (behind > 0 or steps == step, f"global_step {step}, but {steps} steps in the first epoch"),
        (accumulation is None or steps >= processed // accumulation, f"{steps} steps in {processed} batches, {each}"),
        (accumulation is None or total <= 2 * accumulation * (step + 1), f"{step} steps in {total} batches, {each}"),
    ):
        require(fits, f"loops: {contradiction}: the counters contradict each other: expected an intact file")
    if take(checkpoint, bool, *batch, "is_last_batch"):
        return Position(step, entered, 0, 0, processed)
    return Position(step, behind, processed, steps, (total - processed) // behind if behind else None)
