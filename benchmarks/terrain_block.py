"""Cost of terrain in block 0: compare the block with terrain with a plain one, forward and backward, in one process.

    python -m benchmarks.terrain_block [--sizes b,c] [--rounds N] [--threads N] [--quick]

Both blocks run forward and backward in turn on the tokens that the network passes to its block 0; the table has the
median of both and of the ratio within pairs.
"""

import argparse
import sys
import time
from typing import Any

import torch

from benchmarks.fresh import run_fresh, run_here
from benchmarks.sizes import (
    Size,
    add_size_options,
    build_sized_model,
    chosen_sizes,
    chosen_threads,
    synthetic_batch,
    synthetic_elevation_m,
)
from benchmarks.tables import print_table, ratio, spread

PAIRS_PER_ROUND = 4


class BlockAlone:
    """Block 0 of a network of one block, with its arguments."""

    def __init__(self, size: Size, terrain: str):
        model = build_sized_model(size, depth=1, terrain=terrain).train()
        self.block = model.blocks[0]
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hook = self.block.register_forward_pre_hook(
            lambda _, arguments, named: seen.append((arguments, named)), with_kwargs=True
        )
        batch = synthetic_batch(size.grid, size.batch_size, seed=2)
        with torch.no_grad():
            model(batch["x"], batch["lead_time_hours"], synthetic_elevation_m(size.grid), batch["wind_ms"])
        hook.remove()
        ((tokens, *context), named), *_ = seen
        self.tokens = tokens.detach().requires_grad_()
        self.context, self.named = context, named
        self.gradient = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3))

    def seconds(self) -> float:
        """Return the seconds of one forward and backward pass, including gradients of parameters and input."""
        for tensor in (self.tokens, *self.block.parameters()):
            tensor.grad = None
        began = time.perf_counter()
        self.block(self.tokens, *self.context, **self.named).backward(self.gradient)
        return time.perf_counter() - began


def measure_blocks(size: Size, pairs: int, threads: int) -> dict[str, list[float]]:
    """Return {terrain: seconds of each pass}, in turn, after a warm-up pass of each."""
    torch.set_num_threads(threads)
    blocks = {terrain: BlockAlone(size, terrain) for terrain in ("endpoint", "none")}
    seconds: dict[str, list[float]] = {terrain: [] for terrain in blocks}
    for number in range(pairs + 1):
        for terrain in blocks if number % 2 else reversed(blocks):
            seconds[terrain].append(blocks[terrain].seconds())
    return {terrain: values[1:] for terrain, values in seconds.items()}


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, default="b,c")
    options = parser.parse_args(arguments)
    threads = chosen_threads(options)
    rows = []
    for size in chosen_sizes(parser, options):
        pairs = PAIRS_PER_ROUND * (options.rounds or size.rounds)
        seconds = (run_here if options.quick else run_fresh)(measure_blocks, size, pairs, threads)
        with_terrain, plain = seconds["endpoint"], seconds["none"]
        rows.append([str(size), spread(with_terrain), spread(plain), ratio(with_terrain, plain, 3)])
    print(f"{threads} thread(s)\n")
    print_table(["block 0, forward and backward", "terrain, s (range)", "plain, s (range)", "ratio (quartiles)"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
