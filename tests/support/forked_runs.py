"""Runs of train.py as real processes that start in milliseconds, so that hundreds can be killed and resumed.

Python's fork server (multiprocessing) imports torch and the program once and forks each process from there. Until then
it has created no tensor and no thread, and OMP_NUM_THREADS is 1, so a fork is equivalent to a fresh process;
tests/program/test_kills.py compares such runs with `python train.py` and torchrun.

The ranks get torchrun's variables, and are ended as by torchrun: when one is lost the others get SIGTERM, and SIGKILL
after a grace period.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import train
from tests.support.kill_points import Kill, arm
from tests.support.rendezvous import host_store, rank_variables

ROOT = Path(__file__).parents[2]
GRACE_SECONDS = 1.0

# including lazy imports; DDP imports torch's compiler
LATE = ["xarray", "zarr", "netCDF4", "topoflow.logs", "topoflow.plots", "torch._dynamo"]
PRELOADED = ["tests.support.forked_runs", *LATE]
AT_A_RANDOM_TIME = "at a random time"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    statuses: of each rank, negative for a signal. note: that of the kill, if it happened. output: of all ranks.
    """

    statuses: list[int]
    note: dict[str, Any] | None
    output: str

    @property
    def done(self) -> bool:
        return set(self.statuses) == {0}


@dataclass(frozen=True)
class Attack:
    """Kill rank `rank` at `kill` or after `seconds`; `everyone`: together with all others."""

    kill: Kill | None = None
    seconds: float | None = None
    rank: int = 0
    everyone: bool = False

    def __str__(self) -> str:
        when = "never" if self.seconds is None else f"after {self.seconds:.2f} s"
        if self.kill is not None:
            when = f"{self.kill.point} (time {self.kill.count} from step {self.kill.step} on)"
        return f"rank {self.rank}{' and all others' if self.everyone else ''} {when}"


def start_fork_server() -> Any:
    """Return the context of processes that are forked from one that has imported torch and the program."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    return context


class ForkedRuns:
    """Starts runs; their output and the notes of killed ranks are in `folder`."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.log, self.note = folder / "output.log", folder / "killed.json"
        self._context = start_fork_server()

    def run(
        self,
        arguments: Sequence[str],
        world_size: int = 1,
        attack: Attack | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> Ending:
        """Train with these arguments of train.py until the run ends or `attack` kills it.

        Args:
            prepare: called in each process, before it trains; pickled, so a function of a module.
        """
        attack = attack or Attack()
        for file in (self.log, self.note):
            file.unlink(missing_ok=True)
        self.log.touch()
        store, ranks = host_store(), []
        for rank in range(world_size):
            kill = attack.kill if rank == attack.rank else None
            variables = rank_variables(store.port, rank, world_size) if world_size > 1 else {}
            what = (list(arguments), variables, self.log, kill, self.note, prepare)
            ranks.append(self._context.Process(target=_run_rank, args=what))
        try:
            for process in ranks:
                process.start()
            if attack.seconds is not None and not wait([process.sentinel for process in ranks], attack.seconds):
                ranks[attack.rank].kill()
                self.note.write_text(json.dumps({"point": AT_A_RANDOM_TIME}))
            _end_together(ranks, attack.everyone)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        note = json.loads(self.note.read_text()) if self.note.exists() else None
        return Ending([process.exitcode for process in ranks], note, self.log.read_text(errors="replace"))


def _end_together(ranks: Sequence[Any], everyone: bool) -> None:
    """Wait for all; when one is lost, end the others as torchrun does, or at once.

    A rank that ended by itself, with a status, has told the others why: they get time to end by themselves too.
    """
    waiting = list(ranks)
    while waiting and all(process.exitcode in (0, None) for process in ranks):
        wait([process.sentinel for process in waiting])
        waiting = [process for process in waiting if process.exitcode is None]
    if not any((process.exitcode or 0) < 0 for process in ranks):
        _join(waiting)
    for process in waiting:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL if everyone else signal.SIGTERM)
    _join(waiting)


def _join(ranks: Sequence[Any]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))


def _run_rank(
    arguments: list[str],
    variables: dict[str, str],
    log: Path,
    kill: Kill | None,
    note: Path,
    prepare: Callable[[], None] | None,
) -> None:
    """Train in the forked process as the rank that `variables` describe."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(variables)
    sys.argv = ["train.py", *arguments]
    if kill is not None:
        arm(kill, note)
    if prepare is not None:
        prepare()
    sys.exit(train.main(arguments))
