"""The lease of a run directory: RUN/.lease names the one process that may change it.

No lock is held, so nothing outlives a killed process. The file is changed in three moves: write a temporary file,
check that the lease still has the expected content, rename. Whoever takes the lease then removes all other temporary
files. A process that is stopped between its check and its rename therefore has nothing left to rename when it wakes.
"""

import dataclasses
import errno
import json
import logging
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import get_type_hints

from topoflow.errors import RunDirectoryError

log = logging.getLogger(__name__)

FILE_NAME = ".lease"
LEASE_SECONDS = 30.0
HEARTBEATS_PER_LEASE = 6
PROC = Path("/proc")


@dataclasses.dataclass(frozen=True)
class Holder:
    """One state of the lease. Its fields are compared only for equality; `since` is only shown to users."""

    generation: int
    """Incremented each time the lease is taken."""
    token: str
    """Random, drawn when the lease was taken."""
    beat: int
    """Incremented with each heartbeat of the holder."""
    seconds: int | float
    """A holder on another machine counts as ended once its `beat` has not changed for this long."""
    released: bool
    """The holder has ended normally."""
    host: str
    boot: str
    """Linux: id of the machine's boot, else empty."""
    pid_namespace: str
    """Linux: the namespace of `pid` (a container may have its own), else empty."""
    pid: int
    started: str
    """When the process started, as the system reports it, because process ids are reused. Empty: unknown."""
    job: str | None
    """Number of the batch job."""
    restart: int
    """How many times the job had been requeued."""
    since: str
    """When the lease was taken, by the holder's clock."""

    def __str__(self) -> str:
        """Return `process 4242 on n1 (job 17, restart 1) since 2026-01-31 12:00:00 UTC`."""
        job = f" (job {self.job}, restart {self.restart})" if self.job is not None else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    def is_local(self) -> bool:
        """Return whether `pid` is meaningful to this process: same machine, boot and namespace."""
        return (self.host, self.boot, self.pid_namespace) == host_identity()

    def has_left(self) -> bool:
        """Return whether the holder released the lease, or is a local process that has ended."""
        if self.released or not self.is_local():
            return self.released
        start = process_start(self.pid)
        return start is None or bool(start and self.started and start != self.started)  # or the id was reused


def parse_holder(content: bytes | None) -> Holder | None:
    """Return the holder that a lease file names; None if it is damaged or missing (content None)."""
    try:
        holder = Holder(**json.loads(content or b""))
    except (ValueError, TypeError):
        return None
    typed = all(isinstance(getattr(holder, name), kind) for name, kind in get_type_hints(Holder).items())
    return holder if typed and 0 < holder.pid < 2**31 and 0 < holder.seconds <= 3600 else None


def host_identity() -> tuple[str, str, str]:
    """Return host name, boot id and namespace of process ids."""
    try:
        boot, namespace = (PROC / "sys/kernel/random/boot_id").read_text().strip(), os.readlink(PROC / "self/ns/pid")
    except OSError:  # not Linux
        boot = namespace = ""
    return socket.gethostname(), boot, namespace


def process_start(pid: int) -> str | None:
    """Return when a local process started, as the system reports it; None: it has ended; empty: it is hidden."""
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
        return None if state in "ZX" else numbers[18]  # field 22: clock ticks since boot
    command = ["/bin/ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)]
    output = subprocess.run(command, env={"LC_ALL": "C", "TZ": "UTC"}, capture_output=True, text=True).stdout
    state, _, start = output.strip().partition(" ")
    return None if state.startswith("Z") else start.strip()


class Lease:
    """This process's claim on a run directory.

    Args:
        job, restart: number of the batch job, and how often it has been restarted. A higher restart of the same job
            takes the lease from a lower one at once, dead or alive; a lower one never takes it from a higher one
            that may be alive.
        seconds: how long a holder on another machine must be without a heartbeat to count as ended.
    """

    def __init__(self, run_dir: Path, job: str | None = None, restart: int = 0, seconds: float = LEASE_SECONDS):
        self._run_dir, self._job, self._restart, self._seconds = run_dir, job, restart, seconds
        self._path = run_dir / FILE_NAME
        self._mine: Holder | None = None  # as it was taken
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def take(self, wait: bool = True) -> str | None:
        """Become the holder; return a warning for the user if it was taken over from another process.

        Args: wait, whether to watch a holder on another machine for a heartbeat, or to be refused at once.

        Raises:
            RunDirectoryError: another process holds the lease, or may hold it. Nothing was changed.
            OSError: the file system refused.
        """
        assert self._mine is None, "taken already"
        token = secrets.token_hex(8)
        while True:
            found, warning = self.check(wait)
            mine = self._next_holder(found, token)
            if self._replace(found, mine):
                for temporary in self._run_dir.glob(f"{FILE_NAME}-*"):
                    temporary.unlink(missing_ok=True)
                if self._read() == mine.to_bytes():
                    break
        self._mine = mine
        self._ended.clear()
        self._heart = threading.Thread(target=self._heartbeat, name="lease", daemon=True)
        self._heart.start()
        return warning

    def release(self) -> None:
        """Give the run directory up; does nothing if the lease was lost or never taken."""
        if self._mine is None or self._heart is None or self._mine.pid != os.getpid():
            return
        self._ended.set()
        self._heart.join()
        try:
            self._update(released=True)
        except OSError as error:  # the next process will notice that this one has ended
            log.warning("%s: cannot be written: %s", self._path, error.strerror)
        self._mine = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Enter this around each single change of the run directory: one rename, one append, one removal.

        A process that is stopped inside, and wakes after another has taken the lease, still makes that one change,
        unless nothing is left to change. So rename a temporary file, which the next holder removes, or append to a
        file that the next holder replaces by a copy.

        Raises:
            RunDirectoryError: this process does not hold the lease, or has lost it.
            OSError: the lease is missing or unreadable: the file system is unavailable, or refused.
        """
        if self._mine is None or self._mine.pid != os.getpid():
            raise RunDirectoryError(f"run.dir {self._run_dir}: not held by this process: nothing was written")
        found = self._read()
        if found is None:
            raise FileNotFoundError(errno.ENOENT, f"{FILE_NAME} is gone", str(self._path))
        holder = parse_holder(found)
        if holder is None or holder.token != self._mine.token:
            who = f"taken over by {holder}, generation {holder.generation}" if holder else f"its {FILE_NAME} is damaged"
            raise RunDirectoryError(
                f"run.dir {self._run_dir}: {who}; this process held generation {self._mine.generation}: "
                "nothing was written"
            )
        yield

    def check(self, wait: bool = True) -> tuple[bytes | None, str | None]:
        """Return the content of a lease that this process may take, and a warning if that takes it over from another.

        Args: see `take`.

        Raises:
            RunDirectoryError: another process holds the lease, or may hold it.
        """
        while True:
            found = self._read()
            holder = parse_holder(found)
            if found is None or (holder is not None and holder.has_left()):
                return found, None
            if holder is not None and holder.job is not None and holder.job == self._job:
                if self._restart > holder.restart:
                    return found, f"run.dir {self._run_dir}: taken over from an earlier start of this job: {holder}"
                if self._restart < holder.restart:
                    raise RunDirectoryError(
                        f"run.dir {self._run_dir}: in use by a later start of this job, {holder}: expected a restart "
                        f"after that, not restart {self._restart} (if that was another job {self._job}: remove "
                        f"{self._path})"
                    )
            who = str(holder or f"a process that its damaged {FILE_NAME} does not name")
            seconds = holder.seconds if holder is not None else self._seconds
            is_watched = wait and not (holder is not None and holder.is_local())
            if is_watched and self._is_unchanged_for(found, who, seconds):
                return found, f"run.dir {self._run_dir}: taken over from {who}: no heartbeat for {seconds:g} s"
            now = parse_holder(self._read())
            if not is_watched or (holder and now and now.token == holder.token and not now.released):
                raise RunDirectoryError(
                    f"run.dir {self._run_dir}: in use by {who}: expected one run at a time in a folder"
                )

    def _is_unchanged_for(self, found: bytes | None, who: str, seconds: float) -> bool:
        """Return whether the file keeps its content for the whole time, by this process's clock."""
        start, logged = time.monotonic(), False
        while (waited := time.monotonic() - start) < seconds:
            if waited > seconds / 2 and not logged:
                log.warning("run.dir %s: waiting for a heartbeat of %s", self._run_dir, who)
                logged = True
            time.sleep(seconds / 60)
            if self._read() != found:
                return False
        return True

    def _next_holder(self, found: bytes | None, token: str) -> Holder:
        before = parse_holder(found)
        host, boot, pid_namespace = host_identity()
        return Holder(
            generation=before.generation + 1 if before is not None else 1,
            token=token,
            beat=0,
            seconds=self._seconds,
            released=False,
            host=host,
            boot=boot,
            pid_namespace=pid_namespace,
            pid=os.getpid(),
            started=process_start(os.getpid()) or "",
            job=self._job,
            restart=self._restart,
            since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        )

    def _heartbeat(self) -> None:
        beat = 0
        while not self._ended.wait(self._seconds / HEARTBEATS_PER_LEASE):
            beat += 1
            try:
                self._update(beat=beat)
            except OSError:  # the file system is unavailable for a while; each write checks the lease itself
                continue

    def _update(self, **changes: int) -> None:
        """Change this process's entry if it still holds the lease."""
        found = self._read()
        holder = parse_holder(found)
        if holder is not None and self._mine is not None and holder.token == self._mine.token:
            self._replace(found, dataclasses.replace(holder, **changes))

    def _replace(self, expected: bytes | None, holder: Holder) -> bool:
        """Replace the content `expected` by `holder`; return False if the file has another content by now."""
        temporary = self._path.with_name(f"{FILE_NAME}-{holder.token}")
        try:
            temporary.write_bytes(holder.to_bytes())  # not flushed: what a power failure damages is taken over
            if self._read() != expected:
                return False
            os.replace(temporary, self._path)
            return True
        except FileNotFoundError:  # the process that took the lease meanwhile has removed it
            if not self._run_dir.is_dir():
                raise
            return False
        finally:
            temporary.unlink(missing_ok=True)

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None
