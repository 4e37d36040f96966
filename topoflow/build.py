"""From config and data to what a training run is made of: the order of samples, model, optimizer, scheduler.

Shared by training and by the import of checkpoints, which must build the same.
"""

import dataclasses
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch

from topoflow.certificate import Certifier
from topoflow.checkpoint.file import FORMAT
from topoflow.checkpoint.state import capture_state
from topoflow.config import Config
from topoflow.config_io import config_to_dict
from topoflow.data.assembly import SPLITS, DataIndex, ForecastData, index_forecast_data, open_indexed_data
from topoflow.data.normalization import Normalization
from topoflow.data.sampling import BatchPlan
from topoflow.errors import ConfigError, Refusal
from topoflow.model.topoflow import TopoFlow, build_model
from topoflow.optim import build_optimizer, build_scheduler
from topoflow.ranks import Context, require_agreement
from topoflow.reduction import require_whole_subtrees
from topoflow.reproducibility import describe_software, hash_sources
from topoflow.train_state import TrainData, TrainProgress, TrainState


def open_data(config: Config, context: Context, only: Sequence[str] = SPLITS) -> ForecastData:
    """What the config makes of its data set, at which rank 0 alone looks; the others receive what it found.

    So ranks open what they read samples from and nothing else. The first rank of each node also reads the few hours of
    the fingerprint there: what a node sees under the same path may be another copy. Ranks that hold the fields in
    memory have them anyway.

    Args:
        only: the splits whose starts are looked for.

    Raises:
        ConfigError, DataError, MissingPath: on every rank alike, see `index_forecast_data` and `open_indexed_data`.
        RanksDisagree: a rank sees other data than rank 0.
    """
    with context.together("data"):
        index = _index_on_main(config, context)
        data = open_indexed_data(config.data, config.model.wind != "none", index, only)
        seen = data.source.fingerprint
        if not context.is_main and (context.launch.local_rank == 0 or data.source.in_memory):
            seen = data.source.compute_fingerprint()
    require_agreement(context, {f"contents of data.path {config.data.path}": seen}, "with the data open")
    return data


def _index_on_main(config: Config, context: Context) -> DataIndex:
    index, refusal = None, None
    if context.is_main:
        try:
            index = index_forecast_data(config.data, config.model.wind != "none", config.model.terrain != "none")
        except Refusal as error:
            refusal = error
    index, refusal = context.broadcast_object((index, refusal))
    if refusal is not None:
        raise refusal
    return index


def build_plan(config: Config, data: ForecastData, context: Context) -> BatchPlan:
    """How samples are ordered and shared by ranks."""
    if config.distributed.reduction == "canonical":
        micro_batches = config.train.global_batch_size // config.train.micro_batch_size
        require_whole_subtrees(micro_batches, context.world_size)
    return BatchPlan(
        num_samples=len(data.splits["train"].starts) * len(config.data.lead_times_hours),
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=context.rank,
        world_size=context.world_size,
    )


def total_steps(config: Config, plan: BatchPlan) -> int:
    """Length of the run in optimizer steps: max_steps or max_epochs, whichever ends first."""
    by_epochs = config.train.max_epochs and config.train.max_epochs * plan.steps_per_epoch
    return min(steps for steps in (config.train.max_steps, by_epochs) if steps)


def resolve(config: Config, data: ForecastData, plan: BatchPlan) -> Config:
    """The config with what it left open: the grid's size, and the length of the schedule.

    Raises:
        ConfigError: model.img_size is not the data's grid.
    """
    model, optim = config.model, config.optim
    if model.img_size is None:
        model = dataclasses.replace(model, img_size=data.grid.shape)
    if tuple(model.img_size) != data.grid.shape:
        raise ConfigError(f"model.img_size: {list(model.img_size)}: expected the data's {list(data.grid.shape)}")
    if optim.schedule_length is None:
        steps = total_steps(config, plan)
        epochs = -(-steps // plan.steps_per_epoch)
        optim = dataclasses.replace(optim, schedule_length=epochs if optim.schedule_interval == "epoch" else steps)
    return dataclasses.replace(config, model=model, optim=optim)


def build_network(config: Config, data: ForecastData) -> TopoFlow:
    """The network for these data on CPU, with its initial weights."""
    return build_model(
        config.model,
        data.input_names,
        data.target_names,
        data.grid.shape,
        *data.grid.patch_centres_km(config.model.patch_size),
        seed=config.run.seed,
        activation_checkpointing=config.train.activation_checkpointing,
        flex_attention=config.train.flex_attention,
    )


def build_state(config: Config, data: ForecastData, plan: BatchPlan, context: Context) -> TrainState:
    """Model, optimizer and scheduler, as they are before the first step of a new run."""
    with context.together("model"):
        model = build_network(config, data)
    model.to(context.device)
    for buffer in model.buffers():  # derived from the grid, by arithmetic that may differ between machines
        context.broadcast_tensor(buffer)
    if config.train.compile:
        model.compile()
    optimizer = build_optimizer(model, config.optim)
    scheduler = build_scheduler(optimizer, config.optim, plan.steps_per_epoch, total_steps(config, plan))
    return TrainState(model, optimizer, scheduler, TrainProgress())


def build_train_data(
    config: Config, data: ForecastData, normalization: Normalization, plan: BatchPlan, device: torch.device
) -> TrainData:
    """What training reads."""
    return TrainData(
        train=data.dataset("train", normalization),
        validation=data.dataset("validation", normalization) if "validation" in data.splits else None,
        plan=plan,
        elevation_m=torch.from_numpy(data.grid.heights_m()).to(device),
        workers=config.data.workers,
    )


def capture_with(
    certifier: Certifier, config: Config, data: ForecastData, context: Context
) -> Callable[[], dict[str, Any]]:
    """What a checkpoint holds, as a function that captures it when called: its tensors are those of the live state."""
    state, normalization = certifier.state, certifier.data.train.normalization
    constant = {
        "format": FORMAT,
        "random": {"seed": config.run.seed, "keyed_by": "(seed, purpose, step, micro-batch index in the global batch)"},
        "data": {
            "fingerprint": data.source.fingerprint,
            "mask_fingerprint": data.mask_fingerprint,
            "normalization": normalization.to_dict(),
            "normalization_fingerprint": normalization.fingerprint,
        },
        "config": config_to_dict(config),
        "software": {**describe_software(context.device), "world_size": context.world_size},
    }

    def capture() -> dict[str, Any]:
        arrays = capture_state(state.model, state.optimizer, state.scheduler)
        certificate = certifier.certify()
        return {**constant, **arrays, "progress": dataclasses.asdict(state.progress), "certificate": certificate}

    return capture


def require_same_program(context: Context, config: Config) -> None:
    """Prove that all processes have the same code, versions, number of threads, and config.

    Raises:
        RanksDisagree: on every process, with the table of who has what.
    """
    if context.world_size == 1:
        return  # and does not read a hundred source files
    software = describe_software(torch.device("cpu"))
    facts = {name: str(software[name]) for name in ("python", "torch", "numpy", "topoflow", "threads")}
    facts["system"] = platform.system()
    facts["sources of topoflow"] = hash_sources()[:16]
    for section, keys in config_to_dict(config).items():
        facts |= {f"{section}.{key}": repr(value) for key, value in keys.items()}
    require_agreement(context, facts, "at the start")


def require_same_data(context: Context, data: ForecastData, plan: BatchPlan) -> None:
    """Prove that all processes cut the data set into the same batches; that it is the same was seen when it was opened.

    Raises:
        RanksDisagree: on every process, with the table of who has what.
    """
    facts = {
        "batches in an epoch": str(plan.steps_per_epoch * plan.accumulation),
        "order of samples": plan.fingerprint,
    }
    facts |= {f"samples for {split}": str(len(index.starts)) for split, index in data.splits.items()}
    require_agreement(context, facts, "with the data open")
