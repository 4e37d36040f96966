"""Patch embedding and variable aggregation: the implementation in use, and the alternatives.

    python -m benchmarks.embedding [--sizes a,b,c] [--rounds N] [--threads N] [--quick]

Forward and backward from fields [B, V, H, W] to tokens [B, N, D], the same function in four ways: `tokens` forms the
tokens of all variables [B, N, V, D] and passes them to nn.MultiheadAttention, as ClimaX does; `tokens, recomputed`
does that again in the backward pass instead of keeping them; `tokens, without keys and values` forms the tokens and
aggregates them by `VariableAggregation`; `fused` is what the network does, which forms none of these. Each measurement
has a process of its own, in turn. Prints the median time of a pass, and the peak of resident memory above what the
process used before it.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.fresh import ResidentMemory, alternate, run_fresh, run_here
from benchmarks.model_step import StepCost
from benchmarks.sizes import (
    INPUTS,
    PATCH_SIZE,
    SIZES,
    Size,
    add_size_options,
    chosen_sizes,
    chosen_threads,
    synthetic_batch,
)
from benchmarks.tables import print_table, ratio, spread
from topoflow.model.embedding import PatchEmbedding, VariableAggregation, split_patches

PASSES = 5
FUSED = "fused"


class Embedding(nn.Module):
    """From fields to tokens in each of `WAYS`, with the same parameters."""

    def __init__(self, size: Size):
        super().__init__()
        self.patches = PatchEmbedding(len(INPUTS), PATCH_SIZE, size.embed_dim)
        self.aggregation = VariableAggregation(size.embed_dim, size.num_heads)
        self.attention = nn.MultiheadAttention(size.embed_dim, size.num_heads, batch_first=True)
        self.var_embed = nn.Parameter(torch.empty(1, len(INPUTS), size.embed_dim))
        self.var_query = nn.Parameter(torch.empty(1, 1, size.embed_dim))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
        self.attention.load_state_dict(self.aggregation.state_dict())

    def fused(self, x: Tensor) -> Tensor:
        """Return tokens as `topoflow.model.TopoFlow` does."""
        patches = F.pad(split_patches(x, PATCH_SIZE), (0, 1), value=1.0)
        return self.aggregation(self.var_query, patches, self.patches(self.var_embed))

    def tokens_of_variables(self, x: Tensor) -> Tensor:
        """Return the tokens [B, N, V, D], by a convolution for each variable."""
        weights, V = self.patches.proj_weights.flatten(0, 1), len(INPUTS)
        tokens = F.conv2d(x, weights, self.patches.proj_biases.flatten(), stride=PATCH_SIZE, groups=V)
        return tokens.unflatten(1, (V, -1)).flatten(3).permute(0, 3, 1, 2) + self.var_embed

    def with_tokens(self, x: Tensor) -> Tensor:
        """Form tokens, keys and values of all variables."""
        tokens = self.tokens_of_variables(x)
        B, N = tokens.shape[:2]
        flat = tokens.flatten(0, 1)
        query = self.var_query.expand(len(flat), -1, -1)
        return self.attention(query, flat, flat, need_weights=False)[0].reshape(B, N, -1)

    def recomputed(self, x: Tensor) -> Tensor:
        """Do the same, and again in the backward pass."""
        return checkpoint(self.with_tokens, x, use_reentrant=False)

    def without_keys_and_values(self, x: Tensor) -> Tensor:
        """Form tokens, but neither their keys nor their values."""
        return self.aggregation(self.var_query, self.tokens_of_variables(x), None)


WAYS: dict[str, Callable[[Embedding, Tensor], Tensor]] = {
    FUSED: Embedding.fused,
    "tokens": Embedding.with_tokens,
    "tokens, recomputed": Embedding.recomputed,
    "tokens, without keys and values": Embedding.without_keys_and_values,
}


def measure_way(size: Size, way: str, threads: int) -> StepCost:
    """Measure in this process, which must be fresh for the memory figure to be meaningful."""
    torch.set_num_threads(threads)
    embedding, tiny = Embedding(size), SIZES["tiny"]
    small = Embedding(tiny)
    WAYS[way](small, synthetic_batch(tiny.grid, 1, seed=1)["x"]).sum().backward()  # triggers torch's lazy imports
    x = synthetic_batch(size.grid, size.batch_size, seed=2)["x"]
    gradient = torch.randn(size.batch_size, size.num_patches, size.embed_dim)
    memory, seconds = ResidentMemory(), []
    for _ in range(1 + PASSES):
        embedding.zero_grad()
        began = time.perf_counter()
        WAYS[way](embedding, x).backward(gradient)
        seconds.append(time.perf_counter() - began)
    return StepCost(statistics.median(seconds[1:]), memory.peak_bytes())


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, default="a,b,c")
    options = parser.parse_args(arguments)
    threads, run = chosen_threads(options), run_here if options.quick else run_fresh
    for size in chosen_sizes(parser, options):
        costs, killed = alternate(
            list(WAYS), options.rounds or size.rounds, lambda way, size=size: run(measure_way, size, way, threads)
        )
        print(f"{size}; {threads} thread(s)\n")
        head = ["fields to tokens, forward and backward", "ms (range)", "this / fused (quartiles)", "MB (range)"]
        print_table(head, [_row(way, costs, killed) for way in WAYS])
    return 0


def _row(way: str, costs: dict[str, list[StepCost]], killed: dict[str, str]) -> list[Any]:
    if way in killed:
        return [f"{way}: {killed[way]}", "", "", ""]
    seconds = {name: [cost.seconds for cost in found] for name, found in costs.items()}
    compared = ratio(seconds[way], seconds[FUSED]) if way != FUSED and FUSED in seconds else ""
    return [way, spread(seconds[way], 1e3), compared, spread([cost.peak_bytes for cost in costs[way]], 1e-6)]


if __name__ == "__main__":
    sys.exit(main())
