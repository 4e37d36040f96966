"""The folder of a run: its lock, its config, and how it ended."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from topoflow.config import Config, dump_config
from topoflow.errors import RunDirectoryError


class RunDirectory:
    """RUN: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, resume.json, evaluation/, exit.json."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.evaluation = self.path / "evaluation"
        self.is_anothers = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Create the folder and hold it for this process; the lock goes with the process, however that ends.

        Raises:
            RunDirectoryError: another process holds it, or it cannot be created or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "a", encoding="ascii")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise RunDirectoryError(f"run.dir {self.path}: cannot be written: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.is_anothers = True
                raise RunDirectoryError(
                    f"run.dir {self.path}: in use by another process: expected one run at a time in a folder"
                ) from None
            yield

    def write_config(self, config: Config) -> None:
        """RUN/config.yaml: the resolved config, enough to run it again."""
        self._write("config.yaml", dump_config(config))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """RUN/`name` as JSON, replaced in one move."""
        self._write(name, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def write_exit(self, status: int, reason: str) -> None:
        """RUN/exit.json: the exit status, which torchrun would not pass on. Not where another process's run is."""
        if not self.is_anothers:
            with suppress(OSError):  # a folder that cannot be written has been refused already
                self.path.mkdir(parents=True, exist_ok=True)
                self.write_json("exit.json", {"status": status, "reason": reason})

    def _write(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}-{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path / name)
