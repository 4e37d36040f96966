"""Small files that are there whole or not at all."""

import os
import secrets
from pathlib import Path
from typing import IO


def write_text(path: Path, text: str) -> None:
    """Let a file hold ASCII `text`: after a crash at any instant it holds the old text or the new one."""
    temporary = path.with_name(f".{path.name}.writing-{secrets.token_hex(4)}")
    try:
        with open(temporary, "w", encoding="ascii") as file:
            file.write(text)
            flush(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def discard_unfinished(folder: Path) -> None:
    """Delete what a killed process left of files that `write_text` was writing in a folder that is ours alone."""
    for path in folder.glob(".*.writing-*"):
        path.unlink()


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
