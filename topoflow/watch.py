"""The watch that ranks keep on each other, beside the collectives: none waits for one that will not come."""

import json
import math
import os
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from topoflow import errors
from topoflow.errors import RanksDisagree, Refusal
from topoflow.launch import Launch

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


@dataclass(frozen=True)
class Verdict:
    """What all ranks end with, in the words that the user reads: which rank, on which host, in which phase, and why."""

    message: str
    kind: str = RanksDisagree.__name__
    """Name of the refusal: that of a rank which refused something that the others did not see, else RanksDisagree."""
    grace_seconds: float = 3.0
    """How long a rank may take to end by itself."""
    shared: bool = True
    """Rank 0 says it for all. False: rank 0 cannot."""

    def refusal(self) -> Refusal:
        """As an error that every rank raises alike."""
        refusal = getattr(errors, self.kind)(self.message)
        refusal.shared = self.shared
        return refusal

    def exit_status(self, has_failed: bool) -> int:
        """That of a process which the watch ends. has_failed: it is the one that the verdict is on."""
        is_crash = has_failed and self.kind == RanksDisagree.__name__
        return 1 if is_crash else self.refusal().exit_status

    def to_dict(self) -> dict[str, Any]:
        """For the wire."""
        return asdict(self)


def verdict_on_error(error: BaseException, who: str) -> Verdict:
    """What a rank says of an error of its own. who: rank, host and phase."""
    if isinstance(error, Refusal):
        return Verdict(f"{who}: {error}", type(error).__name__)
    first_line = (str(error).splitlines() or [""])[0]
    return Verdict(f"{who}: {type(error).__name__}: {first_line}".removesuffix(": "))


def verdict_on_loss(who: str, observer: str) -> Verdict:
    """A rank whose connection was closed before it said that it was done. observer: a rank and its phase."""
    return Verdict(f"{who}: lost while {observer}: its process ended without a word (killed, or out of memory)")


POLL_SECONDS = 0.4
"""How often ranks are asked where they are, while one of them waits for long."""
LOOK_SECONDS = 0.2
_LONGEST_GREETING = 4096


@dataclass
class Peer:
    """One rank's connection, and what it last said."""

    connection: socket.socket
    rank: int = -1
    host: str = ""
    received: bytes = b""
    left: bool = False
    state: dict[str, Any] = field(default_factory=dict)
    heard: float = 0.0
    """When it last said anything, by this process's monotonic clock."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def waited(self) -> float:
        """Seconds for which it had waited in a collective operation when it spoke; -1: it did not wait."""
        return self.state.get("waited", -1.0)

    @property
    def idle(self) -> float:
        """Seconds that had gone by without progress when it spoke."""
        return self.state.get("idle", 0.0)

    def place(self) -> tuple[int, int]:
        """How far it is: collective operations reached, and signs of progress since."""
        return self.state.get("reached", 0), self.state.get("ticks", 0)


class Hub:
    """Accepts a connection from every rank, this process's own too, in a thread of rank 0.

    While all is well nothing is sent: a rank that ends without a goodbye is known by its closed connection. Once a rank
    has waited for half of its time limit in a collective operation it says so, and all are asked where they are.

    Args:
        token: what a connection must begin with, so that no stranger is heard.
        phase: says what rank 0 is doing.
    """

    def __init__(self, world_size: int, token: str, phase: Callable[[], str]):
        self.world_size, self.token, self._phase = world_size, token, phase
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=world_size + 8, dualstack_ipv6=dual)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._peers: dict[int, Peer] = {}
        self._verdict: Verdict | None = None
        self._stop_asked: str | None = None
        self._polled_since = self._polled = None
        self._closing = threading.Event()
        os.register_at_fork(after_in_child=self._close_sockets)
        self._thread = threading.Thread(target=self._serve, name="watch hub", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Say goodbye to ranks that are still there; they go on unwatched."""
        self._closing.set()
        self._thread.join()

    def _close_sockets(self) -> None:
        for connection in (self._listener, *(peer.connection for peer in self._peers.values())):
            connection.close()

    def _serve(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select(LOOK_SECONDS):
                if key.data is None:
                    self._accept()
                else:
                    self._hear(key.data)
            if self._verdict is None:
                self._look_for_stalls(time.monotonic())
        self._send_all({"bye": True})
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone already, or no file can be opened: not at once again
            time.sleep(0.05)
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, Peer(connection))

    def _hear(self, peer: Peer) -> None:
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
            if not self._understand(peer, line):
                content = b""
                break
        if content:
            return
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if peer.rank >= 0 and not peer.left:
            self._declare(verdict_on_loss(str(peer), f"rank 0 was in {self._phase()}"))

    def _understand(self, peer: Peer, line: bytes) -> bool:
        """Act on a line; False: it is not one of ours."""
        if peer.rank < 0:
            token, _, line = line.partition(b" ")
            if token != self.token.encode():
                return False
        try:
            said = json.loads(line)
        except ValueError:  # half a message, of a process that hangs: its connection is closed, and it is lost
            return False
        if peer.rank < 0:
            peer.rank, peer.host = said["rank"], said["host"]
            self._peers[peer.rank] = peer
            if self._verdict is not None:
                self._send(peer, {"verdict": self._verdict.to_dict()})
            if self._stop_asked is not None:
                self._send(peer, {"stop": self._stop_asked})
        peer.heard = time.monotonic()
        peer.state = said.get("state", peer.state)
        peer.left = peer.left or "bye" in said
        if "stop" in said:
            self._stop_asked = said["stop"]
            self._send_all({"stop": self._stop_asked})
        if "failed" in said:
            self._declare(Verdict(**said["failed"]))
        return True

    def _declare(self, verdict: Verdict) -> None:
        """The first word counts: what follows a failure is its consequence."""
        if self._verdict is None:
            self._verdict = verdict
            self._send_all({"verdict": verdict.to_dict()})

    def _send_all(self, message: dict[str, Any]) -> None:
        for peer in self._peers.values():
            self._send(peer, message)

    def _send(self, peer: Peer, message: dict[str, Any]) -> None:
        with suppress(OSError):  # gone, or stopped for so long that its buffers are full
            peer.connection.send(json.dumps(message).encode() + b"\n")

    # ---- who does not arrive

    def _look_for_stalls(self, now: float) -> None:
        waiting = [peer for peer in self._peers.values() if peer.waited >= 0 and now - peer.heard < 2 * POLL_SECONDS]
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
            self._judge(max(overdue, key=Peer.place), now)

    def _judge(self, front: Peer, now: float) -> None:
        """Name those for whom `front` waits in vain, unless they are on their way."""
        limit = front.state["limit"]
        late, on_their_way = [], False
        for rank in range(self.world_size):
            peer = self._peers.get(rank)
            if peer is None:
                late.append(f"rank {rank} (never came)")
            elif peer.left:
                continue
            elif now - max(peer.heard, self._polled_since) > silence_of(limit):
                late.append(f"{peer} (no sign of life for {now - peer.heard:.0f} s)")
            elif peer.place() < front.place() and peer.idle >= max(limit, peer.state.get("limit", limit)):
                late.append(f"{peer} (alive, in {peer.state['phase']})")
            else:
                on_their_way |= peer.place() < front.place() or peer.idle < limit
        if late:
            more = f" and {len(late) - 16} more" if len(late) > 16 else ""
            names = ", ".join(late[:16]) + more
            self._declare(stall(f"{front.state['phase']}: {names} did not arrive within {limit:g} s"))
        elif not on_their_way:
            where = f"{front.state['phase']}: all ranks have waited for each other for {limit:g} s and none is missing"
            self._declare(stall(f"{where}: expected a network between them that carries all they send"))


def stall(message: str) -> Verdict:
    """A verdict on ranks that wait in vain: they do not end by themselves, so they are given little time."""
    return Verdict(message, grace_seconds=0.4)


def silence_of(limit: float) -> float:
    """Seconds without an answer after which a process counts as stopped or cut off."""
    return max(1.0, min(limit / 4, 10.0))


def allow_connections(world_size: int) -> None:
    """Raise this process's limit of open files, as far as the system lets it: rank 0 has two sockets a rank, of the
    store and of the hub."""
    number = 2 * world_size + 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        most = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


LOOK_SECONDS = 0.2
LAST_WORDS_SECONDS = 1.0
ANSWER_SECONDS = 3.0
"""How long a rank that sees an error of its network waits to hear whose fault it was."""


class Watch:
    """What this process is doing, and its connection to the hub. Without `connect` (one process) it only keeps notes.

    Args:
        setup_seconds, step_seconds: how long a rank may wait for another without any progress of it: before the first
            step is done (which compiles, and fills caches), and from then on.
        last_words: called on rank 0 with status and message before the watch ends a process whose main thread does not
            end by itself. That may hang in a file system that is away, and hold the locks of logging, so this is called
            in a thread and not waited for.
    """

    def __init__(
        self,
        launch: Launch,
        setup_seconds: float = math.inf,
        step_seconds: float = math.inf,
        last_words: Callable[[int, str], None] | None = None,
    ):
        self.rank, self.host = launch.rank, socket.gethostname()
        self._speaks_without_main = launch.rank == 1 or launch.local_rank == 0
        self.verdict: Verdict | None = None
        self.stop_asked: str | None = None
        """The signal by which another rank was asked to stop, once it has said so."""
        self.clock: StartClock | None = None
        """Where there is one, it is told of each stage and part until the first step is done."""
        self._setup_seconds, self._step_seconds, self._last_words = setup_seconds, step_seconds, last_words
        self._limit = setup_seconds
        self._stage, self._detail = "set-up", ""
        self._reached = self._ticks = 0
        self._waiting_since: float | None = None
        self._progressed = time.monotonic()
        self._connection: socket.socket | None = None
        self._sending = threading.Lock()
        self._judged, self._goodbye = threading.Event(), threading.Event()
        self._has_left = False
        self._has_failed = False

    # ---- what this process is doing

    @property
    def phase(self) -> str:
        """`step 12 (loading data)`."""
        return f"{self._stage} ({self._detail})" if self._detail else self._stage

    def enter(self, stage: str, detail: str = "") -> None:
        """Begin a stage of the run, such as `step 12`."""
        self._stage, self._detail = stage, detail
        self._begin()

    def mark(self, detail: str) -> None:
        """Begin a part of the stage."""
        self._detail = detail
        self._begin()

    def _begin(self) -> None:
        if self.clock is not None:
            self.clock.begin(self._detail or self._stage)
        self.tick()

    def tick(self) -> None:
        """A sign of progress: others may wait for a slow rank as long as it gives these."""
        self._ticks += 1
        self._progressed = time.monotonic()

    def breathe(self) -> None:
        """Progress of another thread than the main one: the process is at work, but no further for the others."""
        self._progressed = time.monotonic()

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """Around what may compile, or wait for a disk, on this rank alone: the limit of the set-up holds for it."""
        before, self._limit = self._limit, max(self._limit, self._setup_seconds)
        try:
            yield
        finally:
            self._limit = before

    def end_setup(self) -> str | None:
        """The first step is done: from now on the limit of steps holds.

        Returns, the first time and if there is a clock, what the time until now went to.
        """
        self._limit = self._step_seconds
        clock, self.clock = self.clock, None
        return None if clock is None else clock.summary()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around whatever ends only when all ranks have come to it."""
        self._reached, self._ticks = self._reached + 1, 0
        self._progressed = self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None
            self.tick()

    # ---- the connection

    def connect(self, address: str, port: int, token: str) -> None:
        """Join the hub.

        Raises:
            OSError: it cannot be reached.
        """
        self._address = address
        self._connection = socket.create_connection((address, port), timeout=30)
        self._connection.settimeout(LOOK_SECONDS)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # a loader's worker is a fork of this process: it must not keep the connection open when this has died
        os.register_at_fork(after_in_child=self._connection.close)
        self._send({"rank": self.rank, "host": self.host}, f"{token} ")
        threading.Thread(target=self._listen, name="watch", daemon=True).start()

    def ask_to_stop(self, signal_name: str) -> None:
        """Let the others know, before they meet this rank, that it was asked to stop."""
        if self._connection is not None and self.stop_asked is None:
            self.stop_asked = signal_name
            self._send({"stop": signal_name})

    def leave(self) -> None:
        """This process is done, or refuses what all others refuse alike: nobody need wait for it, or look for it."""
        if self._connection is not None and self.verdict is None:
            self._has_left = True
            self._send({"bye": True})

    def await_goodbye(self) -> None:
        """Stay until rank 0 has left: a launcher that sees the first process end may give the others little time."""
        deadline = time.monotonic() + self._setup_seconds
        while self._connection is not None and self.verdict is None and time.monotonic() < deadline:
            if self._goodbye.wait(LOOK_SECONDS):
                return

    def explain(self, error: BaseException) -> Verdict | None:
        """Whose fault an error of this process is: the verdict on another rank, or None for its own, now reported.

        Where the error looks like the consequence of another rank's end, waits for word of that.
        """
        if self._connection is None:
            return None
        if _is_of_network(error):
            self._judged.wait(ANSWER_SECONDS)
        if self.verdict is None:
            self._has_failed = True
            own = verdict_on_error(error, f"rank {self.rank} on {self.host}, {self.phase}")
            self._send({"failed": own.to_dict()})
            if self.rank == 0 and not isinstance(error, Refusal):  # a rank 0 that goes on says it of any other
                os.write(2, f"topoflow: {own.message}\n".encode())
            self._judged.wait(1.0)  # on rank 0 the hub is a thread of this process: let it tell the others
            return None
        return None if self._has_failed else self.verdict

    def _send(self, message: dict[str, Any], prefix: str = "") -> None:
        with self._sending, suppress(OSError):  # the hub is gone: the listening thread sees that too
            self._connection.sendall(f"{prefix}{json.dumps(message)}\n".encode())

    def _listen(self) -> None:
        received, heard = b"", time.monotonic()
        complained = complaining_since = None
        while self.verdict is None and not self._goodbye.is_set():
            try:
                content = self._connection.recv(65536)
                received, heard = received + content, time.monotonic()
                is_closed = not content
            except TimeoutError:
                is_closed = False
            except OSError:
                is_closed = True
            *lines, received = received.split(b"\n")
            for line in lines:
                self._obey(json.loads(line))
            if is_closed and self._has_left:
                self._goodbye.set()
            elif is_closed and not self._goodbye.is_set():
                self._conclude_alone(verdict_on_loss(f"rank 0 on {self._address}", f"this rank was in {self.phase}"))
            now, since = time.monotonic(), self._waiting_since
            if since is None or now - since < self._limit / 2:
                complained = complaining_since = None
                continue
            complaining_since = complaining_since or now
            if complained is None or now - complained >= POLL_SECONDS:
                complained = now
                self._send({"state": self._state()})
            silent = now - max(heard, complaining_since)
            if now - since >= self._limit + LOOK_SECONDS and silent > silence_of(self._limit):
                who = f"rank 0 on {self._address} (no sign of life for {now - heard:.0f} s)"
                self._conclude_alone(stall(f"{self.phase}: {who} did not arrive within {self._limit:g} s"))

    def _obey(self, said: dict[str, Any]) -> None:
        if "verdict" in said:
            self._conclude(Verdict(**said["verdict"]))
        elif "bye" in said:
            self._goodbye.set()
        elif "stop" in said:
            self.stop_asked = said["stop"]
        elif "poll" in said:
            self._send({"state": self._state()})

    def _state(self) -> dict[str, Any]:
        now, since = time.monotonic(), self._waiting_since
        return {
            "phase": self.phase,
            "reached": self._reached,
            "ticks": self._ticks,
            "waited": -1.0 if since is None else now - since,
            "idle": now - self._progressed,
            "limit": self._limit if math.isfinite(self._limit) else 1e9,
        }

    def _conclude_alone(self, verdict: Verdict) -> None:
        """Rank 0 can say nothing: a few others do."""
        self._conclude(replace(verdict, shared=not self._speaks_without_main))

    def _conclude(self, verdict: Verdict) -> None:
        if self.verdict is not None:
            return
        self.verdict = verdict
        self._judged.set()
        threading.Thread(target=self._end_late, name="watch end", daemon=True).start()

    def _end_late(self) -> None:
        time.sleep(self.verdict.grace_seconds)
        status = self.verdict.exit_status(self._has_failed)
        # stderr may be a file on the file system that is away
        words = threading.Thread(target=self._say_last_words, args=(status,), daemon=True)
        words.start()
        words.join(LAST_WORDS_SECONDS)
        os._exit(status)

    def _say_last_words(self, status: int) -> None:
        if not self._has_failed and (self.rank == 0 or not self.verdict.shared):
            os.write(2, f"topoflow: {self.verdict.message}\n".encode())
        if self.rank == 0 and self._last_words is not None:
            self._last_words(status, self.verdict.message)


def _is_of_network(error: BaseException) -> bool:
    """Whether an error may be what a rank sees when another has gone; gloo's are plain RuntimeErrors."""
    words = ("gloo", "nccl", "connection", "broken pipe", "timed out", "socket")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in text for w in words))
