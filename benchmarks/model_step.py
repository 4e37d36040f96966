"""Time and memory of one optimizer step: the published program's, ours, and ours with each option.

    python -m benchmarks.model_step [--sizes a,b,c] [--variants published,ours,...] [--rounds N] [--threads N] [--quick]

A step is forward, loss, backward, AdamW and zero_grad on one batch. Each measurement has a process of its own, which
takes warm-up steps and then timed ones; processes of all variants take turns, for several rounds. Prints the median
over rounds of a process's median step, with the smallest and the largest; the median over rounds of its peak of
resident memory above the bare process, warm-up included; ratios of medians, with the quartiles of the ratios of single
rounds. The bare process has imported everything and taken a step with a tiny model, because torch imports much at the
first optimizer (80 MB). Linux only, because of the memory.

`ours` has terrain and wind (the published program is measured without its wind scan), no dropout, float32. `published,
same function` leaves out relative position and token norm, as ours does. `dropout` is drop_rate=0.1. Compiling is part
of the first warm-up step, and of the peak. All variants run with the same allocator settings: those of the
environment (launch/env.sh sets them for a run).
"""

import argparse
import dataclasses
import importlib.util
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.fresh import ResidentMemory, alternate, run_fresh, run_here
from benchmarks.sizes import (
    SIZES,
    Size,
    add_size_options,
    build_sized_model,
    chosen_sizes,
    chosen_threads,
    synthetic_batch,
    synthetic_elevation_m,
)
from benchmarks.tables import print_table, ratio, spread
from topoflow.config import OptimConfig
from topoflow.loss import loss_sums
from topoflow.optim import build_optimizer

PUBLISHED, OURS = "published", "ours"
SAME_FUNCTION = "published, same function"
"""The published program without its relative position and token norm, which ours leaves out by default."""


@dataclass(frozen=True)
class Options:
    """How our step differs from the plain one."""

    model: dict[str, Any] = field(default_factory=dict)
    activation_checkpointing: bool = False
    precision: str = "fp32"
    compile: bool = False


VARIANTS = {
    OURS: Options(),
    "terrain none": Options(model={"terrain": "none"}),
    "activation checkpointing": Options(activation_checkpointing=True),
    "bf16": Options(precision="bf16"),
    "compile": Options(compile=True),
    "dropout": Options(model={"drop_rate": 0.1}),
}
AT_PAPER_SCALE = (PUBLISHED, SAME_FUNCTION, OURS, "activation checkpointing")
"""Variants measured at (c) by default, where a step takes from half a minute to minutes."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of one process's median step, and its peak of resident memory above the bare process."""

    seconds: float
    peak_bytes: int


class OurStep:
    """Our training step on CPU, with parameter groups and, like the published one, without clipping."""

    def __init__(self, size: Size, options: Options):
        self.network = build_sized_model(size, options.activation_checkpointing, **options.model).train()
        if options.compile:
            self.network.compile()
        self.optimizer = build_optimizer(self.network, OptimConfig())
        self.elevation_m = synthetic_elevation_m(size.grid)
        self.precision = options.precision

    def __call__(self, batch: dict[str, torch.Tensor]) -> None:
        """Take one optimizer step on a batch of `benchmarks.sizes.synthetic_batch`."""
        sums, counts = loss_sums(self.network, batch, self.elevation_m, self.precision)
        (sums.sum() / counts.sum()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def build_step(size: Size, variant: str, may_compile: bool = True) -> Callable[[dict[str, torch.Tensor]], None]:
    """Return a function that takes one optimizer step on a batch."""
    if variant in (PUBLISHED, SAME_FUNCTION):
        from benchmarks.published import PublishedStep  # needs timm

        return PublishedStep(size, with_priors=variant == PUBLISHED)
    options = VARIANTS[variant]
    return OurStep(size, dataclasses.replace(options, compile=options.compile and may_compile))


def measure_step(size: Size, variant: str, threads: int) -> StepCost:
    """Measure in this process, which must be fresh for the memory figure to be meaningful."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tiny = SIZES["tiny"]
    build_step(tiny, variant, may_compile=False)(synthetic_batch(tiny.grid, tiny.batch_size, seed=2))
    memory = ResidentMemory()
    step, batch = build_step(size, variant), synthetic_batch(size.grid, size.batch_size, seed=2)
    seconds = []
    for _ in range(size.warm_up_steps + size.steps):
        began = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - began)
    return StepCost(statistics.median(seconds[size.warm_up_steps :]), memory.peak_bytes())


def missing_packages(variants: list[str]) -> dict[str, str]:
    """Return {variant: why it cannot be measured here}."""
    reasons = {}
    if importlib.util.find_spec("timm") is None:
        absent = {PUBLISHED, SAME_FUNCTION} & set(variants)
        reasons = dict.fromkeys(absent, "needs timm, of the extra `benchmark`")
    if "compile" in variants and shutil.which("g++") is None:
        reasons["compile"] = "needs a C++ compiler, g++"
    return reasons


def measure_size(
    size: Size, variants: list[str], rounds: int, threads: int, run: Callable[..., StepCost] = run_fresh
) -> None:
    """Measure and print the table of one size."""
    absent = missing_packages(variants)
    present = [variant for variant in variants if variant not in absent]
    costs, killed = alternate(present, rounds, lambda variant: run(measure_step, size, variant, threads))
    print(f"{size}; {threads} thread(s); {rounds} round(s) of {size.warm_up_steps} + {size.steps} steps\n")
    head = [
        "one optimizer step",
        "seconds (range)",
        "published / this (quartiles)",
        "this / ours (quartiles)",
        "GB above the bare process",
        "published / this",
        "this / ours",
    ]
    print_table(head, [_row(variant, costs, {**absent, **killed}) for variant in variants])


def _row(variant: str, costs: dict[str, list[StepCost]], reasons: dict[str, str]) -> list[str]:
    if variant in reasons:
        return [f"{variant}: {reasons[variant]}", *[""] * 6]
    seconds = {name: [cost.seconds for cost in found] for name, found in costs.items()}
    peaks = {name: [statistics.median(cost.peak_bytes for cost in found)] for name, found in costs.items()}

    def compare(values: dict[str, list[float]], over: str, under: str) -> str:
        return ratio(values[over], values[under]) if over != under and {over, under} <= set(values) else ""

    return [
        variant,
        spread(seconds[variant]),
        compare(seconds, PUBLISHED, variant),
        compare(seconds, variant, OURS),
        spread(peaks[variant], 1e-9),
        compare(peaks, PUBLISHED, variant),
        compare(peaks, variant, OURS),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, default="a,b,c")
    parser.add_argument("--variants", help="comma-separated (default: all; at (c) published, ours and checkpointing)")
    options = parser.parse_args(arguments)
    threads = chosen_threads(options)
    everything = [PUBLISHED, SAME_FUNCTION, *VARIANTS]
    asked = options.variants.split(",") if options.variants else None
    if unknown := [variant for variant in asked or () if variant not in everything]:
        parser.error(f"--variants: {unknown[0]!r}: expected some of {', '.join(everything)}")
    for size in chosen_sizes(parser, options):
        variants = asked or (AT_PAPER_SCALE if size.name == "c" else everything)
        if size.name == "tiny" and asked is None:
            variants = [variant for variant in everything if variant != "compile"]  # it takes longest
        run = run_here if options.quick else run_fresh
        measure_size(size, list(variants), options.rounds or size.rounds, threads, run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
