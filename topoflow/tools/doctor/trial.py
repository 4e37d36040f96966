"""What the processes measure together, all at the same time: the network, and passes of the model."""

import math
import resource
import time
from typing import Any

import numpy as np
import torch

from topoflow.config import Config
from topoflow.data.dataset import input_names
from topoflow.data.grid import build_grid
from topoflow.loss import loss_sums
from topoflow.model.topoflow import TopoFlow, build_model
from topoflow.ranks import Context
from topoflow.reproducibility import seed_draws

TRIAL_BYTES = 2**20
LEAST_PAIR_BYTES, MOST_PAIR_BYTES = 8 * 2**20, 64 * 2**20
"""Between two nodes a small gradient would measure the latency of the first byte; a large one tells no more."""
ALL_REDUCE_SECONDS, PAIR_SECONDS = 2.0, 1.0
"""What one measurement may take; where the network is too slow for the whole gradient, a part of it is sent."""
REPEATS, MOST_PARTNERS = 3, 3
PASSES, ENOUGH_SECONDS = 3, 5.0
"""After so many seconds no further pass is made."""


def build_trial_model(config: Config, grid_shape: tuple[int, int]) -> TopoFlow:
    """Return the configured model for a regular grid about the equator: its cost does not depend on where cells are."""
    lat, lon = (np.arange(count) * min(0.25, 120 / count) for count in grid_shape)
    lat2d, lon2d = np.meshgrid(lat - lat.mean(), lon, indexing="ij")
    grid = build_grid(lat2d, lon2d, "the doctor's grid")
    return build_model(
        config.model,
        input_names(config.data),
        config.data.targets,
        grid_shape,
        *grid.patch_centres_km(config.model.patch_size),
        seed=config.run.seed,
        activation_checkpointing=config.train.activation_checkpointing,
        flex_attention=config.train.flex_attention,
    )


def run_passes(model: TopoFlow, config: Config, grid_shape: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """Make a few forward and backward passes of a micro-batch of random fields, the same on all processes.

    Returns seconds of the fastest, loss, memory_bytes at the peak, and total_bytes of the device (None on CPU).
    """
    model = model.to(device).train()
    batch, heights = _random_batch(config, grid_shape, device)
    taken: list[float] = []
    loss = math.nan
    while len(taken) < PASSES and sum(taken) < ENOUGH_SECONDS:
        seed_draws(config.run.seed, "doctor")
        start = time.monotonic()
        sums, counts = loss_sums(model, batch, heights, config.train.precision)
        sums.sum().backward()
        loss = (sums.detach().sum() / counts.sum()).item()
        _synchronize(device)
        taken.append(time.monotonic() - start)
        model.zero_grad()
    used, total = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None
    if device.type == "cuda":
        used, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    return {"seconds": min(taken), "loss": loss, "memory_bytes": used, "total_bytes": total}


def _random_batch(
    config: Config, grid_shape: tuple[int, int], device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a micro-batch as the data set gives it, and terrain heights [H, W] in metres."""
    size, data = config.train.micro_batch_size, config.data
    draws = torch.Generator().manual_seed(config.run.seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, *grid_shape, generator=draws)

    batch = {
        "x": draw(size, len(input_names(data))),
        "y": draw(size, len(data.targets)),
        "valid": torch.ones(size, len(data.targets), *grid_shape, dtype=torch.bool),
        "lead_time_hours": torch.full((size,), float(data.lead_times_hours[0])),
    }
    if config.model.wind != "none":
        batch["wind_ms"] = 5 * draw(size, 2)
    return {name: tensor.to(device) for name, tensor in batch.items()}, 1000 * draw().abs().to(device)


def time_all_reduce(context: Context, wanted_bytes: int, device: torch.device) -> tuple[float, int]:
    """Return (seconds, bytes) of the fastest of a few all-reduces of `wanted_bytes`, or of what the time allows."""

    def once(size: int) -> float:
        tensor = torch.zeros(max(1, size // 4), device=device)
        _barrier(context)
        start = time.monotonic()
        context.all_reduce_sum(tensor)
        _synchronize(device)
        return max(context.gather_objects(time.monotonic() - start))

    once(TRIAL_BYTES)  # the first one connects
    trial = min(TRIAL_BYTES, wanted_bytes)
    size = _affordable(wanted_bytes, trial, once(trial), ALL_REDUCE_SECONDS)
    return min(once(size) for _ in range(REPEATS)), size


def measure_pairs(context: Context, leaders: list[int], wanted_bytes: int, device: torch.device) -> float | None:
    """Return bytes per second that this process, one of `leaders`, sends and receives at once; None for others.

    An all-reduce is as slow as its slowest member, so it blames nobody. Nodes therefore send to each other in pairs,
    all pairs at once, in up to three rounds with other partners; the best round counts, so that one slow node does not
    make its partners look slow.
    """
    rounds, slowest, best = pair_up(leaders)[:MOST_PARTNERS], 0.0, 0.0
    for pairs in rounds:
        _time_pair(context, pairs, TRIAL_BYTES, device)  # the first one connects
        seconds = context.gather_objects(_time_pair(context, pairs, TRIAL_BYTES, device))
        slowest = max(slowest, *(took for took in seconds if took is not None))
    wanted_bytes = min(max(wanted_bytes, LEAST_PAIR_BYTES), MOST_PAIR_BYTES)
    size = _affordable(wanted_bytes, TRIAL_BYTES, slowest, PAIR_SECONDS)
    for pairs in rounds:
        for _ in range(REPEATS):
            seconds = _time_pair(context, pairs, size, device)
            best = max(best, size / seconds if seconds else 0.0)
    return best or None


def pair_up(ranks: list[int]) -> list[list[tuple[int, int]]]:
    """Return rounds in which each rank meets another, or one of an odd number rests (the circle method)."""
    circle: list[int | None] = [*ranks, *([None] if len(ranks) % 2 else [])]
    rounds, half = [], len(circle) // 2
    for _ in range(len(circle) - 1):
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(one, other) for one, other in pairs if one is not None and other is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def _time_pair(context: Context, pairs: list[tuple[int, int]], size: int, device: torch.device) -> float | None:
    """Return the seconds of an exchange with this process's partner, None without one; all pairs send at once."""
    partner = next((other for pair in pairs if context.rank in pair for other in pair if other != context.rank), None)
    sent = torch.zeros(max(1, size // 4), device=device)
    received = torch.empty_like(sent)
    _synchronize(device)
    _barrier(context)
    if partner is None:
        return None
    start = time.monotonic()
    context.exchange(partner, sent, received)
    _synchronize(device)
    return time.monotonic() - start


def _affordable(wanted_bytes: int, trial_bytes: int, trial_seconds: float, seconds: float) -> int:
    """Return how much can be sent in `seconds`, judging by a trial; the same on all processes."""
    return max(trial_bytes, min(wanted_bytes, int(trial_bytes * seconds / trial_seconds)))


def _barrier(context: Context) -> None:
    context.gather_rows(torch.zeros(1))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
