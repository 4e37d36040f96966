"""The folder of a run: its lock, its config, and how it ended."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from topoflow.config import Config, dump_config
from topoflow.errors import RunDirectoryError


class RunDirectory:
    """RUN: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, resume.json, evaluation/, exit.json."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.evaluation = self.path / "evaluation"
        self._lock: TextIO | None = None

    def hold(self) -> None:
        """Create the folder and hold it for this process; the lock goes with the process, however that ends.

        Raises:
            RunDirectoryError: another process holds it, or it cannot be created or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "a", encoding="ascii")  # noqa: SIM115 (closed by release)
        except OSError as error:
            raise RunDirectoryError(f"run.dir {self.path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise RunDirectoryError(
                f"run.dir {self.path}: in use by another process: expected one run at a time in a folder"
            ) from None
        self._lock = lock
        (self.path / "exit.json").unlink(missing_ok=True)  # of an earlier process: this one has not ended

    def release(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_config(self, config: Config) -> None:
        """RUN/config.yaml: the resolved config, enough to run it again."""
        self._write("config.yaml", dump_config(config))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """RUN/`name` as JSON, replaced in one move."""
        self._write(name, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def write_exit(self, status: int, reason: str) -> None:
        """RUN/exit.json: the exit status, which torchrun would not pass on.

        Only where this process holds the folder, or can: the exit of a run that goes on is not ours to tell.
        """
        try:
            if self._lock is None:
                self.hold()
            self.write_json("exit.json", {"status": status, "reason": reason})
        except RunDirectoryError:
            return  # a folder that is another's, or cannot be written, has been refused already

    def _write(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}-{os.getpid()}"
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.path / name)
        except OSError as error:
            raise RunDirectoryError(f"{self.path / name}: cannot be written: {error.strerror}") from None
