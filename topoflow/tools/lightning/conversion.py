"""From a Lightning checkpoint to a state in the form of our own, checked against the run that takes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topoflow.checkpoint.state import GROUP_SETTINGS
from topoflow.errors import ResumeRefused
from topoflow.text import shorten
from topoflow.tools.lightning.comparison import (
    Comparison,
    compare_groups,
    compare_hyperparameters,
    compare_schedule,
    read_hyperparameters,
    read_schedule,
    same,
    samples_per_batch,
)
from topoflow.tools.lightning.moments import Moments, read_moments
from topoflow.tools.lightning.names import PUBLISHED, Weights, choose_state_dict, read_weights
from topoflow.tools.lightning.position import Position, read_position
from topoflow.tools.lightning.reading import PARTS, show

NEEDS = {
    "token_embeds.norm.": "model.patch_norm=true",
    "blocks.0.attn.rel_pos_bias.": "model.relative_position=true",
    "blocks.0.attn.elevation_alpha": "model.terrain=endpoint",
    "blocks.0.attn.H_scale": "model.terrain=endpoint",
    "blocks.": "a larger model.depth",
    "head.": "a larger model.decoder_depth",
    "": "another network",
}
"""The config key that gives a network a weight whose name begins so; the first that fits."""

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
        """Return what import.json holds."""
        return {"lines": self.lines, "warnings": self.warnings, "names": self.names, "progress": self.state["progress"]}


def convert(checkpoint: Mapping[str, Any], destination: Destination, choice: str | None = None) -> Conversion:
    """Return the state in a Lightning checkpoint, under our names.

    Args: choice, "trained" or "averaged" weights, where the file holds both.

    Raises:
        ResumeRefused: it is of no known program, its parts contradict each other, or it contradicts the config.
    """
    config, length = destination.config, destination.steps_per_epoch
    weights = read_weights(choose_state_dict(checkpoint, choice), list(destination.inputs), list(destination.targets))
    _require_place(weights, destination.model)
    groups = {group["name"]: group for group in destination.optimizer.param_groups}
    home = {name: group for group, settings in groups.items() for name in settings["param_names"]}
    moments, position = read_moments(checkpoint, weights, home), read_position(checkpoint)
    schedule, stated = read_schedule(checkpoint), read_hyperparameters(checkpoint)
    size = config["train"]["global_batch_size"]

    comparison = Comparison(config["checkpoint"]["allow_changed"])
    compare_groups(comparison, moments.groups, groups, config["optim"])
    compare_schedule(comparison, schedule, moments.groups, config["optim"])
    compare_hyperparameters(comparison, stated, config)
    _compare_targets(comparison, weights, destination)
    warnings = _compare_network(comparison, weights, stated.get("model", {}), destination)
    batch_samples = samples_per_batch(comparison, stated, size) if position.batches else None
    comparison.raise_if_refused()

    samples = position.samples_in_epoch(batch_samples, size, length)
    interval, steps = config["optim"]["schedule_interval"], position.epoch * length + samples // size
    updates = max((int(entry["step"]) for entry in moments.by_name.values()), default=0)
    state = {
        "model": weights.model(),
        "optimizer": {"groups": _groups(moments, groups), "state": _state(moments, weights)},
        "scheduler": {"steps": _scheduler_steps(schedule, position, interval, steps)},
        "progress": {"step": position.step, "updates": updates, "epoch": position.epoch, "samples_in_epoch": samples},
    }
    lines = _describe(checkpoint, weights, moments, position, state, destination)
    warnings += _compare_masks(weights.mask, destination.mask)
    warnings += [line for accepted in comparison.accepted.values() for line in accepted]
    if choice == "averaged":
        warnings.append("the weights are averaged ones; the moments are those of the trained weights")
    rates_from_config = any(key.startswith("optim.") for key in comparison.accepted)
    return Conversion(state, rates_from_config, weights.mask, dict(weights.names), lines, warnings)


def _require_place(weights: Weights, model: nn.Module) -> None:
    """Require that the model has each weight of the file; the restore checks what the file lacks."""
    known = model.state_dict()
    homeless = {source: name for source, name in weights.names.items() if name not in known}
    if homeless:
        needs = {next(need for part, need in NEEDS.items() if name.startswith(part)) for name in homeless.values()}
        raise ResumeRefused(
            f"weights {shorten(homeless)}: not in the config's network: expected {' and '.join(sorted(needs))}"
        )


def _compare_targets(comparison: Comparison, weights: Weights, destination: Destination) -> None:
    if weights.target_indices is not None:
        inputs = list(destination.inputs)
        chosen = [inputs.index(target) if target in inputs else None for target in destination.targets]
        what = "data.targets, as positions in data.variables,"
        comparison.compare("data.targets", weights.target_indices, chosen, what)


def _compare_network(
    comparison: Comparison, weights: Weights, stated: Mapping[str, Any], destination: Destination
) -> list[str]:
    """Compare wind scan and dropout, which weights do not show; returns warnings."""
    model = destination.config["model"]
    if weights.dialect is PUBLISHED:
        if stated.get("parallel_patch_embed") is True:
            line = "the file's tokens were sorted along the wind (parallel_patch_embed), which no option does"
            comparison.add("model.wind", f"model.wind: {line}")
        return [
            f"model.{key}: {show(stated[key])} in the file, {model[key]} in the config"
            for key in ("drop_rate", "drop_path")
            if key in stated and not same(stated[key], model[key])
        ]
    if model["wind"] == "legacy_regional":
        return []
    if (*destination.mask.shape, model["patch_size"]) == (*SCANNED_CELLS, SCANNED_PATCH_SIZE):
        what = "model.wind (the predecessor sorted its tokens by region)"
        comparison.compare("model.wind", "legacy_regional", model["wind"], what)
        return []
    return [f"model.wind: {model['wind']}: the predecessor's own (legacy_regional) does not exist on this grid"]


def _scheduler_steps(schedule: Mapping[str, Any] | None, position: Position, interval: str, steps: int) -> int:
    """Return where our schedule, which counts optimizer steps, is when it is as far as the file's.

    In epochs it is at `steps`, as if epochs had always been ours, so that rates change where our order of samples
    begins anew, whatever the length of Lightning's epochs.
    """
    expected = position.epoch if interval == "epoch" else position.step
    if schedule is not None and schedule["last_epoch"] != expected:
        raise ResumeRefused(
            f"lr_schedulers: last_epoch {schedule['last_epoch']} after {position.step} steps and {position.epoch} "
            f"whole epochs: expected {expected} for optim.schedule_interval={interval}"
        )
    return steps if interval == "epoch" else position.step


def _groups(moments: Moments, ours: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return our groups with the file's rates; their other settings have been compared and are the config's."""
    rates = {name: group.settings["lr"] for group in moments.groups for name in group.ours}
    return [
        {
            **{key: group[key] for key in ("name", *GROUP_SETTINGS)},
            "lr": rates[name],
            "betas": list(group["betas"]),
            "params": list(group["param_names"]),
        }
        for name, group in ours.items()
        if name in rates
    ]


def _state(moments: Moments, weights: Weights) -> dict[str, dict[str, Tensor]]:
    """Return {name here: {step, exp_avg, exp_avg_sq}}."""
    return {
        weights.names[source]: {
            key: tensor if key == "step" else weights.adapt(source, tensor) for key, tensor in entry.items()
        }
        for source, entry in moments.by_name.items()
    }


def _describe(
    checkpoint: Mapping[str, Any],
    weights: Weights,
    moments: Moments,
    position: Position,
    state: Mapping[str, Any],
    destination: Destination,
) -> list[str]:
    """Return what was taken from the file and what was left, in lines for the user."""
    sizes = [f"{show(group.settings.get('name'))} {len(group.settings['params'])}" for group in moments.groups]
    theirs = f", of Lightning {position.epoch_batches} batches on each device" if position.epoch_batches else ""
    left = [name for name in checkpoint if name not in (*PARTS, "pytorch-lightning_version", "hparams_name")]
    return [
        f"{weights.dialect.name} program, Lightning {show(checkpoint.get('pytorch-lightning_version'))}",
        f"in the file: weights {len(weights.names)}, moments {len(moments.by_name)}/{len(weights.parameters)} "
        f"in {len(moments.groups)} group(s): {', '.join(sizes)}",
        f"head: kept {len(weights.kept)} of {weights.outputs} outputs, those of {', '.join(destination.targets)}",
        f"step {position.step}, {position.epoch} epochs complete, {state['progress']['samples_in_epoch']} samples of "
        f"the next one done, schedule at step {state['scheduler']['steps']}",
        f"an epoch of ours has {destination.steps_per_epoch} steps{theirs}; train.max_epochs counts ours from step 0",
        *([] if weights.mask is None else [f"china_mask: {weights.mask.sum()} of {weights.mask.numel()} cells count"]),
        f"not carried over: {', '.join([*map(show, left), 'best validation loss'])}",
        "not in the file: the order of its samples (the rest of the epoch follows ours) and the normalization of its "
        "data (the config's is used)",
    ]


def _compare_masks(mask: Tensor | None, ours: Tensor) -> list[str]:
    """Return a warning where the loss was over other cells. Masks are bool [H, W]."""
    if mask is None or (mask.shape == ours.shape and bool((mask == ours).all())):
        return []
    differ = f"{int((mask != ours).sum())} cells" if mask.shape == ours.shape else f"shape, {list(mask.shape)}"
    return [
        f"data.mask: {int(ours.sum())} cells count, {int(mask.sum())} by the file's china_mask, which differs in "
        f"{differ}; it is kept in the run directory, for data.mask"
    ]
