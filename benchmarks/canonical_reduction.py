#!/usr/bin/env python3
"""The cost of `distributed.reduction=canonical`: optimizer steps with it and with DDP, alternating in one run.

Each rank holds two copies of one model, reduces one with DDP and one along the canonical tree, and trains both with the
program's own step on the same synthetic batches. Blocks of steps alternate, so that other load on the machine affects
both. For each accumulation the table has the median time of a step over blocks, and the median and quartiles of
the ratio within pairs of blocks.
"""

import argparse
import copy
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.multiprocessing import spawn

from benchmarks.sizes import Size, build_sized_model, synthetic_batch, synthetic_elevation_m
from tests.support.bare_trainer import build_bare_trainer
from tests.support.rendezvous import host_store, rank_variables
from topoflow.config import DistributedConfig
from topoflow.launch import choose_device, read_launch
from topoflow.model.topoflow import TopoFlow
from topoflow.ranks import Context
from topoflow.rendezvous import distributed_context
from topoflow.trainer import Trainer


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    grid: tuple[int, int]
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    micro_batch_size: int
    ranks: int
    accumulation: tuple[int, ...]
    rounds: int
    steps: int
    device: str


def main() -> None:
    settings, store = read_settings(), host_store()
    spawn(run_rank, (settings, store.port), nprocs=settings.ranks)


def read_settings() -> Settings:
    """Parse the command line; the defaults are the small setting at which the published program is timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--grid", default="32x64", help="rows x columns")
    parser.add_argument("--patch-size", type=int, default=2)
    parser.add_argument("--embed-dim", type=int, default=96)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine; a power of two")
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4], help="micro-batches of a rank in a step")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a block")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    options = vars(parser.parse_args())
    rows, columns = options.pop("grid").split("x")
    return Settings(grid=(int(rows), int(columns)), **{**options, "accumulation": tuple(options["accumulation"])})


def run_rank(rank: int, settings: Settings, port: int) -> None:
    """Run one process of the benchmark, with one thread."""
    torch.set_num_threads(1)
    os.environ.update(rank_variables(port, rank, settings.ranks))
    launch = read_launch()
    device = choose_device(settings.device, launch)
    with distributed_context(launch, DistributedConfig(), device) as context:
        model = build_benchmark_model(settings).to(device)
        if context.is_main:
            print_head(settings, model, device)
        for accumulation in settings.accumulation:
            seconds = measure(settings, model, accumulation, context)
            if context.is_main:
                print_row(accumulation, seconds)


def build_benchmark_model(settings: Settings) -> TopoFlow:
    """Return the network, with terrain and wind and without dropout."""
    network = (settings.embed_dim, settings.depth, settings.num_heads)
    size = Size("settings", settings.grid, *network, settings.micro_batch_size)
    return build_sized_model(size, patch_size=settings.patch_size)


def measure(settings: Settings, model: TopoFlow, accumulation: int, context: Context) -> dict[str, np.ndarray]:
    """Return {reduction: seconds of a step, [rounds]}, measured in alternating blocks."""
    batches = list(synthetic_batches(settings, accumulation, context))
    trainers = {
        reduction: build_benchmark_trainer(settings, copy.deepcopy(model), accumulation, reduction, context)
        for reduction in ("ddp", "canonical")
    }
    seconds: dict[str, list[float]] = {"ddp": [], "canonical": []}
    for number in range(settings.rounds + 1):
        for reduction in ("ddp", "canonical") if number % 2 else ("canonical", "ddp"):
            context.gather_rows(torch.zeros(1, 1))  # all ranks start a block together
            began = time.perf_counter()
            for _ in range(settings.steps):
                trainers[reduction].train_step(batches)
            if context.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[reduction].append((time.perf_counter() - began) / settings.steps)
    return {reduction: np.array(values[1:]) for reduction, values in seconds.items()}  # the first warms up


def build_benchmark_trainer(
    settings: Settings, model: TopoFlow, accumulation: int, reduction: str, context: Context
) -> Trainer:
    """Return the program's trainer for `model`, of which only the step is used."""
    elevation_m = synthetic_elevation_m(settings.grid)
    return build_bare_trainer(model, elevation_m, settings.micro_batch_size, accumulation, reduction, context)


def synthetic_batches(settings: Settings, accumulation: int, context: Context) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this rank's micro-batches of one step, on its device."""
    for index in range(accumulation):
        batch = synthetic_batch(settings.grid, settings.micro_batch_size, 2 + context.rank * accumulation + index)
        yield {name: tensor.to(context.device) for name, tensor in batch.items()}


def print_head(settings: Settings, model: TopoFlow, device: torch.device) -> None:
    rows, columns = settings.grid
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{rows} x {columns} cells, patch {settings.patch_size}, width {settings.embed_dim}, depth {settings.depth}, "
        f"{settings.num_heads} heads, {millions:.2f} M parameters, micro-batch {settings.micro_batch_size}; "
        f"{settings.ranks} ranks of 1 thread on {device.type}, {os.cpu_count()} cores; "
        f"{settings.rounds} pairs of blocks of {settings.steps} steps"
    )
    print("accumulation  ddp, ms a step  canonical, ms a step  canonical / ddp  (quartiles)", flush=True)


def print_row(accumulation: int, seconds: dict[str, np.ndarray]) -> None:
    ddp, canonical = (np.median(seconds[reduction]) * 1e3 for reduction in ("ddp", "canonical"))
    low, ratio, high = np.quantile(seconds["canonical"] / seconds["ddp"], [0.25, 0.5, 0.75])
    print(f"{accumulation:12d}  {ddp:14.1f}  {canonical:20.1f}  {ratio:15.3f}  ({low:.3f} - {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
