"""The watch that ranks keep on each other, over sockets of their own: no rank waits for one that will not come."""

import faulthandler
import json
import math
import os
import selectors
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from topoflow import errors
from topoflow.activity import Activity
from topoflow.errors import ConfigError, RanksDisagree, Refusal
from topoflow.launch import Launch
from topoflow.text import number_ranges, shorten


@dataclass(frozen=True)
class RankFailure:
    """The failure that ends all ranks: which rank, on which host, in which phase, and why, in words for the user."""

    message: str
    ranks: tuple[int, ...] = ()
    """Those at fault."""
    kind: str = RanksDisagree.__name__
    """Name of the refusal: of the one that a rank raised alone, else RanksDisagree."""
    is_stall: bool = False
    """Ranks hang, so they are given less time to end by themselves."""
    shared: bool = True
    """Rank 0 reports it for all. False: rank 0 cannot."""

    def refusal(self) -> Refusal:
        """Return the error that each rank raises."""
        return getattr(errors, self.kind)(self.message, shared=self.shared)

    def exit_status(self, is_own: bool) -> int:
        """Return the status of a process that the watch ends. is_own: the failure is that process's own."""
        is_crash = is_own and self.kind == RanksDisagree.__name__
        return 1 if is_crash else self.refusal().exit_status


def _lost(rank: int, host: str, observer: str) -> RankFailure:
    why = "its process ended without a word (killed, or out of memory)"
    return RankFailure(f"rank {rank} on {host}: lost while {observer}: {why}", (rank,))


def _name_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _silence_seconds(limit: float) -> float:
    """Return after how long without an answer a process counts as stopped or cut off."""
    return max(1.0, min(limit / 4, 10.0))


POLL_SECONDS = 0.4
"""How often ranks are asked for their state while one of them waits for long."""
LOOK_SECONDS = 0.2
LAST_WORDS_SECONDS = 1.0
ANSWER_SECONDS = 3.0
"""How long a rank that sees an error of its network waits to be told which rank failed."""
WELCOME_SECONDS = 30.0
WELCOME = b'{"welcome": true}\n'
_LONGEST_GREETING = 4096


@dataclass
class Peer:
    """Rank 0's view of one process: its connection and the last state that it sent."""

    connection: socket.socket
    rank: int = -1
    host: str = ""
    process: str = ""
    """`process 4242 on n1`."""
    device: str = ""
    """The kind: cpu or cuda."""
    identity: str = ""
    """What tells the device from all others; empty where sharing it is no mistake."""
    received: bytes = b""
    is_done: bool = False
    is_gone: bool = False
    state: dict[str, Any] = field(default_factory=dict)
    heard: float = 0.0
    """When its last message came, by this process's monotonic clock."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def waited(self) -> float:
        """Seconds for which it had waited for other ranks when it sent its state; -1: it did not wait."""
        return self.state.get("waited", -1.0)

    @property
    def idle(self) -> float:
        """Seconds without progress when it sent its state."""
        return self.state.get("idle", 0.0)

    def place(self) -> tuple[int, int]:
        """Return how far it is: collective operations reached, and progress since."""
        return self.state.get("reached", 0), self.state.get("ticks", 0)


class WatchServer:
    """A thread of rank 0 with a connection to every rank, its own process included.

    In normal operation nothing is sent: a rank that ends early is known by its closed connection. A rank that has
    waited for half of its limit sends its state, and then all are asked for theirs.

    Args:
        listener: a listening socket.
        token: the first word of each connection; others are closed.
        met: sent to all ranks as soon as all are connected and do not contradict each other.
        end_seconds: how long a rank may take from the end of the run to that of its process.
        phase: returns what rank 0 is doing.
    """

    def __init__(
        self,
        listener: socket.socket,
        world_size: int,
        token: str,
        met: dict[str, Any],
        end_seconds: float,
        phase: Callable[[], str],
    ):
        self.others_are_gone = threading.Event()
        self._listener, self._world_size, self._token, self._met = listener, world_size, token, met
        self._end_seconds, self._phase = end_seconds, phase
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, None)
        self._peers: list[Peer] = []
        self._failure: RankFailure | None = None
        self._stop_asked: str | None = None
        self._polled_since = self._polled = self._ended = None
        os.register_at_fork(after_in_child=self._close_sockets)
        threading.Thread(target=self._serve, name="watch server", daemon=True).start()

    def _close_sockets(self) -> None:
        """Close what a forked process (of a data loader) would keep open after this one has died."""
        for connection in (self._listener, *(peer.connection for peer in self._peers)):
            connection.close()

    def _serve(self) -> None:
        looked = time.monotonic()
        while True:
            for key, _ in self._selector.select(LOOK_SECONDS):
                if key.data is None:
                    self._accept()
                else:
                    self._receive(key.data)
            before, looked = looked, time.monotonic()
            if looked - before > 1 and self._polled_since is not None:
                self._polled_since = looked  # this process was stopped itself: the silence is its own
            if self._failure is not None:
                continue
            if self._ended is None:
                self._find_stalls(looked)
            else:
                self._find_late_exits(self._ended, looked)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone already, or no file can be opened: not again at once
            time.sleep(0.05)
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, Peer(connection))

    def _receive(self, peer: Peer) -> None:
        try:
            content = peer.connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            content = b""
        peer.received += content
        *lines, peer.received = peer.received.split(b"\n")
        if peer.rank < 0 and len(peer.received) > _LONGEST_GREETING:
            content, lines = b"", []  # a stranger
        for line in lines:
            if not self._handle(peer, line):
                content = b""
                break
        if content:
            return
        self._selector.unregister(peer.connection)
        peer.connection.close()
        peer.is_gone = True
        if peer.rank >= 0 and self._ended is None:
            self._declare(_lost(peer.rank, peer.host, f"rank 0 was in {self._phase()}"))

    def _handle(self, peer: Peer, line: bytes) -> bool:
        """Act on a line. Returns False for one that is not of this program."""
        is_new = peer.rank < 0
        if is_new:
            token, _, line = line.partition(b" ")
            if token != self._token.encode():
                return False
        try:
            message = json.loads(line)
        except ValueError:  # half a message, of a process that hangs: its connection is closed, and it is lost
            return False
        peer.heard = time.monotonic()
        if is_new:
            self._admit(peer, message)
        peer.state = message.get("state", peer.state)
        if "stop" in message and self._stop_asked is None:
            self._stop_asked = message["stop"]
            self._send_all({"stop": self._stop_asked})
        if "failed" in message:
            self._declare(RankFailure(**message["failed"]))
        if "done" in message:
            peer.is_done = True
            if len(self._peers) == self._world_size and all(peer.is_done for peer in self._peers):
                self._ended = time.monotonic()
                self._send_all({"all_done": True})
        return True

    def _admit(self, peer: Peer, greeting: dict[str, Any]) -> None:
        for name, value in greeting.items():
            setattr(peer, name, value)
        self._peers.append(peer)
        with suppress(OSError):
            peer.connection.send(WELCOME)
        if self._failure is not None:
            self._send(peer, {"failure": asdict(self._failure)})
        if self._stop_asked is not None:
            self._send(peer, {"stop": self._stop_asked})
        if len(self._peers) == self._world_size:
            contradiction = find_contradiction(self._peers)
            if contradiction:
                self._declare(RankFailure(contradiction, kind=ConfigError.__name__))
            self._send_all({"met": self._met})

    def has_all(self) -> bool:
        """Return whether all processes have come, whatever became of them."""
        return len(self._peers) >= self._world_size

    def _declare(self, failure: RankFailure) -> None:
        """End all ranks. The first failure counts: others are its consequence."""
        if self._failure is None:
            self._failure = failure
            self._send_all({"failure": asdict(failure)})

    def _send_all(self, message: dict[str, Any]) -> None:
        own = _name_process()
        for peer in sorted(self._peers, key=lambda peer: peer.process == own):  # last, because it may end this process
            self._send(peer, message)

    def _send(self, peer: Peer, message: dict[str, Any]) -> None:
        with suppress(OSError):  # gone, or stopped for so long that its buffers are full
            peer.connection.send(json.dumps(message).encode() + b"\n")

    def _find_stalls(self, now: float) -> None:
        waiting = [peer for peer in self._peers if peer.waited >= 0 and now - peer.heard < 2 * POLL_SECONDS]
        if not waiting:
            self._polled_since = self._polled = None
            return
        if self._polled_since is None:
            self._polled_since = now
        if self._polled is None or now - self._polled >= POLL_SECONDS:
            self._polled = now
            self._send_all({"poll": True})
        overdue = [peer for peer in waiting if peer.waited >= peer.state["limit"]]
        if overdue:
            self._judge(max(overdue, key=Peer.place), now, self._polled_since)

    def _judge(self, front: Peer, now: float, polled_since: float) -> None:
        """Name the ranks for which `front` waits in vain, unless they make progress."""
        limit = front.state["limit"]
        peers = {peer.rank: peer for peer in self._peers}
        missing = [rank for rank in range(self._world_size) if rank not in peers]
        late: dict[int, str] = {}
        on_their_way = False
        for rank, peer in sorted(peers.items()):
            if now - max(peer.heard, polled_since) > _silence_seconds(limit):
                late[rank] = f"{peer} (does not answer)"
            elif peer.place() < front.place() and peer.idle >= max(limit, peer.state.get("limit", limit)):
                late[rank] = f"{peer} (alive, in {peer.state['phase']})"
            else:
                on_their_way |= peer.place() < front.place() or peer.idle < limit
        where, names = front.state["phase"], [*late.values()]
        if missing:
            names.append(f"rank(s) {number_ranges(missing)} of {self._world_size}")
        if names:
            message = f"{where}: {shorten(names, 16)} did not arrive within {limit:g} s"
            self._declare(RankFailure(message, (*missing, *late), is_stall=bool(late)))
        elif not on_their_way:
            message = f"{where}: all ranks have waited for each other for {limit:g} s and all are there"
            expected = "expected a network between them that carries all they send"
            self._declare(RankFailure(f"{message}: {expected}", is_stall=True))

    def _find_late_exits(self, ended: float, now: float) -> None:
        """Name the ranks whose process does not end after the run. Rank 0's time begins when the others are gone."""
        alive = sorted((peer for peer in self._peers if not peer.is_gone), key=lambda peer: peer.rank)
        others = [peer for peer in alive if peer.rank > 0]
        if not others and not self.others_are_gone.is_set():
            ended = self._ended = now
            self.others_are_gone.set()
        if now - ended > self._end_seconds:
            names = shorten(others or alive, 16)
            message = f"end of the run: the process of {names} did not exit within {self._end_seconds:g} s"
            self._declare(RankFailure(message, tuple(peer.rank for peer in others or alive), is_stall=True))


def find_contradiction(peers: Iterable[Peer]) -> str:
    """Return one line on two processes with the same rank or device, or with devices of two kinds; empty if none."""
    by_rank: dict[int, Peer] = {}
    by_device: dict[str, Peer] = {}
    by_kind: dict[str, Peer] = {}
    for peer in sorted(peers, key=lambda peer: peer.rank):
        if peer.rank in by_rank:
            both = f"{by_rank[peer.rank].process} and {peer.process}"
            return f"environment: {both} both have rank {peer.rank}: expected one process per rank"
        by_rank[peer.rank] = peer
        named = f"rank {peer.rank} ({peer.process})"
        if peer.identity and peer.identity in by_device:
            other = by_device[peer.identity]
            both = f"rank {other.rank} ({other.process}) and {named}"
            return f"environment: {both} both use device {peer.identity}: expected one process per device"
        by_device[peer.identity] = peer
        by_kind.setdefault(peer.device, peer)
    if len(by_kind) > 1:
        found = [f"{kind} for rank {peer.rank} ({peer.process})" for kind, peer in sorted(by_kind.items())]
        return f"run.device: {' and '.join(found)}: expected the same kind on all ranks"
    return ""


class Watch(Activity):
    """One rank's connection to the watch server, and what ends this process when another rank fails.

    Args:
        setup_seconds, step_seconds: see `Activity`.
        on_forced_exit: called on rank 0 with status and message before the watch ends a process whose main thread does
            not end by itself. It may hang in a file system that is away, and hold the locks of logging, so this is
            called in a thread and waited for only briefly.
    """

    def __init__(
        self,
        launch: Launch,
        setup_seconds: float = math.inf,
        step_seconds: float = math.inf,
        on_forced_exit: Callable[[int, str], None] | None = None,
    ):
        super().__init__(setup_seconds, step_seconds)
        self.rank, self.host = launch.rank, socket.gethostname()
        self.failure: RankFailure | None = None
        self.met: dict[str, Any] = {}
        """What the server sent when all ranks had come; empty before."""
        self._reports_without_main = launch.rank == 1 or launch.local_rank == 0
        self._error_file, self._on_forced_exit = launch.error_file, on_forced_exit
        self._connection: socket.socket | None = None
        self._sending = threading.Lock()
        self._failed, self._all_done = threading.Event(), threading.Event()
        self._has_failed = False

    def connect(
        self,
        connection: socket.socket,
        address: str,
        token: str,
        device: str,
        identity: str,
        pause: Callable[[str], None],
    ) -> None:
        """Greet the server and wait for its welcome.

        Args: address, the name of rank 0's host; device, identity, see `Peer`; pause, called with the problem while
            the answer does not come, raises when that takes too long.

        Raises:
            RanksDisagree: another program answers.
        """
        connection.settimeout(LOOK_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # a loader's worker is a fork of this process: it must not keep the connection open when this has died
        os.register_at_fork(after_in_child=connection.close)
        greeting = {"rank": self.rank, "host": self.host, "device": device, "identity": identity}
        greeting["process"] = _name_process()
        self._address, self._connection = address, connection
        server = f"{address}:{connection.getpeername()[1]}"
        self._send(greeting, f"{token} ")
        received, deadline = b"", time.monotonic() + WELCOME_SECONDS
        while b"\n" not in received and time.monotonic() < deadline:
            try:
                content = connection.recv(65536)
            except TimeoutError:
                pause(f"no answer from rank 0 at {server}")
                continue
            except OSError:
                content = b""
            if not content:
                break
            received += content
        if not received.startswith(WELCOME):
            self._connection = None
            raise RanksDisagree(
                f"set-up: rank {self.rank} on {self.host}: the program that listens at {server} is not rank 0 of this "
                "run, or has ended: expected MASTER_PORT to be a free port"
            )
        threading.Thread(target=self._listen, args=(connection, received), name="watch", daemon=True).start()

    def ask_to_stop(self, signal_name: str) -> None:
        """Tell all ranks, before they meet this one, that it was asked to stop."""
        if self.stop_asked is None:
            self.stop_asked = signal_name
            self._send({"stop": signal_name})

    def raise_if_failed(self) -> None:
        """Raise the failure that ends all ranks, if there is one.

        Raises:
            Refusal: see `RankFailure.refusal`.
        """
        if self.failure is not None:
            raise self.failure.refusal()

    def finish(self) -> None:
        """Wait until all ranks are done.

        Raises:
            Refusal: one of them failed, or did not come.
        """
        self._limit = self._step_seconds
        with self.waiting():
            self._send({"done": True})
            self._all_done.wait()
        self.raise_if_failed()

    def attribute_failure(self, error: BaseException) -> RankFailure | None:
        """Return the failure of another rank that `error` follows from, or None if it is this rank's own.

        Its own is reported to the others. Where the error looks like the end of another rank, waits for word of that.
        """
        if self._connection is None:
            return None
        if _is_of_network(error):
            self._failed.wait(ANSWER_SECONDS)
        if self.failure is None:
            self._has_failed = True
            own = self._own_failure(error)
            self._write_error_file(own)
            self._send({"failed": asdict(own)})
            if self.rank == 0 and not isinstance(error, Refusal):  # of any other rank, rank 0 reports it
                _write_stderr(own.message)
            self._failed.wait(1.0)  # the server is a thread of rank 0: give it time to tell the others
            return None
        return None if self._has_failed else self.failure

    def _own_failure(self, error: BaseException) -> RankFailure:
        where = f"rank {self.rank} on {self.host}, {self.phase}"
        if isinstance(error, Refusal):
            return RankFailure(f"{where}: {error}", (self.rank,), type(error).__name__)
        first_line = (str(error).splitlines() or [""])[0]
        return RankFailure(f"{where}: {type(error).__name__}: {first_line}".removesuffix(": "), (self.rank,))

    def _send(self, message: dict[str, Any], prefix: str = "") -> None:
        assert self._connection is not None  # after `connect`
        with self._sending, suppress(OSError):  # the server is gone: the listening thread sees that too
            self._connection.sendall(f"{prefix}{json.dumps(message)}\n".encode())

    def _listen(self, connection: socket.socket, received: bytes) -> None:
        heard = time.monotonic()
        complained = complaining_since = None
        while self.failure is None:
            try:
                content = connection.recv(65536)
                received, heard = received + content, time.monotonic()
                is_closed = not content
            except TimeoutError:
                is_closed = False
            except OSError:
                is_closed = True
            *lines, received = received.split(b"\n")
            for line in lines:
                self._handle(json.loads(line))
            if is_closed and not self._all_done.is_set():
                self._conclude_alone(_lost(0, self._address, f"this rank was in {self.phase}"))
            if is_closed:
                return
            now, since = time.monotonic(), self._waiting_since
            if since is None or now - since < self._limit / 2:
                complained = complaining_since = None
                continue
            complaining_since = complaining_since or now
            if complained is None or now - complained >= POLL_SECONDS:
                complained = now
                self._send({"state": self.state()})
            silent = now - max(heard, complaining_since)
            if now - since >= self._limit + LOOK_SECONDS and silent > _silence_seconds(self._limit):
                late = f"rank 0 on {self._address} (does not answer)"
                message = f"{self.phase}: {late} did not arrive within {self._limit:g} s"
                self._conclude_alone(RankFailure(message, (0,), is_stall=True))

    def _handle(self, message: dict[str, Any]) -> None:
        if "failure" in message:
            self._conclude(RankFailure(**message["failure"]))
        elif "met" in message:
            self.met = message["met"]
        elif "all_done" in message:
            self._all_done.set()
        elif "stop" in message:
            self.stop_asked = message["stop"]
        elif "poll" in message:
            self._send({"state": self.state()})

    def _conclude_alone(self, failure: RankFailure) -> None:
        """End because of rank 0, which cannot report it: a few others do. It is told, in case that it wakes up."""
        if self.failure is None:
            self._send({"failed": asdict(failure)})
            self._conclude(replace(failure, shared=not self._reports_without_main))

    def _conclude(self, failure: RankFailure) -> None:
        if self.failure is not None:
            return
        self.failure = failure
        if not self._has_failed:
            self._write_error_file(failure)
        self._failed.set()
        self._all_done.set()
        threading.Thread(target=self._force_exit, args=(failure,), name="watch exit", daemon=True).start()

    def _force_exit(self, failure: RankFailure) -> None:
        """End the process, if it has not ended by itself soon."""
        time.sleep(0.4 if failure.is_stall else 3.0)
        status = failure.exit_status(self._has_failed)
        # stderr may be a file on the file system that is away
        report = threading.Thread(target=self._report_forced_exit, args=(failure, status), daemon=True)
        report.start()
        report.join(LAST_WORDS_SECONDS)
        os._exit(status)

    def _report_forced_exit(self, failure: RankFailure, status: int) -> None:
        if not self._has_failed and (self.rank == 0 or not failure.shared):
            _write_stderr(failure.message)
        if self.rank == 0 and self._on_forced_exit is not None:
            self._on_forced_exit(status, failure.message)
        if failure.is_stall and self.rank in failure.ranks and sys.stderr is not None:
            _write_stderr(f"rank {self.rank} is ended; its threads were in:")
            faulthandler.dump_traceback(file=2, all_threads=True)
        if failure.is_stall and torch.cuda.is_initialized():
            path = Path(tempfile.gettempdir()) / f"topoflow-flight-recorder-{self.rank}"
            c10d = torch._C._distributed_c10d  # pyright: ignore[reportAttributeAccessIssue]  (not in torch's stubs)
            path.write_bytes(c10d._dump_nccl_trace())

    def _write_error_file(self, failure: RankFailure) -> None:
        """Tell torchrun, whose report names the failure with the earliest time as the root cause."""
        if self._error_file is None:
            return
        # torchrun dates a rank that left no file (killed) by the moment at which it notices, so others come later
        moment = int(time.time()) + (0 if self.rank in failure.ranks else 60)
        record = {"message": failure.message, "extraInfo": {"timestamp": str(moment)}}
        with suppress(OSError):
            Path(self._error_file).write_text(json.dumps({"message": record}), encoding="utf-8")


def _write_stderr(message: str) -> None:
    """Write without the locks of `sys.stderr`, which a hanging main thread may hold. It may be closed."""
    with suppress(OSError):
        if sys.stderr is not None:
            os.write(2, f"topoflow: {message}\n".encode())


def _is_of_network(error: BaseException) -> bool:
    """Return whether an error may be what a rank sees when another has gone; gloo's are plain RuntimeErrors."""
    words = ("gloo", "nccl", "connection", "broken pipe", "timed out", "socket")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in text for w in words))
