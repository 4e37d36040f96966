"""The program's trainer with nothing around its step: no data, no log, no checkpoint."""

from pathlib import Path

from torch import Tensor, nn

from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.checkpoint.saver import CheckpointSaver
from topoflow.config import CheckpointConfig, DistributedConfig, OptimConfig, TrainConfig
from topoflow.data.sampling import BatchPlan
from topoflow.optim import build_optimizer, build_scheduler
from topoflow.ranks import Context
from topoflow.reduction import build_reduction
from topoflow.train_state import TrainData, TrainProgress, TrainState
from topoflow.trainer import RunOutput, Trainer


def build_bare_trainer(
    model: nn.Module, elevation_m: Tensor, micro_batch_size: int, accumulation: int, reduction: str, context: Context
) -> Trainer:
    """Return a trainer whose `train_step` can be called.

    Args:
        elevation_m: [H, W].
        reduction: as `distributed.reduction`.
    """
    optim = OptimConfig()
    optimizer = build_optimizer(model, optim)
    scheduler = build_scheduler(optimizer, optim, 1000, 1000)
    state = TrainState(model, optimizer, scheduler, TrainProgress(), optim.grad_clip_norm)
    global_batch_size = micro_batch_size * accumulation * context.world_size
    plan = BatchPlan(global_batch_size, 0, global_batch_size, micro_batch_size, context.rank, context.world_size)
    directory = CheckpointDirectory(Path("none"))
    saver = CheckpointSaver(context, directory, CheckpointConfig(), capture=dict, on_commit=print)
    return Trainer(
        context,
        state,
        build_reduction(DistributedConfig(reduction=reduction), model, context, accumulation),
        TrainData(train=None, validation=None, plan=plan, elevation_m=elevation_m.to(context.device), threads=0),
        TrainConfig(max_steps=1000, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size),
        RunOutput(saver, writer=None),
    )
