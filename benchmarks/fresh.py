"""Measurements in processes of their own, one after the other, and the resident memory of a process."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def run_fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function in a new interpreter, which has imported the function's module.

    Raises: what the function raises; BrokenProcessPool if the process was killed, for example for lack of memory.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run_here(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run in this process instead, for smoke runs: quick, but the figures mean nothing."""
    return function(*arguments)


def alternate(
    names: Sequence[str], rounds: int, measure: Callable[[str], Any]
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Measure each in turn, `rounds` times, every other round in reverse, so that other load affects all equally.

    Returns: {name: measurements of all rounds}, and {name: reason} for those whose process was killed.
    """
    measured: dict[str, list[Any]] = {name: [] for name in names}
    killed: dict[str, str] = {}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            if name in killed:
                continue
            try:
                measured[name].append(measure(name))
            except BrokenProcessPool:
                killed[name] = "its process was killed: out of memory?"
    return {name: values for name, values in measured.items() if name not in killed}, killed


class ResidentMemory:
    """The peak of this process's resident memory above its current size.

    getrusage would start at the peak of the parent process. Linux only.
    """

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak; see proc(5)
        self._before = _status_bytes("VmRSS")

    def peak_bytes(self) -> int:
        """Return the peak since this object was created."""
        return _status_bytes("VmHWM") - self._before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: expected Linux")
