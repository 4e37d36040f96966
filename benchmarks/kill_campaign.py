"""Kill runs at random places, resume them, and count those that differ from a run that never stopped.

    python -m benchmarks.kill_campaign [--kills 200] [--ranks 1,2,4] [--seed 0] [section.key=value ...]

Each run is a chain: it starts, is killed (SIGKILL; one rank or all), resumes from its newest checkpoint, is killed
again, and finally runs to its end. Then every loss in its metrics.jsonl (each step once) and weights, moments, rates
and progress in its last checkpoint must equal those of a run that never stopped, bit for bit. Dropout, drop path,
accumulation and loader threads are on. Exits with 1 if a run differs or a resume is refused.
"""

import argparse
import collections
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.support.compare_runs import differences, newest_step
from tests.support.forked_runs import AT_A_RANDOM_TIME, Attack, Ending, ForkedRuns
from tests.support.kill_points import POINTS, Kill
from tests.support.prepared import prepare_world

STEPS = 20
SETTINGS = {
    "run": {"threads": 1, "seed": 3},
    "data": {
        "train": [["2018-10-01", "2018-10-03"]],
        "validation": [["2018-10-06", "2018-10-07"]],
        "lead_times_hours": [6, 12],
        "availability": True,
        "threads": 2,
    },
    "model": {"patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "drop_rate": 0.1, "drop_path": 0.3},
    "optim": {"learning_rate": 1e-3, "schedule_interval": "step", "warmup_steps": 3},
    "train": {
        "max_steps": STEPS,
        "global_batch_size": 16,
        "micro_batch_size": 2,
        "validate_every_steps": 5,
        "log_every_steps": 1,
    },
    "checkpoint": {"every_steps": 3, "keep_last": 2},
    "distributed": {"verify_every_steps": 4, "timeout_seconds": 120.0},
}
MOST_FAILURES = 5


@dataclass
class Tally:
    """Counts over all chains. misses: kills at a place that their run did not reach any more."""

    kills: collections.Counter = field(default_factory=collections.Counter)
    misses: int = 0
    resumes: int = 0
    refused: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    runs: int = 0

    @property
    def total(self) -> int:
        return sum(self.kills.values())

    @property
    def failures(self) -> list[str]:
        return self.refused + self.different


def draw_attack(draw: random.Random, world_size: int, saved_step: int | None, seconds: float) -> Attack:
    """Draw a kill of a run whose newest checkpoint is of `saved_step`; `seconds`: duration of a whole run."""
    name = draw.choice([AT_A_RANDOM_TIME, *POINTS])
    everyone = draw.random() < 0.5
    if name == AT_A_RANDOM_TIME:
        return Attack(seconds=draw.uniform(0.0, seconds), rank=draw.randrange(world_size), everyone=everyone)
    point = POINTS[name]
    step = 0 if point.before_the_first_step else draw.randint(min((saved_step or 0) + 1, STEPS), STEPS)
    rank = 0 if point.only_on_rank_0 else draw.randrange(world_size)
    return Attack(Kill(name, step, draw.randint(1, point.times)), rank=rank, everyone=everyone)


class Campaign:
    """Chains of killed and resumed runs in `folder`."""

    def __init__(self, folder: Path, draw: random.Random, overrides: Sequence[str] = ()):
        self.folder, self.draw, self.overrides, self.tally = folder, draw, overrides, Tally()
        self.runs = ForkedRuns(folder / "processes")
        prepare_world(folder / "world", days=10)
        settings = {**SETTINGS, "data": {**SETTINGS["data"], "path": str(folder / "world")}}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        self.seconds: dict[int, float] = {}

    def train(self, run: Path, world_size: int, attack: Attack | None = None) -> Ending:
        arguments = [str(self.folder / "config.yaml"), f"run.dir={run}", *self.overrides]
        return self.runs.run(arguments, world_size, attack)

    def untouched(self, world_size: int) -> Path:
        """Return a run that never stopped."""
        run = self.folder / f"untouched-{world_size}"
        if not run.exists():
            start = time.monotonic()
            ending = self.train(run, world_size)
            assert ending.done, ending.output
            self.seconds[world_size] = time.monotonic() - start
        return run

    def chain(self, world_size: int, most_kills: int) -> None:
        """Kill one run up to `most_kills` times, resume it each time, and compare it at its end."""
        untouched, run = self.untouched(world_size), self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        story, kills, ending = [], 0, None
        while ending is None or not ending.done:
            attack = None
            if kills < most_kills:
                attack = draw_attack(self.draw, world_size, newest_step(run), self.seconds[world_size])
            ending = self.train(run, world_size, attack)
            story.append("untouched" if attack is None else str(attack))
            if ending.note is not None:
                kills += 1
                self.tally.kills[ending.note["point"]] += 1
            elif not ending.done:
                last = (ending.output.strip().splitlines() or ["no output"])[-1]
                self.tally.refused.append(f"{world_size} rank(s), {'; '.join(story)}: ended {ending.statuses}: {last}")
                self.keep(run)
                return
            elif attack is not None:
                self.tally.misses += 1
        self.tally.runs += 1
        self.tally.resumes += sum('"event": "resume"' in line for line in (run / "metrics.jsonl").open())
        different = differences(run, untouched, STEPS)
        if different:
            self.tally.different.append(f"{world_size} rank(s), {'; '.join(story)}: {', '.join(different[:5])}")
            self.keep(run)

    def keep(self, run: Path) -> None:
        """Keep a failed run, with the output of its last processes."""
        number = len(self.tally.refused) + len(self.tally.different)
        shutil.copytree(run, self.folder / f"failed-{number}")
        shutil.copy(self.runs.log, self.folder / f"failed-{number}" / "output.log")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument("--ranks", default="1,2,4", metavar="N,...", help="numbers of processes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kills (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="work here, and keep failed runs here (default: keep none)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="config values of all runs")
    options = parser.parse_args(arguments)
    world_sizes = [int(number) for number in options.ranks.split(",")]
    draw, start = random.Random(options.seed), time.monotonic()
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        campaign = Campaign(folder, draw, options.overrides)
        tally = campaign.tally
        while tally.total < options.kills and len(tally.failures) < MOST_FAILURES:
            world_size, left = world_sizes[tally.runs % len(world_sizes)], options.kills - tally.total
            campaign.chain(world_size, most_kills=min(left, draw.randint(1, 4)))
            if sys.stderr.isatty():
                print(f"\r{tally.total} kills", end="", file=sys.stderr, flush=True)
    report(tally, time.monotonic() - start)
    return 1 if tally.failures else 0


def report(tally: Tally, seconds: float) -> None:
    """Print the figures."""
    for point, count in sorted(tally.kills.items(), key=lambda item: -item[1]):
        print(f"{count:5}  killed {point}")
    print(f"kills: {tally.total} in {tally.runs} runs, {seconds:.0f} s ({tally.misses} more came too late)")
    print(f"resumes: {tally.resumes}, refused: {len(tally.refused)}")
    print(f"runs that differ from one that never stopped: {len(tally.different)}")
    for line in tally.failures:
        print(line)


if __name__ == "__main__":
    sys.exit(main())
