"""Disturb jobs of a real SLURM as time limits and preemption do, and count what is lost.

    python -m benchmarks.requeue_campaign [--cycles 100] [--nodes 2] [--tasks-per-node 1] [--jobs 2] [--seed 0]
                                          [--power COMMAND [--crashes N]] [section.key=value ...]

Each job is `sbatch launch/train.sbatch` of a small run. It gets SIGUSR1, SIGTERM or SIGINT (scancel to all tasks, kill
to one rank), sometimes followed by more signals, or `scontrol requeue`; it must commit a checkpoint, be requeued and
resume by itself. It is disturbed again, up to ten times, in a random phase of a run or at a random time. Then every
loss in its metrics.jsonl (each step once) and weights, moments, rates and progress in its last checkpoint must equal
those of an undisturbed run, bit for bit.

--power names a command that crashes a node (`COMMAND crash NODE`) and boots it again (`COMMAND boot NODE`). Some cycles
(--crashes, by default one in ten) are then such a crash, and the job resumes elsewhere, which requires a spare node.

Works with any SLURM that sbatch finds here; --folder must be on a file system that its nodes share. Exits with 1 if
a job failed or differs, with 2 if there is no SLURM.
"""

import argparse
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from benchmarks.disturbed_job import AT_A_RANDOM_TIME, CYCLE_SECONDS, STEPS, Cycle, DisturbedJob, JobFailed, last_line
from benchmarks.kill_campaign import SETTINGS
from tests.support.compare_runs import differences
from tests.support.pause_points import PLACES
from tests.support.pausing import ROOT, PlanFolder, make_project
from tests.support.prepared import prepare_world
from tests.support.slurm_jobs import ENDED, Job, NoSlurm, Slurm, job_options, wait_until

MOST_OF_A_JOB = 10
MOST_FAILURES = 5


@dataclass
class Tally:
    """Counts over all jobs. misses: disturbances that came too late for their run."""

    wanted: int
    cycles: list[Cycle] = field(default_factory=list)
    promised: int = 0
    misses: int = 0
    jobs: int = 0
    failed: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def failures(self) -> list[str]:
        return self.failed + self.different

    def promise(self) -> tuple[int, int]:
        """Return the number of the next job and of the cycles that it should do; 0: no further job."""
        with self.lock:
            left = self.wanted - len(self.cycles) - self.promised
            number = 0 if len(self.failures) >= MOST_FAILURES else min(left, MOST_OF_A_JOB)
            self.promised += number
            self.jobs += number > 0
            return self.jobs, number

    def keep(self, job: DisturbedJob, promised: int) -> None:
        with self.lock:
            self.promised -= promised
            self.cycles += job.cycles
            self.misses += len(job.story) - len(job.cycles)


class Campaign:
    """Jobs in `folder`, each of `nodes` x `tasks_per_node` tasks. power_command: see the module's docstring."""

    def __init__(
        self,
        folder: Path,
        slurm: Slurm,
        nodes: int,
        tasks_per_node: int,
        power_command: Sequence[str],
        overrides: Sequence[str],
    ):
        self.folder, self.slurm, self.power_command, self.overrides = folder, slurm, power_command, overrides
        self.world_size, self.options = nodes * tasks_per_node, job_options(nodes, tasks_per_node)
        self.project = make_project(folder)
        prepare_world(folder / "world", days=10)
        settings = {
            **SETTINGS,
            "data": {**SETTINGS["data"], "path": str(folder / "world"), "threads": 1},
            "train": {**SETTINGS["train"], "max_steps": STEPS},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        self.seconds = 0.0
        """Duration of an undisturbed run, from its first process on."""

    def send(self, name: str) -> Job:
        return self.slurm.send(
            *self.options,
            f"--chdir={self.project}",
            f"--job-name={name}",
            f"--output={self.log(name)}",
            str(self.project / "launch/train.sbatch"),
            str(self.folder / "config.yaml"),
            f"run.dir={self.folder / name}",
            *self.overrides,
        )

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.out"

    def power(self, what: str, node: str) -> None:
        subprocess.run([*self.power_command, what, node], check=True, capture_output=True)

    def untouched(self) -> None:
        """Return the undisturbed run."""
        job, files = self.send("untouched"), PlanFolder(self.folder / "plans", "untouched", 0)
        wait_until(lambda: files.started(0) is not None or job.state in ENDED, CYCLE_SECONDS, "the first job")
        start = time.monotonic()
        status = job.wait(CYCLE_SECONDS)
        if status != 0:
            raise JobFailed(f"the undisturbed run ended with {status}: {last_line(self.log('untouched'))}")
        self.seconds = time.monotonic() - start

    def disturbed(self, tally: Tally, seed: int, crashes: bool = False) -> None:
        """Run job after job until there are enough cycles; compare each at its end."""
        while (promised := tally.promise())[1]:
            number, most = promised
            name = f"{'crashed' if crashes else 'disturbed'}-{number}"
            job = DisturbedJob(self, name, random.Random(f"{seed} {name}"), crashes)
            try:
                job.go(most)
            except (JobFailed, TimeoutError) as error:
                tally.failed.append(f"{name}: {'; '.join(map(str, job.story))}: {error}")
            else:
                different = differences(job.run, self.folder / "untouched", STEPS)
                if different:
                    tally.different.append(f"{name}: {'; '.join(map(str, job.story))}: {', '.join(different[:5])}")
            finally:
                tally.keep(job, most)


def report(tallies: Sequence[Tally], seconds: float) -> None:
    """Print the figures."""
    cycles = [cycle for tally in tallies for cycle in tally.cycles]
    print(f"{'disturbed by':<24}{'cycles':>8}{'steps lost':>14}{'seconds until the job had ended':>36}")
    print(f"{'':<24}{'':>8}{'most':>7}{'mean':>7}{'median':>29}{'most':>7}")
    for kind in sorted({cycle.disturbance.kind for cycle in cycles}):
        mine = [cycle for cycle in cycles if cycle.disturbance.kind == kind]
        lost, took = [cycle.lost_steps for cycle in mine], [cycle.seconds for cycle in mine]
        figures = f"{max(lost):>7}{statistics.mean(lost):>7.1f}{statistics.median(took):>29.1f}{max(took):>7.1f}"
        print(f"{kind:<24}{len(mine):>8}{figures}")
    phases = Counter(cycle.disturbance.phase for cycle in cycles)
    print("where: " + ", ".join(f"{phase} {phases[phase]}" for phase in (*PLACES, AT_A_RANDOM_TIME)))
    again = sum(bool(cycle.disturbance.again) for cycle in cycles)
    jobs, misses = sum(tally.jobs for tally in tallies), sum(tally.misses for tally in tallies)
    print(f"cycles: {len(cycles)}, {again} of them with more signals after the first ({misses} more came too late)")
    print(f"jobs: {jobs} in {seconds:.0f} s, failed: {sum(len(tally.failed) for tally in tallies)}")
    print(f"differ {sum(len(tally.different) for tally in tallies)}")
    for line in (line for tally in tallies for line in tally.failures):
        print(line)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="nodes per job (default: %(default)s)")
    parser.add_argument("--tasks-per-node", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="concurrent jobs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the disturbances (default: %(default)s)")
    parser.add_argument("--power", type=shlex.split, default=[], metavar="COMMAND", help="crashes or boots a node")
    parser.add_argument("--crashes", type=int, metavar="N", help="cycles with a crash (default: a tenth, with --power)")
    parser.add_argument("--folder", type=Path, help="work here, and keep all runs here (default: keep none)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="config values of all runs")
    options = parser.parse_args(arguments)
    # the nodes use this interpreter; the batch script needs the package to find run.dir
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm, start = Slurm({**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}), time.monotonic()
    try:
        slurm.require()
    except NoSlurm as error:
        print(f"requeue_campaign: {error}", file=sys.stderr)
        return 2
    most = options.cycles // 10 if options.crashes is None else min(options.crashes, options.cycles)
    crashes = Tally(most if options.power else 0)
    others = Tally(options.cycles - crashes.wanted)
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shape = (options.nodes, options.tasks_per_node)
        campaign = Campaign(folder.absolute(), slurm, *shape, options.power, options.overrides)
        try:
            campaign.untouched()
        except (JobFailed, TimeoutError) as error:
            print(f"requeue_campaign: {error}", file=sys.stderr)
            return 1
        campaign.disturbed(crashes, options.seed, crashes=True)  # no other job may share a node
        with ThreadPoolExecutor(options.jobs) as threads:
            for running in [threads.submit(campaign.disturbed, others, options.seed) for _ in range(options.jobs)]:
                running.result()
    report((crashes, others), time.monotonic() - start)
    return 1 if crashes.failures or others.failures else 0


if __name__ == "__main__":
    sys.exit(main())
