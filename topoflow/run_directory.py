"""The folder of a run: who holds it, its config, and how it ended."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from topoflow.config import Config, dump_config
from topoflow.errors import RunDirectoryError
from topoflow.lease import Lease


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
