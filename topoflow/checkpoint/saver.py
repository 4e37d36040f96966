"""Saving during a run: rank 0 copies the state and writes it in the background; all ranks handle a failed write."""

import logging
import mmap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.checkpoint.file import map_tensors, named_tensors
from topoflow.checkpoint.fingerprint import seal
from topoflow.config import CheckpointConfig
from topoflow.errors import DataError, RanksDisagree, ResumeRefused, RunDirectoryError
from topoflow.ranks import Context

log = logging.getLogger(__name__)

_ALIGNMENT = 64


class HostBuffer:
    """Host memory that every copy reuses: a copy overwrites the tensors of the one before.

    Reuse pays: with fresh memory for each copy, training waits twice as long for a save.

    Args:
        pinned: page-locked, so that a GPU copies without the host.
    """

    def __init__(self, pinned: bool):
        self._pinned, self._memory = pinned, memoryview(b"")

    def reserve(self, nbytes: int) -> None:
        """Allocate this much memory and touch every page, so that the first copy is as fast as later ones.

        Raises:
            OSError: not enough memory.
        """
        if len(self._memory) < nbytes:
            self._memory = memoryview(b"")  # freed before the larger one is allocated
            if self._pinned:
                self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy().data
            else:
                # not by torch or NumPy, which raise other errors where memory is short
                self._memory = memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
                np.frombuffer(self._memory, np.uint8)[:] = 0  # not by torch: see `topoflow.checkpoint.fingerprint`

    def copy(self, tree: Any) -> Any:
        """Return the tree (nested dicts of tensors and plain values) with each tensor copied to the host.

        Each copy has its own storage, so that torch.save writes nothing else.

        Raises:
            OSError: not enough memory.
        """
        self.reserve(sum(_room(tensor) for _, tensor in named_tensors(tree)))
        position, devices = 0, set()

        def take(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal position
            if tensor.numel() == 0:
                return torch.empty(tensor.shape, dtype=tensor.dtype)
            copy = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=position)
            position += _room(tensor)
            devices.add(tensor.device)
            return copy.view(tensor.shape).copy_(tensor.detach(), non_blocking=True)

        with torch.no_grad():
            copied = map_tensors(tree, take)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return copied


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


class CheckpointSaver:
    """Writes checkpoints of one run into its directory, and deletes old ones.

    Training waits only for a copy of the state to host memory. One write is in flight at a time, in a thread of rank 0.
    An error there is kept until all ranks call `handle_failed_save`.

    Args:
        capture: returns the content of a checkpoint with live tensors on any device; called on rank 0 only.
        on_commit: called with step and folder, in the main thread of rank 0, once a checkpoint is on disk.
    """

    def __init__(
        self,
        context: Context,
        directory: CheckpointDirectory,
        config: CheckpointConfig,
        capture: Callable[[], dict[str, Any]],
        on_commit: Callable[[int, Path], None],
    ):
        self._context, self._directory, self._config = context, directory, config
        self._capture, self._on_commit = capture, on_commit
        self._buffer = HostBuffer(pinned=context.device.type == "cuda")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._reserved: Future[None] | None = None
        self._write: Future[Path] | None = None
        self._step: int | None = None
        """Step of the last save, in flight or committed; None if it failed."""
        self._best_step: int | None = None
        """Step of the last save of a best state, in flight, committed or failed."""
        self._failure: BaseException | None = None

    def is_due(self, step: int, is_best: bool) -> bool:
        """Return whether the state after `step` steps is to be saved: by checkpoint.every_steps, or as a new best."""
        every = self._config.every_steps
        return bool(every and step % every == 0) or (is_best and self._config.keep_best)

    def prepare(self, nbytes: int) -> None:
        """Allocate host memory for a copy of about this size in the background while training begins."""
        if self._context.is_main:
            small_tensors = nbytes // 64 + 2**20  # step counts, buffers and alignment
            self._reserved = self._thread.submit(self._buffer.reserve, nbytes + small_tensors)

    def save(self, step: int, is_best: bool) -> None:
        """Copy the current state, after `step` steps, and start writing it. No rank waits for another here.

        A step that is saved or in flight is not saved again. Waits for an earlier write that is still in flight.
        """
        self._note_write()
        is_saved = step == self._step and (not is_best or step == self._best_step)
        if not self._context.is_main or is_saved:
            return
        self._step, self._best_step = step, step if is_best else self._best_step
        reserved, self._reserved = self._reserved, None
        if reserved is not None:
            reserved.exception()  # wait; if it failed for lack of memory, the copy tries again
        try:
            with self._context.watch.unhurried():  # the probe may compile
                state = self._buffer.copy(self._capture())
        except (OSError, DataError) as error:  # out of memory, or samples of the certificate unreadable
            self._note_failure(error)
        else:
            self._write = self._thread.submit(self._commit, state, step == self._best_step and self._config.keep_best)

    def poll(self) -> bool:
        """Note a write that has ended; return whether one failed. All ranks must then call `handle_failed_save`."""
        if self._write is not None and self._write.done():
            self._note_write()
        return self._failure is not None

    def handle_failed_save(self) -> None:
        """Handle a failed write: log it or raise. Call on every rank once `poll` returned True on rank 0.

        Raises:
            RunDirectoryError: on every rank: checkpoint.on_error is `stop`, or another process holds the run directory.
        """
        self._log_or_raise("", may_continue=self._config.on_error == "continue")

    def require_saved(self, step: int, when: str) -> None:
        """Commit the current state, after `step` steps; a failed save of this step is tried once more.

        A failure is raised whatever checkpoint.on_error is, so that no such run appears successful. Call on every
        rank.

        Raises:
            RunDirectoryError: it could not be written.
        """
        self.save(step, is_best=False)
        self._note_write()
        if self._context.broadcast_object(self._failure is not None):
            self._log_or_raise(f"{when}: the checkpoint of step {step} was not written: ", may_continue=False)

    def close(self) -> None:
        """Wait for the write in flight, however the run ends, without other ranks. Log a failure."""
        self._note_write()
        self._thread.shutdown()
        if self._failure is not None and not isinstance(
            self._failure, RunDirectoryError
        ):  # the end of the run reports it
            kind, message = self._describe(self._failure)
            log.error("%s", message, exc_info=self._failure if kind == "defect" else None)

    def _commit(self, state: dict[str, Any], is_best: bool) -> Path:
        """Write a checkpoint, in the thread. Old ones, and the one resumed from, stay until this one is complete."""
        seal(state)
        folder = self._directory.save(state, is_best)
        self._directory.prune(self._config.keep_last)
        return folder

    def _log_or_raise(self, prefix: str, may_continue: bool) -> None:
        error, self._failure = self._failure, None
        kind, message = self._context.broadcast_object(self._describe(error))
        if kind == "defect" and self._context.is_main:
            raise RuntimeError(message) from error  # with the traceback of the thread
        if kind == "disk" and may_continue:
            if self._context.is_main:
                log.error("%s; training continues (checkpoint.on_error=continue)", message)
            return
        kind_of_refusal = RanksDisagree if kind == "defect" else RunDirectoryError
        raise kind_of_refusal(prefix + message if kind == "disk" else message, shared=True) from error

    def _note_write(self) -> None:
        """Wait for the write in flight, if any, and record its result."""
        if self._write is None:
            return
        write, self._write = self._write, None
        error = write.exception()
        if error is not None:
            self._note_failure(error)
            return
        if isinstance(self._failure, OSError | DataError):
            log.error("%s; the later save of step %d succeeded", self._describe(self._failure)[1], self._step)
            self._failure = None
        assert self._step is not None  # a write has a step until it fails
        self._on_commit(self._step, write.result())

    def _note_failure(self, error: BaseException) -> None:
        self._step = None
        if self._failure is None or isinstance(self._failure, OSError | DataError):
            self._failure = error

    def _describe(self, error: BaseException | None) -> tuple[str, str]:
        """Return the kind of a failure and a message about it."""
        if isinstance(error, RunDirectoryError):
            return "run directory lost", str(error)
        if isinstance(error, OSError | DataError):
            reason = getattr(error, "strerror", None) or error
            return (
                "disk",
                f"checkpoint in {self._directory.path}: not written: {reason}; {self._existing_checkpoints()}",
            )
        return "defect", f"rank 0: a checkpoint was not written: {error!r}"

    def _existing_checkpoints(self) -> str:
        try:
            steps = self._directory.steps()
        except ResumeRefused:
            return "its folder is temporarily unreadable"
        return f"existing checkpoints: step {', '.join(map(str, steps))}" if steps else "no checkpoint exists"
