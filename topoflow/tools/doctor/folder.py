"""A folder of a moment for the doctor's own files, in a place that must stay as it is."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = ".topoflow-doctor-"


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest above it that exists (a file in the place of a folder fails where it is used)."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


class BriefFolder:
    """A folder with a random name, which does not outlive the block of `kept`, however that ends."""

    def __init__(self):
        self._path: Path | None = None

    @contextmanager
    def kept(self) -> Iterator["BriefFolder"]:
        try:
            yield self
        finally:
            self.remove()

    def make(self, parent: Path) -> Path:
        """The folder, made in `parent` now.

        Raises:
            OSError: it cannot be.
        """
        self._path = parent / f"{PREFIX}{secrets.token_hex(8)}"
        self._path.mkdir()
        return self._path

    def remove(self) -> None:
        """Remove the folder with all in it, if it was made. Tried once: where this hangs, it would hang again."""
        path, self._path = self._path, None
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)


def write_durably(path: Path, content: bytes) -> None:
    """A new file that is on the disk, or the server, when this returns."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
