"""The sizes at which the network is measured, and networks and batches of these sizes.

(c) is the paper's scale. Unless stated otherwise: patch 2, 15 inputs, 6 targets, mlp_ratio 4, decoder_depth 2, no
dropout, no drop path, terrain on, rank along the wind (docs/performance.md was measured with it).
"""

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topoflow.config import DataConfig, ModelConfig
from topoflow.model.topoflow import TopoFlow, build_model

INPUTS, TARGETS = DataConfig.variables, DataConfig.targets
PATCH_SIZE, DECODER_DEPTH, MLP_RATIO = 2, 2, 4.0
CELL_KM = 25.0
"""About 0.25 degree."""


@dataclass(frozen=True)
class Size:
    """A grid, a network and a batch, and the number of steps and processes to measure."""

    name: str
    grid: tuple[int, int]
    embed_dim: int
    depth: int
    num_heads: int
    batch_size: int
    warm_up_steps: int = 1
    """Steps of a process before timing starts, to allocate memory and warm up caches and branch predictors."""
    steps: int = 1
    """Steps of a process that are timed."""
    rounds: int = 1
    """Number of processes of each kind, which take turns."""

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1] // PATCH_SIZE**2

    def __str__(self) -> str:
        """Return text such as `(a) 32 x 64 cells, width 96, depth 3, 4 heads, batch 4`."""
        rows, columns = self.grid
        network = f"width {self.embed_dim}, depth {self.depth}, {self.num_heads} heads"
        return f"({self.name}) {rows} x {columns} cells, {network}, batch {self.batch_size}"


SIZES = {
    size.name: size
    for size in (
        Size("a", (32, 64), 96, 3, 4, 4, warm_up_steps=3, steps=10, rounds=5),
        Size("b", (64, 128), 256, 4, 8, 2, warm_up_steps=1, steps=3, rounds=4),
        Size("c", (128, 256), 768, 6, 8, 1, warm_up_steps=1, steps=1, rounds=3),
        # for smoke runs, which only test that everything runs
        Size("tiny", (8, 16), 32, 2, 4, 2, warm_up_steps=1, steps=2, rounds=1),
    )
}


def add_size_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --sizes, --rounds, --threads and --quick, common to all benchmarks of the network."""
    parser.add_argument("--sizes", default=default, help="comma-separated: a, b, c (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="processes of each kind, in turn (default: that of the size)")
    add_run_options(parser)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add --threads and --quick; `chosen_threads` returns the number of threads."""
    parser.add_argument("--threads", type=int, help=f"default: all cores, {torch.get_num_threads()}")
    parser.add_argument("--quick", action="store_true", help="a smoke run at a tiny size; the figures mean nothing")


def chosen_threads(options: argparse.Namespace) -> int:
    """Return the number of threads; one for a smoke run, because several wait for each other on busy cores."""
    return 1 if options.quick else options.threads or torch.get_num_threads()


def chosen_sizes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Size]:
    """Return the sizes chosen by the options of `add_size_options`; exit with 2 for an unknown name."""
    names = ["tiny"] if options.quick else options.sizes.split(",")
    if unknown := [name for name in names if name not in SIZES]:
        parser.error(f"--sizes: {unknown[0]!r}: expected some of {', '.join(SIZES)}")
    return [SIZES[name] for name in names]


def model_config(size: Size, **changes: Any) -> ModelConfig:
    """Return the model section of a size, without dropout; `changes` override its keys."""
    fields = {
        "patch_size": PATCH_SIZE,
        "embed_dim": size.embed_dim,
        "depth": size.depth,
        "decoder_depth": DECODER_DEPTH,
        "num_heads": size.num_heads,
        "mlp_ratio": MLP_RATIO,
        "drop_rate": 0.0,
        "drop_path": 0.0,
        "wind": "rank",
    }
    return ModelConfig(**{**fields, **changes})


def build_sized_model(
    size: Size, activation_checkpointing: bool = False, flex_attention: bool = True, **changes: Any
) -> TopoFlow:
    """Build our network at a size, on CPU; changes as for `model_config`."""
    config = model_config(size, **changes)
    rows, columns = (cells // config.patch_size for cells in size.grid)
    step_km = CELL_KM * config.patch_size
    y_km, x_km = np.meshgrid(np.arange(rows) * step_km, np.arange(columns) * step_km, indexing="ij")
    return build_model(
        config,
        INPUTS,
        TARGETS,
        size.grid,
        x_km.ravel(),
        y_km.ravel(),
        seed=0,
        activation_checkpointing=activation_checkpointing,
        flex_attention=flex_attention,
    )


def synthetic_batch(grid: tuple[int, int], batch_size: int, seed: int) -> dict[str, Tensor]:
    """Return a batch of noise in the form of the data set: x [B, V, H, W], y and valid [B, T, H, W], lead_time_hours
    [B], wind_ms [B, 2, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch_size, len(INPUTS), *grid, generator=generator),
        "y": torch.randn(batch_size, len(TARGETS), *grid, generator=generator),
        "valid": torch.ones(batch_size, len(TARGETS), *grid, dtype=torch.bool),
        "lead_time_hours": torch.full((batch_size,), 24.0),
        "wind_ms": torch.randn(batch_size, 2, *grid, generator=generator) * 5,
    }


def synthetic_elevation_m(grid: tuple[int, int]) -> Tensor:
    """Return independent heights [H, W] from 0 to 4000 m, so that half of all pairs of tokens are damped."""
    return torch.rand(grid, generator=torch.Generator().manual_seed(1)) * 4000
