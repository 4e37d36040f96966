"""What the time from the start of the process to the first optimizer step goes to, phase by phase."""

import os
import time
from pathlib import Path

SHOWN_SECONDS = 0.05


class StartClock:
    """Begins with the phase `set-up`; before it, if `with_imports`, stand the imports, from the start of the process.

    with_imports: the process was started for this run, and has imported the program for it.
    """

    def __init__(self, with_imports: bool):
        now = time.monotonic()
        self._begun = [(now, "set-up")]
        age_seconds = _process_age_seconds() if with_imports else None
        if age_seconds is not None:
            self._begun.insert(0, (now - age_seconds, "imports"))

    def begin(self, phase: str) -> None:
        """The phase that was is over."""
        self._begun.append((time.monotonic(), phase))

    def seconds(self) -> dict[str, float]:
        """Seconds in each phase until now, in the order of their first beginning."""
        ends = [*(moment for moment, _ in self._begun[1:]), time.monotonic()]
        spent: dict[str, float] = {}
        for (begun, phase), end in zip(self._begun, ends, strict=True):
            spent[phase] = spent.get(phase, 0.0) + end - begun
        return spent

    def summary(self) -> str:
        """`first step after 3.1 s: imports 1.6, data 0.4, ...`, without phases that round to nothing."""
        spent = self.seconds()
        shown = [f"{phase} {seconds:.1f}" for phase, seconds in spent.items() if seconds >= SHOWN_SECONDS]
        return f"first step after {sum(spent.values()):.1f} s: {', '.join(shown) or 'nothing took long'}"


def _process_age_seconds() -> float | None:
    """How long ago this process began, by the kernel's own note (to 0.01 s); None on a system without one."""
    note = Path("/proc/self/stat")
    if not note.is_file():
        return None
    started = int(note.read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
