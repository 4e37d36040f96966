"""The lease of a run directory: who may write there, told by a generation number that grows with each taking."""

import dataclasses
import errno
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from topoflow.errors import RunDirectoryError
from topoflow.lease.holder import Holder, parse_holder, process_start, whereabouts
from topoflow.lease.lock import BriefLock

log = logging.getLogger(__name__)

FILE_NAME = ".lease"
LEASE_SECONDS = 30.0
LOCK_SECONDS = 10.0
BEATS = 6  # of a living holder's heart in the lease's time


class Lease:
    """This process's claim on a run directory: RUN/.lease names the holder, RUN/.lock keeps changes of it apart.

    The file is changed in three moves: write a temporary file, look whether the lease is what it was thought to be,
    rename. Who takes the lease then removes all other temporary files. So a process that was stopped between its look
    and its rename, for however long, finds nothing to rename, also where the lock was broken or there is none.

    Args:
        job, restart: number of the batch job, and how often it has been restarted: a higher restart of the same job
            takes the lease from a lower one at once, dead or alive; a lower one never does from one that may live.
        seconds: how long the beat of a holder elsewhere must stand still until it counts as gone.
        lock_seconds: see `BriefLock`.
    """

    def __init__(
        self,
        run_dir: Path,
        job: str | None = None,
        restart: int = 0,
        seconds: float = LEASE_SECONDS,
        lock_seconds: float = LOCK_SECONDS,
    ):
        self._run_dir, self._job, self._restart, self._seconds = run_dir, job, restart, seconds
        self._path = run_dir / FILE_NAME
        self._lock = BriefLock(run_dir / ".lock", lock_seconds, self._say)
        self._mine: Holder | None = None  # as it was taken
        self._notes: list[str] = []
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def take(self, wait: bool = True) -> list[str]:
        """Become the holder; returns lines that the user should be told, in the usual case none.

        Args: wait, whether to watch a holder elsewhere for signs of life, or to be refused by it at once.

        Raises:
            RunDirectoryError: another process holds the lease, or may. Nothing was changed.
            OSError: the file system refused.
        """
        assert self._mine is None, "taken already"
        self._notes = []
        token = secrets.token_hex(8)
        while True:
            found, note = self.look(wait)
            mine = self._next_holder(found, token)
            if self._replace(found, mine, durable=True):
                for temporary in self._run_dir.glob(f"{FILE_NAME}-*"):
                    temporary.unlink(missing_ok=True)
                if self._read() == mine.to_bytes():
                    break
        self._mine = mine
        self._ended.clear()
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._heart.start()
        return self._notes + ([note] if note is not None else [])

    def release(self) -> None:
        """Let others have the run directory at once; nothing happens if the lease was lost, or never taken."""
        if self._mine is None or self._mine.pid != os.getpid():
            return
        self._ended.set()
        self._heart.join()
        try:
            self._renew(released=True)
        except OSError as error:  # then the next one sees that this process is gone
            log.warning("%s: cannot be written: %s", self._path, error.strerror)
        self._mine = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Enter this around each single change of the run directory: one rename, one append, one removal.

        A process that is stopped inside, and wakes after another has taken the lease, still makes that one change,
        unless there is nothing left to change: it should rename a temporary file, which whoever takes the lease
        removes, or append to a file that whoever takes the lease replaces by a copy.

        Raises:
            RunDirectoryError: this process does not hold the lease, or no longer.
            OSError: the lease cannot be read, or is not there: the file system is away, or refused.
        """
        if self._mine is None or self._mine.pid != os.getpid():
            raise RunDirectoryError(f"run.dir {self._run_dir}: not held by this process: nothing was written")
        with self._lock.held():
            self._require_mine()
            yield

    def look(self, wait: bool = True) -> tuple[bytes | None, str | None]:
        """The content of a lease that this process could take, and what the user should be told about it, if anything.

        Args: as of `take`.

        Raises:
            RunDirectoryError: another process holds the lease, or may.
        """
        while True:
            found = self._read()
            holder = parse_holder(found)
            if found is None or (holder is not None and _has_left(holder)):
                return found, None
            if holder is not None and holder.job is not None and holder.job == self._job:
                if self._restart > holder.restart:
                    return found, f"run.dir {self._run_dir}: taken over from an earlier start of this job: {holder}"
                self._refuse_earlier_start(holder)
            who = str(holder or f"a process that its damaged {FILE_NAME} does not name")
            seconds = holder.seconds if holder is not None else self._seconds
            is_watched = wait and not (holder is not None and holder.is_here())
            if is_watched and self._stands_still(found, who, seconds):
                return found, f"run.dir {self._run_dir}: taken over from {who}: no sign of life for {seconds:g} s"
            if not is_watched or self._is_still(holder):
                raise RunDirectoryError(
                    f"run.dir {self._run_dir}: in use by {who}: expected one run at a time in a folder"
                )

    def _refuse_earlier_start(self, holder: Holder) -> None:
        if self._restart < holder.restart:
            raise RunDirectoryError(
                f"run.dir {self._run_dir}: in use by a later start of this job, {holder}: expected a restart after "
                f"that, not restart {self._restart} (if job {self._job} was another then: remove {self._path})"
            )

    def _stands_still(self, found: bytes, who: str, seconds: float) -> bool:
        """Whether the file stays what it is for the whole time, by this process's clock."""
        start, told = time.monotonic(), False
        while (waited := time.monotonic() - start) < seconds:
            if waited > seconds / 2 and not told:
                log.warning("run.dir %s: waiting for a sign of life of %s", self._run_dir, who)
                told = True
            time.sleep(seconds / 60)
            if self._read() != found:
                return False
        return True

    def _is_still(self, holder: Holder | None) -> bool:
        """Whether the lease is still `holder`'s, after a change of the file."""
        now = parse_holder(self._read())
        return holder is not None and now is not None and now.token == holder.token and not now.released

    def _next_holder(self, found: bytes | None, token: str) -> Holder:
        before = parse_holder(found)
        host, boot, pid_namespace = whereabouts()
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

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(self._seconds / BEATS):
            beat += 1
            try:
                self._renew(beat=beat)
            except OSError:  # a file system that is away for a while: what is written looks for itself
                continue

    def _renew(self, **changes: int) -> None:
        """Change this process's entry, if it is still there."""
        found = self._read()
        holder = parse_holder(found)
        if holder is not None and holder.token == self._mine.token:
            self._replace(found, dataclasses.replace(holder, **changes), durable=False)

    def _replace(self, expected: bytes | None, holder: Holder, durable: bool) -> bool:
        """Put `holder` in the place of `expected`; False if that is not, or no longer, what stands there."""
        temporary = self._path.with_name(f"{FILE_NAME}-{holder.token}")
        try:
            with self._lock.held():
                with open(temporary, "wb") as file:
                    file.write(holder.to_bytes())
                    file.flush()
                    if durable:
                        os.fsync(file.fileno())
                if self._read() != expected:
                    return False
                try:
                    os.replace(temporary, self._path)
                except FileNotFoundError:  # who took the lease meanwhile has removed it
                    return False
                return True
        finally:
            temporary.unlink(missing_ok=True)

    def _require_mine(self) -> None:
        found = self._read()
        if found is None:
            raise FileNotFoundError(errno.ENOENT, f"{FILE_NAME} is gone", str(self._path))
        holder = parse_holder(found)
        if holder is not None and (holder.generation, holder.token) == (self._mine.generation, self._mine.token):
            return
        who = f"taken over by {holder}, generation {holder.generation}" if holder else f"its {FILE_NAME} is damaged"
        raise RunDirectoryError(
            f"run.dir {self._run_dir}: {who}; this process held generation {self._mine.generation}: nothing was written"
        )

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _say(self, line: str) -> None:
        if self._mine is None:
            self._notes.append(line)
        else:
            log.warning("%s", line)


def _has_left(holder: Holder) -> bool:
    return holder.released or (holder.is_here() and holder.is_gone())
