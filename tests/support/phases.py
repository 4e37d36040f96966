"""Costs of each part of a run on one rank, recorded in the process itself, around the functions that train.py calls.

For each phase: elapsed seconds; CPU seconds of all threads; calls of collective operations by name; and bytes and
segments of all TCP sockets of the process together (gloo's, the store's, the watch's) as counted by the kernel. For the
whole run: how often it opened files of a checkpoint and of prepared data for reading.
"""

import collections
import contextlib
import functools
import json
import os
import resource
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

import train
from topoflow.resume import Resume
from topoflow.trainer import Trainer

PHASES = {
    "distributed_context": "rendezvous",
    "read_start": "reading the checkpoint",
    "open_data": "data",
    "build_normalization": "normalization",
    "build_state": "model",
    "verify_ranks": "verification",
    "build_reduction": "reduction",
}
"""Functions of train.py, and the phase that their time counts for."""

STEP, VALIDATION, WHOLE = "step", "validation", "whole run"
METHODS = {
    "restore": (Resume, "restore"),
    "proof": (Resume, "prove"),
    STEP: (Trainer, "train_step"),
    VALIDATION: (Trainer, "validate"),
}

_COLLECTIVES = (
    "all_gather",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "recv",
    "recv_object_list",
    "send",
    "send_object_list",
)
_TCP_INFO = struct.Struct("=104x2Q2Q6I")
"""Of struct tcp_info (linux/tcp.h): two rates, bytes_acked, bytes_received, segs_out, segs_in, and four more."""


class PhaseRecorder:
    """Records the costs of phases in this process, and writes them to a file when the run ends."""

    def __init__(self, file: Path):
        self.file = file
        self.phases: list[dict[str, Any]] = []
        self.collectives: collections.Counter = collections.Counter()
        self.opens: collections.Counter = collections.Counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the costs inside the block."""
        calls, traffic = self.collectives.copy(), _traffic()
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            after = _traffic()
            self.phases.append(
                {
                    "phase": name,
                    "seconds": wall,
                    "cpu_seconds": cpu,
                    "collectives": dict(self.collectives - calls),
                    **{key: after[key] - traffic[key] for key in after},
                }
            )

    def record(self, owner: Any, function: str, name: str) -> None:
        """Make each call of a function of `owner` a phase; for a context manager, only its entry."""
        whole = getattr(owner, function)

        @functools.wraps(whole)
        def recorded(*arguments: Any, **options: Any) -> Any:
            with self.phase(name):
                return whole(*arguments, **options)

        @contextlib.contextmanager
        def entered(*arguments: Any, **options: Any) -> Iterator[Any]:
            with contextlib.ExitStack() as stack:
                with self.phase(name):
                    value = stack.enter_context(whole(*arguments, **options))
                yield value

        setattr(owner, function, entered if function == "distributed_context" else recorded)

    def count(self, name: str) -> None:
        """Count the calls of a collective operation."""
        operation = getattr(dist, name)

        @functools.wraps(operation)
        def counted(*arguments: Any, **options: Any) -> Any:
            self.collectives[name] += 1
            return operation(*arguments, **options)

        setattr(dist, name, counted)

    def note_opens(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count files opened for reading, whether they exist or not; an audit hook."""
        if event != "open" or not isinstance(arguments[0], str | os.PathLike):
            return
        path, mode, flags = arguments
        if "r" in mode if mode is not None else flags & os.O_ACCMODE == os.O_RDONLY:
            name = os.path.basename(os.fspath(path))
            if name == "state.pt":
                self.opens["checkpoint"] += 1
            elif name == "static.npz" or name.startswith("days_"):
                self.opens["metadata"] += 1
            elif name.startswith("fields_"):
                self.opens["fields"] += 1

    def write(self) -> None:
        """Write the file: a list of phases, and then the totals of the process."""
        whole = {"open_files": len(os.listdir("/proc/self/fd")), "opens": dict(self.opens)}
        peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.phases.append({"phase": WHOLE, "peak_bytes": peak_bytes, **whole})
        self.file.write_text(json.dumps(self.phases))


def record_phases(folder: Path) -> None:
    """Record the phases of this process in `folder`, in a file named by its rank; call before training."""
    recorder = PhaseRecorder(folder / f"rank-{train.read_launch().rank}.json")
    for function, name in PHASES.items():
        recorder.record(train, function, name)
    for name, (owner, method) in METHODS.items():
        recorder.record(owner, method, name)
    for name in _COLLECTIVES:
        recorder.count(name)
    sys.addaudithook(recorder.note_opens)
    train.train = _and_then(train.train, recorder.write)


def _and_then(function: Callable[..., None], afterwards: Callable[[], None]) -> Callable[..., None]:
    def both(*arguments: Any) -> None:
        function(*arguments)
        afterwards()

    return both


def _traffic() -> dict[str, int]:
    """Return bytes and segments of all TCP sockets of this process since they were opened."""
    totals = {"bytes_sent": 0, "bytes_received": 0, "segments_sent": 0}
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(descriptor)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(descriptor))) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        except OSError:  # gone
            continue
        _, _, acknowledged, received, *_, segments_with_data = _TCP_INFO.unpack(info)
        totals["bytes_sent"] += acknowledged
        totals["bytes_received"] += received
        totals["segments_sent"] += segments_with_data
    return totals
