"""Build the parts of a training run from config and data: order of samples, network, optimizer, scheduler.

Training and the import of other programs' checkpoints build through the same functions.
"""

import dataclasses
import platform
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from topoflow.bases import fit_base, restore_base
from topoflow.certificate import Certifier
from topoflow.checkpoint.file import FORMAT
from topoflow.checkpoint.state import capture_state, deliver
from topoflow.config import Config
from topoflow.config_io import config_to_dict
from topoflow.data.assembly import SPLITS, ForecastData, open_forecast_data
from topoflow.data.channels import input_names
from topoflow.data.grid import Grid
from topoflow.data.normalization import Base, Normalization
from topoflow.data.prepared.reader import PreparedIndex, index_prepared
from topoflow.data.sampling import BatchPlan
from topoflow.errors import ConfigError, Refusal
from topoflow.model.topoflow import TopoFlow, build_model
from topoflow.optim import build_optimizer, build_scheduler
from topoflow.ranks import Context
from topoflow.reduction import require_whole_subtrees
from topoflow.reproducibility import describe_software, hash_sources
from topoflow.text import format_table
from topoflow.train_state import TrainData, TrainProgress, TrainState, total_steps


def program_facts(config: Config) -> dict[str, str]:
    """Return {name: value} of all that must be equal on all ranks: code, versions, number of threads and config."""
    software = describe_software(torch.device("cpu"))
    facts = {name: str(software[name]) for name in ("python", "torch", "numpy", "topoflow", "threads")}
    facts["system"] = platform.system()
    facts["sources of topoflow"] = hash_sources()[:16]
    for section, keys in config_to_dict(config).items():
        facts |= {f"{section}.{key}": repr(value) for key, value in keys.items()}
    return facts


def require_same_program(context: Context, config: Config) -> None:
    """Check that all processes have the same `program_facts`.

    Raises:
        RanksDisagree: on every process, with a table of the values per rank.
    """
    if context.world_size > 1:  # a single process does not need to hash a hundred source files
        context.require_same(program_facts(config), "at the start")


def open_data(config: Config, context: Context, only: Sequence[str] = SPLITS) -> ForecastData:
    """Open the data set of the config. Only rank 0 reads its metadata, and sends them to the others.

    The first rank of each node also reads them: a node may see another copy under the same path.

    Args:
        only: the splits whose start times are needed.

    Raises:
        ConfigError, DataError, MissingPath: on every rank, see `open_forecast_data`.
        RanksDisagree: a rank sees other data than rank 0.
    """
    form = (config.model.wind != "none", config.model.terrain != "none", config.model.leads == "joint")
    with context.together("data"):
        index = _index_on_main(config.data.path, "data.path", context)
        forecasts = None
        if config.data.forecast is not None:
            forecasts = _index_on_main(config.data.forecast, "data.forecast", context)
        data = open_forecast_data(config.data, *form, index=index, forecast_index=forecasts, only=only)
        seen = data.contents.fingerprint
        if not context.is_main and context.launch.local_rank == 0:
            seen = open_forecast_data(config.data, *form, only=only).contents.fingerprint
    context.require_same({f"contents of data.path {config.data.path}": seen}, "with the data open")
    return data


def _index_on_main(path: str, key: str, context: Context) -> PreparedIndex:
    index, refusal = None, None
    if context.is_main:
        try:
            index = index_prepared(path, key)
        except Refusal as error:
            refusal = error
    index, refusal = context.broadcast_object((index, refusal))
    if refusal is not None:
        raise refusal
    return index


def build_plan(config: Config, data: ForecastData, context: Context) -> BatchPlan:
    """Build the order of samples and their division among ranks, the same on all ranks.

    Raises:
        ConfigError: the world size or the number of samples does not fit the batch size.
        RanksDisagree: ranks divide the data set into different batches.
    """
    with context.together("order of samples"):
        if config.distributed.reduction == "canonical":
            micro_batches = config.train.global_batch_size // config.train.micro_batch_size
            require_whole_subtrees(micro_batches, context.world_size)
        plan = BatchPlan(
            num_samples=data.num_samples("train"),
            seed=config.run.seed,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            rank=context.rank,
            world_size=context.world_size,
        )
    facts = {"batches in an epoch": str(plan.steps_per_epoch * plan.accumulation), "order of samples": plan.fingerprint}
    facts |= {f"samples for {split}": str(len(index.starts)) for split, index in data.splits.items()}
    context.require_same(facts, "with the data open")
    return plan


def resolve(config: Config, data: ForecastData, plan: BatchPlan) -> Config:
    """Return the config with the keys filled in that the user left open: the grid's size, the length of the schedule.

    Raises:
        ConfigError: model.img_size is not the data's grid.
    """
    model, optim = config.model, config.optim
    if model.img_size is None:
        model = dataclasses.replace(model, img_size=data.grid.shape)
    if tuple(model.img_size or ()) != data.grid.shape:
        raise ConfigError(f"model.img_size: {list(model.img_size or ())}: expected the data's {list(data.grid.shape)}")
    if optim.schedule_length is None:
        steps = total_steps(config.train, plan)
        epochs = -(-steps // plan.steps_per_epoch)
        optim = dataclasses.replace(optim, schedule_length=epochs if optim.schedule_interval == "epoch" else steps)
    return dataclasses.replace(config, model=model, optim=optim)


def build_normalization(config: Config, data: ForecastData, context: Context) -> Normalization:
    """Compute the constants over the training split on rank 0, send them to all ranks, and fit the base of model.base.

    Raises:
        ConfigError, DataError: on every rank, see `ForecastData.build_normalization` and `fit_base`.
    """
    constants = None
    with context.together("normalization"):
        if context.is_main:
            constants = data.build_normalization(context.watch.tick).to_dict()
    normalization = Normalization.from_dict(context.broadcast_object(constants))
    if config.model.base == "none":
        return normalization
    return dataclasses.replace(normalization, base=fit_base(config.model.base, data, context))


def restore_normalization(saved: dict[str, Any], context: Context) -> Normalization:
    """Return what the `data` of a checkpoint hold, on every rank; only on rank 0 do its tensors have contents."""
    normalization = Normalization.from_dict(saved["normalization"])
    if "base" not in saved:
        return normalization
    arrays = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in saved["base"].items()}
    device = context.device
    pairs = [(saved["base"][name], array.to(device)) for name, array in arrays.items()]
    deliver(context, pairs)
    base = {name: pair[1].cpu().numpy() for name, pair in zip(arrays, pairs, strict=True)}
    return dataclasses.replace(normalization, base=restore_base(base))


def build_network(config: Config, grid: Grid, observed: np.ndarray | None = None) -> TopoFlow:
    """Build the network for data on this grid on CPU, with its initial weights.

    observed: bool [H, W]; with model.tokens=with_data, only patches with one of these cells are computed.
    """
    model = build_model(
        config.model,
        input_names(config.data),
        config.data.targets,
        grid.shape,
        *grid.patch_centres_km(config.model.patch_size),
        seed=config.run.seed,
        activation_checkpointing=config.train.activation_checkpointing,
        flex_attention=config.train.flex_attention,
        num_leads=len(config.data.lead_times_hours),
    )
    if config.model.tokens == "with_data" and observed is not None:
        model.keep_patches(observed)
    return model


def observed_cells(data: ForecastData, base: Base | None) -> np.ndarray | None:
    """Return the cells of the mask where a target was observed in training, bool [H, W]; None without a base."""
    return None if base is None else base.known & data.source.mask


def build_state(config: Config, data: ForecastData, base: Base | None, plan: BatchPlan, context: Context) -> TrainState:
    """Build network, optimizer and scheduler as they are before the first step of a new run."""
    with context.together("model"):
        model = build_network(config, data.grid, observed_cells(data, base))
    model.to(context.device)
    for buffer in model.buffers():  # derived from the grid with arithmetic that may differ between machines
        context.broadcast_tensor(buffer)
    if config.train.compile:
        # torch compiles at the first call. In training that call comes from DDP, and the graph is cut at DDP's buckets,
        # so that gradients are summed over ranks during the backward pass
        model.compile()
    optimizer = build_optimizer(model, config.optim)
    scheduler = build_scheduler(optimizer, config.optim, plan.steps_per_epoch, total_steps(config.train, plan))
    return TrainState(model, optimizer, scheduler, TrainProgress(), config.optim.grad_clip_norm)


def build_train_data(
    config: Config, data: ForecastData, normalization: Normalization, plan: BatchPlan, context: Context
) -> TrainData:
    """Build the data sets of the training and validation splits."""
    report, with_validation = context.watch.tick, "validation" in data.splits
    with context.together("samples"):
        return TrainData(
            train=data.dataset("train", normalization, on_progress=report),
            validation=data.dataset("validation", normalization, on_progress=report) if with_validation else None,
            plan=plan,
            elevation_m=torch.from_numpy(data.source.heights_m()).to(context.device),
            threads=config.data.threads,
        )


def capture_with(
    certifier: Certifier, config: Config, data: ForecastData, context: Context
) -> Callable[[], dict[str, Any]]:
    """Return a function that captures the content of a checkpoint; its tensors are those of the live state."""
    state, normalization = certifier.state, certifier.data.train.normalization
    arrays = normalization.base.arrays() if normalization.base else {}
    base = {name: torch.from_numpy(array) for name, array in arrays.items()}
    constant = {
        "format": FORMAT,
        "random": {"seed": config.run.seed, "keyed_by": "(seed, purpose, step, micro-batch index in the global batch)"},
        "data": {
            "fingerprint": data.contents.fingerprint,
            "contents": data.contents.to_dict(),
            "grid": data.grid.to_dict(),
            "normalization": normalization.to_dict(),
            "normalization_fingerprint": normalization.fingerprint,
            **({"base": base} if base else {}),
        },
        "config": config_to_dict(config),
        "software": {**describe_software(context.device), "world_size": context.world_size},
    }

    def capture() -> dict[str, Any]:
        arrays = capture_state(state.model, state.optimizer, state.scheduler)
        certificate = certifier.certify()
        return {**constant, **arrays, "progress": dataclasses.asdict(state.progress), "certificate": certificate}

    return capture


def describe_run(config: Config, data: ForecastData, state: TrainState, plan: BatchPlan, context: Context) -> list[str]:
    """Return lines for the log at the start: data, parameter groups, batch and length."""
    lines = data.summary()
    if plan.dropped:
        lines.append(
            f"{plan.dropped} samples at the end of each epoch's order do not fill a global batch and are not used"
        )
    groups = [(g["name"], g["params"], f"{g['lr']:.3g}") for g in state.optimizer.param_groups]
    groups.append(("all", [parameter for _, parameters, _ in groups for parameter in parameters], ""))
    rows = [
        (name, f"{len(parameters):,}", f"{sum(parameter.numel() for parameter in parameters):,}", rate)
        for name, parameters, rate in groups
    ]
    lines += format_table(("group", "tensors", "parameters", "rate"), rows)
    steps, threads = total_steps(config.train, plan), torch.get_num_threads()
    micro_batches = f"{plan.micro_batch_size} x {plan.world_size} processes x {plan.accumulation} accumulated"
    return [
        *lines,
        f"device          {context.device}, {config.train.precision}, {threads} thread(s) per process",
        f"batch           {plan.global_batch_size} = {micro_batches}",
        f"length          {steps:,} steps, {plan.steps_per_epoch:,} an epoch, {state.progress.step:,} done",
    ]
