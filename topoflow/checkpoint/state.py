"""The state of a run by name: taken from a model, an optimizer and a scheduler, and put back on every rank."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from topoflow.checkpoint.file import map_tensors, read_checkpoint
from topoflow.checkpoint.fingerprint import MOMENTS
from topoflow.errors import ResumeRefused
from topoflow.ranks import Context
from topoflow.text import matches

GROUP_SETTINGS = ("lr", "initial_lr", "weight_decay", "betas", "eps")

Pair = tuple[torch.Tensor, torch.Tensor]
"""(source, destination) of a copy."""


@dataclass
class RestoreReport:
    """What was restored, by name and count; `expected` counts leave out what may start fresh."""

    weights: int = 0
    weights_expected: int = 0
    buffers: int = 0
    buffers_expected: int = 0
    moments: int = 0
    moments_expected: int = 0
    new: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    learning_rates: dict[str, float] = field(default_factory=dict)
    weight_decay: dict[str, float] = field(default_factory=dict)
    rates_from_config: bool = False
    scheduler_steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """Return lines for the log, exceptions last."""
        lines = [f"weights {self.weights}/{self.weights_expected}, buffers {self.buffers}/{self.buffers_expected}"]
        if self.learning_rates:
            lines[0] += f", moments {self.moments}/{self.moments_expected}, scheduler at step {self.scheduler_steps}"
        whence = "config, as checkpoint.allow_changed permits" if self.rates_from_config else "checkpoint"
        lines += [
            f"{name:<15} learning rate {rate:.6e}, weight decay {self.weight_decay[name]:g} (from the {whence})"
            for name, rate in self.learning_rates.items()
        ]
        lines += [f"new, starts fresh: {name}" for name in self.new]
        return lines + [f"moved with its moments: {move}" for move in self.moved]


@dataclass
class Restore:
    """A restore that has been checked: the copies to make, and what is set after them."""

    report: RestoreReport
    pairs: list[Pair]
    finish: Callable[[], None] = lambda: None
    """Set moments, rates and position in the optimizer and the scheduler."""


def capture_state(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    """Return weights, buffers, moments, steps, groups, rates and scheduler as nested dicts of tensors and plain values.

    The tensors are those of the model and the optimizer themselves: copy them before the next step.

    Args:
        model: the bare module (not DDP's or torch.compile's wrapper).
        optimizer: AdamW whose groups have `name` and `param_names`.
        scheduler: a torch LambdaLR over it.
    """
    groups, state = [], {}
    for group in optimizer.param_groups:
        settings = {key: group[key] for key in GROUP_SETTINGS}
        settings["betas"] = list(settings["betas"])
        groups.append({"name": group["name"], **settings, "params": list(group["param_names"])})
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            moments = optimizer.state.get(parameter)
            if moments:
                state[name] = {key: moments[key].detach() for key in MOMENTS}
    return {
        "model": {name: tensor.detach() for name, tensor in model.state_dict().items()},
        "optimizer": {"groups": groups, "state": state},
        "scheduler": {"steps": scheduler.last_epoch},
    }


def groups_by_parameter(groups: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return {parameter: its group}, by name, of the groups in a captured state."""
    return {name: group["name"] for group in groups for name in group["params"]}


def copy_pairs(pairs: Sequence[Pair]) -> None:
    """Copy each source into its destination."""
    with torch.no_grad():
        for source, destination in pairs:
            destination.copy_(source)


def plan_weights(model: nn.Module, saved: dict[str, torch.Tensor], allow_new: Sequence[str] = ()) -> Restore:
    """Plan to overwrite weights and buffers by name. Of the tensors in `saved` only shape and dtype are read.

    Raises:
        ResumeRefused: a name is missing (and not in `allow_new`) or left over, or a shape or dtype differs.
    """
    parameters = dict(model.named_parameters())
    current = model.state_dict()
    new = _allowed_new(list(current), list(saved), allow_new, "weight or buffer")
    for name, tensor in saved.items():
        _require_same_form(name, tensor, current[name])
    new_weights = sum(name in parameters for name in new)
    report = RestoreReport(
        weights=sum(name in parameters for name in saved),
        weights_expected=len(parameters) - new_weights,
        buffers=sum(name not in parameters for name in saved),
        buffers_expected=len(current) - len(parameters) - (len(new) - new_weights),
        new=new,
    )
    return Restore(report, [(tensor, current[name]) for name, tensor in saved.items()])


def plan_state(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    allow_new: Sequence[str] = (),
    rates_from_config: bool = False,
) -> Restore:
    """Plan to restore weights, buffers, moments, steps, rates and the scheduler's position, each by name.

    Nothing is changed before the plan's pairs are copied, and its `finish` is called.

    Args:
        state: as `capture_state` returns it, with `progress`; of its tensors only shape and dtype are read.
        allow_new: names or globs of weights and buffers that may be absent from the state; they start fresh.
        rates_from_config: the user allowed other optimizer settings: keep those of `optimizer`, at the restored step.

    Raises:
        ResumeRefused: something is missing, left over, or of another shape, dtype or rate; the message names it.
    """
    groups = {group["name"]: group for group in state["optimizer"]["groups"]}
    home = {name: group["name"] for group in optimizer.param_groups for name in group["param_names"]}
    parameters = dict(model.named_parameters())
    moments = state["optimizer"]["state"]
    restore = plan_weights(model, state["model"], allow_new)
    if state["progress"]["updates"] > 0:
        new = set(_allowed_new(list(home), list(moments), allow_new, "moments of"))
    else:
        new = set(home) - set(moments)
    for name, entry in moments.items():
        for key in MOMENTS[1:]:
            _require_same_form(f"{key} of {name}", entry[key], parameters[name])
        _require_same_form(f"step of {name}", entry["step"], torch.empty((), dtype=torch.float32))
    for group in optimizer.param_groups:
        if group["name"] not in groups:
            raise ResumeRefused(f"optimizer group {group['name']}: not in the checkpoint ({', '.join(groups)})")
    steps = state["scheduler"]["steps"]
    rates = _rates_at(groups, optimizer, scheduler, steps, rates_from_config)

    fresh = {name: _zero_moments(parameters[name]) for name in (*moments, *new)} if moments else {}
    restore.pairs += [(moments[name][key], fresh[name][key]) for name in moments for key in MOMENTS]
    saved_home = groups_by_parameter(groups.values())
    report = restore.report
    report.moments, report.moments_expected = len(moments), len(home) - len(new)
    report.moved = [f"{name}: {saved_home[name]} -> {home[name]}" for name in moments if saved_home[name] != home[name]]
    report.learning_rates, report.rates_from_config = rates, rates_from_config
    report.weight_decay = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    report.scheduler_steps = steps

    def finish() -> None:
        optimizer.state.clear()
        optimizer.state.update({parameters[name]: entry for name, entry in fresh.items()})
        scheduler.last_epoch, scheduler._step_count = steps, steps + 1
        for group in optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        scheduler._last_lr = list(rates.values())

    restore.finish = finish
    return restore


def restore_state(state: dict[str, Any], model: nn.Module, *parts: Any, **options: Any) -> RestoreReport:
    """Restore a state in this process, without other ranks; arguments as of `plan_state`."""
    restore = plan_state(state, model, *parts, **options)
    copy_pairs(restore.pairs)
    restore.finish()
    return restore.report


def _allowed_new(expected: list[str], found: list[str], allow_new: Sequence[str], what: str) -> list[str]:
    """Return the names that the checkpoint lacks and `allow_new` lists; refuse any other missing or extra name."""
    left_over = sorted(set(found) - set(expected))
    if left_over:
        raise ResumeRefused(f"{what} {', '.join(left_over)}: in the checkpoint, but this model has no such name")
    new = [name for name in expected if name not in set(found)]
    refused = [name for name in new if not matches(name, allow_new)]
    if refused:
        raise ResumeRefused(
            f"{what} {', '.join(refused)}: not in the checkpoint: "
            "expected every name, or checkpoint.allow_new to list those that may start fresh"
        )
    return new


def _require_same_form(name: str, saved: torch.Tensor, current: torch.Tensor) -> None:
    for what in ("shape", "dtype"):
        was, now = getattr(saved, what), getattr(current, what)
        if was != now:
            was, now = (tuple(was), tuple(now)) if what == "shape" else (was, now)
            raise ResumeRefused(f"{name}: {what} {was} in the checkpoint: expected {now}")


def _zero_moments(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return moments and step count on the parameter's device, as fused AdamW creates them."""
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)} | {
        key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS[1:]
    }


def _rates_at(
    groups: dict[str, dict], optimizer: torch.optim.Optimizer, scheduler: Any, steps: int, rates_from_config: bool
) -> dict[str, float]:
    """Return the rate of each group after `steps` scheduler steps, and compare its other settings by name.

    The schedule is a closed form of the position, so the saved rate must be what the config's schedule gives there.
    """
    rates = {}
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        scheduled = group["initial_lr"] * factor(steps)
        if rates_from_config:
            rates[group["name"]] = scheduled
            continue
        saved = groups[group["name"]]
        for key in GROUP_SETTINGS[1:]:
            now = list(group[key]) if key == "betas" else group[key]
            if saved[key] != now:
                raise ResumeRefused(f"optimizer group {group['name']}: {key} {saved[key]}: expected {now}")
        if abs(saved["lr"] - scheduled) > 1e-9 * max(abs(scheduled), 1e-30):
            raise ResumeRefused(
                f"optimizer group {group['name']}: learning rate {saved['lr']:.9e} in the checkpoint, "
                f"but the schedule gives {scheduled:.9e} at step {steps}"
            )
        rates[group["name"]] = saved["lr"]
    return rates


PIECE_BYTES = 64 * 2**20


def share_outline(context: Context, state: dict[str, Any] | None) -> dict[str, Any]:
    """Return rank 0's `state` (nested dicts of tensors and plain values) there, and its outline on the other ranks.

    In the outline every tensor is on the meta device: it has shape and dtype and takes no memory. The other ranks pass
    None.
    """
    outline = context.broadcast_object(map_tensors(state, _without_contents))
    return outline if state is None else state


def _without_contents(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def read_everywhere(context: Context, find: Callable[[], Path], parts: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Read the checkpoint that `find` returns on rank 0; return its path and those parts of it, see `share_outline`.

    Raises:
        MissingPath, ResumeRefused: on every rank, as `find` and `read_checkpoint` raise them.
    """
    path, state = None, None
    with context.together("reading the checkpoint"):
        if context.is_main:
            path = find()
            whole = read_checkpoint(path, parts)
            state = {part: whole[part] for part in parts}
    return context.broadcast_object(path), share_outline(context, state)


def deliver(context: Context, pairs: Sequence[Pair]) -> None:
    """Copy rank 0's sources into every rank's destinations, which may be on any device.

    The pairs are the same on all ranks, in the same order; only on rank 0 do sources need contents. A rank needs
    memory for its destinations and one piece of at most PIECE_BYTES.
    """
    if context.world_size == 1:
        return copy_pairs(pairs)
    with torch.no_grad():
        for dtype in sorted({destination.dtype for _, destination in pairs}, key=str):
            _broadcast_flat(context, [pair for pair in pairs if pair[1].dtype == dtype], dtype)


def load_weights(
    context: Context, model: nn.Module, saved: dict[str, torch.Tensor], allow_new: Sequence[str] = ()
) -> RestoreReport:
    """Load weights and buffers by name on every rank; only on rank 0 do the tensors in `saved` need contents.

    Raises:
        ResumeRefused: on every rank, see `plan_weights`.
    """
    with context.together("restoring the weights"):
        restore = plan_weights(model, saved, allow_new)
    deliver(context, restore.pairs)
    return restore.report


def _broadcast_flat(context: Context, pairs: list[Pair], dtype: torch.dtype) -> None:
    length = max(1, PIECE_BYTES // dtype.itemsize)
    taken: list[Pair] = []
    room = length
    for source, destination in pairs:
        # a parameter is contiguous, so its flat view is the parameter itself
        parts = zip(source.reshape(-1).split(length), destination.view(-1).split(length), strict=True)
        for part in parts:
            if part[1].numel() > room:
                _broadcast_piece(context, taken, dtype)
                taken, room = [], length
            taken.append(part)
            room -= part[1].numel()
    _broadcast_piece(context, taken, dtype)


def _broadcast_piece(context: Context, parts: list[Pair], dtype: torch.dtype) -> None:
    sizes = [destination.numel() for _, destination in parts]
    piece = torch.empty(sum(sizes), dtype=dtype, device=context.device)
    if context.is_main:
        copy_pairs(list(zip([source for source, _ in parts], piece.split(sizes), strict=True)))
    context.broadcast_tensor(piece)
    copy_pairs(list(zip(piece.split(sizes), [destination for _, destination in parts], strict=True)))
