"""Durable changes of files: after a crash at any instant a path holds its old content or its new one."""

import logging
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import IO

from topoflow.errors import ConfigError

log = logging.getLogger(__name__)

Guard = Callable[[], AbstractContextManager]
"""Entered around each change of a run directory; raises RunDirectoryError once another process has taken it over."""


def hidden_name(path: Path, purpose: str) -> Path:
    """Return an unused name in the same folder: `.writing-step-00000042-1a2b3c4d`."""
    return path.with_name(f".{purpose}-{path.name}-{secrets.token_hex(4)}")


def flush(file: IO) -> None:
    """Wait until the content of an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; without it, a power failure may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes, guard: Guard = nullcontext) -> None:
    """Create or replace a small file (text as UTF-8), flushed to the disk and then renamed into place.

    Raises:
        RunDirectoryError: `guard` refused; nothing was changed.
        OSError: the file cannot be written; the old one, if any, is unchanged.
    """
    temporary = hidden_name(path, "writing")
    try:
        with guard(), open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            flush(file)
        with guard():
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Delete the temporary files of killed processes; no living process may be writing in `folder`."""
    for path in folder.glob(".writing-*"):
        path.unlink(missing_ok=True)


def discard(path: Path, guard: Guard) -> None:
    """Delete a folder or file, renaming it first so that a crash leaves no half of it; log what cannot be deleted."""
    try:
        if not path.name.startswith((".deleting-", ".writing-")):
            with guard():
                path = path.rename(hidden_name(path, "deleting"))
        with guard():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        log.warning("%s: could not be deleted: %s", path, error.strerror or error)


def require_writable(folder: Path) -> None:
    """Create `folder` if it is missing, and check that files can be created in it.

    Call it before long work whose result goes there.

    Raises:
        ConfigError: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = hidden_name(folder / "probe", "writing")
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}: expected a writable folder") from None
