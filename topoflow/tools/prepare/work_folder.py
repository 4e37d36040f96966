"""The hidden folder in which data are prepared, until they are complete: held by one process at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from topoflow.errors import ConfigError

LOCK = "lock"


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """Create `.NAME.preparing` next to `output`, or take up an earlier one; hold it alone.

    ConfigError if another process holds it.
    """
    work = output.with_name(f".{output.name}.preparing")
    with _lock(work, output) as lock:
        try:
            yield work
        finally:
            is_ours = _is_lock_of(work, lock)  # else it was finished, and may be there again, of another process
            if is_ours and all(path.name == LOCK for path in work.iterdir()):  # refused before anything was written
                delete_work_folder(work)


def _lock(work: Path, output: Path) -> IO:
    """Create `work` if it is missing, and return its open lock. ConfigError if another process holds it."""
    import fcntl

    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(work / LOCK, "a")  # noqa: SIM115 (for as long as the caller wants it)
        except FileNotFoundError:  # another process has just finished, and its folder is gone
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_lock_of(work, lock):
                return lock
        except BlockingIOError:
            lock.close()
            raise ConfigError(f"{output}: another process is preparing it ({work} is locked)") from None
        lock.close()  # of a folder that another process has finished with meanwhile


def _is_lock_of(work: Path, lock: IO) -> bool:
    """Return whether an open lock is still the one that lies in `work`."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(work / LOCK))
    except FileNotFoundError:
        return False


def delete_work_folder(work: Path) -> None:
    """Delete the folder of this process, its lock last: from then on another process may create it again."""
    for path in work.iterdir():
        if path.name != LOCK:
            path.unlink()
    (work / LOCK).unlink()
    with suppress(OSError):
        work.rmdir()
