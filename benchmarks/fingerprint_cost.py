#!/usr/bin/env python3
"""The cost of the proof that all ranks hold the same, measured in turn with optimizer steps in one run.

Prints the median of a step and of a proof (fingerprints of all weights, buffers and moments, and their comparison
over ranks), and how much the proof adds to a step at the default `distributed.verify_every_steps` and at an interval
of 1.
Options as for benchmarks.canonical_reduction.
"""

import os
import time

import numpy as np
import torch
from torch.multiprocessing import spawn

from benchmarks.canonical_reduction import (
    Settings,
    build_benchmark_model,
    build_benchmark_trainer,
    read_settings,
    synthetic_batches,
)
from tests.support.rendezvous import host_store, rank_variables
from topoflow.checkpoint.fingerprint import state_fingerprints
from topoflow.config import DistributedConfig
from topoflow.launch import choose_device, read_launch
from topoflow.rendezvous import distributed_context


def main() -> None:
    settings, store = read_settings(), host_store()
    spawn(run_rank, (settings, store.port), nprocs=settings.ranks)


def run_rank(rank: int, settings: Settings, port: int) -> None:
    """Run one process of the benchmark, with one thread."""
    torch.set_num_threads(1)
    os.environ.update(rank_variables(port, rank, settings.ranks))
    launch = read_launch()
    device = choose_device(settings.device, launch)
    with distributed_context(launch, DistributedConfig(), device) as context:
        accumulation = settings.accumulation[0]
        model = build_benchmark_model(settings).to(device)
        trainer = build_benchmark_trainer(settings, model, accumulation, "ddp", context)
        state, batches = trainer.state, list(synthetic_batches(settings, accumulation, context))

        def prove() -> None:
            context.require_same(state_fingerprints(state.model, state.optimizer, state.scheduler), "a benchmark")

        seconds: dict[str, list[float]] = {"step": [], "proof": []}
        for _ in range(settings.rounds + 1):
            for name, body in (("step", lambda: trainer.train_step(batches)), ("proof", prove)):
                context.gather_rows(torch.zeros(1, 1))  # all ranks start together
                began = time.perf_counter()
                body()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - began)
        if context.is_main:
            print_figures(model, {name: np.array(values[1:]) for name, values in seconds.items()})  # the first warms up


def print_figures(model: torch.nn.Module, seconds: dict[str, np.ndarray]) -> None:
    """Print the cost of the proof."""
    every = DistributedConfig().verify_every_steps
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    step, proof = (np.median(seconds[name]) for name in ("step", "proof"))
    print(f"{millions:.2f} M parameters: step {step * 1e3:.1f} ms, proof {proof * 1e3:.1f} ms")
    print(
        f"added to a step: {100 * proof / step / every:.4f} % every {every} steps, {100 * proof / step:.1f} % each step"
    )


if __name__ == "__main__":
    main()
