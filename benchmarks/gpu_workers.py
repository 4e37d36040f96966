"""Measurements of `benchmarks.gpu` in one process or one per rank: python -m benchmarks.gpu_workers CALL OUTPUT

CALL is the JSON of [worker, its keyword arguments]; OUTPUT is a file for the JSON of its result.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.sizes import Size, build_sized_model, synthetic_batch, synthetic_elevation_m
from topoflow.config import DistributedConfig, OptimConfig, RunConfig, TrainConfig
from topoflow.launch import choose_device, read_launch
from topoflow.loss import loss_sums
from topoflow.optim import build_optimizer
from topoflow.ranks import Context
from topoflow.reduction import DdpReduction
from topoflow.rendezvous import distributed_context
from topoflow.reproducibility import set_deterministic, set_tf32

DROP_RATE = 0.1
"""model.drop_rate and model.drop_path of configs/caqra.yaml."""


def time_calls(call: Callable[[], Any], device: torch.device, warm_up: int, repeats: int) -> list[float]:
    """Return the seconds of each call after `warm_up` calls, with the device idle before and after it."""
    synchronize, seconds = torch.get_device_module(device).synchronize, []
    for _ in range(warm_up + repeats):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[warm_up:]


def measure_peak(device: str, precision: str, matrix_sizes: Sequence[int]) -> dict[str, Any]:
    """Return the FLOP/s of square matrix products: the best size, by the median of its times."""
    set_tf32(precision == "TF32")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best = 0.0
    for n in matrix_sizes:
        a, b, out = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
        seconds = time_calls(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), torch.device(device), 5, 20)
        best = max(best, 2 * n**3 / statistics.median(seconds))
    return {"flops_per_second": best}


def parse_size(fields: dict[str, Any]) -> Size:
    """Return the Size with these fields; JSON turned its grid into a list."""
    return Size(**{**fields, "grid": tuple(fields["grid"])})


class TrainingStep:
    """A training step on this process's device, under DDP if there are several processes."""

    def __init__(self, size: Size, config: TrainConfig, context: Context):
        network = build_sized_model(
            size, flex_attention=config.flex_attention, drop_rate=DROP_RATE, drop_path=DROP_RATE
        )
        network.to(context.device).train()
        if config.compile:
            network.compile()
        self.reduction = DdpReduction(network, context, accumulation=1)
        self.optimizer, self.precision = build_optimizer(network, OptimConfig()), config.precision
        batch = synthetic_batch(size.grid, size.batch_size, seed=2)
        self.batch = {name: tensor.to(context.device) for name, tensor in batch.items()}
        self.elevation_m = synthetic_elevation_m(size.grid).to(context.device)
        self.parameters = sum(parameter.numel() for parameter in network.parameters())

    def __call__(self) -> None:
        """Run forward, loss, backward and AdamW once."""
        with self.reduction.micro_batch(0):
            sums, counts = loss_sums(self.reduction.forward, self.batch, self.elevation_m, self.precision)
            (sums.sum() / counts.sum()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure_step(device: str, size: dict[str, Any], train: dict[str, Any], deterministic: bool) -> dict[str, Any]:
    """Return seconds of each step, and the peak of memory that tensors took (CUDA only).

    size: the fields of a Size. train: keys of TrainConfig. deterministic: as run.deterministic.
    """
    measured, config = parse_size(size), TrainConfig(max_steps=1, **train)
    set_deterministic(RunConfig(deterministic=deterministic), config.compile)
    set_tf32(config.tf32)
    alone = read_launch({})
    own_device = choose_device(device, alone)
    try:
        with distributed_context(alone, DistributedConfig(), own_device) as context:
            step = TrainingStep(measured, config, context)
            seconds = time_calls(step, own_device, measured.warm_up_steps, measured.steps)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error)}
    peak_bytes = torch.cuda.max_memory_allocated(own_device) if device == "cuda" else None
    return {"seconds": seconds, "peak_bytes": peak_bytes, "parameters": step.parameters}


def measure_ranks(device: str, size: dict[str, Any]) -> dict[str, Any]:
    """Return seconds of each all-reduce of a flat gradient in float32 and of each step in bf16; call on all ranks."""
    measured, launch = parse_size(size), read_launch()
    own_device = choose_device(device, launch)
    set_deterministic(RunConfig())
    with distributed_context(launch, DistributedConfig(), own_device) as context:
        if context.world_size == 1:  # the program does not create a group of one
            if device == "cuda":
                dist.init_process_group("nccl", device_id=own_device)
            else:
                dist.init_process_group("gloo")
        step = TrainingStep(measured, TrainConfig(max_steps=1, precision="bf16"), context)
        flat = torch.zeros(step.parameters, device=own_device)
        reduced = time_calls(lambda: dist.all_reduce(flat), own_device, 5, 20)
        seconds = time_calls(step, own_device, measured.warm_up_steps, measured.steps)
        if context.world_size == 1:
            dist.destroy_process_group()
    return {"bytes": flat.nbytes, "all_reduce_seconds": reduced, "step_seconds": seconds}


WORKERS = {"peak": measure_peak, "step": measure_step, "ranks": measure_ranks}


def main(call: str, output: Path) -> int:
    """Run a worker; rank 0 writes its result."""
    name, arguments = json.loads(call)
    result = WORKERS[name](**arguments)
    if os.environ.get("RANK", "0") == "0":
        output.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
