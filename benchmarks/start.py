"""Time from `python train.py` to the first optimizer step: imports, and each phase of the set-up.

    python -m benchmarks.start [--rounds N] [--quick]

Fresh processes take turns, so that other load on the machine affects all equally. The first table has the seconds that
a process takes to import torch, or the program (`import train`: all that a run imports at its start), and the ratio
within pairs of processes. The second has the phases that a run logs after its first step, for a data set that no run
has read before (cold) and for the same one again (warm); the files are in the page cache in both. Both tables have the
number of modules loaded and of files opened by Python: on a parallel file system each is a metadata operation. --quick
uses a small model and a small data set, to test the benchmark.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.tables import print_table, spread
from tests.support.prepared import prepare_world

ROOT = Path(__file__).parents[1]
TOTAL = "start to first step"
SHOWN_SECONDS = 0.005

COUNT = """
import json, sys, time
opened = 0
def count(event, arguments):
    global opened
    opened += event == "open"
if sys.argv[1] == "count":
    sys.addaudithook(count)
"""

IMPORT = f"""{COUNT}
began, cpu = time.perf_counter(), time.process_time()
__import__(sys.argv[2])
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
print(json.dumps({{"seconds": seconds, "cpu": cpu, "modules": sorted(sys.modules), "files": opened}}))
"""

RUN = f"""{COUNT}
import runpy
from topoflow.activity import StartClock

def note(clock, summary=StartClock.summary):
    with open(noted, "w") as file:
        json.dump({{"phases": clock.seconds(), "modules": sorted(sys.modules), "files": opened}}, file)
    return summary(clock)

StartClock.summary = note
noted, sys.argv = sys.argv[2], sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""train.py as a user starts it, except that its clock also writes its phases to a file."""

Process = dict[str, Any]
"""What a process reported about itself."""


@dataclass(frozen=True)
class Settings:
    """What to measure.

    days: of data, of which the last ten are not trained on. rounds: of imports, and of starts. pause_seconds: before
    each start, because where CPU time is rationed, a process is slowed down by the one before it.
    """

    grid: tuple[int, int]
    days: int
    model: dict[str, int | float]
    rounds: tuple[int, int]
    pause_seconds: float


NO_DROPOUT = {"drop_rate": 0.0, "drop_path": 0.0}
FULL = Settings((32, 64), 60, {"embed_dim": 96, "depth": 3, "num_heads": 4, **NO_DROPOUT}, (9, 5), 2.0)
QUICK = Settings((8, 12), 20, {"embed_dim": 16, "depth": 1, "num_heads": 2, **NO_DROPOUT}, (1, 1), 0.0)


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print both tables as markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, metavar="N", help="starts (default 5); about twice as many imports")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    imports, starts = settings.rounds
    if options.rounds is not None:
        imports, starts = 2 * options.rounds - 1, options.rounds
    print_imports(measure_imports(imports))
    with tempfile.TemporaryDirectory(prefix="topoflow-start-") as folder:
        print_starts(measure_starts(Path(folder), settings, starts))
    return 0


def measure_imports(rounds: int) -> dict[str, list[Process]]:
    """Return measurements by what is imported, torch or the program: one process per round."""
    counted = {module: json.loads(run_python(IMPORT, "count", module)) for module in ("torch", "train")}
    measured: dict[str, list[Process]] = {module: [] for module in counted}
    for _ in range(rounds):
        for module, processes in measured.items():
            process = json.loads(run_python(IMPORT, "time", module))
            processes.append({**process, "files": counted[module]["files"]})
    return measured


def measure_starts(folder: Path, settings: Settings, rounds: int) -> dict[str, list[Process]]:
    """Return measurements by kind of start, cold or warm: one run per round."""
    pristine, data, config, noted = (folder / name for name in ("pristine", "data", "start.yaml", "noted.json"))
    prepare_world(pristine, days=settings.days, grid=settings.grid)
    config.write_text(yaml.safe_dump(build_config(settings, data)))
    measured: dict[str, list[Process]] = {"cold": [], "warm": []}
    files: dict[str, int] = {}
    for round_number in range(rounds + 1):
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(pristine, data)
        os.sync()  # done now, not while a start is measured
        mode, home = "time" if files.keys() == measured.keys() else "count", folder / f"home-{round_number}"
        for kind, runs in measured.items():
            time.sleep(settings.pause_seconds)
            run = folder / f"run-{round_number}-{kind}"
            run_python(RUN, mode, noted, ROOT / "train.py", config, f"run.dir={run}", home=home)
            seen = json.loads(noted.read_text())
            if mode == "count":  # drop the first round, which warms up the page cache
                files[kind] = seen["files"]
            else:
                runs.append({**seen, "files": files[kind]})
    return measured


def build_config(settings: Settings, data: Path) -> dict[str, dict]:
    """Return the config of a run of one step on all fifteen inputs, terrain on, without validation."""
    first = datetime.date(2018, 10, 1)
    last = first + datetime.timedelta(days=settings.days - 11)
    return {
        "run": {"threads": 2},
        "data": {"path": str(data), "train": [[str(first), str(last)]], "threads": 0},
        "model": {"patch_size": 2, **settings.model},
        "train": {"max_steps": 1, "global_batch_size": 4, "micro_batch_size": 4},
    }


def run_python(code: str, *arguments: object, home: Path | None = None) -> str:
    """Run `code` in a fresh Python and return its output; bytecode is written even if the environment disables it.

    home: home directory, which has the cache of earlier processes.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(ROOT)
    if home is not None:
        environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments}: status {done.returncode}\n{done.stderr}")
    return done.stdout


def import_ratios(measured: dict[str, list[Process]], key: str) -> list[float]:
    """Return the time of `import train` over that of `import torch` in each round; key: seconds or cpu."""
    return [train[key] / torch[key] for train, torch in zip(measured["train"], measured["torch"], strict=True)]


def print_imports(measured: dict[str, list[Process]]) -> None:
    """Print the first table."""
    rows = []
    for module, processes in measured.items():
        clock, cpu = ([process[key] for process in processes] for key in ("seconds", "cpu"))
        last = processes[-1]
        rows.append([f"`import {module}`", spread(clock), spread(cpu), str(len(last["modules"])), str(last["files"])])
    clock, cpu = (spread(import_ratios(measured, key)) for key in ("seconds", "cpu"))
    torch, train = (measured[module][-1] for module in ("torch", "train"))
    modules, files = len(train["modules"]) / len(torch["modules"]), train["files"] / torch["files"]
    rows.append(["ratio within pairs", clock, cpu, f"{modules:.2f}", f"{files:.2f}"])
    print_table(["imports", "seconds (range)", "CPU seconds (range)", "modules", "files opened"], rows)


def print_starts(measured: dict[str, list[Process]]) -> None:
    """Print the second table; phases below SHOWN_SECONDS in both kinds of start share one row."""
    spent = {kind: [run["phases"] for run in runs] for kind, runs in measured.items()}
    phases = list(dict.fromkeys(phase for runs in spent.values() for run in runs for phase in run))

    def seconds(kind: str, only: Sequence[str]) -> list[float]:
        return [sum(run.get(phase, 0.0) for phase in only) for run in spent[kind]]

    shown = [p for p in phases if any(statistics.median(seconds(kind, [p])) >= SHOWN_SECONDS for kind in spent)]
    rows = {phase: [phase] for phase in shown}
    rows |= {"all others": [phase for phase in phases if phase not in shown], f"**{TOTAL}**": phases}
    table = [[name, *(spread(seconds(kind, only)) for kind in spent)] for name, only in rows.items()]
    table.append(["modules loaded", *(str(len(runs[-1]["modules"])) for runs in measured.values())])
    table.append(["files opened", *(str(runs[-1]["files"]) for runs in measured.values())])
    print_table(["phase", *(f"{kind}: seconds (range)" for kind in spent)], table)


if __name__ == "__main__":
    sys.exit(main())
