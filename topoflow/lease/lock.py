"""A lock for moments: flock where the file system has it, never waited for without end."""

import errno
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
