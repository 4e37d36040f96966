"""How close a training step comes to the machine's peak speed of matrix multiplication.

    python -m benchmarks.flops [--sizes a,b,c] [--rounds N] [--threads N] [--quick]

The peak is the best, over sizes and over the libraries in torch (MKL by torch.mm, oneDNN by torch.utils.mkldnn), of the
median time of square multiplications in float32, and in bfloat16. It is measured again in each round, in a process
just before the one that is compared with it, because the peak of a shared machine varies. A model FLOP is a
multiplication or an addition of the forward pass; the backward pass counts twice as much, and recomputation (activation
checkpointing, attention) does not count.
"""

import argparse
import functools
import statistics
import sys
import time

import torch
from torch import nn
from torch.utils.mkldnn import to_mkldnn

from benchmarks.fresh import run_fresh, run_here
from benchmarks.model_step import OURS, measure_step
from benchmarks.sizes import (
    DECODER_DEPTH,
    INPUTS,
    MLP_RATIO,
    PATCH_SIZE,
    TARGETS,
    Size,
    add_size_options,
    chosen_sizes,
    chosen_threads,
)
from benchmarks.tables import print_table, spread
from topoflow.model.wind import HIDDEN_DIM, NUM_FEATURES

MATRIX_SIZES = (512, 1024, 2048, 4096)
SECONDS_PER_MATRIX_SIZE = 1.0


def forward_flops(size: Size) -> int:
    """Return the FLOPs of one forward pass over a batch: only matrix products, a multiply-add counted as two.

    For each token, with width D, V variables, patches of c cells and a 1, and h heads: the scores of the variables'
    tokens 2 V c h and the values' sum 2 V c D, both straight from the cells, and the projection 2 D^2 of the
    aggregation; 2 w (f + D) for the rank along the wind, of f features and w hidden; in each block 8 D^2 for queries,
    keys, values and projection, 4 N D for scores and values of N tokens, 4 m D^2 for an MLP of ratio m; in the head
    2 D^2 for each hidden layer and 2 D p^2 T for T targets. Once per batch: keys and values of the V c cells,
    2 V c D (h + D), and a query of each head, 2 D^2 twice. Once per sample: 2 D for the lead time.
    """
    D, N, V, heads = size.embed_dim, size.num_patches, len(INPUTS), size.num_heads
    cells = PATCH_SIZE**2 + 1
    aggregation = 2 * V * cells * (heads + D) + 2 * D**2
    wind = 2 * HIDDEN_DIM * (NUM_FEATURES + D)
    block = (8 + 4 * MLP_RATIO) * D**2 + 4 * N * D
    head = 2 * DECODER_DEPTH * D**2 + 2 * D * PATCH_SIZE**2 * len(TARGETS)
    once = 2 * V * cells * D * (heads + D) + 4 * D**2
    sample = N * (aggregation + wind + size.depth * block + head) + 2 * D
    return round(size.batch_size * sample + once)


def step_flops(size: Size) -> int:
    """Return the model FLOPs of one training step."""
    return 3 * forward_flops(size)


def measure_peak(dtype: torch.dtype, threads: int, seconds: float = SECONDS_PER_MATRIX_SIZE) -> float:
    """Return the FLOP/s of square multiplications in this process: the best median over MATRIX_SIZES."""
    torch.set_num_threads(threads)
    best = 0.0
    for n in MATRIX_SIZES if seconds >= SECONDS_PER_MATRIX_SIZE else MATRIX_SIZES[:1]:
        a, b = (torch.randn(n, n, dtype=dtype) for _ in range(2))
        ways = [functools.partial(torch.mm, a, b, out=torch.empty(n, n, dtype=dtype))]
        if dtype == torch.float32 and torch.backends.mkldnn.is_available():
            ways.append(functools.partial(to_mkldnn(nn.Linear(n, n, bias=False).eval()), a))
        for multiply in ways:
            taken, end = [], time.perf_counter() + seconds / len(ways)
            with torch.inference_mode():
                while time.perf_counter() < end or len(taken) < 4:
                    began = time.perf_counter()
                    multiply()
                    taken.append(time.perf_counter() - began)
            best = max(best, 2 * n**3 / statistics.median(taken[1:]))
    return best


def main(arguments: list[str] | None = None) -> int:
    """Print the peaks and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, default="a,b,c")
    options = parser.parse_args(arguments)
    threads = chosen_threads(options)
    seconds, run = (0.1, run_here) if options.quick else (SECONDS_PER_MATRIX_SIZE, run_fresh)
    rows, peaks = [], []
    for size in chosen_sizes(parser, options):
        peak, reached = [], []
        for _ in range(options.rounds or size.rounds):
            peak.append(run(measure_peak, torch.float32, threads, seconds))
            reached.append(step_flops(size) / run(measure_step, size, OURS, threads).seconds)
        of_peak = [a / b for a, b in zip(reached, peak, strict=True)]
        flops = f"{step_flops(size) / 1e9:.4g}"
        rows.append([str(size), flops, spread(reached, 1e-9), spread(peak, 1e-9), spread(of_peak, 100, 2)])
        peaks += peak
    bf16 = run(measure_peak, torch.bfloat16, threads, seconds)
    print(
        f"{threads} thread(s); peak of matrix multiplication: float32 {spread(peaks, 1e-9)} GFLOP/s, "
        f"bfloat16 {spread([bf16], 1e-9)} GFLOP/s\n"
    )
    print_table(["one training step, float32", "GFLOP", "GFLOP/s (range)", "peak, GFLOP/s (range)", "% (range)"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
