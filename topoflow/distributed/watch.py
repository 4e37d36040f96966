"""The watch that ranks keep on each other, beside the collectives: none waits for one that will not come.

A rank that raises says so to rank 0's hub, one that dies is known by its closed connection, one that stalls by the
time for which others have waited for it. The hub names the first, and every rank ends with that message: in its main
thread if that can, else from the watch's own thread, whatever the main thread hangs in.
"""

import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from topoflow.distributed.hub import POLL_SECONDS, silence_of, stall
from topoflow.distributed.launch import Launch
from topoflow.distributed.verdict import Verdict, verdict_on_error, verdict_on_loss
from topoflow.errors import Refusal
from topoflow.start_clock import StartClock

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
