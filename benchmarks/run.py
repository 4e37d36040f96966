#!/usr/bin/env python3
"""Run all benchmarks of speed in turn, each with one or more tables: python benchmarks/run.py [--quick]

Needs the package, and for all rows the extra `benchmark`; the tables list what is left out because it is not installed.
Figures are medians with their range over processes that take turns, so other load on the machine affects all of them;
ratios are of medians, with quartiles over turns. Paper scale, (c), needs 16 GB of memory and about an hour on two
cores; --sizes a,b leaves it out. Exits with 1 if a benchmark failed; the others still run.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MACHINE = "benchmarks.machine"
# name on the command line: title, module, and which of our options it takes
BENCHMARKS = {
    "model": ("One optimizer step: time, memory, options", "benchmarks.model_step", {"sizes", "rounds"}),
    "embedding": ("Patch embedding and variable aggregation", "benchmarks.embedding", {"sizes", "rounds"}),
    "terrain": ("Block 0: with and without terrain", "benchmarks.terrain_block", {"sizes", "rounds"}),
    "flops": ("FLOP/s relative to the machine's peak", "benchmarks.flops", {"sizes", "rounds"}),
    "loop": ("fit compared with a bare loop", "benchmarks.loop", {"rounds"}),
    "trainers": ("Comparison with other trainers", "benchmarks.compare_trainers", {"rounds"}),
    "data": ("Data", "benchmarks.loading", set()),
    "start": ("Start", "benchmarks.start", set()),
}


def build_command(name: str, options: argparse.Namespace) -> list[str]:
    """Return the command of one benchmark, with those of the given options that it takes."""
    _, module, takes = BENCHMARKS[name]
    command = [sys.executable, "-m", module]
    for option in sorted(takes):
        value = getattr(options, option)
        if value is not None:
            command += [f"--{option}", str(value)]
    return [*command, "--quick"] if options.quick else command


def main(arguments: list[str] | None = None) -> int:
    """Run them; return 0, or 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help="comma-separated: a, b, c (default: each benchmark's own)")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--rounds", type=int, help="turns of each (default: each benchmark's own)")
    parser.add_argument("--quick", action="store_true", help="a smoke run at a tiny size; the figures mean nothing")
    options = parser.parse_args(arguments)
    # run in ROOT, so that -m finds the modules from any folder
    subprocess.run([sys.executable, "-m", MACHINE], cwd=ROOT, check=True)
    failed = []
    for name in options.only or BENCHMARKS:
        print(f"## {BENCHMARKS[name][0]}\n", flush=True)
        began = time.monotonic()
        status = subprocess.run(build_command(name, options), cwd=ROOT).returncode
        print(f"({name}: {time.monotonic() - began:.0f} s)\n", flush=True)
        if status:
            failed.append(f"{name} (status {status})")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
