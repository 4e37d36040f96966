"""The trial of the model: a few forward and backward passes of random fields, the same on all processes."""

import math
import resource
import statistics
import time
from collections.abc import Mapping

import numpy as np
import torch

from topoflow.build import build_network
from topoflow.data.channels import input_names
from topoflow.data.grid import Grid
from topoflow.loss import loss_sums
from topoflow.reproducibility import seed_draws
from topoflow.tools.doctor.probe import Process
from topoflow.tools.doctor.report import FAIL, WARNING, Found, Report, format_value

PASSES, ENOUGH_SECONDS = 3, 5.0
"""After so many seconds no further pass is made."""
SLOW_PASS_FACTOR, SLOW_PASS_SECONDS = 1.5, 0.05
"""A process is slow if it takes this many times the median, and at least this many seconds more."""
SAME_LOSS = {"fp32": 1e-3, "bf16": 2e-2}
"""Relative difference of the loss, equal on all processes, that rounding explains."""
FULL_MEMORY_SHARE = 0.9
"""Of the device's memory; optimizer and communication need some too."""


def build_trial_model(process: Process, found: Found) -> None:
    """Build the configured model for a regular grid about the equator: any costs the same."""
    lat, lon = (np.arange(count) * min(0.25, 120 / count) for count in process.grid_shape)
    grid = Grid(*np.meshgrid(lat.mean() - lat, lon, indexing="ij"))
    process.model = build_network(process.config, grid)
    found.facts["gradient_bytes"] = sum(parameter.nbytes for parameter in process.model.parameters())


def run_passes(process: Process, found: Found) -> None:
    """Pass a micro-batch of random fields through the model a few times, forward and backward."""
    config, device, grid_shape = process.config, process.device, process.grid_shape
    is_gpu, data, size = device.type == "cuda", config.data, config.train.micro_batch_size
    if is_gpu:
        torch.cuda.set_device(device)  # each thread has a current device of its own
    draws = torch.Generator().manual_seed(config.run.seed)
    leads = (len(data.lead_times_hours),) if config.model.leads == "joint" else ()
    targets = (size, *leads, len(data.targets), *grid_shape)
    batch = {
        "x": torch.randn(size, len(input_names(data)), *grid_shape, generator=draws),
        "y": torch.randn(targets, generator=draws),
        "valid": torch.ones(targets, dtype=torch.bool),
        "lead_time_hours": torch.full((size,), float(data.lead_times_hours[0])),
        "wind_ms": 5 * torch.randn(size, 2, *grid_shape, generator=draws),
    }
    if config.model.wind == "none":
        del batch["wind_ms"]
    heights_m = 1000 * torch.randn(grid_shape, generator=draws).abs().to(device)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    assert process.model is not None
    model = process.model.to(device).train()
    taken: list[float] = []
    loss = math.nan
    while len(taken) < PASSES and sum(taken) < ENOUGH_SECONDS:
        seed_draws(config.run.seed, "doctor")
        start = time.monotonic()
        sums, counts = loss_sums(model, batch, heights_m, config.train.precision)
        sums.sum().backward()
        loss = (sums.detach().sum() / counts.sum()).item()
        if is_gpu:
            torch.cuda.synchronize(device)
        taken.append(time.monotonic() - start)
        model.zero_grad()
    used = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if is_gpu:
        used, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        if used > FULL_MEMORY_SHARE * total:
            text = f"{format_value(used, 'B')} of {format_value(total, 'B')}: lower train.micro_batch_size"
            found.find(WARNING, text)
    found.facts["loss"] = loss
    found.figures |= {"pass_seconds": min(taken), "memory_bytes": used}
    size = f"{batch['x'].shape[0]} sample(s) of {grid_shape[0]} x {grid_shape[1]} cells in {config.train.precision}"
    found.summary = f"forward and backward of {size}{', not compiled' * config.train.compile}, without the optimizer"


def compare_passes(report: Report, found: Mapping[int, Found]) -> str:
    """Check that all processes compute the same loss in about the same time."""
    if not found:
        return "no pass was measured"
    tolerance = SAME_LOSS[report.config.train.precision]
    taken = [item.figures["pass_seconds"] for item in found.values()]
    median, usual = statistics.median(taken), statistics.median_low(item.facts["loss"] for item in found.values())
    for rank, item in found.items():
        loss, seconds = item.facts["loss"], item.figures["pass_seconds"]
        if not abs(loss - usual) <= tolerance * abs(usual):  # or one is not a number
            text = f"rank {rank} computes a loss of {loss:.6g}, others {usual:.6g}: is its device broken?"
            item.find(FAIL, text)
        if seconds > max(SLOW_PASS_FACTOR * median, median + SLOW_PASS_SECONDS):
            text = f"rank {rank} takes {seconds:.4f} s, the median process {median:.4f} s: all wait for it"
            item.find(WARNING, f"{text}; check its device's clock rate and other load there")
    return f"{found[min(found)].summary}: median {median:.4f} s, slowest {max(taken):.4f} s"
