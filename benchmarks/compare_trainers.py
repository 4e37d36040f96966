#!/usr/bin/env python3
"""Compare a training step in our loop with Lightning's Trainer, Lightning Fabric and Hugging Face Accelerate.

    python benchmarks/compare_trainers.py [--size a] [--processes 1,2] [--rounds N] [--steps N] [--loaders N] [--quick]

Each uses the same network, data set, AdamW, schedule and clipping (see `benchmarks.trainer_loops`), TensorBoard every
10 steps and its default terminal output. The bare loop does the same arithmetic on batches in memory. Loops take turns,
each in fresh processes, for several rounds; a single process uses all threads, each of several processes one thread.
Prints median, smallest and largest step time over rounds, and the ratio to ours with quartiles over rounds. The other
trainers come with the extra `benchmark`; those not installed are left out. The promise is that all ratios are at least
1, except the bare loop's. Linux only, because of the terminal.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

if not __package__:  # run by its path: its siblings are found as with -m
    sys.path.insert(0, str(Path(__file__).parents[1]))


from benchmarks.fresh import alternate
from benchmarks.sizes import SIZES, Size, add_run_options, chosen_threads
from benchmarks.tables import print_table, ratio, spread
from benchmarks.terminal import run_in_terminal
from benchmarks.training_data import make_world, run_config
from topoflow.config_io import dump_config

TITLES = {
    "ours": "topoflow",
    "lightning": "Lightning Trainer",
    "fabric": "Lightning Fabric",
    "accelerate": "Accelerate",
    "bare": "bare loop",
}
PACKAGES = {"lightning": "lightning", "fabric": "lightning", "accelerate": "accelerate"}
ROUNDS, WARM_UP_STEPS, STEPS = 5, 10, 30


def measure_loop(
    loop: str, size: Size, world: Path, *, steps: int, warm_up_steps: int, processes: int, threads: int, loaders: int
) -> float:
    """Return the seconds of a step of one run in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        all_steps = warm_up_steps + steps
        config = run_config(
            size, world, Path(folder) / "run", steps=all_steps, processes=processes, threads=threads, loaders=loaders
        )
        config_file = Path(folder) / "config.yaml"
        config_file.write_text(dump_config(config))
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launcher, "-m", "benchmarks.trainer_loops", loop, str(config_file), folder, str(warm_up_steps)]
        run_in_terminal(command, threads)
        return json.loads((Path(folder) / "seconds.json").read_text())


def compare(size: Size, world: Path, options: argparse.Namespace, processes: int, threads: int) -> None:
    """Measure and print the table for one number of processes."""
    absent = {loop for loop, package in PACKAGES.items() if importlib.util.find_spec(package) is None}
    loops = [loop for loop in TITLES if loop not in absent]
    counts = {"steps": options.steps, "warm_up_steps": options.warm_up_steps}
    measured, _ = alternate(
        loops,
        options.rounds,
        lambda loop: measure_loop(
            loop, size, world, **counts, processes=processes, threads=threads, loaders=options.loaders
        ),
    )
    print(
        f"{size} in each of {processes} process(es) of {threads} thread(s), {options.loaders} loader(s) each; "
        f"{options.rounds} round(s) of {options.warm_up_steps} + {options.steps} steps\n"
    )
    rows = [
        [f"{title}: needs the extra `benchmark`", "", ""]
        if loop in absent
        else [title, spread(measured[loop], 1e3), "" if loop == "ours" else ratio(measured[loop], measured["ours"], 3)]
        for loop, title in TITLES.items()
    ]
    print_table(["one training step", "ms (range)", "this / topoflow (quartiles)"], rows)


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="a", choices=list(SIZES), help="default: %(default)s")
    parser.add_argument("--processes", default="1,2", help="comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps (default: %(default)s)")
    parser.add_argument("--warm-up-steps", type=int, default=WARM_UP_STEPS, help="default: %(default)s")
    parser.add_argument("--loaders", type=int, default=2, help="loader threads, or processes (default: 2)")
    add_run_options(parser)
    options = parser.parse_args(arguments)
    threads = chosen_threads(options)
    if options.quick:
        options.size, options.rounds, options.warm_up_steps, options.steps = "tiny", 1, 1, 2
        options.processes = "2"
    size = SIZES[options.size]
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder), size)
        for processes in map(int, options.processes.split(",")):
            compare(size, world, options, processes, threads if processes == 1 else 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
