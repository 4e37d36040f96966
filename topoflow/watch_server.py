"""Rank 0's side of the watch: who is connected, what each is doing, who has failed, and who does not arrive."""

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
from topoflow.watch import LOOK_SECONDS, Connection, RankFailure, Watch, beat_seconds, silence_seconds


@dataclass
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
    is_gone: bool = False
    state: State = field(default_factory=State)
    asked_since: float | None = None
    """When it was asked for its state, if it has not answered."""

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
        self.others_are_gone = threading.Event()
        self._listener, self._token, self._store_port = listener, token, store_port
        self._watch, self._world_size, self._end_seconds = watch, watch.launch.world_size, end_seconds
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, None)
        self._peers: list[Peer] = []
        self._news: dict[str, Any] = {}
        """What all ranks are to know: store_port, stop_asked, failure, all_done."""
        self._ended: float | None = None
        threading.Thread(target=self._serve, name="watch server", daemon=True).start()

    def has_all(self) -> bool:
        """Return whether all processes have connected, even if some have ended since."""
        return len(self._peers) >= self._world_size

    def _serve(self) -> None:
        looked = asked = time.monotonic()
        while True:
            for key, _ in self._selector.select(LOOK_SECONDS):
                if key.data is None:
                    self._accept()
                else:
                    self._receive(key.data)
            before, now = looked, time.monotonic()
            if now - looked < LOOK_SECONDS or "failure" in self._news:
                continue
            looked = now
            if self._ended is not None:
                self._find_late_exits(self._ended, now)
                continue
            if now - before < 1:  # else this process was stopped itself, and hears the others first
                self._find_stalls(now)
            if now - asked >= beat_seconds(self._world_size):
                asked = now
                self._ask_all(now)

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
            peer.is_gone = True
            if peer.rank >= 0 and self._ended is None:
                self._declare(RankFailure.of_lost_rank(peer.rank, peer.host, f"rank 0 was in {self._watch.phase}"))

    def _admit(self, peer: Peer, greeting: dict[str, Any]) -> None:
        for name, value in greeting.items():
            setattr(peer, name, value)
        self._peers.append(peer)
        peer.connection.send(self._news)
        if len(self._peers) == self._world_size:
            if contradiction := find_contradiction(self._peers):
                self._declare(RankFailure(contradiction, kind=ConfigError.__name__))
            else:
                self._announce(store_port=self._store_port)

    def _handle(self, peer: Peer, report: dict[str, Any]) -> None:
        peer.state, peer.asked_since = State(**report["state"]), None
        if peer.state.stop_asked is not None and "stop_asked" not in self._news:
            self._announce(stop_asked=peer.state.stop_asked)
        if "failure" in report:
            self._declare(RankFailure(**report["failure"]))
        if "done" in report:
            peer.is_done = True
            if self.has_all() and all(peer.is_done for peer in self._peers):
                self._ended = time.monotonic()
                self._announce(all_done=True)

    def _declare(self, failure: RankFailure) -> None:
        """End all ranks. The first failure counts: others are its consequence."""
        if "failure" not in self._news:
            self._announce(failure=asdict(failure))

    def _announce(self, **news: Any) -> None:
        """Send all ranks what is new, and what was before."""
        self._news |= news
        # rank 0 last, because it may end this process
        for peer in sorted(self._peers, key=lambda peer: peer.rank, reverse=True):
            peer.connection.send(self._news)

    def _ask_all(self, now: float) -> None:
        """Ask for the state of each rank that has answered before, so that nothing piles up at one that is stopped."""
        for peer in self._peers:
            if peer.asked_since is None:
                peer.asked_since = now
                peer.connection.send(self._news)

    def _find_stalls(self, now: float) -> None:
        """Judge for the rank that is furthest of those whose limit is over, of which none is stopped itself."""
        overdue = [peer for peer in self._peers if peer.state.waited >= peer.state.limit and peer.asked_since is None]
        if overdue:
            self._judge(max((peer.state for peer in overdue), key=lambda state: state.place), now)

    def _judge(self, front: State, now: float) -> None:
        """Name the ranks for which `front` has waited too long, unless they make progress."""
        limit, silence = front.limit, silence_seconds(front.limit, self._world_size)
        peers = {peer.rank: peer for peer in self._peers}
        missing = [rank for rank in range(self._world_size) if rank not in peers]
        late: dict[int, str] = {}
        on_their_way = False
        for rank, peer in sorted(peers.items()):
            is_behind = peer.state.place < front.place
            if peer.asked_since is not None and now - peer.asked_since > silence:
                late[rank] = f"{peer} (does not answer)"
            elif is_behind and peer.state.idle >= max(limit, peer.state.limit):
                late[rank] = f"{peer} (alive, in {peer.state.phase})"
            else:
                on_their_way |= is_behind or peer.state.idle < limit
        names = [*late.values()]
        if missing:
            names.append(f"rank(s) {number_ranges(missing)} of {self._world_size}")
        if names:
            message = f"{front.phase}: {shorten(names, 16)} did not arrive within {limit:g} s"
            self._declare(RankFailure(message, (*missing, *late), is_stall=bool(late)))
        elif not on_their_way:
            message = f"{front.phase}: all ranks have waited for each other for {limit:g} s and all are alive"
            expected = "expected a network that delivers all messages between them"
            self._declare(RankFailure(f"{message}: {expected}", is_stall=True))

    def _find_late_exits(self, ended: float, now: float) -> None:
        """Name the ranks whose process does not end after the run. Rank 0's time starts when the others have ended."""
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
    first: dict[tuple[str, str | int], Peer] = {}
    first_of_kind: dict[str, Peer] = {}
    for peer in sorted(peers, key=lambda peer: peer.rank):
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
