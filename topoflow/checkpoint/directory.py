"""The folder of a run's checkpoints: which there are, the pointers `last` and `best`, and which may go."""

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from topoflow.checkpoint.file import read_checkpoint, write_checkpoint
from topoflow.errors import MissingPath, ResumeRefused

log = logging.getLogger(__name__)

FOLDER_NAME = r"step-(\d{8,})"


class CheckpointDirectory:
    """`RUN/checkpoints`: folders step-00000042 and the small text files `last` and `best` that name one of them."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def steps(self) -> list[int]:
        """Steps of all checkpoints, oldest first (whole or not: reading tells)."""
        if not self.path.is_dir():
            return []
        names = (re.fullmatch(FOLDER_NAME, entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def folder(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def pointer(self, name: str) -> Path | None:
        """The checkpoint that `last` or `best` names; None if there is no such pointer.

        Raises:
            ResumeRefused: the pointer names something that is not there.
        """
        file = self.path / name
        if not file.is_file():
            return None
        name = file.read_text(encoding="ascii", errors="replace").strip()
        target = self.path / name
        if not re.fullmatch(FOLDER_NAME, name) or not target.is_dir():
            raise ResumeRefused(f"checkpoint pointer {file}: names {name!r}, which is not there: it is damaged")
        return target

    def save(self, state: dict[str, Any], is_best: bool) -> Path:
        """Write a checkpoint for its step, then move the pointers to it.

        Raises:
            OSError: the file system refused; what was there before is untouched.
        """
        folder = self.folder(state["progress"]["step"])
        write_checkpoint(folder, state)
        if is_best:
            self.point("best", folder)
        self.point("last", folder)
        return folder

    def newest_whole(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, with its state; None if there are no checkpoints at all.

        Raises:
            ResumeRefused: there are checkpoints, and every one is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.folder(step), read_checkpoint(self.folder(step))
            except ResumeRefused as damage:
                log.warning("%s; taking the next older one", damage)
        if steps:
            raise ResumeRefused(f"{self.path}: none of {len(steps)} checkpoints is whole: expected at least one")
        return None

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename checkpoints of later steps to abandoned-step-N: a run that goes on from `step` must never take them.

        A pointer to one of them goes. Returns the new names.
        """
        renamed = []
        for later in [later for later in self.steps() if later > step]:
            folder = self.folder(later)
            for name in ("best", "last"):
                file = self.path / name
                if file.is_file() and file.read_text(encoding="ascii", errors="replace").strip() == folder.name:
                    file.unlink()
            target, number = self.path / f"abandoned-{folder.name}", 2
            while target.exists():
                target, number = self.path / f"abandoned-{folder.name}-{number}", number + 1
            folder.rename(target)
            renamed.append(target)
        return renamed

    def prune(self, keep_last: int, keep: set[Path]) -> list[Path]:
        """Delete all but the newest `keep_last` checkpoints, the best and those in `keep`; returns what went."""
        try:
            best = self.pointer("best")
        except ResumeRefused as damage:
            log.warning("%s", damage)
            best = None
        keep = {*keep, best, *map(self.folder, self.steps()[-keep_last:])}
        gone = [self.folder(step) for step in self.steps() if self.folder(step) not in keep]
        for folder in gone:
            shutil.rmtree(folder)
        return gone

    def clean_up(self) -> None:
        """Remove what a killed save left behind; a checkpoint that it was about to replace comes back."""
        for temporary in self.path.glob(".writing-*") if self.path.is_dir() else ():
            shutil.rmtree(temporary)
        for hidden in self.path.glob(".replaced-step-*") if self.path.is_dir() else ():
            folder = self.path / re.sub(r"^\.replaced-(step-\d+)-\d+$", r"\1", hidden.name)
            if folder.exists():
                shutil.rmtree(hidden)
            else:
                hidden.rename(folder)

    def point(self, name: str, folder: Path | None) -> None:
        """Let `last` or `best` name this checkpoint, in one move; None removes the pointer."""
        if folder is None:
            (self.path / name).unlink(missing_ok=True)
            return
        temporary = self.path / f".{name}-{os.getpid()}"
        with open(temporary, "w", encoding="ascii") as file:
            file.write(folder.name + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that a user means: itself, or of a run directory its best, else its last.

    Raises:
        MissingPath: no such path, or it holds no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise MissingPath(f"{path}: not found: expected a checkpoint or a run directory")
    if path.is_file() and path.name == "state.pt":
        return path.parent
    if (path / "manifest.json").is_file() or (path / "state.pt").is_file():
        return path
    directory = CheckpointDirectory(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    found = directory.pointer("best") or directory.pointer("last")
    if found is None and directory.steps():
        found = directory.folder(directory.steps()[-1])
    if found is None:
        raise MissingPath(f"{path}: holds no checkpoint: expected a checkpoint or a run directory")
    return found
