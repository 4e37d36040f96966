"""From a Lightning checkpoint to a state in the form of our own, checked against the run that takes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topoflow.errors import ResumeRefused
from topoflow.tools.lightning.dialects import PREDECESSOR, PUBLISHED, Weights, read_weights, shorten
from topoflow.tools.lightning.moments import KEYS, Moments, read_moments
from topoflow.tools.lightning.position import read_position
from topoflow.tools.lightning.report import describe_position, describe_rest, describe_weights, warn_of_mask
from topoflow.tools.lightning.statements import (
    Statements,
    compare_groups,
    compare_hyperparameters,
    compare_schedule,
    samples_per_batch,
)

NEEDS = {
    "token_embeds.norm.": "model.patch_norm=true",
    "blocks.0.attn.rel_pos_bias.": "model.relative_position=true",
    "blocks.0.attn.elevation_alpha": "model.terrain=endpoint",
    "blocks.0.attn.H_scale": "model.terrain=endpoint",
    "blocks.": "a larger model.depth",
    "head.": "a larger model.decoder_depth",
    "": "another network",
}
"""What a config says whose network has a weight with such a name; the first that fits."""

SCANNED_CELLS, SCANNED_PATCH_SIZE = (128, 256), 2
"""The only grid that the predecessor's wind scan is defined on."""


@dataclass(frozen=True)
class Destination:
    """The run that takes the weights: its model and optimizer as the config makes them.

    config: its sections as plain dicts. inputs, targets: names of channels. mask: bool [H, W], the cells that count.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: Mapping[str, Mapping[str, Any]]
    inputs: Sequence[str]
    targets: Sequence[str]
    mask: Tensor
    steps_per_epoch: int


@dataclass(frozen=True)
class Conversion:
    """What a file holds, in our terms.

    state, rates_from_config: as `restore_state` takes them. mask: the file's own, bool [H, W], if it has one. names:
    {name in the file: name here}. lines, warnings: for the user.
    """

    state: dict[str, Any]
    rates_from_config: bool
    mask: Tensor | None
    names: dict[str, str]
    lines: list[str]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For import.json."""
        return {"lines": self.lines, "warnings": self.warnings, "names": self.names, "progress": self.state["progress"]}


def convert(checkpoint: Mapping[str, Any], destination: Destination, path: str) -> Conversion:
    """The state that a Lightning checkpoint (read from `path`) holds, under our names.

    Raises:
        ResumeRefused: it is of no known program, its parts do not fit each other, or it contradicts the config.
    """
    config, length = destination.config, destination.steps_per_epoch
    weights = read_weights(checkpoint["state_dict"], list(destination.inputs), list(destination.targets))
    _require_place(weights, destination.model)
    groups = {group["name"]: group for group in destination.optimizer.param_groups}
    home = {name: group for group, settings in groups.items() for name in settings["param_names"]}
    moments = read_moments(checkpoint["optimizer_states"], weights, home)
    said = _hyperparameters(checkpoint)
    statements = Statements(config["checkpoint"]["allow_changed"])
    warnings = _compare(statements, checkpoint, weights, moments, said, groups, destination)
    statements.require_none(path)

    position, size = read_position(checkpoint), config["train"]["global_batch_size"]
    samples = position.samples_in_epoch(samples_per_batch(said), size, length)
    here = position.epoch * length + samples // size
    steps = position.scheduler_steps(checkpoint["lr_schedulers"], config["optim"]["schedule_interval"], here)
    updates = max((int(entry["step"]) for entry in moments.by_name.values()), default=0)
    state = {
        "model": weights.model(),
        "optimizer": {"groups": _groups(moments, groups), "state": _state(moments, weights)},
        "scheduler": {"steps": steps},
        "progress": {"step": position.step, "updates": updates, "epoch": position.epoch, "samples_in_epoch": samples},
    }
    mask = checkpoint["state_dict"].get("china_mask")
    mask = None if mask is None else mask > 0.5
    lines = [
        *describe_weights(checkpoint, weights, moments, destination.targets),
        *describe_position(position, samples, steps, length),
        *describe_rest(checkpoint, mask),
    ]
    warnings += [*warn_of_mask(mask, destination.mask), *statements.accepted]
    rates_from_config = any(key.startswith("optim.") for key in statements.accepted_keys)
    return Conversion(state, rates_from_config, mask, dict(weights.names), lines, warnings)


def _require_place(weights: Weights, model: nn.Module) -> None:
    """Each weight of the file has its place in the model; what else the model has is for the restore to judge."""
    known = model.state_dict()
    homeless = {source: name for source, name in weights.names.items() if name not in known}
    if homeless:
        needs = {next(need for part, need in NEEDS.items() if name.startswith(part)) for name in homeless.values()}
        raise ResumeRefused(
            f"weights {shorten(homeless)}: the config's network has no such: expected {' and '.join(sorted(needs))}"
        )


def _hyperparameters(checkpoint: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The sections of the program's own config, where it was saved; a file need not have one."""
    saved = checkpoint.get("hyper_parameters")
    said = saved.get("config", saved) if isinstance(saved, Mapping) else {}
    sections = said.items() if isinstance(said, Mapping) else ()
    return {name: section for name, section in sections if isinstance(section, Mapping)}


def _compare(
    statements: Statements,
    checkpoint: Mapping[str, Any],
    weights: Weights,
    moments: Moments,
    said: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, Mapping[str, Any]],
    destination: Destination,
) -> list[str]:
    """All that the file says of its run against the config; returns warnings."""
    config = destination.config
    compare_groups(statements, moments.groups, groups, config["optim"])
    compare_schedule(statements, checkpoint["lr_schedulers"], moments.groups, config["optim"])
    if "model.target_indices" in checkpoint["state_dict"]:
        indices, inputs = checkpoint["state_dict"]["model.target_indices"].tolist(), list(destination.inputs)
        chosen = [inputs.index(target) if target in inputs else None for target in destination.targets]
        statements.compare("data.targets", indices, chosen, "data.targets, as positions in data.variables,")
    warnings = compare_hyperparameters(statements, said, config, with_drops=weights.dialect is PUBLISHED)
    wind, scanned = config["model"]["wind"], said.get("model", {}).get("parallel_patch_embed")
    if weights.dialect is PREDECESSOR and wind != "legacy_regional":
        if (*destination.mask.shape, config["model"]["patch_size"]) == (*SCANNED_CELLS, SCANNED_PATCH_SIZE):
            what = "model.wind (the predecessor sorted its tokens by region)"
            statements.compare("model.wind", "legacy_regional", wind, what)
        else:
            warnings.append(f"model.wind: {wind}: the predecessor's own (legacy_regional) does not exist on this grid")
    if weights.dialect is PUBLISHED and scanned is True:
        line = "model.wind: the file's tokens were sorted along the wind (parallel_patch_embed), which no option does"
        statements.differ("model.wind", line)
    return warnings


def _groups(moments: Moments, ours: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Our groups with the file's rates; their other settings have been compared and are written as the config's."""
    rates = {name: group.settings["lr"] for group in moments.groups for name in group.ours}
    return [
        {
            "name": name,
            "lr": rates[name],
            "initial_lr": group["initial_lr"],
            "weight_decay": group["weight_decay"],
            "betas": list(group["betas"]),
            "eps": group["eps"],
            "params": list(group["param_names"]),
        }
        for name, group in ours.items()
        if name in rates
    ]


def _state(moments: Moments, weights: Weights) -> dict[str, dict[str, Tensor]]:
    """{name here: {step, exp_avg, exp_avg_sq}}."""
    return {
        weights.names[source]: {
            "step": torch.as_tensor(entry["step"], dtype=torch.float32).reshape(()),
            **{key: weights.adapt(source, entry[key]) for key in KEYS[1:]},
        }
        for source, entry in moments.by_name.items()
    }
