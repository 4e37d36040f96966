"""Rank 0's side of the watch: who is connected, what each is doing, who has failed, and who does not arrive."""

import itertools
import math
import selectors
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from topoflow.activity import State
from topoflow.errors import ConfigError
from topoflow.text import number_ranges, shorten
from topoflow.watch import LOOK_SECONDS, Connection, RankFailure, Watch

ASKED_PER_LOOK = 80
"""Ranks asked for their state at once, at most: an answer costs rank 0 about 20 us, so this is below 1 % of a core."""


@dataclass(eq=False)
class Peer:
    """Rank 0's view of one process: its connection and the last state that it sent."""

    connection: Connection
    rank: int = -1
    """-1: it has not introduced itself."""
    host: str = ""
    pid: int = 0
    device: str = ""
    """The kind: cpu or cuda."""
    identity: str = ""
    """Identifies the device; empty if processes may share it."""
    is_done: bool = False
    state: State = field(default_factory=State)
    silent_looks: int = 0
    """Looks since it was asked for its state; 0: it has answered."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class WatchServer:
    """A thread of rank 0 with a connection to every rank, its own process included.

    A rank that ends early is known by its closed connection, and one that stalls by the states of all.

    Args:
        listener: a listening socket.
        token: what each process sends first; others are sent away.
        store_port: sent to all ranks as soon as all are connected and do not contradict each other.
        watch: of rank 0.
        end_seconds: how long a rank may take from the end of the run to that of its process.
    """

    def __init__(self, listener: socket.socket, token: str, store_port: int, watch: Watch, end_seconds: float):
        self._listener, self._token, self._store_port = listener, token, store_port
        self._watch, self._world_size, self._end_seconds = watch, watch.launch.world_size, end_seconds
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, None)
        self._peers: list[Peer] = []
        """Processes that have introduced themselves and are connected, by rank."""
        self._news: dict[str, Any] = {}
        """What all ranks are to know: store_port, stop_asked, failure, all_done, others_have_exited."""
        # Time is counted in looks, because the clock goes on while this process is stopped itself.
        self._exit_looks = 0
        """Looks since all ranks were done, or all others have exited."""

    def start(self) -> None:
        """Serve all ranks until this process ends."""
        threading.Thread(target=self._serve, name="watch server", daemon=True).start()

    def _serve(self) -> None:
        turns = math.ceil(self._world_size / ASKED_PER_LOOK)
        for look in itertools.count():
            due = time.monotonic() + LOOK_SECONDS
            while (seconds := due - time.monotonic()) > 0:
                for key, _ in self._selector.select(seconds):
                    if key.data is None:
                        self._accept()
                    else:
                        self._receive(key.data)
            if "failure" in self._news:
                continue
            if "all_done" in self._news:
                self._find_late_exits()
            else:
                self._find_stalls()
            self._ask(look % turns, turns)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has already closed, or no file can be opened: do not retry at once
            time.sleep(0.05)
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, Peer(Connection(connection)))

    def _receive(self, peer: Peer) -> None:
        """Act on the messages of a process; on its end, or if it is not of this run, close the connection."""
        messages = peer.connection.receive()
        if messages and peer.rank < 0:
            greeting, *messages = messages
            if greeting.pop("token", None) == self._token:
                self._admit(peer, greeting)
            else:
                messages = None
        for message in messages or ():
            self._handle(peer, message)
        if messages is None:
            self._selector.unregister(peer.connection.socket)
            peer.connection.socket.close()
            if peer in self._peers:
                self._peers.remove(peer)
                if "all_done" not in self._news:
                    self._declare(RankFailure.of_lost_rank(peer.rank, peer.host, f"rank 0 was in {self._watch.phase}"))

    def _admit(self, peer: Peer, greeting: dict[str, Any]) -> None:
        for name, value in greeting.items():
            setattr(peer, name, value)
        self._peers = sorted([*self._peers, peer], key=lambda peer: peer.rank)
        peer.connection.send(self._news)
        if len(self._peers) == self._world_size:
            if contradiction := find_contradiction(self._peers):
                self._declare(RankFailure(contradiction, kind=ConfigError.__name__))
            else:
                self._announce(store_port=self._store_port)

    def _handle(self, peer: Peer, report: dict[str, Any]) -> None:
        peer.state, peer.silent_looks = State(**report["state"]), 0
        if peer.state.stop_asked is not None and "stop_asked" not in self._news:
            self._announce(stop_asked=peer.state.stop_asked)
        if "failure" in report:
            self._declare(RankFailure(**report["failure"]))
        if "done" in report:
            peer.is_done = True
            if all(peer.is_done for peer in self._peers):
                self._announce(all_done=True)

    def _declare(self, failure: RankFailure) -> None:
        """End all ranks. The first failure counts: others are its consequence."""
        if "failure" not in self._news:
            self._announce(failure=asdict(failure))

    def _announce(self, **news: Any) -> None:
        """Send all ranks what is new, and what was before."""
        self._news |= news
        for peer in reversed(self._peers):  # rank 0 last, because it may end this process
            peer.connection.send(self._news)

    def _ask(self, turn: int, turns: int) -> None:
        """Ask ranks for their state, except those that have not answered: nothing piles up at one that is stopped."""
        for number, peer in enumerate(self._peers):
            if peer.silent_looks > 0:
                peer.silent_looks += 1
            elif number % turns == turn:
                peer.silent_looks = 1
                peer.connection.send(self._news)

    def _find_stalls(self) -> None:
        """Name the ranks for which another has waited too long, unless they make progress."""
        answers = [peer.state for peer in self._peers if peer.silent_looks == 0]  # others may be stopped themselves
        overdue = [state for state in answers if state.is_waiting and state.idle >= state.limit]
        if not overdue:
            return
        front = max(overdue, key=lambda state: state.reached)
        limit, longest_silence = front.limit, max(1.0, min(front.limit / 4, 10.0))
        late: dict[int, str] = {}
        on_their_way = False
        for peer in self._peers:
            is_behind = peer.state.reached < front.reached
            if peer.silent_looks * LOOK_SECONDS > longest_silence:
                late[peer.rank] = f"{peer} (does not answer)"
            elif is_behind and peer.state.idle >= max(limit, peer.state.limit):
                late[peer.rank] = f"{peer} (alive, in {peer.state.phase})"
            else:
                on_their_way |= is_behind or peer.state.idle < limit
        names = [*late.values()]
        if missing := sorted({*range(self._world_size)} - {peer.rank for peer in self._peers}):
            names.append(f"rank(s) {number_ranges(missing)} of {self._world_size}")
        if names:
            message = f"{front.phase}: {shorten(names, 16)} did not arrive within {limit:g} s"
            self._declare(RankFailure(message, (*missing, *late), is_stall=bool(late)))
        elif not on_their_way:
            message = f"{front.phase}: all ranks have waited for each other for {limit:g} s and all are alive"
            expected = "expected a network that delivers all messages between them"
            self._declare(RankFailure(f"{message}: {expected}", is_stall=True))

    def _find_late_exits(self) -> None:
        """Name the ranks whose process does not end after the run. Rank 0's time starts when the others have ended."""
        self._exit_looks += 1
        others = [peer for peer in self._peers if peer.rank > 0]
        if not others and "others_have_exited" not in self._news:
            self._exit_looks = 0
            self._announce(others_have_exited=True)
        if self._exit_looks * LOOK_SECONDS > self._end_seconds:
            late = others or self._peers
            message = f"end of the run: the process of {shorten(late, 16)} did not exit within {self._end_seconds:g} s"
            self._declare(RankFailure(message, tuple(peer.rank for peer in late), is_stall=True))


def find_contradiction(peers: Iterable[Peer]) -> str:
    """Return one line on two of `peers`, in the order of ranks, with the same rank or device, or with devices of two
    kinds; empty if none.
    """
    first: dict[tuple[str, str | int], Peer] = {}
    first_of_kind: dict[str, Peer] = {}
    for peer in peers:
        for noun, value in (("rank", peer.rank), ("device", peer.identity)):
            other = first.setdefault((noun, value), peer)
            if other is not peer and value != "":
                both = f"{other} (process {other.pid}) and {peer} (process {peer.pid})"
                return f"environment: {both} both have {noun} {value}: expected one process per {noun}"
        first_of_kind.setdefault(peer.device, peer)
    if len(first_of_kind) > 1:
        found = [f"{kind} for {peer}" for kind, peer in sorted(first_of_kind.items())]
        return f"run.device: {' and '.join(found)}: expected the same kind on all ranks"
    return ""
