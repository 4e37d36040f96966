"""One job of the requeue campaign: how and when it is disturbed, and what that costs."""

import itertools
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.support.compare_runs import newest_step
from tests.support.pause_points import PLACES
from tests.support.pausing import Plan, PlanFolder
from tests.support.slurm_jobs import ENDED, Job, Slurm, wait_until

STEPS = 80
MOST_STEPS_AHEAD = 6  # from the newest checkpoint to where a job is disturbed
CYCLE_SECONDS = 600.0  # longer than any start of these jobs takes, or their time in the queue
SIGNALS = ("USR1", "TERM", "INT")
AT_A_RANDOM_TIME = "at a random time"
REQUEUE, CRASH = "scontrol requeue", "node crash"


@dataclass(frozen=True)
class Disturbance:
    """How and when one start of a job is disturbed.

    kind: in words. signal: None for requeue and crash. rank: the one that gets it; None: all. phase: see PLACES, or
    AT_A_RANDOM_TIME, `seconds` after the first process started. again: more signals, (seconds after the previous one,
    name) each.
    """

    kind: str
    signal: str | None
    rank: int | None
    phase: str
    plan: Plan
    seconds: float = 0.0
    again: tuple[tuple[float, str], ...] = ()

    def __str__(self) -> str:
        place = self.plan.point or f"{self.seconds:.1f} s after the start"
        return f"{self.kind} {place} (rank {self.plan.rank}){' and more' if self.again else ''}"


def draw_disturbance(
    draw: random.Random, world_size: int, saved_step: int | None, seconds: float, crash: bool = False
) -> Disturbance:
    """Draw a disturbance of a run whose newest checkpoint is of `saved_step`; `seconds`: duration of a whole run."""
    signal, rank, again = draw.choice(SIGNALS), draw.choice([None, draw.randrange(world_size)]), ()
    kind = f"SIG{signal} to {'all tasks' if rank is None else 'one rank'}"
    if crash or draw.random() < 0.15:
        kind, signal, rank = CRASH if crash else REQUEUE, None, None
    elif draw.random() < 0.3:
        again = tuple((draw.uniform(0.0, 0.5), draw.choice(SIGNALS)) for _ in range(draw.randint(1, 3)))
    phases = [AT_A_RANDOM_TIME, *(phase for phase in PLACES if phase != "loading" or saved_step is not None)]
    phase, plan = draw.choice(phases), Plan()
    if phase in PLACES:
        name = draw.choice(list(PLACES[phase]))
        point, first = PLACES[phase][name], (saved_step or 0) + 1
        step = 0 if point.before_the_first_step else draw.randint(first, first + MOST_STEPS_AHEAD)
        where = 0 if point.only_on_rank_0 else draw.randrange(world_size)
        plan = Plan(name, where, step, draw.randint(1, point.times))
    return Disturbance(kind, signal, rank, phase, plan, draw.uniform(0.0, seconds), again)


@dataclass(frozen=True)
class Cycle:
    """The cost of a disturbance: steps done but not saved, seconds until the job had ended."""

    disturbance: Disturbance
    lost_steps: int
    seconds: float


class JobFailed(Exception):
    """A job did not behave as promised."""


class Sender(Protocol):
    """What a disturbed job needs from its campaign. seconds: duration of an undisturbed run."""

    folder: Path
    slurm: Slurm
    world_size: int
    seconds: float

    def send(self, name: str) -> Job: ...

    def log(self, name: str) -> Path: ...

    def power(self, what: str, node: str) -> None: ...


class DisturbedJob:
    """A job that is disturbed again and again until it may finish. crashes: only by crashes of a node."""

    def __init__(self, campaign: Sender, name: str, draw: random.Random, crashes: bool):
        self.campaign, self.name, self.draw, self.crashes = campaign, name, draw, crashes
        self.run, self.job = campaign.folder / name, None
        self.story: list[Disturbance] = []
        self.cycles: list[Cycle] = []
        self._down: str | None = None

    def go(self, most: int) -> None:
        """Submit it, disturb it up to `most` times, and let it finish.

        Raises:
            JobFailed: it ended otherwise.
            TimeoutError: it hangs.
        """
        try:
            for restart in itertools.count():
                files = PlanFolder(self.campaign.folder / "plans", self.name, restart)
                saved, disturbance = newest_step(self.run), None
                if restart < most and (saved or 0) < STEPS - 2 * MOST_STEPS_AHEAD:
                    about = (self.campaign.world_size, saved, self.campaign.seconds, self.crashes)
                    disturbance = draw_disturbance(self.draw, *about)
                    files.write(disturbance.plan)  # before the job can start
                    self.story.append(disturbance)
                self.job = self.job or self.campaign.send(self.name)
                if not self._cycle(restart, disturbance, files):
                    return
        except (JobFailed, TimeoutError):
            self.job.cancel()
            raise
        finally:
            self._boot()

    def _cycle(self, restart: int, disturbance: Disturbance | None, files: PlanFolder) -> bool:
        """Disturb one start of the job until it is back in the queue; return False if the run is over."""
        self._wait(lambda: files.started(0) is not None or self._has_ended(), "the start of the job")
        self._boot()
        if disturbance is None:
            self._wait(self._has_ended, "the end of the run")
        elif disturbance.plan.point is None:
            time.sleep(disturbance.seconds)
        else:
            self._wait(lambda: files.is_pausing or self._has_ended(), f"a process that is {disturbance.plan.point}")
        is_disturbed = not self._has_ended()
        if is_disturbed:
            start = time.monotonic()
            output_before = self.campaign.log(self.name).stat().st_size
            self._disturb(disturbance, files)
            self._wait(lambda: self._has_left(restart), f"the end after {disturbance.kind}")
            seconds = time.monotonic() - start
        now = self.job.describe()
        if now["JobState"] in ENDED:
            if now["JobState"] != "COMPLETED":
                when = "after" if is_disturbed else "before or without"
                raise JobFailed(f"{now['JobState']} {now['ExitCode']} {when} that: {self._reason()}")
            return False
        if now["Restarts"] != str(restart + 1):
            raise JobFailed(f"start {now['Restarts']} follows start {restart}")
        if disturbance.signal is not None:
            self._require_stop(output_before)
        self.cycles.append(Cycle(disturbance, lost_steps(self.run), seconds))
        return True

    def _disturb(self, disturbance: Disturbance, files: PlanFolder) -> None:
        if disturbance.kind == REQUEUE:
            self.job.requeue()
        elif disturbance.kind == CRASH:
            self._down = self.draw.choice([files.started(0)["node"], self.job.describe()["BatchHost"]])
            self.campaign.power("crash", self._down)
        else:
            self._signal(disturbance.signal, disturbance.rank, files)
        files.release()
        for seconds, name in disturbance.again:
            time.sleep(seconds)
            self._signal(name, disturbance.rank, files)

    def _signal(self, name: str, rank: int | None, files: PlanFolder) -> None:
        if rank is None:
            self.job.signal(name)
        else:
            self._wait(lambda: files.started(rank) is not None, f"rank {rank} to start")
            self.job.signal_task(**files.started(rank), name=name)

    def _boot(self) -> None:
        """Boot the crashed node, now that the job runs elsewhere, or is lost."""
        if self._down is not None:
            node, self._down = self._down, None
            self.campaign.power("boot", node)
            states = self.campaign.slurm.node_states
            self._wait(lambda: not states()[node].startswith("down"), f"{node} to come back")

    def _require_stop(self, output_before: int) -> None:
        """Check that this start stopped on request, by its output: the next start removes exit.json."""
        log = self.campaign.log(self.name)
        if b"stopped by SIG" not in log.read_bytes()[output_before:]:
            raise JobFailed(f"requeued without a line 'stopped by SIG...' in its output: {last_line(log)}")

    def _reason(self) -> str:
        """Return what exit.json says, and the last line of the output."""
        path = self.run / "exit.json"
        written = json.loads(path.read_text()) if path.exists() else None
        return f"exit.json {written}, last line: {last_line(self.campaign.log(self.name))}"

    def _has_ended(self) -> bool:
        return self.job.state in ENDED

    def _has_left(self, restart: int) -> bool:
        """Return whether no process of this start is left."""
        now = self.job.describe()
        return now["JobState"] in ENDED or (
            now["JobState"] in ("PENDING", "RUNNING") and now["Restarts"] != str(restart)
        )

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, CYCLE_SECONDS, what)


def lost_steps(run: Path) -> int:
    """Return the number of steps in metrics.jsonl that no checkpoint holds."""
    path = run / "metrics.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    last = max((event["step"] for event in events if event["event"] == "train"), default=0)
    return max(0, last - (newest_step(run) or 0))


def last_line(log: Path) -> str:
    """Return the last line of a job's output."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "no output"
