"""The run directory: who holds it, how files in it are written and how a run ends there."""

import dataclasses
import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from topoflow.config import Config
from topoflow.config_io import dump_config
from topoflow.errors import EXIT_DONE, ConfigError, Refusal, RunDirectoryError
from topoflow.launch import Launch
from topoflow.logs import close_logging

log = logging.getLogger(__name__)

Guard = Callable[[], AbstractContextManager]
"""Entered around every change of what others look at; raises RunDirectoryError where the run is not ours any more."""


def hidden_beside(path: Path, purpose: str) -> Path:
    """A name in the same folder that nobody else uses: `.writing-step-00000042-1a2b3c4d`."""
    return path.with_name(f".{purpose}-{path.name}-{secrets.token_hex(4)}")


def flush(file: IO) -> None:
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: without it, a rename may be undone by a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str, guard: Guard = nullcontext) -> None:
    """Let a small file hold ASCII `text`: after a crash at any instant it holds the old text or the new one."""
    temporary = hidden_beside(path, "writing")
    try:
        with open(temporary, "w", encoding="ascii") as file:
            file.write(text)
            flush(file)
        with guard():
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def discard_unfinished(folder: Path) -> None:
    """Delete what killed processes left of files that `replace_text` was writing; no living one may write there."""
    for path in folder.glob(".writing-*"):
        path.unlink()


def discard(path: Path, guard: Guard) -> None:
    """Delete a folder (or file), its name first, so that no crash leaves half of it there; warn if something stays."""
    try:
        if not path.name.startswith((".deleting-", ".writing-")):
            with guard():
                path = path.rename(hidden_beside(path, "deleting"))
        with guard():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        log.warning("%s: could not be deleted: %s", path, error.strerror or error)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Name of the first stop signal that arrived, or None. A second one changes nothing and breaks nothing."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @contextmanager
    def listening(self) -> Iterator["StopFlag"]:
        """Catch the stop signals (Ctrl-C, preemption and scancel, SLURM's warning) while the block runs."""
        previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        # launch/srun.sh starts the program with these blocked: one that came while it was being started arrives now
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name


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


_NO_FLOCK = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}


class BriefLock:
    """A file that one process at a time holds locked, for milliseconds; the threads of that process share it.

    A process that was stopped while it held the lock would keep all others waiting. After `seconds` they put another
    file in the place of the locked one. So the lock makes races rare; what it protects must bear a broken one.

    Args: path, created when needed; seconds, what no orderly holder needs; say, what is called with a line for the
    user when the lock was broken, or (once) cannot be had on this file system.
    """

    def __init__(self, path: Path, seconds: float, say: Callable[[str], None]):
        self._path, self._seconds, self._say = path, seconds, say
        self._mutex = threading.RLock()
        self._inside = 0  # sections of this process that are open
        self._descriptor: int | None = None
        self._is_supported = True  # until the file system says otherwise
        self._notes: list[str] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock while the block runs; blocks may be nested, and overlap in threads.

        Raises:
            OSError: the file cannot be opened.
        """
        with self._mutex:
            if self._inside == 0 and self._is_supported:
                self._descriptor = self._acquire()
            self._inside += 1
            notes, self._notes = self._notes, []
        try:
            for note in notes:  # not sooner: who is told may want the lock
                self._say(note)
            yield
        finally:
            with self._mutex:
                self._inside -= 1
                if self._inside == 0 and self._descriptor is not None:
                    descriptor, self._descriptor = self._descriptor, None
                    _unlock(descriptor)

    def _acquire(self) -> int | None:
        """Descriptor of the locked file, or None where the file system has no locks."""
        deadline = time.monotonic() + self._seconds
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                    return descriptor
            except BlockingIOError:
                pass
            except FileNotFoundError:
                pass  # someone removed it: once more
            except OSError as error:
                os.close(descriptor)
                if error.errno not in _NO_FLOCK:
                    raise
                self._is_supported = False
                self._notes.append(
                    f"{self._path}: the file system has no flock ({error.strerror}): a process that lost the run "
                    "directory is kept out by the lease's generation alone"
                )
                return None
            os.close(descriptor)
            if time.monotonic() > deadline:
                return self._break()
            time.sleep(0.002)

    def _break(self) -> int:
        temporary = self._path.with_name(f"{self._path.name}-{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.replace(temporary, self._path)
        self._notes.append(f"{self._path}: locked for {self._seconds:g} s, by a process that seems stopped: replaced")
        return descriptor


def _unlock(descriptor: int) -> None:
    # not by closing alone: a process forked meanwhile has the descriptor too, and would keep the lock
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


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


class RunDirectory:
    """RUN: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, resume.json, evaluation/, exit.json.

    Args: job, restart: of the launch, see `Lease`.
    """

    def __init__(self, path: str | Path, job: str | None = None, restart: int = 0):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.evaluation = self.path / "evaluation"
        self._lease = Lease(self.path, job, restart)
        self._was_asked_for = False

    def hold(self, wait: bool = True) -> list[str]:
        """Create the folder and take its lease, which is over when this process is, however it ends.

        Returns lines that the user should be told: from whom it was taken over, if so.

        Args: wait, whether to watch a holder on another machine for signs of life (30 s), or to be refused at once.

        Raises:
            RunDirectoryError: another process holds it, and nothing was changed; or it cannot be created or written.
        """
        self._was_asked_for = True
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            notes = self._lease.take(wait)
            with self.writing():
                for unfinished in self.path.glob(".writing-*"):  # of who held it before, and could still rename them
                    unfinished.unlink(missing_ok=True)
                (self.path / "exit.json").unlink(missing_ok=True)  # of an earlier process: this one has not ended
        except OSError as error:
            raise RunDirectoryError(f"run.dir {self.path}: cannot be written: {error.strerror}") from None
        return notes

    def release(self) -> None:
        """Let another process have the folder."""
        self._lease.release()

    def leave(self, status: int, reason: str) -> None:
        """Write exit.json, and let another process have the folder."""
        self.write_exit(status, reason)
        self.release()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The guard around each single change of the folder (rename, append, removal): see `Lease.writing`.

        Raises:
            RunDirectoryError: this process does not hold the folder, or no longer.
            OSError: the file system refused.
        """
        with self._lease.writing():
            yield

    def require_held(self) -> None:
        """Refuse to go on where this process does not hold the folder.

        Raises:
            RunDirectoryError: another process took it, or it cannot be read.
        """
        try:
            with self.writing():
                pass
        except OSError as error:
            raise RunDirectoryError(f"run.dir {self.path}: cannot be read: {error.strerror}") from None

    def write_config(self, config: Config) -> None:
        """RUN/config.yaml: the resolved config, enough to run it again."""
        self._write("config.yaml", dump_config(config))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """RUN/`name` as JSON, replaced in one move."""
        self._write(name, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def write_exit(self, status: int, reason: str) -> None:
        """RUN/exit.json: the exit status, which torchrun would not pass on.

        Only where this process holds the folder, or was not refused it and can have it at once: the exit of a run that
        goes on is not ours to tell.
        """
        try:
            if not self._was_asked_for:
                self.hold(wait=False)
            self.write_json("exit.json", {"status": status, "reason": reason})
        except RunDirectoryError:
            return  # a folder that is another's, or cannot be written, has been refused already

    def _write(self, name: str, text: str) -> None:
        temporary = self.path / f".writing-{name}-{secrets.token_hex(8)}"
        try:
            with self.writing(), temporary.open("w", encoding="utf-8") as file:  # not ours: not even a temporary file
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            with self.writing():  # still ours, and whoever takes over now removes the temporary file
                os.replace(temporary, self.path / name)
        except OSError as error:
            raise RunDirectoryError(f"{self.path / name}: cannot be written: {error.strerror}") from None
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


log = logging.getLogger(__name__)


def run_to_exit(body: Callable[[], None], launch: Launch, directory: RunDirectory | None = None) -> int:
    """Run `body`; a refusal becomes one line on stderr and its exit status, which rank 0 also writes to exit.json.

    What every rank refuses alike is said by rank 0 alone. Anything but a refusal is a defect, with Python's traceback
    and status 1. Of several processes, one that does not end well ends here: to take its process group apart could
    mean to wait for a process that is gone, with the interpreter's lock held, so that not even the watch could end it.
    """
    try:
        body()
    except Refusal as refusal:
        say_refusal(refusal, launch)
        _leave(refusal.exit_status, str(refusal), launch, directory)
        if launch.world_size > 1:
            _end_now(refusal.exit_status)
        return refusal.exit_status
    except BaseException as error:
        if launch.world_size > 1:
            sys.excepthook(type(error), error, error.__traceback__)
        _leave(1, f"crashed: {type(error).__name__}: {error}", launch, directory)
        if launch.world_size > 1:
            _end_now(1)
        raise
    _leave(EXIT_DONE, "done", launch, directory)
    return EXIT_DONE


def _leave(status: int, reason: str, launch: Launch, directory: RunDirectory | None) -> None:
    if directory is not None and launch.is_main:
        directory.leave(status, reason)
    close_logging()


def _end_now(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def say_refusal(refusal: Refusal, launch: Launch | None = None) -> None:
    """One line on stderr, and in the log file once there is one. Without a launch the process speaks for itself."""
    is_main = launch is None or launch.is_main
    if is_main and logging.getLogger("topoflow").handlers:
        log.error("%s", refusal)
    elif is_main or not refusal.shared:
        who = "" if is_main else f"rank {launch.rank}: "
        print(f"topoflow: {who}{refusal}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Look at the lease of `arguments` = RUN, JOB ("": none), RESTART ("": 0); returns the exit status."""
    try:
        if not 1 <= len(arguments) <= 3:
            raise ConfigError(f"{len(arguments)} arguments: expected RUN [JOB [RESTART]]")
        run_dir, job, restart = (*arguments, "", "")[:3]
        if restart and not (restart.isascii() and restart.isdigit()):
            raise ConfigError(f"RESTART: {restart!r}, expected a whole number")
        try:
            Lease(Path(run_dir), job or None, int(restart or 0)).look()
        except OSError as error:
            raise RunDirectoryError(f"run.dir {run_dir}: cannot be read: {error.strerror}") from None
    except Refusal as refusal:
        print(f"topoflow: {refusal}", file=sys.stderr)
        return refusal.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
