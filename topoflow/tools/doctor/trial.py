"""The trial of the model: a few forward and backward passes of random fields, the same on all processes."""

import math
import resource
import time
from typing import Any

import numpy as np
import torch

from topoflow.config import Config
from topoflow.data.channels import input_names
from topoflow.data.grid import Grid
from topoflow.loss import loss_sums
from topoflow.model.topoflow import TopoFlow, build_model
from topoflow.reproducibility import seed_draws

PASSES, ENOUGH_SECONDS = 3, 5.0
"""After so many seconds no further pass is made."""


def build_trial_model(config: Config, grid_shape: tuple[int, int]) -> dict[str, Any]:
    """Return the configured `model`, and `gradient_bytes`, for a regular grid about the equator: any costs the same."""
    lat, lon = (np.arange(count) * min(0.25, 120 / count) for count in grid_shape)
    grid = Grid(*np.meshgrid(lat.mean() - lat, lon, indexing="ij"))
    model = build_model(
        config.model,
        input_names(config.data),
        config.data.targets,
        grid_shape,
        *grid.patch_centres_km(config.model.patch_size),
        seed=config.run.seed,
        activation_checkpointing=config.train.activation_checkpointing,
        flex_attention=config.train.flex_attention,
    )
    return {"model": model, "gradient_bytes": sum(parameter.nbytes for parameter in model.parameters())}


def run_passes(model: TopoFlow, config: Config, grid_shape: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """Pass a micro-batch of random fields through the model a few times, forward and backward.

    Returns seconds of the fastest, loss, memory_bytes at the peak, and total_bytes of the device (None on CPU).
    """
    is_gpu, data, size = device.type == "cuda", config.data, config.train.micro_batch_size
    if is_gpu:
        torch.cuda.set_device(device)  # each thread has a current device of its own
    draws = torch.Generator().manual_seed(config.run.seed)
    batch = {
        "x": torch.randn(size, len(input_names(data)), *grid_shape, generator=draws),
        "y": torch.randn(size, len(data.targets), *grid_shape, generator=draws),
        "valid": torch.ones(size, len(data.targets), *grid_shape, dtype=torch.bool),
        "lead_time_hours": torch.full((size,), float(data.lead_times_hours[0])),
        "wind_ms": 5 * torch.randn(size, 2, *grid_shape, generator=draws),
    }
    if config.model.wind == "none":
        del batch["wind_ms"]
    heights = 1000 * torch.randn(grid_shape, generator=draws).abs().to(device)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    model = model.to(device).train()
    taken: list[float] = []
    loss = math.nan
    while len(taken) < PASSES and sum(taken) < ENOUGH_SECONDS:
        seed_draws(config.run.seed, "doctor")
        start = time.monotonic()
        sums, counts = loss_sums(model, batch, heights, config.train.precision)
        sums.sum().backward()
        loss = (sums.detach().sum() / counts.sum()).item()
        if is_gpu:
            torch.cuda.synchronize(device)
        taken.append(time.monotonic() - start)
        model.zero_grad()
    used, total = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None
    if is_gpu:
        used, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    return {"seconds": min(taken), "loss": loss, "memory_bytes": used, "total_bytes": total}
