"""What an import took from a file and what it left, in words for the user."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from topoflow.tools.lightning.dialects import Weights
from topoflow.tools.lightning.moments import Moments
from topoflow.tools.lightning.position import Position

TAKEN = (
    "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "optimizer_states", "lr_schedulers",
    "hparams_name",
)  # fmt: skip
"""Parts of a file that are read, or say nothing."""


def describe_weights(
    checkpoint: Mapping[str, Any], weights: Weights, moments: Moments, targets: Sequence[str]
) -> list[str]:
    """The network and its optimizer."""
    outputs = len(weights.tensors[next(source for source, name in weights.names.items() if name == weights.last_bias)])
    version, groups = checkpoint.get("pytorch-lightning_version", "unknown"), moments.groups
    sizes = ", ".join(f"{group.settings.get('name', 'no name')} {len(group.settings['params'])}" for group in groups)
    return [
        f"{weights.dialect.name} program, Lightning {version}",
        f"in the file: weights {len(weights.names)}, moments {len(moments.by_name)}/{len(weights.parameters)} "
        f"in {len(groups)} group(s): {sizes}",
        f"head: kept {len(weights.kept)} of {outputs} outputs, those of {', '.join(targets)}",
    ]


def describe_position(position: Position, samples: int, scheduler_steps: int, steps_per_epoch: int) -> list[str]:
    """Where the run stands, and what its epochs are."""
    theirs = "" if position.epoch_batches is None else f", of Lightning {position.epoch_batches} batches on each device"
    return [
        f"step {position.step}, {position.epoch} epochs complete, {samples} samples of the next one done, "
        f"schedule at step {scheduler_steps}",
        f"an epoch of ours has {steps_per_epoch} steps{theirs}; train.max_epochs counts ours from step 0",
    ]


def describe_rest(checkpoint: Mapping[str, Any], mask: Tensor | None) -> list[str]:
    """What is not carried over, and what the file never had."""
    left = [name for name, content in checkpoint.items() if name not in TAKEN and content]
    lines = [] if mask is None else [f"china_mask: {int(mask.sum())} of {mask.numel()} cells count"]
    return [
        *lines,
        f"left behind: {', '.join([*left, 'best validation loss'])}",
        "not in the file: the order of its samples (the rest of the epoch follows ours) and the normalization of its "
        "data (the config's is used)",
    ]


def warn_of_mask(mask: Tensor | None, ours: Tensor) -> list[str]:
    """That the loss was over other cells, if so. Masks are bool [H, W]."""
    if mask is None or (mask.shape == ours.shape and bool((mask == ours).all())):
        return []
    differ = f"{int((mask != ours).sum())} cells" if mask.shape == ours.shape else f"shape, {list(mask.shape)}"
    return [
        f"data.mask: {int(ours.sum())} cells count, {int(mask.sum())} by the file's china_mask, which differs in "
        f"{differ}; it is kept in the run directory, for data.mask"
    ]
