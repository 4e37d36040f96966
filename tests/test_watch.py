"""The watch between ranks, with four real processes: whatever becomes of one, the others end, and name it.

The processes are forked, so that importing torch is paid for once; each writes what it says to a file of its own.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch._dynamo  # here once, and not in every forked process

from topoflow.config import DistributedConfig
from topoflow.errors import DataError, StopRequested
from topoflow.launch import Launch
from topoflow.ranks import distributed_context
from topoflow.run_dir import run_to_exit
from topoflow.watch import Hub, Watch

WORLD = 4
LIMIT = 2.0
"""distributed.timeout_seconds."""
BUSY = 5.0
"""What a machine that others use as well may take on top, in seconds."""


@dataclass
class Ending:
    """How a rank ended: exit status (negative: a signal), seconds since the fault, and what it said on stderr."""

    status: int
    seconds: float
    said: str


class Ranks:
    """Runs `body(context)` in forked processes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.endings: list[Ending] = []

    def run(self, body, setup_seconds=60.0, stop_rank=None, absent=()):
        """All ranks to their end; the rank `stop_rank`, which stops itself, is killed then."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.clock = self.folder / "fault"
        pids = [self._fork(rank, port, body, setup_seconds, rank in absent) for rank in range(WORLD)]
        ended = {}
        deadline = time.monotonic() + 120
        while len(ended) < WORLD - (stop_rank is not None):
            assert time.monotonic() < deadline, f"hangs: {[r for r in range(WORLD) if r not in ended]}"
            for rank, pid in enumerate(pids):
                if rank not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    ended[rank] = (os.waitstatus_to_exitcode(found[1]), time.time())
            time.sleep(0.02)
        if stop_rank is not None:
            os.kill(pids[stop_rank], signal.SIGKILL)
            os.waitpid(pids[stop_rank], 0)
        fault = float(self.clock.read_text()) if self.clock.exists() else 0.0
        for rank in range(WORLD):
            status, when = ended.get(rank, (-signal.SIGKILL, fault))
            self.endings.append(Ending(status, when - fault, (self.folder / f"rank{rank}").read_text()))
        return self.endings

    def _fork(self, rank, port, body, setup_seconds, is_absent):
        pid = os.fork()
        if pid:
            return pid
        status = 99
        if is_absent:
            (self.folder / f"rank{rank}").touch()
            os._exit(0)
        try:
            with (self.folder / f"rank{rank}").open("w") as said:
                os.dup2(said.fileno(), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            launch = Launch(
                launcher="a test", reason="a test", rank=rank, world_size=WORLD, local_rank=rank,
                local_world_size=WORLD, address="127.0.0.1", port=port,
            )  # fmt: skip
            config = DistributedConfig(setup_timeout_seconds=setup_seconds, timeout_seconds=LIMIT)

            def inside():
                with distributed_context(launch, config, torch.device("cpu")) as context:
                    body(context, self)

            status = run_to_exit(inside, launch)
        except (ZeroDivisionError, MemoryError, AssertionError) as error:
            sys.excepthook(type(error), error, error.__traceback__)
            status = 1
        finally:
            sys.stderr.flush()
            os._exit(status)

    def fault(self):
        """The clock starts."""
        self.clock.write_text(repr(time.time()))

    def said_by_all(self):
        return "".join(ending.said for ending in self.endings)


@pytest.fixture
def ranks(tmp_path):
    return Ranks(tmp_path)


def train(context, until):
    """What a run does: steps with a collective each, for ever unless `until(step)` ends it."""
    context.watch.end_setup()
    for step in range(1, 100000):
        context.watch.enter(f"step {step}", "loading data")
        if until(step) == "stop":
            return
        context.watch.mark("forward and backward")
        context.gather_rows(torch.ones(1))


HOST = socket.gethostname()


def raises(context, ranks):
    ranks.fault()
    raise ZeroDivisionError("division by zero")


def is_killed(context, ranks):
    ranks.fault()
    os.kill(os.getpid(), signal.SIGKILL)


def exits(context, ranks):
    ranks.fault()
    os._exit(0)


def runs_out_of_memory(context, ranks):
    ranks.fault()
    raise MemoryError


def refuses_alone(context, ranks):
    ranks.fault()
    raise DataError("data.path: gone")


LOST = "its process ended without a word"


@pytest.mark.parametrize(
    ("culprit", "fault", "own_status", "others", "words"),
    [
        (2, raises, 1, 5, f"rank 2 on {HOST}, step 5 (loading data): ZeroDivisionError: division by zero"),
        (0, raises, 1, 5, f"rank 0 on {HOST}, step 5 (loading data): ZeroDivisionError: division by zero"),
        (2, is_killed, -signal.SIGKILL, 5, f"rank 2 on {HOST}: lost while rank 0 was in step 5"),
        (0, is_killed, -signal.SIGKILL, 5, "rank 0 on 127.0.0.1: lost while this rank was in step 5"),
        (2, exits, 0, 5, f"rank 2 on {HOST}: lost while rank 0 was in step 5"),
        (2, runs_out_of_memory, 1, 5, f"rank 2 on {HOST}, step 5 (loading data): MemoryError"),
        (2, refuses_alone, 2, 2, f"rank 2 on {HOST}, step 5 (loading data): data.path: gone"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_first_rank_that_fails_is_named_and_all_end(ranks, culprit, fault, own_status, others, words):
    def body(context, ranks):
        train(context, lambda step: fault(context, ranks) if (context.rank, step) == (culprit, 5) else None)

    endings = ranks.run(body)
    assert [ending.status for ending in endings] == [own_status if r == culprit else others for r in range(WORLD)]
    assert max(ending.seconds for ending in endings) < 5 + BUSY
    speaker = 1 if (culprit, fault) == (0, is_killed) else 0
    assert f"topoflow: {'rank 1: ' * speaker}{words}" in endings[speaker].said
    assert not any(ending.said for rank, ending in enumerate(endings) if rank not in (speaker, culprit))


def never_returns(context, ranks):
    ranks.fault()
    while True:
        pass


def sleeps(context, ranks):
    ranks.fault()
    time.sleep(1e6)


def is_stopped(context, ranks):
    ranks.fault()
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("culprit", "fault"),
    [(2, never_returns), (0, sleeps), (2, is_stopped), (0, is_stopped)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_ranks_that_do_not_arrive_are_named_within_the_limit(ranks, culprit, fault):
    def body(context, ranks):
        train(context, lambda step: fault(context, ranks) if (context.rank, step) == (culprit, 5) else None)

    stopped = culprit if fault is is_stopped else None
    endings = ranks.run(body, stop_rank=stopped)
    assert {ending.status for rank, ending in enumerate(endings) if rank != stopped} == {5}
    slowest = max(ending.seconds for ending in endings)
    assert LIMIT - 0.5 < slowest < LIMIT + 2 + BUSY
    said = ranks.said_by_all()
    assert f"rank {culprit} on" in said
    assert f"did not arrive within {LIMIT:g} s" in said
    assert "step 5 (" in said
    assert culprit == 0 or not ("rank 1 on" in said or "rank 3 on" in said)


def test_ranks_that_never_come_are_named(ranks):
    ranks.clock = ranks.folder / "fault"
    ranks.fault()
    endings = ranks.run(lambda context, ranks: None, setup_seconds=LIMIT, absent=(1, 3))
    assert [ending.status for ending in endings] == [5, 0, 5, 0]
    assert max(ending.seconds for ending in endings) < LIMIT + 2 + BUSY
    assert f"topoflow: set-up: rank(s) 1, 3 of 4 did not arrive within {LIMIT:g} s\n" in endings[0].said


def test_a_rank_that_never_ends_its_set_up_is_given_that_times_limit(ranks):
    def body(context, ranks):
        with context.together("data"):
            if context.rank == 3:
                ranks.fault()
                time.sleep(1e6)

    endings = ranks.run(body, setup_seconds=2 * LIMIT)
    assert {ending.status for ending in endings} == {5}
    assert 2 * LIMIT - 0.5 < max(ending.seconds for ending in endings) < 2 * LIMIT + 2 + BUSY
    assert "set-up (data): rank 3 on" in endings[0].said


def test_a_rank_that_is_slow_and_goes_on_is_waited_for(ranks):
    def body(context, ranks):
        def slow(step):
            if (context.rank, step) == (2, 3):
                for _ in range(20):
                    time.sleep(2 * LIMIT / 20)
                    context.watch.tick()
            return "stop" if step == 5 else None

        train(context, slow)

    assert [ending.status for ending in ranks.run(body)] == [0] * WORLD
    assert not ranks.said_by_all()


def test_a_thread_that_works_beside_a_waiting_rank_puts_no_blame_on_others(ranks):
    """As rank 0 does while it writes a checkpoint and waits for a rank that stalls."""

    def body(context, ranks):
        def breathe():
            while True:
                context.watch.breathe()
                time.sleep(0.05)

        if context.rank == 0:
            threading.Thread(target=breathe, daemon=True).start()
        train(context, lambda step: sleeps(context, ranks) if (context.rank, step) == (3, 5) else None)

    endings = ranks.run(body)
    assert {ending.status for ending in endings} == {5}
    assert "rank 3 on" in endings[0].said
    assert not re.search(r"rank [12] on", endings[0].said)


def test_one_rank_that_is_asked_to_stop_tells_all_others_before_they_meet(ranks):
    def body(context, ranks):
        if context.rank == 2:
            context.watch.ask_to_stop("SIGUSR1")
        deadline = time.monotonic() + 30
        while context.watch.stop_asked is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert context.watch.stop_asked == "SIGUSR1"
        context.gather_rows(torch.ones(1))

    assert [ending.status for ending in ranks.run(body)] == [0] * WORLD, ranks.said_by_all()


def test_a_rank_that_joins_later_hears_that_another_was_asked_to_stop():
    hub = Hub(4, "token", lambda: "set-up")
    asked, witness, late = (
        Watch(
            Launch(
                launcher="a test", reason="a test", rank=rank, world_size=4, local_rank=rank, local_world_size=4,
                address="127.0.0.1", port=0,
            )
        )
        for rank in (1, 2, 3)
    )  # fmt: skip
    try:
        for watch in (witness, asked):
            watch.connect("127.0.0.1", hub.port, "token")
        deadline = time.monotonic() + 30
        asked.ask_to_stop("SIGUSR1")
        while witness.stop_asked is None and time.monotonic() < deadline:
            time.sleep(0.01)
        late.connect("127.0.0.1", hub.port, "token")
        while late.stop_asked is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert late.stop_asked == "SIGUSR1"
    finally:
        for watch in (asked, witness, late):
            watch.leave()
        hub.close()


def test_a_main_thread_that_hangs_in_python_ends_too(ranks):
    """As one that hangs in a GPU's queue or a dead file system: it sees no error, the watch's thread ends it."""

    def body(context, ranks):
        train(
            context,
            lambda step: (
                sleeps(context, ranks)
                if context.rank == 1 and step == 2
                else (raises(context, ranks) if context.rank == 2 and step == 2 else None)
            ),
        )

    endings = ranks.run(body)
    assert [ending.status for ending in endings] == [5, 5, 1, 5]
    assert max(ending.seconds for ending in endings) < 5 + BUSY


def test_what_all_refuse_alike_is_said_once_and_ends_nobody_else(ranks):
    def body(context, ranks):
        refusal = StopRequested("stopped by a test")
        refusal.shared = True
        time.sleep(0.3 * context.rank)  # the others leave at other times
        raise refusal

    endings = ranks.run(body)
    assert [ending.status for ending in endings] == [75] * WORLD
    assert ranks.said_by_all() == "topoflow: stopped by a test\n"


def test_strangers_are_not_heard(ranks):
    def body(context, ranks):
        if context.rank == 0:
            hub = context.watch._connection.getpeername()[:2]
            for words in (b"\n", b"wrong {}\n", b"\xff" * 70000):
                with socket.create_connection(hub) as stranger:
                    stranger.sendall(words)
                    stranger.settimeout(5)
                    if words.endswith(b"\n"):
                        assert not stranger.recv(1)  # sent away
        context.gather_rows(torch.ones(1))

    assert [ending.status for ending in ranks.run(body)] == [0] * WORLD, ranks.said_by_all()
