"""Who holds a run directory, as the lease file says it: which process, of which job, and whether it lives."""

import dataclasses
import json
import os
import socket
import subprocess
from pathlib import Path

PROC = Path("/proc")


@dataclasses.dataclass(frozen=True)
class Holder:
    """One state of the lease. All of it is for comparing with `==`; `since` is for people alone."""

    generation: int
    """One more each time that the lease is taken."""
    token: str
    """Drawn at random when the lease was taken."""
    beat: int
    """Grows by one every few seconds while the holder lives."""
    seconds: int | float
    """A holder elsewhere whose `beat` stood still for so long counts as gone."""
    released: bool
    """The holder has ended in an orderly way."""
    host: str
    boot: str
    """Linux: id of the machine's start. Empty where the system has none."""
    pid_namespace: str
    """Linux: what a process number is relative to (a container may have its own). Empty where the system has none."""
    pid: int
    started: str
    """When the process was started, in words of the system: numbers of processes are used again. Empty: unknown."""
    job: str | None
    """Number of the batch job."""
    restart: int
    """How many times the job had been put back into the queue."""
    since: str
    """When the lease was taken, by the holder's clock."""

    def __str__(self) -> str:
        """`process 4242 on n1 (job 17, restart 1) since 2026-01-31 12:00:00 UTC`."""
        job = f" (job {self.job}, restart {self.restart})" if self.job is not None else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"

    def to_bytes(self) -> bytes:
        """As it stands in the file."""
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    def is_here(self) -> bool:
        """Whether its process number means something to this process."""
        return (self.host, self.boot, self.pid_namespace) == whereabouts()

    def is_gone(self) -> bool:
        """Whether its process has ended (a zombie has), for a holder that `is_here`."""
        now = process_start(self.pid)
        has_another_start = bool(now and self.started) and now != self.started  # the number is another process's now
        return now is None or has_another_start


def parse_holder(content: bytes | None) -> Holder | None:
    """What a lease file says; None if it is damaged, or not there (content None)."""
    try:
        holder = Holder(**json.loads(content or b""))
    except (ValueError, TypeError):
        return None
    typed = all(isinstance(getattr(holder, field.name), field.type) for field in dataclasses.fields(Holder))
    return holder if typed and 0 < holder.pid < 2**31 and 0 < holder.seconds <= 3600 else None


def whereabouts() -> tuple[str, str, str]:
    """Host, id of its start, and namespace of process numbers, as a `Holder` has them."""
    try:
        boot, namespace = (PROC / "sys/kernel/random/boot_id").read_text().strip(), os.readlink(PROC / "self/ns/pid")
    except OSError:  # not Linux
        boot = namespace = ""
    return socket.gethostname(), boot, namespace


def process_start(pid: int) -> str | None:
    """When a process of this machine was started, in words of the system; None: it is gone; empty: not to be seen."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # another user's, and alive
    if (PROC / "self/stat").exists():
        try:
            state, *numbers = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # hidden from this user (hidepid)
            return ""
        return None if state in "ZX" else numbers[18]  # field 22: clock ticks since the machine's start
    command = ["/bin/ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)]
    said = subprocess.run(command, env={"LC_ALL": "C", "TZ": "UTC"}, capture_output=True, text=True).stdout
    state, _, start = said.strip().partition(" ")
    return None if state.startswith("Z") else start.strip()
