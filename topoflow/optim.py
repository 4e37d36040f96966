"""Parameter groups by name, AdamW over them, and the learning-rate schedule."""

import math
from typing import Any

import torch
from torch import nn

from topoflow.config import PARAMETER_GROUPS, OptimConfig

_GROUP_PREFIXES = {"vit_blocks": "blocks.", "wind_embedding": "token_embeds.", "head": "head."}
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def group_of(name: str) -> str:
    """Return the parameter group of a parameter of this name: `others` if it is in no other group."""
    for group, prefix in _GROUP_PREFIXES.items():
        if name.startswith(prefix):
            return group
    return "others"


def group_parameters(model: nn.Module) -> list[dict[str, Any]]:
    """Return all parameters of the model, each in exactly one group, with their names.

    The result is a list of {"name": group, "params": [parameters], "param_names": [names]} in the order of
    PARAMETER_GROUPS, and in each group in the model's own order. Groups without parameters are left out.

    Raises: ValueError if one parameter has two names, or the model is wrapped (DDP, torch.compile) so that its names
    would all fall into `others`.
    """
    groups = {name: {"name": name, "params": [], "param_names": []} for name in PARAMETER_GROUPS}
    name_of: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(_WRAPPER_PREFIXES):
            raise ValueError(f"parameter {name}: expected the bare model, not its wrapper")
        if parameter in name_of:
            raise ValueError(f"parameter {name} is also {name_of[parameter]}: expected one name for each parameter")
        name_of[parameter] = name
        group = groups[group_of(name)]
        group["params"].append(parameter)
        group["param_names"].append(name)
    grouped = sum(len(group["params"]) for group in groups.values())
    assert grouped == len(list(model.parameters())), f"{grouped} parameters in groups"
    return [group for group in groups.values() if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the groups of `group_parameters`, each at learning_rate x its multiplier.

    Every parameter is decayed, biases and norms too, as in the program whose checkpoints we import. Each group keeps
    `name`, `param_names` and `initial_lr`. The fused implementation makes one pass over weights, gradients and moments
    and updates each element on its own, so its bits repeat.
    """
    groups = group_parameters(model)
    for group in groups:
        group["lr"] = group["initial_lr"] = config.learning_rate * config.group_multipliers[group["name"]]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate_at(
    step: int, initial_lr: float, config: OptimConfig, steps_per_epoch: int, total_steps: int
) -> float:
    """Return the learning rate of a group after `step` optimizer steps (the rate that step number step + 1 uses).

    cosine: with t = min(1, elapsed / schedule_length), elapsed in steps or in whole epochs,

        eta_min + (initial_lr - eta_min) * (1 + cos(pi t)) / 2        (SGDR, arXiv 1608.03983, eq. 5, no restart)

    as in torch's CosineAnnealingLR, but it stays at eta_min afterwards instead of rising again. A group that
    starts below eta_min rises to it, except that a rate of 0 stays 0: a multiplier of 0 freezes its group.
    Warm-up: optimizer step k of the first warmup_steps takes k / warmup_steps of its rate.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant" or initial_lr == 0:
        return initial_lr * warmup
    if config.schedule_interval == "epoch":
        elapsed, run_length = step // steps_per_epoch, math.ceil(total_steps / steps_per_epoch)
    else:
        elapsed, run_length = step, total_steps
    progress = min(1.0, elapsed / (config.schedule_length or run_length))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return warmup * (config.eta_min + (initial_lr - config.eta_min) * cosine)


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, steps_per_epoch: int, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule of `learning_rate_at`, to be stepped once after every optimizer step.

    The rate is a closed form of the step count, so a checkpoint restores only that count; nothing accumulates.
    The lambdas are plain functions, so the state dict holds counts and rates and none of the config.

    Args: optimizer from `build_optimizer` (its groups have `initial_lr`); steps_per_epoch >= 1; total_steps >= 1, the
    length of the run, used where schedule_length is null.
    """
    assert steps_per_epoch >= 1, steps_per_epoch
    assert total_steps >= 1, total_steps

    def factor_of(initial_lr: float):
        # LambdaLR multiplies initial_lr by this factor; a rate of 0 stays 0 for any factor
        divisor = initial_lr or 1.0
        return lambda step: learning_rate_at(step, initial_lr, config, steps_per_epoch, total_steps) / divisor

    factors = [factor_of(group["initial_lr"]) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
