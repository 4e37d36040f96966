"""The watch between ranks, with four real processes: if one fails or stalls, the others end and name it.

The processes are forked, so that importing torch is paid for once; each writes its stderr to a file of its own.
"""

import math
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch._dynamo  # here once, and not in every forked process

from topoflow.config import DistributedConfig
from topoflow.errors import DataError, StopRequested
from topoflow.launch import Launch
from topoflow.rendezvous import distributed_context
from topoflow.run_dir import StopFlag, run_to_exit
from topoflow.watch_server import Peer, find_contradiction

WORLD = 4
LIMIT = 2.0
"""distributed.timeout_seconds."""
BUSY = 5.0
"""Seconds added to each time limit for a loaded machine."""


@dataclass
class Ending:
    """How a rank ended: exit status (negative: a signal), seconds since the fault, and its stderr."""

    status: int
    seconds: float
    stderr: str


class Ranks:
    """Run `body(context, ranks)` in forked processes."""

    def __init__(self, folder: Path, store_port: int):
        self.folder, self.store_port = folder, store_port
        self.endings: list[Ending] = []

    def run(self, body=None, setup_seconds=60.0, stop_rank=None, wake_after=None, absent=(), **options):
        """Run all ranks and return how each ended.

        stop_rank: it stops itself, and is continued `wake_after` seconds after the fault, or killed at the end.

        Options: see `_live`.
        """
        self.clock = self.folder / "fault"
        pids = [self._fork(number, body, setup_seconds, number in absent, **options) for number in range(WORLD)]
        ended = {}
        deadline = time.monotonic() + 60
        while len(ended) < WORLD - (stop_rank is not None and wake_after is None):
            assert time.monotonic() < deadline, f"hangs: {[r for r in range(WORLD) if r not in ended]}"
            for rank, pid in enumerate(pids):
                if rank not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    ended[rank] = (os.waitstatus_to_exitcode(found[1]), time.time())
            if wake_after is not None and self.clock.exists() and time.time() > self.since() + wake_after:
                os.kill(pids[stop_rank], signal.SIGCONT)
                wake_after = math.inf
            time.sleep(0.02)
        if stop_rank is not None and stop_rank not in ended:
            os.kill(pids[stop_rank], signal.SIGKILL)
            os.waitpid(pids[stop_rank], 0)
        fault = self.since() if self.clock.exists() else 0.0
        for rank in range(WORLD):
            status, when = ended.get(rank, (-signal.SIGKILL, fault))
            self.endings.append(Ending(status, when - fault, (self.folder / f"rank{rank}").read_text()))
        return self.endings

    def _fork(self, number, body, setup_seconds, is_absent, **options):
        pid = os.fork()
        if pid:
            return pid
        with (self.folder / f"rank{number}").open("w") as stderr:
            os.dup2(stderr.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        status = 99
        try:
            status = 0 if is_absent else self._live(number, body, setup_seconds, **options)
        except (ZeroDivisionError, MemoryError, AssertionError) as error:
            sys.excepthook(type(error), error, error.__traceback__)
            status = 1
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _live(self, number, body, setup_seconds, before=None, after=None, numbers=range(WORLD), port=None):
        """Be one rank. before, after: called with the rank and `self`. port: where rank 0 listens itself."""
        rank = numbers[number]
        launch = Launch(
            launcher="a test", reason="a test", rank=rank, world_size=WORLD, local_rank=number, local_world_size=WORLD,
            address="127.0.0.1", port=port or self.store_port, has_agent_store=port is None,
        )  # fmt: skip
        config = DistributedConfig(setup_timeout_seconds=setup_seconds, timeout_seconds=LIMIT)
        cpu = torch.device("cpu")

        def inside():
            if before:
                before(rank, self)
            with distributed_context(launch, config, cpu, stop=stop) as context:
                body(context, self)

        with StopFlag().listening() as stop:
            status = run_to_exit(inside, launch)
        if after:
            after(rank, self)
        return status

    def since(self):
        """Return the time of the fault."""
        return float(self.clock.read_text())

    def fault(self):
        """Record the time of the fault."""
        written = self.clock.with_suffix(".partial")
        written.write_text(repr(time.time()))
        written.rename(self.clock)  # at once, for who reads it meanwhile

    def all_stderr(self):
        return "".join(ending.stderr for ending in self.endings)


@pytest.fixture
def ranks(tmp_path, store_port):
    return Ranks(tmp_path, store_port)


def train(context, until):
    """Run steps with one collective each, until `until(step)` returns "stop"."""
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


LOST = "its process ended without reporting an error"


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
    reporter = 1 if (culprit, fault) == (0, is_killed) else 0
    assert f"topoflow: {'rank 1: ' * reporter}{words}" in endings[reporter].stderr
    assert not any(ending.stderr for rank, ending in enumerate(endings) if rank not in (reporter, culprit))


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
    stderr = ranks.all_stderr()
    assert f"rank {culprit} on" in stderr
    assert f"did not arrive within {LIMIT:g} s" in stderr
    assert "step 5 (" in stderr
    assert culprit == 0 or not ("rank 1 on" in stderr or "rank 3 on" in stderr)


def test_ranks_that_never_arrive_are_named(ranks):
    ranks.clock = ranks.folder / "fault"
    ranks.fault()
    endings = ranks.run(lambda context, ranks: None, setup_seconds=LIMIT, absent=(1, 3))
    assert [ending.status for ending in endings] == [5, 0, 5, 0]
    assert max(ending.seconds for ending in endings) < LIMIT + 2 + BUSY
    assert f"topoflow: set-up: rank(s) 1, 3 of 4 did not arrive within {LIMIT:g} s\n" in endings[0].stderr


def test_a_rank_that_never_ends_its_set_up_is_given_that_times_limit(ranks):
    def body(context, ranks):
        with context.together("data"):
            if context.rank == 3:
                ranks.fault()
                time.sleep(1e6)

    endings = ranks.run(body, setup_seconds=2 * LIMIT)
    assert {ending.status for ending in endings} == {5}
    assert 2 * LIMIT - 0.5 < max(ending.seconds for ending in endings) < 2 * LIMIT + 2 + BUSY
    assert "set-up (data): rank 3 on" in endings[0].stderr


def test_a_slow_rank_that_makes_progress_is_waited_for(ranks):
    def body(context, ranks):
        def slow(step):
            if (context.rank, step) == (2, 3):
                for _ in range(20):
                    time.sleep(2 * LIMIT / 20)
                    context.watch.tick()
            return "stop" if step == 5 else None

        train(context, slow)

    assert [ending.status for ending in ranks.run(body)] == [0] * WORLD
    assert not ranks.all_stderr()


def test_a_rank_that_waits_while_another_of_its_threads_works_does_not_blame_other_waiting_ranks(ranks):
    """As rank 0 does while it writes a checkpoint and waits for a rank that stalls."""

    def body(context, ranks):
        def beat():
            while True:
                context.watch.tick()
                time.sleep(0.05)

        if context.rank == 0:
            threading.Thread(target=beat, daemon=True).start()
        train(context, lambda step: sleeps(context, ranks) if (context.rank, step) == (3, 5) else None)

    endings = ranks.run(body)
    assert {ending.status for ending in endings} == {5}
    assert "rank 3 on" in endings[0].stderr
    assert not re.search(r"rank [12] on", endings[0].stderr)


def test_one_rank_that_is_asked_to_stop_tells_all_others_before_they_meet(ranks):
    def body(context, ranks):
        if context.rank == 2:
            context.watch.stop_asked = "SIGUSR1"
        deadline = time.monotonic() + 30
        while context.watch.stop_asked is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert context.watch.stop_asked == "SIGUSR1"
        context.gather_rows(torch.ones(1))

    assert [ending.status for ending in ranks.run(body)] == [0] * WORLD, ranks.all_stderr()


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


def test_a_refusal_of_all_ranks_is_reported_once(ranks):
    def body(context, ranks):
        refusal = StopRequested("stopped by a test")
        refusal.shared = True
        time.sleep(0.3 * context.rank)  # the others leave at other times
        raise refusal

    endings = ranks.run(body)
    assert [ending.status for ending in endings] == [75] * WORLD
    assert ranks.all_stderr() == "topoflow: stopped by a test\n"


def test_connections_of_other_programs_are_closed(ranks):
    def body(context, ranks):
        if context.rank == 0:
            server = context.watch._connection.socket.getpeername()[:2]
            for words in (b"\n", b"wrong\n", b'{"token": "wrong", "rank": 1}\n', b"\xff" * 70000):
                with socket.create_connection(server) as stranger:
                    stranger.sendall(words)
                    stranger.settimeout(5)
                    if words.endswith(b"\n"):
                        assert not stranger.recv(1)  # closed by the server
        context.gather_rows(torch.ones(1))

    assert [ending.status for ending in ranks.run(body)] == [0] * WORLD, ranks.all_stderr()


# ---- before all ranks have met


def soon(seconds, do, *arguments):
    threading.Timer(seconds, do, arguments).start()


def test_a_rank_that_is_lost_before_all_have_arrived_is_named(ranks):
    def before(rank, ranks):
        if rank == 2:
            soon(1.5, is_killed, None, ranks)
        if rank == 3:
            os.kill(os.getpid(), signal.SIGSTOP)

    endings = ranks.run(before=before, stop_rank=3)
    assert [ending.status for ending in endings] == [5, 5, -signal.SIGKILL, -signal.SIGKILL]
    assert max(ending.seconds for ending in endings) < 5 + BUSY
    assert f"rank 2 on {HOST}: lost while rank 0 was in set-up" in endings[0].stderr


@pytest.mark.parametrize("missing", [0, 3])
def test_a_signal_ends_ranks_that_wait_for_others(ranks, missing):
    def before(rank, ranks):
        if rank == missing:
            os.kill(os.getpid(), signal.SIGSTOP)
        if rank == 1 or missing == 0:  # a rank that is connected to rank 0 tells all
            soon(1.5, lambda: (ranks.fault(), os.kill(os.getpid(), signal.SIGTERM)))

    endings = ranks.run(before=before, stop_rank=missing)
    assert {ending.status for rank, ending in enumerate(endings) if rank != missing} == {75}, ranks.all_stderr()
    assert max(ending.seconds for ending in endings) < 5 + BUSY
    assert "stopped by SIGTERM during set-up" in endings[1].stderr


def test_the_end_of_the_launcher_ends_ranks_that_wait_for_others(ranks):
    launcher = os.fork()
    if launcher == 0:
        ranks._fork(1, None, 60.0, False)
        time.sleep(1.5)
        os._exit(0)
    os.waitpid(launcher, 0)
    deadline, log = time.monotonic() + BUSY, ranks.folder / "rank1"
    while "its launcher" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert f"set-up: rank 1 on {HOST}: its launcher (process {launcher}) has ended" in log.read_text()


def test_a_rank_0_that_never_arrives_is_reported_within_the_limit_in_one_line(ranks, held_port):
    ranks.clock = ranks.folder / "fault"
    ranks.fault()
    endings = ranks.run(setup_seconds=LIMIT, absent=(0,), port=held_port)
    assert [ending.status for ending in endings] == [0, 5, 5, 5]
    assert max(ending.seconds for ending in endings) < LIMIT + 2 + BUSY
    where = f"no connection to rank 0 at 127.0.0.1:{held_port}"
    assert endings[1].stderr.startswith(f"topoflow: rank 1: set-up: rank 1 on {HOST}: {where}")
    assert endings[1].stderr.endswith(f"within {LIMIT:g} s\n")
    assert endings[1].stderr.count("\n") == 1


def test_ranks_meet_at_a_port_without_a_launchers_store(ranks, held_port):
    endings = ranks.run(lambda context, ranks: context.gather_rows(torch.ones(1)), port=held_port)
    assert [ending.status for ending in endings] == [0] * WORLD, ranks.all_stderr()


@pytest.mark.parametrize("words", [b"SSH-2.0-OpenSSH_9.2\r\n", b""])
def test_a_port_in_use_is_reported_at_once_by_all(ranks, words):
    ranks.clock = ranks.folder / "fault"
    ranks.fault()
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]

        def answer():
            while True:
                with suppress(OSError):
                    connection, _ = stranger.accept()
                    connection.sendall(words)
                    connection.recv(4096)
                    connection.close()

        pid = os.fork()
        if pid == 0:
            answer()
        endings = ranks.run(port=port)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert [ending.status for ending in endings] == [2, 5, 5, 5]
    assert max(ending.seconds for ending in endings) < 2 + BUSY
    assert f"rank 0 cannot listen on port {port} of {HOST} (Address already in use)" in endings[0].stderr
    assert f"the program that listens at 127.0.0.1:{port} is not rank 0 of this run" in endings[1].stderr


@pytest.mark.parametrize("numbers", [(0, 2, 2, 3), (0, 0, 2, 3)])
def test_two_processes_with_one_rank_end_all_and_both_are_named(ranks, numbers):
    endings = ranks.run(numbers=numbers)
    assert [ending.status for ending in endings] == [2] * WORLD, ranks.all_stderr()
    number = numbers[1]
    one = rf"rank {number} on {HOST} \(process \d+\)"
    both = f"{one} and {one} both have rank {number}"
    assert re.search(rf"topoflow: environment: {both}: expected one process per rank", endings[0].stderr)


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (("cuda A", "cuda B", "cuda C"), None),
        # one device visible to all tasks of a node: each takes it for its own
        (("cuda A", "cuda B", "cuda A"), "rank 0 on n1 (process 10) and rank 2 on n1 (process 12) both have device A"),
        (("cuda ", "cuda ", "cuda "), None),  # PyTorch cannot tell
        (("cuda A", "cpu ", "cuda B"), "run.device: cpu for rank 1 on n1 and cuda for rank 0 on n1"),
    ],
)
def test_a_device_of_two_ranks_and_devices_of_two_kinds_are_found(devices, words):
    peers = []
    for rank, device in enumerate(devices):
        kind, _, identity = device.partition(" ")
        peers.append(Peer(None, rank, host="n1", pid=10 + rank, device=kind, identity=identity))
    found = find_contradiction(peers)
    assert words in found if words else not found


# ---- after the run


@pytest.mark.parametrize(
    ("culprit", "fault", "statuses"),
    [(2, sleeps, [5, 0, 5, 0]), (0, sleeps, [5, 0, 0, 0]), (2, is_stopped, [5, 0, -signal.SIGKILL, 0])],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_process_that_does_not_exit_after_the_run_is_named_and_ended(ranks, culprit, fault, statuses):
    def after(rank, ranks):
        if rank == culprit:
            fault(None, ranks)

    stopped = culprit if fault is is_stopped else None
    endings = ranks.run(lambda context, ranks: None, after=after, stop_rank=stopped)
    assert [ending.status for ending in endings] == statuses
    assert LIMIT - 0.5 < max(ending.seconds for ending in endings) < LIMIT + 2 + BUSY
    words = f"topoflow: end of the run: the process of rank {culprit} on {HOST} did not exit within {LIMIT:g} s\n"
    assert words in endings[0].stderr


def test_rank_0_that_hangs_while_it_writes_what_the_others_have_scored_is_named(ranks):
    def body(context, ranks):
        context.watch.end_setup()
        context.watch.enter("evaluation")
        if context.rank == 0:
            sleeps(context, ranks)

    endings = ranks.run(body)
    assert [ending.status for ending in endings] == [5] * WORLD
    assert max(ending.seconds for ending in endings) < LIMIT + 2 + BUSY
    words = f"rank 0 on {HOST} (alive, in evaluation) did not arrive within {LIMIT:g} s"
    assert f"topoflow: end of the run: {words}\n" in endings[0].stderr


def test_a_rank_that_hangs_when_it_leaves_the_process_group_is_named(ranks):
    def body(context, ranks):
        context.watch.end_setup()
        if context.rank == 2:
            torch.distributed.destroy_process_group = lambda: sleeps(context, ranks)

    endings = ranks.run(body)
    assert [ending.status for ending in endings] == [5] * WORLD
    assert max(ending.seconds for ending in endings) < LIMIT + 2 + BUSY
    words = f"rank 2 on {HOST} (alive, in end of the run (leaving the process group)) did not arrive within {LIMIT:g} s"
    assert f"topoflow: end of the run: {words}\n" in endings[0].stderr
    assert "threads were in:" in endings[2].stderr
    assert "in sleeps" in endings[2].stderr


def test_a_rank_0_that_stalled_and_resumed_reports_itself(ranks):
    def body(context, ranks):
        train(context, lambda step: is_stopped(context, ranks) if (context.rank, step) == (0, 5) else None)

    endings = ranks.run(body, stop_rank=0, wake_after=LIMIT + 3)
    assert [ending.status for ending in endings] == [5] * WORLD
    assert "rank 0 on 127.0.0.1 (does not answer) did not arrive" in endings[0].stderr
    assert not re.search(r"rank [123] on", ranks.all_stderr())
