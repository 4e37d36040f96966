"""What a Lightning checkpoint of either program holds, consistent in itself: weights, moments, schedule, position.

Every function raises ResumeRefused where the file does not hold what it expects, naming what it found.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topoflow.checkpoint.fingerprint import MOMENTS
from topoflow.checkpoint.state import groups_by_parameter
from topoflow.errors import ResumeRefused
from topoflow.text import matches, shorten
from topoflow.tools.lightning.reading import is_kind, show, take
from topoflow.tools.lightning.weights import Weights, read_weights

ADAMW_KEYS = {"params", "lr", "betas", "eps", "weight_decay", "amsgrad"}
OPTIONAL_KEYS = {"name", "initial_lr", "param_names", "maximize", "foreach", "capturable", "differentiable", "fused",
                 "decoupled_weight_decay"}  # fmt: skip
"""Keys of an AdamW group. The last tells Adam from AdamW; older versions of torch lack it."""

BATCH_KEYS = ("train.batch_size", "train.devices", "train.num_nodes")
"""Keys of a program's own config whose product is the samples in one batch of all devices."""


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


@dataclass(frozen=True)
class Contents:
    """A whole file.

    groups: {names of our groups that a group of the file holds: its settings}, in the file's order. moments: {our name
    of a parameter: {step, exp_avg, exp_avg_sq}}, in our shapes. schedule: the state of a CosineAnnealingLR, None for a
    constant rate. stated: {"section.key": value} of the program's own config, where it was saved. batch_samples: in one
    batch of all devices, where that config states them. accumulation: its batches per step. warnings: for the user.
    """

    weights: Weights
    groups: Mapping[tuple[str, ...], Mapping[str, Any]]
    moments: Mapping[str, Mapping[str, Tensor]]
    schedule: Mapping[str, Any] | None
    position: Position
    stated: Mapping[str, Any]
    batch_samples: int | None
    accumulation: int | None
    warnings: list[str]


def read_contents(
    checkpoint: Mapping[str, Any],
    ours: dict[str, Any],
    inputs: list[str],
    targets: list[str],
    choice: str | None,
    allow_new: Sequence[str],
) -> Contents:
    """Return what a file holds, by the names of the config's network.

    Args:
        ours: the state of a run of the config before its first step, as `capture_state` returns it.
        inputs, targets: the config's channels.
        choice: "trained" or "averaged" weights, where the file holds both.
        allow_new: names or globs of parameters whose moments may be all zero; they are left out, and so start fresh.
    """
    weights = read_weights(checkpoint, choice, ours["model"], inputs, targets)
    groups, moments = _read_optimizer(checkpoint, weights, groups_by_parameter(ours["optimizer"]["groups"]))
    zero = _find_zero_moments(moments, take(checkpoint, int, "global_step"), allow_new)
    moments = {name: entry for name, entry in moments.items() if name not in zero}
    warnings = _check_step_counts(checkpoint, moments)
    if zero:
        warnings.append(f"moments of {shorten(zero)}: all zero in the file: they start fresh")
    saved = checkpoint.get("hyper_parameters")
    saved = saved.get("config", saved) if isinstance(saved, Mapping) else {}
    sections = [item for item in saved.items() if isinstance(item[1], Mapping)] if isinstance(saved, Mapping) else []
    stated = {f"{name}.{key}": value for name, section in sections for key, value in section.items()}
    counts: list[Any] = [stated.get(key) for key in BATCH_KEYS]
    batch_samples = math.prod(counts) if all(is_kind(count, int) and count > 0 for count in counts) else None
    accumulation = stated.get("train.accumulate_grad_batches")
    accumulation = accumulation if is_kind(accumulation, int) and accumulation > 0 else None
    schedule, position = read_schedule(checkpoint), _read_position(checkpoint, accumulation)
    return Contents(weights, groups, moments, schedule, position, stated, batch_samples, accumulation, warnings)


def _read_optimizer(
    checkpoint: Mapping[str, Any], weights: Weights, home: Mapping[str, str]
) -> tuple[dict[tuple[str, ...], Mapping[str, Any]], dict[str, dict[str, Tensor]]]:
    """Return groups and moments of a file's one AdamW, see Contents; home: {our name of a parameter: our group}.

    Lightning numbers parameters through the groups. Names, where a group has them, decide (see `_name_parameters`).
    Without them, numbers within a group are in the order in which the network registers its parameters, which the state
    dict keeps. What can be checked is: counts, names of groups, shapes, values, steps.
    """
    optimizers, global_step = take(checkpoint, list, "optimizer_states"), take(checkpoint, int, "global_step")
    if len(optimizers) != 1:
        raise ResumeRefused(f"optimizer_states: {len(optimizers)} optimizers in the file: expected one, AdamW")
    state, groups = take(optimizers[0], Mapping, "state"), take(optimizers[0], list, "param_groups")
    for index, group in enumerate(groups):
        _require_adamw(group, index)
    sources = [source for source, name in weights.names.items() if name in home]
    keys = [key for group in groups for key in group["params"]]
    named: dict[Any, Any] = {
        key: source for group in groups for key, source in _name_parameters(group, sources).items()
    }
    found = [named.get(key, key) for key in keys]
    by_name = all(isinstance(key, str) for key in found)
    if len(found) != len(sources) or set(found) != set(sources if by_name else range(len(sources))):
        raise ResumeRefused(
            f"optimizer groups: {len(found)} parameters, {len(set(found))} of them different, in {len(groups)} "
            f"group(s): expected each of the {len(sources)} parameters in the file's weights once"
        )
    for key in state:
        more = [show(name) for name in take(state, Mapping, key) if name not in MOMENTS]
        if more or key not in keys:
            found = f"has {shorten(more)}: expected AdamW's" if more else "is in no group: expected one"
            raise ResumeRefused(f"optimizer state of parameter {show(key)} {found}")
    state = {named.get(key, key): entry for key, entry in state.items()}

    left: dict[tuple[str, ...], list[str]] = {}
    for source in sources:
        left.setdefault((home[weights.names[source]],), []).append(source)
    if len(groups) == 1:
        left = {tuple(name for (name,) in left): sources}
    matched, moments = {}, {}
    for group in groups:
        params = [named.get(key, key) for key in group["params"]]
        params = sorted(params, key=sources.index) if by_name else params
        ours = _match_group(group.get("name"), params, left, state, weights)
        matched[ours] = group
        for key, source in zip(params, left.pop(ours), strict=True):
            if len(state.get(key, ())) == len(MOMENTS):
                moments[weights.names[source]] = _read_moments(state[key], source, global_step, weights)
    return matched, moments


def _name_parameters(group: Mapping[str, Any], sources: list[str]) -> dict[Any, str]:
    """Return {key of a parameter in the optimizer: its name in the weights}, empty where the group only numbers them.

    FSDP names parameters in `params`; torch names them in `param_names`, if the optimizer was built from the
    named_parameters() of the training module or of a module in it, whose names lack the beginning.
    """
    names = group.get("param_names", group["params"])
    if not all(isinstance(name, str) for name in names):
        return {}
    for beginning in ("", "model.", "model.climax."):
        if all(beginning + name in sources for name in names) and len(names) == len(group["params"]):
            return {key: beginning + name for key, name in zip(group["params"], names, strict=True)}
    unknown = [show(name) for name in names if not any(source.endswith(name) for source in sources)]
    raise ResumeRefused(
        f"optimizer group with {len(names)} names for {len(group['params'])} parameters, {shorten(unknown) or 'none'} "
        "of them unknown: expected names of the file's weights, one for each parameter"
    )


def _find_zero_moments(
    moments: Mapping[str, Mapping[str, Tensor]], global_step: int, allow_new: Sequence[str]
) -> list[str]:
    """Return the parameters with a moment that is all zero, each of which `allow_new` must list."""
    zero = {name: [key for key in MOMENTS[1:] if not entry[key].any()] for name, entry in moments.items()}
    if global_step > 0 and all(zero.values()):
        raise ResumeRefused(
            f"optimizer_states: no moments (exp_avg, exp_avg_sq) other than zero, but global_step is {global_step}: "
            "expected those of every parameter: use a checkpoint of the run that was saved with its optimizer "
            "(checkpoint.allow_new is for single names)"
        )
    refused = [
        f"{' and '.join(keys)} of {name}" for name, keys in zero.items() if keys and not matches(name, allow_new)
    ]
    if refused:
        raise ResumeRefused(
            f"optimizer_states: {shorten(refused)}: all zero at global_step {global_step}: expected both moments of "
            "every parameter, or checkpoint.allow_new to list those that may start fresh (as without a gradient)"
        )
    return [name for name, keys in zero.items() if keys]


def _check_step_counts(checkpoint: Mapping[str, Any], moments: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Return warnings about step counts below global_step; refuse a largest one that nothing in the file explains.

    In half precision, a GradScaler skips steps whose gradients overflow, and Lightning counts them. A parameter that
    was frozen for a while, or had no gradient in some steps, has had fewer than the others.
    """
    counts = {name: int(entry["step"]) for name, entry in moments.items()}
    step = take(checkpoint, int, "global_step")
    most = max(counts.values(), default=step)
    warnings = []
    if most != step:
        found = f"the largest step count of the optimizer is {most}, but global_step is {step}"
        if not any(isinstance(part, Mapping) and "_growth_tracker" in part for part in checkpoint.values()):
            raise ResumeRefused(f"{found}: expected the same, or the state of a GradScaler, which skips steps")
        warnings.append(f"{found}: the GradScaler skipped the others")
    behind = [f"{name} ({count})" for name, count in counts.items() if count < most]
    if behind:
        warnings.append(f"step counts below {most}: {shorten(behind)}: parameters without a gradient in some steps")
    return warnings


def _require_adamw(group: Any, index: int) -> None:
    group = group if isinstance(group, Mapping) else {}
    label = f"optimizer group {show(group.get('name', index))}"
    variants = [group.get("amsgrad"), group.get("maximize"), group.get("decoupled_weight_decay") is False]
    if set(group) - OPTIONAL_KEYS != ADAMW_KEYS or not all(value is None or value is False for value in variants):
        found = ", ".join(f"{show(key)}: {show(group[key])}" for key in group if key != "params")
        raise ResumeRefused(f"{label} with {found or 'nothing'}: expected torch's AdamW, without amsgrad or maximize")
    for key in {"lr", "initial_lr", "eps", "weight_decay"} & set(group):
        take({label: group}, float, label, key)
    for key, kinds in (("betas", (float,)), ("params", (int, str)), ("param_names", (str,))):
        values = group.get(key, ())
        if not isinstance(values, list | tuple) or not all(any(is_kind(v, kind) for kind in kinds) for v in values):
            raise ResumeRefused(f"{label}: {key} {show(values)}: expected a list of numbers or names")


def _match_group(
    label: Any, params: Sequence[Any], left: Mapping[tuple[str, ...], list[str]], state: Mapping, weights: Weights
) -> tuple[str, ...]:
    """Return the key in `left` {our groups: parameters} of a group of the file, by its name, else by its shapes."""
    reasons = []
    for ours, sources in left.items():
        if label is None or ours == (label,) or len(ours) > 1:
            reasons.append(_find_misfit(params, sources, state, weights))
            if reasons[-1] is None:
                return ours
    sizes = shorten(f"{' + '.join(ours)} ({len(sources)})" for ours, sources in left.items())
    reason = reasons[0] if len(reasons) == 1 else f"expected one of {sizes or 'none'}, each once"
    what = "without a name" if label is None else show(label)
    raise ResumeRefused(f"optimizer group {what}: {len(params)} parameters: {reason}")


def _find_misfit(params: Sequence[Any], sources: list[str], state: Mapping, weights: Weights) -> str | None:
    """Return why parameters of a group of the file cannot be these sources; None if they can."""
    if len(params) != len(sources) or (isinstance(params[0], str) and params != sources):
        return f"expected {len(sources)}, {shorten(sources, 3)}"
    for key, source in zip(params, sources, strict=True):
        expected = weights.tensors[source].shape
        for moment in [name for name in MOMENTS[1:] if name in state.get(key, ())]:
            shape = getattr(state[key][moment], "shape", None)
            if shape != expected:
                return f"{moment} of {key} is {tuple(shape or ())}: expected {tuple(expected)} for {source}"
    return None


def _read_moments(entry: Mapping[str, Any], source: str, global_step: int, weights: Weights) -> dict[str, Tensor]:
    """Return the moments of one parameter in our shape, its step count as a float32 scalar."""
    step = entry["step"]
    step = step.item() if is_kind(step, torch.float32) and step.numel() == 1 else step
    if not is_kind(step, float) or step != int(step) or not 1 <= step <= global_step:
        raise ResumeRefused(f"step count of {source}: {show(step)}: expected 1 to global_step, which is {global_step}")
    moments = {key: take({source: entry}, torch.float32, source, key) for key in MOMENTS[1:]}
    if bool((moments["exp_avg_sq"] < 0).any()):
        raise ResumeRefused(f"exp_avg_sq of {source}: below 0: expected a mean of squares")
    return {"step": torch.tensor(float(step)), **{key: weights.adapt(source, moments[key]) for key in moments}}


def read_schedule(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the state of the file's one CosineAnnealingLR; None without a scheduler, which is a constant rate."""
    schedulers = take(checkpoint, list, "lr_schedulers")
    if not schedulers:
        return None
    needed = {"T_max": int, "eta_min": float, "base_lrs": list, "last_epoch": int, "_last_lr": list}
    found = schedulers[0] if len(schedulers) == 1 and isinstance(schedulers[0], Mapping) else {}
    if any(not is_kind(found.get(key), kind) for key, kind in needed.items()) or found["T_max"] == 0:
        values = ", ".join(f"{show(key)}: {show(value)}" for key, value in found.items())
        raise ResumeRefused(
            f"lr_schedulers: {len(schedulers)}, {values or 'unreadable'}: expected one CosineAnnealingLR "
            f"({', '.join(needed)})"
        )
    return found


def _read_position(checkpoint: Mapping[str, Any], accumulation: int | None) -> Position:
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
        if not fits:
            raise ResumeRefused(f"loops: {contradiction}: the counters contradict each other: expected an intact file")
    if take(checkpoint, bool, *batch, "is_last_batch"):
        return Position(step, entered, 0, 0, processed)
    return Position(step, behind, processed, steps, (total - processed) // behind if behind else None)
