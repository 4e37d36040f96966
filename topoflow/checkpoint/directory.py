"""The checkpoints of a run: their folder, the pointers `last` and `best`, and which checkpoints are deleted."""

import hashlib
import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from topoflow.checkpoint.file import read_checkpoint, verify_checkpoint, write_checkpoint
from topoflow.errors import CheckpointUnreadable, MissingPath, ResumeRefused, RunDirectoryError
from topoflow.files import Guard, discard, flush_folder, write_atomically
from topoflow.text import shorten

log = logging.getLogger(__name__)

FOLDER_NAME = r"step-(\d{8,})"
POINTERS = ("last", "best")


class CheckpointDirectory:
    """`RUN/checkpoints`: folders step-00000042 and the small text files `last` and `best` that each name one of them.

    A pointer's first line is the name of a folder, its second the SHA-256 of the first, so that a flipped byte cannot
    make it name another checkpoint.

    Args:
        guard: entered around every rename, pointer write and delete, see `topoflow.run_dir`.
        on_progress: called repeatedly while a checkpoint is written.
    """

    def __init__(self, path: Path, guard: Guard = nullcontext, on_progress: Callable[[], None] = lambda: None):
        self.path, self._guard, self._on_progress = Path(path), guard, on_progress

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, oldest first, damaged ones included."""
        matches = (re.fullmatch(FOLDER_NAME, name) for name in self._names())
        return sorted(int(match[1]) for match in matches if match)

    def folder(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` steps."""
        return self.path / f"step-{step:08d}"

    def is_parent_of(self, folder: Path) -> bool:
        """Return whether a checkpoint lies in this directory."""
        return folder.resolve().parent == self.path.resolve()

    def pointer(self, name: str) -> Path | None:
        """Return the checkpoint that `last` or `best` names; None if there is no such pointer.

        Raises:
            ResumeRefused: the pointer is damaged, or names a folder that does not exist.
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
            raise ResumeRefused(f"checkpoint pointer {file}: names {target.name!r}, which does not exist")
        return target

    def save(self, state: dict[str, Any], is_best: bool) -> Path:
        """Write a checkpoint for its step, then move the pointers to it.

        The folder is created when needed; the run directory is not, so that one that vanished does not reappear.

        Raises:
            OSError: the file system refused; earlier checkpoints are intact.
            RunDirectoryError: the guard refused; the same holds.
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
        """Return the newest undamaged checkpoint with its state; None if the run never had a checkpoint.

        A damaged checkpoint is skipped with a warning that names it; one that is temporarily unreadable is not.

        Args:
            strict: refuse if the newest, or a pointer, is damaged.

        Raises:
            ResumeRefused: every checkpoint is damaged, or there were checkpoints and they are missing.
        """
        self.require_not_lost()
        steps = self.steps()
        if not steps and self.traces():
            raise ResumeRefused(
                f"{self.path}: holds {shorten(self.traces())}, but no checkpoint to resume from: "
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
            raise ResumeRefused(f"{self.path}: none of {len(steps)} checkpoints is intact: expected at least one")
        return None

    def traces(self) -> list[str]:
        """Return the names of everything that a committed checkpoint left here: checkpoints, archived ones, pointers.

        Leftovers of a killed save do not count, because it was never committed.
        """
        pattern = rf"{FOLDER_NAME}|abandoned-{FOLDER_NAME}(-\d+)?|{'|'.join(POINTERS)}"
        return [name for name in self._names() if re.fullmatch(pattern, name)]

    def require_not_lost(self) -> None:
        """Refuse to start if the run's files record a checkpoint but there are no checkpoints.

        Raises:
            ResumeRefused: the folder is missing or empty although the run had checkpoints (its file system may not be
                mounted), or is a link to nothing, or cannot be read.
        """
        if self.traces():
            return
        record = self._record_of_checkpoint()
        if record is not None:
            found = "holds no checkpoint" if os.path.lexists(self.path) else "is missing"
            raise ResumeRefused(
                f"{self.path}: {found}, but {record[0]} records {record[1]}: expected the checkpoints (is their file "
                f"system mounted?), another run.dir, or {record[0]} removed to start over"
            )

    def _record_of_checkpoint(self) -> tuple[Path, str] | None:
        """Return a file of the run that records a checkpoint in this folder, and what it records.

        A `train` event is not enough: a run that was stopped before its first checkpoint starts again. Neither is a
        resume from another run's checkpoint, since the run may have been stopped before its own first one.
        """
        metrics, report = self.path.parent / "metrics.jsonl", self.path.parent / "resume.json"
        try:
            lines = metrics.read_bytes().splitlines() if metrics.exists() else []
            resumed = _parse_object(report.read_bytes()).get("from") if report.exists() else None
        except OSError as error:
            raise ResumeRefused(f"{error.filename}: cannot be read: {error.strerror}") from None
        for event in map(_parse_object, reversed(lines)):
            if event.get("event") == "checkpoint":
                return metrics, f"a checkpoint of step {event.get('step')}"
        if isinstance(resumed, str) and self.is_parent_of(Path(resumed)):
            return report, f"a resume from {Path(resumed).name}"
        return None

    def choose_best_or_last(self) -> Path:
        """Return the best checkpoint, or the last one where the best is missing or damaged; log which and why.

        Raises:
            MissingPath: there is neither.
            ResumeRefused: `last` is damaged, too, or the best is temporarily unreadable.
        """
        try:
            best = self.pointer("best")
            if best is not None:
                verify_checkpoint(best)
                return best
            log.info("no best checkpoint: using the last one")
        except CheckpointUnreadable:
            raise
        except ResumeRefused as damage:
            log.warning("best checkpoint cannot be used: %s; using the last one instead", damage)
        return self.choose_last()

    def choose_last(self) -> Path:
        """Return the last checkpoint: the one that `last` names or, where that is missing, the newest.

        Raises:
            MissingPath: there is none.
            ResumeRefused: `last` is damaged.
        """
        last = self.pointer("last") or (self.folder(self.steps()[-1]) if self.steps() else None)
        if last is None:
            raise MissingPath(f"{self.path}: holds no checkpoint: expected a checkpoint or a run directory")
        return last

    def archive_after(self, step: int) -> list[Path]:
        """Rename checkpoints of later steps to abandoned-step-N: a run that resumes from `step` must never load them.

        `last` then names the checkpoint of `step`, and `best` none of the later ones. Return the new paths.

        Raises:
            RunDirectoryError: a checkpoint cannot be renamed.
        """
        later = [later for later in self.steps() if later > step]
        renamed = []
        with self._changing("archived"):
            if self.folder(step).is_dir():
                self._point("last", self.folder(step))
            for name in POINTERS:
                if self._named_by(name) in list(map(self.folder, later)):
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
        """Delete all but the newest `keep_last` checkpoints and the best; return the deleted ones.

        While the pointer `best` is damaged nothing is deleted, since any checkpoint may be the best.
        """
        try:
            best, folders = self.pointer("best"), [self.folder(step) for step in self.steps()]
        except ResumeRefused as damage:
            log.warning("%s; no old checkpoint is deleted until it is repaired", damage)
            return []
        gone = [folder for folder in folders[:-keep_last] if folder != best]
        for folder in gone:
            discard(folder, self._guard)
        return gone

    def clean_up(self) -> None:
        """Remove what a killed process left behind; restore a checkpoint that it was replacing.

        Raises:
            RunDirectoryError: that checkpoint cannot be renamed.
            ResumeRefused: the folder cannot be read.
        """
        with self._changing("restored"):
            for name in self._names():
                replaced = re.fullmatch(rf"\.replaced-({FOLDER_NAME})-.*", name)
                if replaced and not (self.path / replaced[1]).exists():
                    with self._guard():
                        os.rename(self.path / name, self.path / replaced[1])
                    flush_folder(self.path)
        for name in self._names():
            if name.startswith((".replaced-", ".writing-", ".deleting-")):
                discard(self.path / name, self._guard)

    def point(self, name: str, folder: Path | None) -> None:
        """Make `last` or `best` name this checkpoint, in one rename; None removes the pointer.

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
        """Return the names in the folder, sorted; none if there is no such folder.

        Raises:
            ResumeRefused: it cannot be read, or is a link to nothing.
        """
        try:
            return sorted(os.listdir(self.path))
        except FileNotFoundError:
            if self.path.is_symlink():
                raise ResumeRefused(
                    f"{self.path}: a link to {os.readlink(self.path)}, which does not exist: expected its file system "
                    "mounted, or another run.dir"
                ) from None
            return []
        except NotADirectoryError:
            return []
        except OSError as error:
            raise ResumeRefused(f"{self.path}: cannot be read: {error.strerror}") from None

    def _point(self, name: str, folder: Path) -> None:
        if self._named_by(name) != folder:
            write_atomically(self.path / name, _pointer_text(folder.name), self._guard)

    def _named_by(self, name: str) -> Path | None:
        """Return the path that an undamaged pointer names, existing or not."""
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
                log.warning("%s; the newest intact checkpoint is used", damage)
            else:
                if found is None and name == "last" and self.steps():
                    log.warning(
                        "checkpoint pointer %s: is missing; the newest intact checkpoint is used", self.path / name
                    )

    @contextmanager
    def _changing(self, how: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunDirectoryError(f"{self.path}: a checkpoint cannot be {how}: {error.strerror or error}") from None


def find_directory(path: Path) -> CheckpointDirectory:
    """Return the checkpoint directory that a path means: that of a run directory, else the path itself.

    Raises:
        MissingPath: no such path.
    """
    # os.path returns False where permission is missing; Path.exists raises
    if not os.path.exists(path):
        raise MissingPath(f"{path}: not found: expected a checkpoint or a run directory")
    return CheckpointDirectory(path / "checkpoints" if os.path.lexists(path / "checkpoints") else path)


def find_checkpoint(path: Path, run_dir: Path | str = "RUN", prefer_best: bool = True) -> Path:
    """Return the checkpoint folder that a path means: itself, or the one to use of a run directory.

    Args:
        run_dir: for the advice on how to import another program's file.
        prefer_best: of a run directory, the best checkpoint if there is one, else the last.

    Raises:
        MissingPath: no such path, or it holds no checkpoint.
        ResumeRefused: a file of another program; see also `CheckpointDirectory.choose_best_or_last`.
    """
    path = Path(path)
    directory = find_directory(path)
    if path.name == "state.pt" and os.path.isfile(path):
        return path.parent
    if os.path.isfile(path):
        words = ["python", "-m", "topoflow", "import-lightning", str(path), "--config", "CONFIG", "-o", str(run_dir)]
        raise ResumeRefused(
            f"{path}: a file: expected a TopoFlow checkpoint folder or run directory; "
            f"import a Lightning checkpoint with: {shlex.join(words)}"
        )
    if os.path.isfile(path / "manifest.json") or os.path.isfile(path / "state.pt"):
        return path
    return directory.choose_best_or_last() if prefer_best else directory.choose_last()


def _pointer_text(name: str) -> str:
    return f"{name}\n{hashlib.sha256(name.encode()).hexdigest()}\n"


def _first_line(content: bytes) -> str:
    return content.partition(b"\n")[0].decode("utf-8", errors="replace")


def _parse_object(text: bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one for a torn or damaged text."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
