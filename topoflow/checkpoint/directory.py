"""The folder of a run's checkpoints: which there are, the pointers `last` and `best`, and which may go."""

import hashlib
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from topoflow.checkpoint.file import read_checkpoint, write_checkpoint
from topoflow.errors import CheckpointUnreadable, MissingPath, ResumeRefused, RunDirectoryError
from topoflow.run_dir import Guard, discard, flush_folder, replace_text

log = logging.getLogger(__name__)

FOLDER_NAME = r"step-(\d{8,})"
POINTERS = ("last", "best")


class CheckpointDirectory:
    """`RUN/checkpoints`: folders step-00000042 and the small text files `last` and `best` that name one of them.

    A pointer's first line is the name of a folder, its second the SHA-256 of the first: no flipped byte can make it
    name another checkpoint.

    Args:
        guard: entered around every rename, pointer write and delete, see `topoflow.run_dir`.
        on_progress: called while a checkpoint is being written, after each tensor.
    """

    def __init__(self, path: Path, guard: Guard = nullcontext, on_progress: Callable[[], None] = lambda: None):
        self.path, self._guard, self._on_progress = Path(path), guard, on_progress

    def steps(self) -> list[int]:
        """Steps of all checkpoints, oldest first (whole or not: reading tells)."""
        matches = (re.fullmatch(FOLDER_NAME, name) for name in self._names())
        return sorted(int(match[1]) for match in matches if match)

    def folder(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def is_parent_of(self, folder: Path) -> bool:
        """Whether a checkpoint is one of this directory."""
        return folder.resolve().parent == self.path.resolve()

    def pointer(self, name: str) -> Path | None:
        """The checkpoint that `last` or `best` names; None if there is no such pointer.

        Raises:
            ResumeRefused: the pointer is damaged, or names something that is not there.
        """
        file = self.path / name
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ResumeRefused(f"checkpoint pointer {file}: cannot be read: {error.strerror}") from None
        target = self.path / _first_line(content)
        if content != _pointer_text(target.name).encode():
            raise ResumeRefused(f"checkpoint pointer {file}: does not match its own hash: it is damaged")
        if not re.fullmatch(FOLDER_NAME, target.name) or not target.is_dir():
            raise ResumeRefused(f"checkpoint pointer {file}: names {target.name!r}, which is not there")
        return target

    def save(self, state: dict[str, Any], is_best: bool) -> Path:
        """Write a checkpoint for its step, then move the pointers to it.

        The folder is made if need be, but not the run directory: one that vanished is not made anew.

        Raises:
            OSError: the file system refused; what was there before is untouched.
            RunDirectoryError: the guard refused; likewise.
        """
        if not self.path.is_dir():
            with self._guard():
                self.path.mkdir()
            flush_folder(self.path.parent)
        folder = self.folder(state["progress"]["step"])
        write_checkpoint(folder, state, self._guard, self._on_progress)
        for name in ("best", "last") if is_best else ("last",):
            self._point(name, folder)
        return folder

    def newest_whole(self, strict: bool = False) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, with its state; None if there never was one.

        Damage is passed over, with a warning that names it; a file system that refuses just now is no damage.

        Args:
            strict: refuse if the newest, or a pointer, is damaged.

        Raises:
            ResumeRefused: there are checkpoints and every one is damaged, or there were some and they are gone.
        """
        steps = self.steps()
        if not steps and self.traces():
            raise ResumeRefused(
                f"{self.path}: holds {', '.join(self.traces())}, but no checkpoint to go on from: "
                "expected the path of one in checkpoint.resume, or another run.dir"
            )
        self._check_pointers(strict)
        for step in reversed(steps):
            try:
                return self.folder(step), read_checkpoint(self.folder(step))
            except CheckpointUnreadable:
                raise
            except ResumeRefused as damage:
                if strict:
                    raise
                log.warning("%s; taking the next older one", damage)
        if steps:
            raise ResumeRefused(f"{self.path}: none of {len(steps)} checkpoints is whole: expected at least one")
        return None

    def traces(self) -> list[str]:
        """Names of all that says that a checkpoint was committed here: checkpoints, those set aside, pointers.

        What a killed save left behind is no trace: it was never committed.
        """
        pattern = rf"{FOLDER_NAME}|abandoned-{FOLDER_NAME}(-\d+)?|{'|'.join(POINTERS)}"
        return [name for name in self._names() if re.fullmatch(pattern, name)]

    def archive_after(self, step: int) -> list[Path]:
        """Rename checkpoints of later steps to abandoned-step-N: a run that goes on from `step` must never take them.

        `last` then names the checkpoint of `step`, and `best` none of those. Returns the new names.

        Raises:
            RunDirectoryError: something cannot be renamed.
        """
        later = [later for later in self.steps() if later > step]
        renamed = []
        with self._changing("set aside"):
            if self.folder(step).is_dir():
                self._point("last", self.folder(step))
            for name in POINTERS:
                if self._named_by(name) in map(self.folder, later):
                    with self._guard():
                        (self.path / name).unlink()
            for folder in map(self.folder, reversed(later)):
                target, number = self.path / f"abandoned-{folder.name}", 2
                while target.exists():
                    target, number = self.path / f"abandoned-{folder.name}-{number}", number + 1
                with self._guard():
                    os.rename(folder, target)
                renamed.append(target)
            if renamed:
                flush_folder(self.path)
        return renamed[::-1]

    def prune(self, keep_last: int) -> list[Path]:
        """Delete all but the newest `keep_last` checkpoints and the best; returns what went.

        As long as `best` is damaged nothing goes: it might be the best.
        """
        try:
            best, folders = self.pointer("best"), [self.folder(step) for step in self.steps()]
        except ResumeRefused as damage:
            log.warning("%s; no old checkpoint is deleted for now", damage)
            return []
        gone = [folder for folder in folders[:-keep_last] if folder != best]
        for folder in gone:
            discard(folder, self._guard)
        return gone

    def clean_up(self) -> None:
        """Remove what a killed process left behind; a checkpoint that it was about to replace comes back.

        Raises:
            RunDirectoryError: that checkpoint cannot be renamed.
        """
        if not self.path.is_dir():
            return
        with self._changing("brought back"):
            for hidden in self.path.glob(".replaced-step-*"):
                folder = self.path / re.sub(r"^\.replaced-(step-\d+)-.*$", r"\1", hidden.name)
                if not folder.exists():
                    with self._guard():
                        os.rename(hidden, folder)
                    flush_folder(self.path)
        for pattern in (".replaced-*", ".writing-*", ".deleting-*"):
            for rubbish in self.path.glob(pattern):
                discard(rubbish, self._guard)

    def point(self, name: str, folder: Path | None) -> None:
        """Let `last` or `best` name this checkpoint, in one move; None removes the pointer.

        Raises:
            RunDirectoryError: it cannot be written.
        """
        with self._changing(f"pointed to by {name}"):
            if folder is not None:
                self._point(name, folder)
            elif (self.path / name).exists():
                with self._guard():
                    (self.path / name).unlink()

    def _names(self) -> list[str]:
        """What is in the folder, sorted; nothing if there is no such folder."""
        try:
            return sorted(os.listdir(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise ResumeRefused(f"{self.path}: cannot be read: {error.strerror}") from None

    def _point(self, name: str, folder: Path) -> None:
        if self._named_by(name) != folder:
            replace_text(self.path / name, _pointer_text(folder.name), self._guard)

    def _named_by(self, name: str) -> Path | None:
        """What an undamaged pointer names, there or not."""
        file = self.path / name
        content = file.read_bytes() if file.is_file() else b""
        named = _first_line(content)
        return self.path / named if content == _pointer_text(named).encode() else None

    def _check_pointers(self, strict: bool) -> None:
        for name in POINTERS:
            try:
                found = self.pointer(name)
            except ResumeRefused as damage:
                if strict:
                    raise
                log.warning("%s; looking at the checkpoints themselves", damage)
            else:
                if found is None and name == "last" and self.steps():
                    log.warning(
                        "checkpoint pointer %s: is missing; looking at the checkpoints themselves", self.path / name
                    )

    @contextmanager
    def _changing(self, how: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunDirectoryError(f"{self.path}: a checkpoint cannot be {how}: {error.strerror or error}") from None


def find_checkpoint(path: Path, run_dir: Path | str = "RUN") -> Path:
    """The checkpoint folder that a user means: itself, or of a run directory its best, else its last.

    Args:
        run_dir: for the advice on what to do with another program's file.

    Raises:
        MissingPath: no such path, or it holds no checkpoint.
        ResumeRefused: a file that is not ours, or a pointer is damaged.
    """
    path = Path(path)
    # os.path: a place where we may not look is no place
    if not os.path.exists(path):
        raise MissingPath(f"{path}: not found: expected a checkpoint or a run directory")
    if path.name == "state.pt" and os.path.isfile(path):
        return path.parent
    if os.path.isfile(path):
        words = ["python", "-m", "topoflow", "import-lightning", str(path), "--config", "CONFIG", "-o", str(run_dir)]
        raise ResumeRefused(
            f"{path}: a file, expected a checkpoint folder or a run directory of this program; "
            f"one of Lightning becomes a run by: {shlex.join(words)}"
        )
    if os.path.isfile(path / "manifest.json") or os.path.isfile(path / "state.pt"):
        return path
    directory = CheckpointDirectory(path / "checkpoints" if os.path.isdir(path / "checkpoints") else path)
    found = directory.pointer("best") or directory.pointer("last")
    if found is None and directory.steps():
        found = directory.folder(directory.steps()[-1])
    if found is None:
        raise MissingPath(f"{path}: holds no checkpoint: expected a checkpoint or a run directory")
    return found


def _pointer_text(name: str) -> str:
    return f"{name}\n{hashlib.sha256(name.encode()).hexdigest()}\n"


def _first_line(content: bytes) -> str:
    return content.partition(b"\n")[0].decode("utf-8", errors="replace")
