"""The state of a run by name: taken from a model, an optimizer and a scheduler, and put back.

torch's own optimizer.load_state_dict maps parameters by position, and even overwrites the names that it is given; so
moments, steps and rates are set here, by name, after everything has been checked.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from topoflow.checkpoint.file import tensor_digest
from topoflow.errors import ResumeRefused

GROUP_SETTINGS = ("lr", "initial_lr", "weight_decay", "betas", "eps")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class RestoreReport:
    """What a restore put back, by name and count."""

    weights: int = 0
    weights_expected: int = 0
    buffers: int = 0
    moments: int = 0
    moments_expected: int = 0
    new: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    learning_rates: dict[str, float] = field(default_factory=dict)
    scheduler_steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For the log."""
        rates = ", ".join(f"{name} {rate:.6e}" for name, rate in self.learning_rates.items())
        lines = [
            f"weights {self.weights}/{self.weights_expected}, buffers {self.buffers}, "
            f"moments {self.moments}/{self.moments_expected}, scheduler at step {self.scheduler_steps}",
            f"learning rates: {rates}",
        ]
        lines += [f"new, starts fresh: {name}" for name in self.new]
        return lines + [f"moved with its moments: {move}" for move in self.moved]


def capture_state(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    """Weights and buffers, moments and steps, groups and rates, scheduler: nested dicts of host tensors and scalars.

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
                state[name] = {key: moments[key].detach().cpu() for key in MOMENTS}
    return {
        "model": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        "optimizer": {"groups": groups, "state": state},
        "scheduler": {"steps": scheduler.last_epoch},
    }


def restore_weights(model: nn.Module, saved: dict[str, torch.Tensor], allow_new: Sequence[str] = ()) -> RestoreReport:
    """Overwrite weights and buffers by those of the same name.

    Raises:
        ResumeRefused: a name is missing (and not in `allow_new`) or left over, or a shape or dtype differs. Nothing
            has been changed then.
    """
    parameters = dict(model.named_parameters())
    current = model.state_dict()
    new = _allowed_new(list(current), list(saved), allow_new, "weight or buffer")
    for name, tensor in saved.items():
        _require_alike(name, tensor, current[name])
    with torch.no_grad():
        for name, tensor in saved.items():
            current[name].copy_(tensor)
    return RestoreReport(
        weights=sum(name in parameters for name in saved),
        weights_expected=len(parameters),
        buffers=sum(name not in parameters for name in saved),
        new=new,
    )


def restore_state(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    allow_new: Sequence[str] = (),
    rates_from_config: bool = False,
) -> RestoreReport:
    """Put weights, buffers, moments, steps, rates and the scheduler's position back, each by name.

    Args:
        state: as `capture_state` returns it.
        allow_new: names or globs of weights and buffers that may be absent from the state; they start fresh.
        rates_from_config: the user allowed other optimizer settings: keep those of `optimizer`, at the restored step.

    Raises:
        ResumeRefused: something is missing, left over, or of another shape, dtype or rate; the message names it.
    """
    groups = {group["name"]: group for group in state["optimizer"]["groups"]}
    home = {name: group["name"] for group in optimizer.param_groups for name in group["param_names"]}
    parameters = dict(model.named_parameters())
    moments = state["optimizer"]["state"]
    if state["progress"]["updates"] > 0:
        new = set(_allowed_new(list(home), list(moments), allow_new, "moments of"))
    else:
        new = set(home) - set(moments)
    for name, entry in moments.items():
        for key in MOMENTS[1:]:
            _require_alike(f"{key} of {name}", entry[key], parameters[name])
    for group in optimizer.param_groups:
        if group["name"] not in groups:
            raise ResumeRefused(f"optimizer group {group['name']}: not in the checkpoint ({', '.join(groups)})")

    report = restore_weights(model, state["model"], allow_new)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            optimizer.state.pop(parameter, None)
            if name not in new:
                optimizer.state[parameter] = _moments_for(parameter, moments[name])
    saved_home = {name: group["name"] for group in groups.values() for name in group["params"]}
    report.moments, report.moments_expected = len(moments), len(home)
    report.moved = [f"{name}: {saved_home[name]} -> {home[name]}" for name in moments if saved_home[name] != home[name]]
    _restore_rates(groups, optimizer, scheduler, state["scheduler"]["steps"], rates_from_config)
    report.learning_rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    report.scheduler_steps = scheduler.last_epoch
    return report


def state_digests(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, str]:
    """Content hash of every weight, buffer and moment, and of rates and scheduler, by name."""
    state = capture_state(model, optimizer, scheduler)
    digests = {name: tensor_digest(tensor) for name, tensor in state["model"].items()}
    for name, entry in state["optimizer"]["state"].items():
        digests.update({f"{key} of {name}": tensor_digest(tensor) for key, tensor in entry.items()})
    for group in state["optimizer"]["groups"]:
        digests[f"optimizer group {group['name']}"] = repr(group)
    digests["scheduler"] = repr(state["scheduler"])
    return digests


def _allowed_new(expected: list[str], found: list[str], allow_new: Sequence[str], what: str) -> list[str]:
    """Names that the checkpoint lacks and that the user listed; anything else missing or left over is refused."""
    left_over = sorted(set(found) - set(expected))
    if left_over:
        raise ResumeRefused(f"{what} {', '.join(left_over)}: in the checkpoint, but this model has no such name")
    new = [name for name in expected if name not in set(found)]
    refused = [name for name in new if not any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_new)]
    if refused:
        raise ResumeRefused(
            f"{what} {', '.join(refused)}: not in the checkpoint: "
            "expected every name, or checkpoint.allow_new to list those that may start fresh"
        )
    return new


def _require_alike(name: str, saved: torch.Tensor, current: torch.Tensor) -> None:
    for what in ("shape", "dtype"):
        was, now = getattr(saved, what), getattr(current, what)
        if was != now:
            was, now = (tuple(was), tuple(now)) if what == "shape" else (was, now)
            raise ResumeRefused(f"{name}: {what} {was} in the checkpoint: expected {now}")


def _moments_for(parameter: torch.Tensor, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the moments on the parameter's device; the step count stays on the host, as unfused AdamW has it."""
    moments = {key: saved[key].detach().to(parameter.device, copy=True) for key in MOMENTS[1:]}
    return {"step": saved["step"].detach().to("cpu", torch.float32, copy=True), **moments}


def _restore_rates(
    groups: dict[str, dict], optimizer: torch.optim.Optimizer, scheduler: Any, steps: int, rates_from_config: bool
) -> None:
    """Set the scheduler's position, and each group's settings by name.

    The schedule is a closed form of the position, so the saved rate must be what the config's schedule gives there.
    """
    scheduler.last_epoch, scheduler._step_count = steps, steps + 1
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        scheduled = group["initial_lr"] * factor(steps)
        if rates_from_config:
            group["lr"] = scheduled
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
        group["lr"] = saved["lr"]
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
