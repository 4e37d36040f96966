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
    with _lock(work, output):
        try:
            yield work
        finally:
            is_unused = work.exists() and all(path.name == LOCK for path in work.iterdir())
            if is_unused:  # refused before anything was written
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
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(work / LOCK)):
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError:
            lock.close()
            raise ConfigError(f"{output}: another process is preparing it ({work} is locked)") from None
        lock.close()  # of a folder that another process has finished with meanwhile


def delete_work_folder(work: Path) -> None:
    """Delete it, its lock last. Another process may then create it again at once: so its being there is no failure."""
    for path in work.iterdir():
        if path.name != LOCK:
            path.unlink()
    (work / LOCK).unlink()
    with suppress(OSError):
        work.rmdir()
