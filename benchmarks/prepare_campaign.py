"""Disturb `topoflow prepare` at random places, run it again, and count results that differ from an undisturbed one.

    python -m benchmarks.prepare_campaign [--cycles 100] [--days 110] [--seed 0] [--folder DIR]

A cycle prepares a simulated world over two years anew, or appends to prepared data (hours of the first year, and the
second). One to three times it is disturbed: ended by SIGKILL, SIGTERM or Ctrl-C at a random time, stopped by a limit on
the size of files (which acts like a full disk), or started twice at once; or, between two runs, what lies in the hidden
folder is damaged. After each, prepared data that are there must be whole, and there must be no traceback. Then the same
command runs to its end, and every byte of every file must be as without disturbance. Exits with 1 if a cycle differs.
"""

import argparse
import collections
import os
import random
import resource
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import xarray as xr
from tqdm import tqdm

from topoflow import cli
from topoflow.data.prepared.manifest import is_prepared
from topoflow.terminal import prepare_process, run_program
from topoflow.tools.demo.world import make_demo_data
from topoflow.tools.prepare.command import load_recipe, prepare
from topoflow.tools.prepare.verification import verify

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
STATUSES = {"SIGKILL": -9, "SIGTERM": -15, "Ctrl-C": 130}
FULL, TWICE = "no space for a file", "two at once"
DAMAGES = ["flipped bit", "cut file", "file lost", "journal lost", "other bytes at the end"]
FIRST_YEAR_HOURS = 24 * 60 + 7
"""Hours of the data that are appended to."""


@dataclass
class Tally:
    """Counts. taken_up: disturbances after which whole days lay in the hidden folder; late: runs that ended before."""

    disturbances: collections.Counter = field(default_factory=collections.Counter)
    late: int = 0
    taken_up: int = 0
    cycles: collections.Counter = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)


class Process:
    """`topoflow ARGUMENTS` in a fork of this process, which has what it imports. most_bytes: of any file it writes."""

    def __init__(self, arguments: list[str], folder: Path, most_bytes: int | None = None):
        self.status: int | None = None
        self.errors = folder / f"errors-{secrets.token_hex(4)}"
        self.pid = os.fork()
        if self.pid:
            return
        try:
            for number, path in ((1, os.devnull), (2, self.errors)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
            prepare_process()
            tqdm.set_lock(threading.RLock())  # its own lock is shared with forks, and stays locked when one is killed
            if most_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
            os._exit(run_program(lambda: cli.main(arguments)))
        finally:
            traceback.print_exc()
            os._exit(1)

    def has_ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def signal(self, number: int) -> None:
        if not self.has_ended():
            os.kill(self.pid, number)

    def end(self) -> tuple[int, str]:
        """Wait, and return the status and what was written to stderr."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        errors = self.errors.read_text() if self.errors.exists() else ""
        self.errors.unlink(missing_ok=True)
        return self.status, errors


class Campaign:
    """Cycles in `folder`. The result of each must be that of `undisturbed`, by (is appended, dtype)."""

    def __init__(self, folder: Path, days: int, draw: random.Random):
        self.folder, self.draw, self.tally = folder, draw, Tally()
        self.output, self.work = folder / "out", folder / ".out.preparing"
        make_demo_data(folder / "raw", days=days, grid=(8, 12), seed=0, progress=False)
        early = folder / "early"
        early.mkdir()
        first = min((folder / "raw").glob("*.nc"))
        with xr.open_dataset(first) as dataset:
            dataset.isel(time=slice(0, FIRST_YEAR_HOURS)).to_netcdf(early / first.name)
        self.undisturbed: dict[tuple[bool, str], dict[str, bytes]] = {}
        self.seconds = 60.0
        for dtype in ("float32", "float16"):
            for name in ("raw", "early"):
                (folder / f"{name}-{dtype}.yaml").write_text(f"sources: [{{path: {name}}}]\ndtype: {dtype}\n")
            prepare(load_recipe([str(folder / f"early-{dtype}.yaml")]), folder / f"before-{dtype}", progress=False)
            for appended in (False, True):
                self.prepare_output(appended, dtype)
                start = time.monotonic()
                self.run(folder / f"raw-{dtype}.yaml", self.output)
                self.seconds = min(self.seconds, time.monotonic() - start)
                self.undisturbed[appended, dtype] = contents(self.output)

    def prepare_output(self, appended: bool, dtype: str) -> None:
        """Make `output` what it is before a cycle."""
        for path in (self.output, self.work):
            shutil.rmtree(path, ignore_errors=True)
        if appended:
            shutil.copytree(self.folder / f"before-{dtype}", self.output)

    def start(self, recipe: Path, output: Path, most_bytes: int | None = None) -> "Process":
        return Process(["prepare", str(recipe), "-o", str(output)], self.folder, most_bytes)

    def run(self, recipe: Path, output: Path) -> None:
        """Run to the end; it must succeed."""
        status, errors = self.start(recipe, output).end()
        assert status == 0, errors

    def disturb(self, recipe: Path, kind: str) -> str | None:
        """Run once with a disturbance; return what is wrong then."""
        if kind in DAMAGES:
            return self.damage(kind)
        if kind == TWICE:
            ends = [process.end() for process in [self.start(recipe, self.output) for _ in range(2)]]
            refused = [errors for status, errors in ends if status != 0]
            is_right = len(refused) < 2 and all("another process is preparing it" in errors for errors in refused)
            return None if is_right else f"ended {ends}"
        if kind == FULL:
            largest = max(map(len, self.undisturbed[False, "float32"].values()))
            status, errors = self.start(recipe, self.output, self.draw.randrange(largest)).end()
            is_right = status == 2 and errors.count("\n") == 1 and "cannot be written: File too large" in errors
        else:
            status, errors = self.signal(recipe, SIGNALS[kind])
            is_right = status == STATUSES[kind]
        if status == 0:
            self.tally.late += 1
            return None
        return None if is_right and "Traceback" not in errors else f"ended with {status}: {errors[-300:]}"

    def signal(self, recipe: Path, number: int) -> tuple[int, str]:
        """Send a signal at a random time after the start, or after the hidden folder was made."""
        process = self.start(recipe, self.output)
        if self.draw.random() < 0.7:
            while not self.work.exists() and not process.has_ended():
                time.sleep(0.001)
            time.sleep(self.draw.uniform(0, self.seconds / 3))
        else:
            time.sleep(self.draw.uniform(0, self.seconds))
        process.signal(number)
        return process.end()

    def damage(self, kind: str) -> str | None:
        """Damage a file in the hidden folder."""
        files = sorted(self.work.glob("*.journal" if kind == "journal lost" else "*.*")) if self.work.exists() else []
        if not files:
            self.tally.late += 1
            return None
        path = self.draw.choice(files)
        data = bytearray(path.read_bytes())
        if kind.endswith("lost"):
            path.unlink()
        elif kind == "other bytes at the end":
            path.write_bytes(data + self.draw.randbytes(1000))
        elif data:
            place = self.draw.randrange(len(data))
            data[place] ^= 1 << self.draw.randrange(8)
            path.write_bytes(data if kind == "flipped bit" else data[:place])
        return None

    def cycle(self) -> None:
        """Disturb one preparation, let it end, and compare."""
        appended, dtype = self.draw.random() < 0.5, self.draw.choice(["float32", "float16"])
        recipe, story = self.folder / f"raw-{dtype}.yaml", ["appended" if appended else "new", dtype]
        self.prepare_output(appended, dtype)
        for number in range(self.draw.randint(1, 3)):
            kinds = [*SIGNALS, FULL, TWICE] if number == 0 else [*SIGNALS, FULL, TWICE, *DAMAGES]
            kind = self.draw.choice(kinds)
            story.append(kind)
            self.tally.disturbances[kind] += 1
            wrong = self.disturb(recipe, kind)
            if wrong is None and is_prepared(self.output):
                wrong = "; ".join(verify(self.output, progress=False)[1]) or None
            if wrong is not None:
                self.fail(story, wrong)
                return
            self.tally.taken_up += any(len(path.read_bytes().splitlines()) > 1 for path in self.work.glob("*.journal"))
        status, errors = self.start(recipe, self.output).end()
        if status != 0:
            self.fail(story, f"the last run ended with {status}: {errors[-300:]}")
        elif self.work.exists() or contents(self.output) != self.undisturbed[appended, dtype]:
            expected, found = self.undisturbed[appended, dtype], contents(self.output)
            self.fail(story, f"differs in {[n for n in {**expected, **found} if expected.get(n) != found.get(n)]}")
        self.tally.cycles[story[0]] += 1

    def fail(self, story: list[str], what: str) -> None:
        """Record a failure, and keep its folders."""
        self.tally.failures.append(f"{', '.join(story)}: {what}")
        for path in (self.output, self.work):
            if path.exists():
                shutil.copytree(path, self.folder / f"failed-{len(self.tally.failures)}" / path.name)


def contents(folder: Path) -> dict[str, bytes]:
    """Return {name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> int:
    """Run the campaign; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--days", type=int, default=110, metavar="N", help="of the world (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="work here, and keep failed cycles here (default: keep none)")
    options = parser.parse_args()
    start = time.monotonic()
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        campaign = Campaign(folder.resolve(), options.days, random.Random(options.seed))
        tally = campaign.tally
        for _ in range(options.cycles):
            campaign.cycle()
            if sys.stderr.isatty():
                print(f"\r{tally.cycles.total()} cycles", end="", file=sys.stderr, flush=True)
    for kind, count in tally.disturbances.most_common():
        print(f"{count:5}  {kind}")
    print(f"disturbances: {tally.disturbances.total()} ({tally.late} came too late), {time.monotonic() - start:.0f} s")
    print(f"disturbances after which whole days were left to take up: {tally.taken_up}")
    print(f"cycles: {', '.join(f'{count} {kind}' for kind, count in tally.cycles.items())}")
    print(f"cycles that failed, or differ from an undisturbed one: {len(tally.failures)}")
    for line in tally.failures:
        print(line)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
