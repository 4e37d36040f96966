"""What makes changes in a folder outlast a crash, and what keeps half a folder from being taken for a whole one."""

import logging
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO

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
