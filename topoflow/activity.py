"""What a rank is doing: its phase, its progress, whether it waits for other ranks, and how long its start took."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class StartClock:
    """Time spent in each phase of the start. The first phase is `set-up`, or with_imports `imports` and then `set-up`.

    with_imports: this process was started for the run, so its age is the time that imports took.
    """

    def __init__(self, with_imports: bool):
        now = time.monotonic()
        self._begun = [(now, "set-up")]
        age_seconds = _process_age_seconds() if with_imports else None
        if age_seconds is not None:
            self._begun.insert(0, (now - age_seconds, "imports"))

    def begin(self, phase: str) -> None:
        """End the current phase and begin another."""
        self._begun.append((time.monotonic(), phase))

    def seconds(self) -> dict[str, float]:
        """Return the seconds spent in each phase until now, in the order in which they first began."""
        ends = [*(moment for moment, _ in self._begun[1:]), time.monotonic()]
        spent: dict[str, float] = {}
        for (begun, phase), end in zip(self._begun, ends, strict=True):
            spent[phase] = spent.get(phase, 0.0) + end - begun
        return spent

    def summary(self) -> str:
        """Return `first step after 3.1 s: imports 1.6, data 0.4, ...`, without phases that round to zero."""
        spent = self.seconds()
        shown = [f"{phase} {seconds:.1f}" for phase, seconds in spent.items() if seconds >= 0.05]
        return f"first step after {sum(spent.values()):.1f} s: {', '.join(shown) or 'no phase took long'}"


def _process_age_seconds() -> float | None:
    """Return the age of this process as the kernel records it (to 0.01 s); None on a system without /proc."""
    record = Path("/proc/self/stat")
    if not record.is_file():
        return None
    started = int(record.read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


@dataclass
class State:
    """What a rank is doing at one moment, for the comparison with other ranks."""

    phase: str = "set-up"
    reached: int = 0
    """Number of collective operations that it has reached."""
    is_waiting: bool = False
    """Whether it waits for other ranks, in the last of them."""
    idle: float = 0.0
    """Seconds without progress."""
    limit: float = math.inf
    """Seconds after which waiting, or no progress, is a stall."""
    stop_asked: str | None = None
    """The signal that asked some rank to stop, if this one knows."""


class Activity:
    """What this rank is doing: its phase, its progress, and whether it waits for other ranks.

    Args:
        setup_seconds, step_seconds: how long another rank may wait for this one without progress: until the first step
            is done (which compiles and fills caches), and after it.
    """

    def __init__(self, setup_seconds: float = math.inf, step_seconds: float = math.inf):
        self.clock: StartClock | None = None
        """Records the phases until the first step is done, if there is one."""
        self.stop_asked: str | None = None
        """The signal that asked some rank to stop, as soon as this one knows; the watch tells the others."""
        self._setup_seconds, self._step_seconds, self._limit = setup_seconds, step_seconds, setup_seconds
        self._stage, self._detail = "set-up", ""
        self._reached, self._is_waiting, self._progressed = 0, False, time.monotonic()

    @property
    def phase(self) -> str:
        """`step 12 (loading data)`."""
        return f"{self._stage} ({self._detail})" if self._detail else self._stage

    def enter(self, stage: str, detail: str = "") -> None:
        """Begin a stage of the run, such as `step 12`."""
        self._stage, self._detail = stage, detail
        if self.clock is not None:
            self.clock.begin(detail or stage)
        self.tick()

    def mark(self, detail: str) -> None:
        """Begin a part of the current stage."""
        self.enter(self._stage, detail)

    def tick(self) -> None:
        """Record progress: other ranks wait for a slow rank as long as it makes progress."""
        self._progressed = time.monotonic()

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """Apply the limit of the set-up to a block that may compile, or wait for a disk, on this rank alone."""
        before, self._limit = self._limit, max(self._limit, self._setup_seconds)
        try:
            yield
        finally:
            self._limit = before

    def end_setup(self) -> str | None:
        """Apply the limit of steps from now on: the first step is done.

        Returns the clock's summary the first time, if there is a clock.
        """
        self._limit = self._step_seconds
        clock, self.clock = self.clock, None
        return None if clock is None else clock.summary()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark a block that ends only when all ranks have reached it."""
        self._reached, self._is_waiting = self._reached + 1, True
        self.tick()
        try:
            yield
        finally:
            self._is_waiting = False
            self.tick()

    def state(self) -> State:
        """Return what this rank is doing now."""
        idle = time.monotonic() - self._progressed
        return State(self.phase, self._reached, self._is_waiting, idle, self._limit, self.stop_asked)
