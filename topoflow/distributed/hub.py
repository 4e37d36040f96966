"""Rank 0's end of the watch: hears of ranks that fail, are lost or do not arrive, and tells all others."""

import json
import os
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from topoflow.distributed.verdict import Verdict, verdict_on_loss

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
