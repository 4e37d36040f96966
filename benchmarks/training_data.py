"""A demo world on a size's grid, and the config of a run on it, for the benchmarks of loops over data."""

from pathlib import Path

from benchmarks.sizes import Size, model_config
from tests.support.prepared import prepare_world
from topoflow.config import Config, DataConfig, DistributedConfig, OptimConfig, RunConfig, TrainConfig

DAYS = 12
"""192 hourly starts, whose longest lead of 96 hours fits in, and four leads: 768 samples."""
LOG_EVERY_STEPS = 10


def make_world(folder: Path, size: Size) -> Path:
    """Write the data set in `folder`; return its path."""
    path = folder / "world"
    prepare_world(path, days=DAYS, grid=size.grid)
    return path


def run_config(
    size: Size, world: Path, run_dir: Path, *, steps: int, processes: int, threads: int, loaders: int
) -> Config:
    """Return the config of a run of so many steps with a size's batch per process; defaults otherwise, no dropout.

    Raises ValueError for more steps than one epoch has, because loops do other work between epochs.
    """
    samples, global_batch_size = 4 * (24 * DAYS - 96), size.batch_size * processes
    if steps * global_batch_size > samples:
        raise ValueError(f"{steps} steps of {global_batch_size} samples: expected at most one epoch of {samples}")
    return Config(
        run=RunConfig(dir=str(run_dir), threads=threads, device="cpu"),
        data=DataConfig(path=str(world), train=(("2018-10-01", f"2018-10-{DAYS}"),), threads=loaders),
        model=model_config(size),
        optim=OptimConfig(schedule_interval="step"),
        train=TrainConfig(
            max_steps=steps,
            micro_batch_size=size.batch_size,
            global_batch_size=global_batch_size,
            log_every_steps=LOG_EVERY_STEPS,
        ),
        distributed=DistributedConfig(backend="gloo"),
    )
