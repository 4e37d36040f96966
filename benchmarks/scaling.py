"""Measure what grows with the number of ranks: start-up, resume and steps of a tiny model on 1 to 32 processes.

    python -m benchmarks.scaling [--ranks 1,2,4,8,16,32] [--steps 12] [--repeats 3] [section.key=value ...]
    python -m benchmarks.scaling --model

For each number of ranks, do a run with one sample per rank and step, and resume it. Prints tables of CPU milliseconds
per rank in each phase, with the least-squares fit a + b n + c log2 n without negative terms; elapsed milliseconds;
bytes and TCP segments that ranks send; files that a rank opens and holds open. The processes share few cores, so
elapsed time only shows how busy these are; CPU time and segments show how a rank's cost grows with the number of ranks.
Ranks are forked from a process that has imported the program. Linux only.

--model prints the predictions of `benchmarks.scaling_model` for 8 to 4,096 devices.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.scaling_model import print_model
from tests.support.forked_runs import ForkedRuns
from tests.support.phases import METHODS, PHASES, STEP, WHOLE, record_phases
from tests.support.prepared import prepare_world

SETTINGS = {
    "run": {"threads": 1, "seed": 3, "device": "cpu"},
    "data": {
        "train": [["2018-10-01", "2018-10-06"]],
        "validation": [["2018-10-07", "2018-10-08"]],
        "lead_times_hours": [6, 12],
        "threads": 0,
    },
    "model": {"patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "optim": {"schedule": "constant"},
    "train": {"micro_batch_size": 1, "log_every_steps": 1},
}
ON_RESUME = ("reading the checkpoint", "restore", "proof", WHOLE)
"""Phases measured in the resume; the others are measured in the new run."""
WARM_UP_STEPS = 3
Phases = dict[str, list[dict[str, Any]]]
"""Costs of one phase by name, on each rank."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="config values of the runs")
    parser.add_argument("--ranks", default="1,2,4,8,16,32", help="numbers of processes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps per run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs per number of processes (default: %(default)s)")
    parser.add_argument("--model", action="store_true", help="print the model of larger machines, measure nothing")
    options = parser.parse_args()
    if options.model:
        print_model()
        return 0
    sizes = [int(size) for size in options.ranks.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), sizes, options.steps, options.repeats, options.overrides)
    print_tables(measured)
    return 0


def measure(
    folder: Path, sizes: Sequence[int], steps: int, repeats: int, overrides: Sequence[str] = ()
) -> dict[int, list[Phases]]:
    """Return the costs of each run by number of ranks. Numbers of ranks take turns, so all see the same load."""
    prepare_world(folder / "data", days=10)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({**SETTINGS, "data": {**SETTINGS["data"], "path": str(folder / "data")}}))
    runs = ForkedRuns(folder / "runs")
    measured: dict[int, list[Phases]] = {size: [] for size in sizes}
    for repeat, size in itertools.product(range(repeats), sizes):
        words = [str(config), f"run.dir={folder}/run-{size}-{repeat}", f"train.global_batch_size={size}", *overrides]
        begun, resumed = (
            _run(runs, [*words, f"train.max_steps={length}"], size, folder / f"phases-{size}-{repeat}-{length}")
            for length in (steps, steps + 1)
        )
        measured[size].append({**begun, **{name: resumed[name] for name in ON_RESUME}})
        print(f"{size} rank(s), {repeat + 1} of {repeats}", file=sys.stderr)
    return measured


def _run(runs: ForkedRuns, arguments: Sequence[str], size: int, folder: Path) -> Phases:
    folder.mkdir()
    ending = runs.run(arguments, size, prepare=partial(record_phases, folder))
    assert ending.done, ending.output
    of_ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(size)]
    names = {phase["phase"] for phase in of_ranks[0]}
    return {name: [_one(name, phases) for phases in of_ranks] for name in names}


def _one(name: str, phases: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the costs of one phase on one rank; of steps, the median after the first few."""
    costs = [phase for phase in phases if phase["phase"] == name]
    if name != STEP:
        return costs[-1]
    costs = costs[WARM_UP_STEPS:] or costs
    median = {
        key: statistics.median(cost[key] for cost in costs) for key in costs[0] if key not in ("phase", "collectives")
    }
    return {**median, "collectives": costs[-1]["collectives"]}


def fit_growth(sizes: Sequence[int], values: Sequence[float]) -> tuple[float, float, float]:
    """Fit a + b n + c log2 n to `values` at n in `sizes` by least squares; return (a, b, c), none negative.

    With so few terms, it is the best of the fits of all subsets of terms that have no negative coefficient.
    """
    terms = np.array([[1.0, size, math.log2(size)] for size in sizes])
    best, smallest = (0.0, 0.0, 0.0), float(np.square(values).sum())
    for count in (1, 2, 3):
        for chosen in itertools.combinations(range(3), count):
            factors = np.zeros(3)
            factors[list(chosen)] = np.linalg.lstsq(terms[:, chosen], np.asarray(values), rcond=None)[0]
            rest = float(np.square(terms @ factors - values).sum())
            if factors.min() >= 0 and rest < smallest * (1 - 1e-9):
                best, smallest = tuple(factors), rest
    return best


def print_tables(measured: dict[int, list[Phases]]) -> None:
    """Print the tables, in Markdown."""
    sizes = list(measured)
    names = [*PHASES.values(), *METHODS]
    print(f"{os.cpu_count()} cores; medians of {len(measured[sizes[0]])} runs\n")
    _print_table("CPU ms per rank", sizes, {name: _over_ranks(measured, name, "cpu_seconds", 1e3) for name in names})
    _print_table("elapsed ms", sizes, {name: _over_ranks(measured, name, "seconds", 1e3) for name in names})
    for who, ranks in (("rank 0", slice(0, 1)), ("another rank", slice(1, None))):
        traffic = {name: _over_ranks(measured, name, "bytes_sent", 1e-3, ranks) for name in names}
        _print_table(f"kB sent by {who}", sizes, traffic)
    _print_table(
        "segments sent by a rank", sizes, {name: _over_ranks(measured, name, "segments_sent") for name in names}
    )
    whole = {
        "open files": _over_ranks(measured, WHOLE, "open_files"),
        "peak MB": _over_ranks(measured, WHOLE, "peak_bytes", 1e-6),
    }
    _print_table("a rank at the end", sizes, whole)
    _print_opens(measured)
    print("collective operations of a rank, at the largest number:\n")
    for name in names:
        calls = measured[sizes[-1]][0][name][-1]["collectives"]
        print(f"- {name}: {', '.join(f'{count} {call}' for call, count in sorted(calls.items())) or 'none'}")


def _print_opens(measured: dict[int, list[Phases]]) -> None:
    kinds = ("checkpoint", "metadata", "fields")
    print(f"| files opened by a resume, rank 0 and the most of any other | {' | '.join(kinds)} |\n|--:|--:|--:|--:|")
    for size, runs in measured.items():
        first, *others = (rank["opens"] for rank in runs[0][WHOLE])
        most = {kind: max((opens.get(kind, 0) for opens in others), default="-") for kind in kinds}
        print(f"| {size} | {' | '.join(f'{first.get(kind, 0)}, {most[kind]}' for kind in kinds)} |")
    print()


def _over_ranks(
    measured: dict[int, list[Phases]], name: str, key: str, scale: float = 1.0, ranks: slice = slice(None)
) -> list[float]:
    """Return, per number of ranks, the median over runs of the mean over (those) ranks; nan without such ranks."""
    found = []
    for runs in measured.values():
        costs = [[cost[key] for cost in phases[name][ranks]] for phases in runs]
        found.append(scale * statistics.median(map(statistics.mean, costs)) if costs[0] else math.nan)
    return found


def _print_table(title: str, sizes: Sequence[int], rows: dict[str, list[float]]) -> None:
    print(f"| {title} | {' | '.join(map(str, sizes))} | fit |\n|---|{'--:|' * len(sizes)}---|")
    for name, values in rows.items():
        known = [(size, value) for size, value in zip(sizes, values, strict=True) if not math.isnan(value)]
        cells = " | ".join(_show(value) for value in values)
        print(f"| {name} | {cells} | {_show_fit(*fit_growth(*zip(*known, strict=True))) if len(known) > 3 else ''} |")
    print()


def _show(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _show_fit(a: float, b: float, c: float) -> str:
    terms = [(a, ""), (b, " n"), (c, " log2 n")]
    return " + ".join(f"{factor:.2g}{term}" for factor, term in terms if factor > 0) or "0"


if __name__ == "__main__":
    sys.exit(main())
