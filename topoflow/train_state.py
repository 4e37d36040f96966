"""The state of training, the data that it reads, and the check that all ranks hold the same."""

from dataclasses import dataclass

import torch
from torch import nn

from topoflow.checkpoint.fingerprint import state_fingerprints
from topoflow.config import TrainConfig
from topoflow.data.dataset import ForecastDataset
from topoflow.data.sampling import BatchPlan
from topoflow.ranks import Context


@dataclass
class TrainProgress:
    """The position of a run; a checkpoint holds all of it."""

    step: int = 0
    updates: int = 0
    """Steps that changed weights: all except those whose batch had no valid target."""
    epoch: int = 0
    samples_in_epoch: int = 0
    validation_loss: float | None = None
    validated_step: int | None = None
    """The step after which validation_loss was measured."""
    validation_owed: bool = False
    """The validation after this step was interrupted by a request to stop."""
    best_validation_loss: float | None = None
    best_step: int | None = None
    validations_since_best: int = 0


@dataclass
class TrainState:
    """What training changes. grad_clip_norm: limit of the gradient's norm in an update (None: no clipping)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    progress: TrainProgress
    grad_clip_norm: float | None


@dataclass(frozen=True)
class TrainData:
    """What training reads. elevation_m [H, W]: terrain height in metres, on the device. threads: that load batches."""

    train: ForecastDataset
    validation: ForecastDataset | None
    plan: BatchPlan
    elevation_m: torch.Tensor
    threads: int


def total_steps(config: TrainConfig, plan: BatchPlan) -> int:
    """Return the length of the run in optimizer steps: max_steps or max_epochs, whichever ends first."""
    by_epochs = config.max_epochs and config.max_epochs * plan.steps_per_epoch
    return min(steps for steps in (config.max_steps, by_epochs) if steps)


def verify_ranks(context: Context, state: TrainState, data: TrainData, when: str) -> None:
    """Check that all ranks hold the same weights, buffers, moments, steps, rates, position and order of samples.

    Raises:
        RanksDisagree: naming what differs, and the ranks.
    """
    if context.world_size > 1:
        here = state_fingerprints(state.model, state.optimizer, state.scheduler)
        here["progress"] = repr(state.progress)
        here["order of samples"] = data.plan.fingerprint
        here["normalization"] = data.train.normalization.fingerprint
        context.require_same(here, when)
