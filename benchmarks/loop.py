"""Overhead of the loop: a step of `Trainer.fit` compared with a bare step of the same network on the same data.

    python -m benchmarks.loop [--size a] [--rounds N] [--pairs N] [--loaders N] [--threads N] [--quick]

train.py runs in one process, with TensorBoard, metrics and progress bar. After every ten optimizer steps its clock is
stopped, while a second copy of the network takes ten bare steps (forward, backward, clip, step, schedule) on batches in
memory. So the two blocks of a pair are seconds apart in one process, and each block of `fit` loads ten batches and logs
once. Prints both medians over pairs, and the ratio of medians with the quartiles over pairs; then how long `fit` waited
for its batches, in the same way over blocks. Each round is a new process. The promises are a ratio of at most 1.03 at
(a), and less than 1 % of waiting with loader threads. Not on Windows.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.sizes import SIZES, Size, add_run_options, chosen_threads
from benchmarks.tables import print_table, ratio, spread
from benchmarks.terminal import run_in_terminal
from benchmarks.trainer_loops import BareStep, Job, Parts, run_ours
from benchmarks.training_data import LOG_EVERY_STEPS, make_world, run_config
from topoflow.config_io import dump_config, load_config
from topoflow.data.batch import Batch
from topoflow.trainer import Trainer

WARM_UP_STEPS = 10
ROUNDS, PAIRS = 3, 12


class WaitClock:
    """Seconds that `fit` waits for the batches of its steps, in this process, counted from now."""

    def __init__(self):
        self.seconds = 0.0
        steps_of_epoch = Trainer._steps_of_epoch

        def timed(trainer: Trainer) -> Iterator[list[Batch]]:
            steps = steps_of_epoch(trainer)
            while True:
                asked = time.perf_counter()
                batches = next(steps, None)
                self.seconds += time.perf_counter() - asked
                if batches is None:
                    return
                yield batches

        Trainer._steps_of_epoch = timed


class AlternatingBlocks:
    """Called after each optimizer step of `fit`: times blocks of its steps, and runs and times bare steps between.

    All times are seconds per step; `fit` includes the wait.
    """

    def __init__(self, bare: BareStep, steps: int, clock: WaitClock):
        self.bare, self.steps, self.clock = bare, steps, clock
        self.fit_seconds: list[float] = []
        self.wait_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self._taken = -WARM_UP_STEPS
        self._began = self._waited = 0.0
        self.hook = register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if optimizer is self.bare.parts.optimizer:
            return
        now = time.perf_counter()
        self._taken += 1
        if self._taken < 0 or self._taken % self.steps:
            return
        if self._taken:
            self.fit_seconds.append((now - self._began) / self.steps)
            self.wait_seconds.append((self.clock.seconds - self._waited) / self.steps)
        began = time.perf_counter()
        for _ in range(self.steps):
            self.bare()
        self._began, self._waited = time.perf_counter(), self.clock.seconds
        if self._taken:  # the first block warms up the bare step
            self.bare_seconds.append((self._began - began) / self.steps)


def run_alternating(config_file: str, result_file: str) -> None:
    """Train in this process and write {"fit", "wait", "bare": seconds per step in each block}."""
    job = Job(load_config(config_file), Path(config_file), Path(result_file).parent, processes=1)
    blocks = AlternatingBlocks(BareStep(Parts(job), job.clip_norm), LOG_EVERY_STEPS, WaitClock())
    run_ours(job)
    seconds = {"fit": blocks.fit_seconds, "wait": blocks.wait_seconds, "bare": blocks.bare_seconds}
    Path(result_file).write_text(json.dumps(seconds))


def measure_loop(size: Size, world: Path, pairs: int, threads: int, loaders: int) -> dict[str, list[float]]:
    """Return what `run_alternating` writes in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        steps = WARM_UP_STEPS + pairs * LOG_EVERY_STEPS
        run_dir, config_file, result_file = (Path(folder) / name for name in ("run", "config.yaml", "seconds.json"))
        config = run_config(size, world, run_dir, steps=steps, processes=1, threads=threads, loaders=loaders)
        config_file.write_text(dump_config(config))
        code = "import sys; from benchmarks.loop import run_alternating; run_alternating(*sys.argv[1:])"
        run_in_terminal([sys.executable, "-c", code, str(config_file), str(result_file)], threads)
        return json.loads(result_file.read_text())


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="a", choices=list(SIZES), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="processes (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of blocks of each (default: %(default)s)")
    parser.add_argument("--loaders", type=int, default=1, help="loader threads (default: %(default)s)")
    add_run_options(parser)
    options = parser.parse_args(arguments)
    threads = chosen_threads(options)
    if options.quick:
        options.size, options.rounds, options.pairs = "tiny", 1, 2
    size, seconds = SIZES[options.size], {"fit": [], "wait": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder), size)
        for _ in range(options.rounds):
            measured = measure_loop(size, world, options.pairs, threads, options.loaders)
            for name, values in seconds.items():
                values += measured[name]
    fit, wait, bare = seconds.values()
    print(
        f"{size}; {threads} thread(s), {options.loaders} loader thread(s); {options.rounds} round(s) of "
        f"{options.pairs} pairs of {LOG_EVERY_STEPS} steps\n"
    )
    head = ["one training step", "ms (range)", "this / bare (quartiles)"]
    print_table(head, [["fit", spread(fit, 1e3), ratio(fit, bare, 3)], ["bare loop", spread(bare, 1e3), ""]])
    shares = [100 * waited / whole for waited, whole in zip(wait, fit, strict=True)]
    row = ["fit, for its batch", spread(wait, 1e3), spread(shares)]
    print_table(["waiting in a step", "ms (range)", "% of the step (range)"], [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
