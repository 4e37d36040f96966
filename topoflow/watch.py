"""The watch that ranks keep on each other, over a connection of each to rank 0: a rank's side of it.

Rank 0 sends its news to all ranks a few times a second, and each answers with its state. Whoever fails reports it at
once. Rank 0 (`watch_server`) judges; a rank judges alone only when rank 0 is lost or does not answer.
"""

import faulthandler
import json
import math
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from topoflow import errors
from topoflow.activity import Activity
from topoflow.errors import RanksDisagree, Refusal
from topoflow.launch import Launch

LOOK_SECONDS = 0.2
"""How often a thread of the watch looks at what it knows."""
ANSWER_SECONDS = 3.0
"""How long a rank that sees a network error waits to be told which rank failed."""
_LONGEST_LINE = 2**20


class Connection:
    """A socket that carries messages: JSON objects, one per line."""

    def __init__(self, connection: socket.socket):
        self.socket, self._received = connection, b""
        self._sending = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that arrived, after at most the socket's timeout.

        None: the other process closed the connection, or is not one of this program.
        """
        try:
            content = self.socket.recv(65536)
            *lines, self._received = (self._received + content).split(b"\n")
            messages = [dict(json.loads(line)) for line in lines]
        except (BlockingIOError, TimeoutError):
            return []
        except (OSError, ValueError, TypeError):
            return None
        return messages if content and len(self._received) < _LONGEST_LINE else None

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. A process that is gone, or stopped for so long that its buffers are full, misses it."""
        with self._sending, suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")


@dataclass(frozen=True)
class RankFailure:
    """The failure that ends all ranks: which rank, on which host, in which phase, and why, for the user."""

    message: str
    ranks: tuple[int, ...] = ()
    """Ranks that failed."""
    kind: str = RanksDisagree.__name__
    """Class name of the refusal: that of the one a rank raised alone, else RanksDisagree."""
    is_stall: bool = False
    """Ranks hang, so they are given less time to end by themselves."""
    shared: bool = True
    """Rank 0 reports it for all. False: rank 0 cannot."""

    def refusal(self) -> Refusal:
        """Return the error that each rank raises."""
        return getattr(errors, self.kind)(self.message, shared=self.shared)

    @classmethod
    def of_lost_rank(cls, rank: int, host: str, observer: str) -> "RankFailure":
        """Return the failure of a rank whose connection closed without a report."""
        why = "its process ended without reporting an error (killed, or out of memory)"
        return cls(f"rank {rank} on {host}: lost while {observer}: {why}", (rank,))

    @classmethod
    def of_error(cls, rank: int, where: str, error: BaseException) -> "RankFailure":
        """Return the failure of a rank that raised `error`."""
        if isinstance(error, Refusal):
            return cls(f"{where}: {error}", (rank,), type(error).__name__)
        first_line = (str(error).splitlines() or [""])[0]
        return cls(f"{where}: {type(error).__name__}: {first_line}".removesuffix(": "), (rank,))


class Watch(Activity):
    """One rank's connection to the watch server, and what ends this process when another rank fails.

    Args:
        setup_seconds, step_seconds: see `Activity`.
        on_forced_exit: called on rank 0 with status and message before the watch ends a process whose main thread does
            not end by itself. That thread may hang in a file system that is away, and hold the locks of logging, so
            this may hang, too.
    """

    def __init__(
        self,
        launch: Launch,
        setup_seconds: float = math.inf,
        step_seconds: float = math.inf,
        on_forced_exit: Callable[[int, str], None] | None = None,
    ):
        super().__init__(setup_seconds, step_seconds)
        self.failure: RankFailure | None = None
        """What ends all ranks, as soon as this one knows."""
        self.store_port: int | None = None
        """Port of the store of rank 0, known when all ranks have connected."""
        self.launch, self._on_forced_exit = launch, on_forced_exit
        self._host = socket.gethostname()
        self._name = f"rank {launch.rank} on {self._host}"
        self._connection: Connection | None = None
        self._ended = threading.Event()
        """This process may end: see `finish`, or a rank has failed."""

    def connect(self, connection: socket.socket, port: int, token: str, device: str, identity: str) -> None:
        """Introduce this rank to the server, and answer it from now on. device, identity: see `Peer`."""
        connection.settimeout(LOOK_SECONDS)
        self._connection = Connection(connection)
        peer = {
            "rank": self.launch.rank,
            "host": self._host,
            "pid": os.getpid(),
            "device": device,
            "identity": identity,
        }
        self._connection.send({"token": token, **peer})
        threading.Thread(target=self._listen, args=(self._connection, port), name="watch", daemon=True).start()

    def raise_if_failed(self) -> None:
        """Raise the failure that ends all ranks, if there is one.

        Raises:
            Refusal: see `RankFailure.refusal`.
        """
        if self.failure is not None:
            raise self.failure.refusal()

    def finish(self) -> None:
        """Wait until all ranks are done, and on rank 0 until the processes of all others have ended.

        Raises:
            Refusal: one of them failed, did not arrive, or did not end.
        """
        self.end_setup()
        with self.waiting():
            self._report(done=True)
            self._ended.wait()
        self.raise_if_failed()

    def attribute_failure(self, error: BaseException) -> RankFailure | None:
        """Return the failure of another rank that caused `error`, or None if it is this rank's own.

        Its own is reported to the others. An error of the network may come before the news of the rank that caused it,
        so this waits for that.
        """
        if self._connection is None:
            return None
        if _is_network_error(error):
            self._ended.wait(ANSWER_SECONDS)
        if self.failure is not None:
            return self.failure
        own = RankFailure.of_error(self.launch.rank, f"{self._name}, {self.phase}", error)
        self._write_error_file(own)
        self._report(failure=asdict(own))
        if self.launch.is_main and not isinstance(error, Refusal):  # rank 0 reports failures of other ranks
            _write_stderr(own.message)
        self._ended.wait(1.0)  # the server is a thread of rank 0: give it time to tell the others
        return None

    def _report(self, **more: Any) -> None:
        assert self._connection is not None  # after `connect`
        self._connection.send({"state": vars(self.state()), **more})

    def _listen(self, connection: Connection, port: int) -> None:
        """Answer the server, and end this process if a rank has failed; if rank 0 cannot report that, judge alone."""
        address = self.launch.address
        failure, has_met, silence = None, False, 0.0
        while failure is None:
            messages = connection.receive()
            if messages:
                has_met, silence = True, 0.0
                failure = self._learn(messages[-1])
            elif self._ended.is_set():
                if messages is None:
                    return
            elif messages is not None:
                silence += LOOK_SECONDS  # not by a clock: this process may have been stopped itself
                if silence > self._limit + LOOK_SECONDS:  # rank 0 is the first to judge, if it can
                    late = f"rank 0 on {address} (does not answer)"
                    message = f"{self.phase}: {late} did not arrive within {self._limit:g} s"
                    failure = self._blame_rank_0(RankFailure(message, (0,), is_stall=True))
            elif has_met:
                failure = self._blame_rank_0(RankFailure.of_lost_rank(0, address, f"this rank was in {self.phase}"))
            else:
                problem = f"the program that listens at {address}:{port} is not rank 0 of this run, or has ended"
                message = f"set-up: {self._name}: {problem}: expected MASTER_PORT to be a free port"
                failure = self._blame_rank_0(RankFailure(message))
        self._end(failure)

    def _learn(self, news: dict[str, Any]) -> RankFailure | None:
        """Act on what the server knows, and answer; return the failure that ends all ranks, if there is one."""
        self.store_port = news.get("store_port")
        self.stop_asked = self.stop_asked or news.get("stop_asked")
        if "failure" in news:
            return RankFailure(**news["failure"])
        if news.get("others_have_exited" if self.launch.is_main else "all_done"):
            self._ended.set()
        else:
            self._report()
        return None

    def _blame_rank_0(self, failure: RankFailure) -> RankFailure:
        """Return a failure that a few other ranks report. Tell rank 0, in case it wakes up."""
        self._report(failure=asdict(failure))
        is_reporter = self.launch.rank == 1 or self.launch.local_rank == 0
        return replace(failure, shared=not is_reporter)

    def _end(self, failure: RankFailure) -> None:
        """Tell the main thread, and end the process unless it ends by itself soon."""
        is_culprit = self.launch.rank in failure.ranks
        is_crash = is_culprit and not failure.is_stall and failure.kind == RanksDisagree.__name__
        status = 1 if is_crash else failure.refusal().exit_status
        seconds = 0.4 if failure.is_stall else 3.0
        # the files and stderr that are written below may be on a file system that hangs
        deadline = threading.Timer(seconds + 1.0, os._exit, (status,))
        deadline.daemon = True
        deadline.start()
        self._write_error_file(failure)
        self.failure = failure
        self._ended.set()
        time.sleep(seconds)
        if self.launch.is_main or not failure.shared:
            _write_stderr(failure.message)
        if self.launch.is_main and self._on_forced_exit is not None:
            self._on_forced_exit(status, failure.message)
        if failure.is_stall and is_culprit:
            _write_stderr(f"rank {self.launch.rank} is ended; its threads were in:", with_stacks=True)
        if failure.is_stall and torch.cuda.is_initialized():
            path = Path(tempfile.gettempdir()) / f"topoflow-flight-recorder-{self.launch.rank}"
            c10d = torch._C._distributed_c10d  # pyright: ignore[reportAttributeAccessIssue]  (not in torch's stubs)
            path.write_bytes(c10d._dump_nccl_trace())
        os._exit(status)

    def _write_error_file(self, failure: RankFailure) -> None:
        """Tell torchrun, whose report names the failure with the earliest time as the root cause."""
        if self.launch.error_file is None:
            return
        # torchrun dates a rank that wrote no file (killed) by the time at which it notices, so others must be later
        moment = int(time.time()) + (0 if self.launch.rank in failure.ranks else 60)
        record = {"message": failure.message, "extraInfo": {"timestamp": str(moment)}}
        with suppress(OSError):
            Path(self.launch.error_file).write_text(json.dumps({"message": record}), encoding="utf-8")


def _write_stderr(message: str, with_stacks: bool = False) -> None:
    """Write without the locks of `sys.stderr`, which a hanging main thread may hold."""
    if sys.stderr is None:  # closed when the program started: its number may be another file's
        return
    with suppress(OSError):
        os.write(2, f"topoflow: {message}\n".encode())
        if with_stacks:
            faulthandler.dump_traceback(file=2, all_threads=True)


def _is_network_error(error: BaseException) -> bool:
    """Return whether an error may be caused by the end of another rank; gloo raises plain RuntimeErrors."""
    words = ("gloo", "nccl", "connection", "broken pipe", "timed out", "socket")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in text for w in words))
