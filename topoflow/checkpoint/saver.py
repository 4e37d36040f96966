"""Saving during a run: rank 0 copies the state and writes it in the background, all ranks learn whether it worked."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.checkpoint.fingerprint import seal
from topoflow.checkpoint.host_copy import HostBuffer
from topoflow.config import CheckpointConfig
from topoflow.distributed import Context
from topoflow.errors import DataError, RanksDisagree, RunDirectoryError

log = logging.getLogger(__name__)


class CheckpointSaver:
    """Writes checkpoints of one run into its directory, and deletes those that need not stay.

    The loop waits for a copy of the state to host memory only. One write is in flight at a time, in a thread of rank 0.
    What goes wrong there waits for `settle`, in which all ranks act on it together.

    Args:
        capture: returns the whole content of a checkpoint, live tensors on any device; called on rank 0 only.
        on_commit: called with step and folder, in the main thread of rank 0, once a checkpoint is on the disk.
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
        """Of the last save, in flight or committed; None if it failed."""
        self._best_step: int | None = None
        """Of the last save of a best one, in flight, committed or failed."""
        self._failure: BaseException | None = None

    @property
    def keeps_best(self) -> bool:
        """Whether a new lowest validation loss is worth a checkpoint of its own."""
        return self._config.keep_best

    def prepare(self, nbytes: int) -> None:
        """Have host memory for a copy of about this size made ready while training begins."""
        if self._context.is_main:
            small_tensors = nbytes // 64 + 2**20  # counts of steps, buffers, and what alignment takes
            self._reserved = self._thread.submit(self._buffer.reserve, nbytes + small_tensors)

    def save(self, step: int, is_best: bool) -> None:
        """Copy the present state, that after `step` steps, and let it be written. No rank waits for another here.

        A step that was saved, or is being, is not saved again. A write that is still in flight is waited for.
        """
        self._note_write()
        is_saved = step == self._step and (not is_best or step == self._best_step)
        if not self._context.is_main or is_saved:
            return
        self._step, self._best_step = step, step if is_best else self._best_step
        reserved, self._reserved = self._reserved, None
        if reserved is not None:
            reserved.exception()  # waited for; if it found no memory, the copy asks again
        try:
            with self._context.watch.unhurried():  # the probe may compile
                state = self._buffer.copy(self._capture())
        except (OSError, DataError) as error:  # no memory, or the samples of the certificate could not be read
            self._note_failure(error)
        else:
            self._write = self._thread.submit(self._commit, state, step == self._best_step and self.keeps_best)

    def poll(self) -> bool:
        """Note a write that has ended. Returns whether one has failed; all ranks must then call `settle`."""
        if self._write is not None and self._write.done():
            self._note_write()
        return self._failure is not None

    def settle(self) -> None:
        """Act on a failed write. Every rank calls it, because rank 0's `poll` was true.

        Raises:
            RunDirectoryError: on every rank alike: checkpoint.on_error is `stop`, or the run is not ours any more.
                Older checkpoints are untouched.
        """
        self._act_on_failure("", goes_on=self._config.on_error == "continue")

    def require_saved(self, step: int, when: str) -> None:
        """Have the present state, that after `step` steps, committed; if that failed before, it is tried once more.

        No run ends as if its state were safe when it is not, whatever checkpoint.on_error says. Call on every rank.

        Raises:
            RunDirectoryError: it could not be written.
        """
        self.save(step, is_best=False)
        self._note_write()
        if self._context.broadcast_object(self._failure is not None):
            self._act_on_failure(f"{when}: the checkpoint of step {step} was not written: ", goes_on=False)

    def close(self) -> None:
        """Wait for the write in flight, however the run ends; no other rank is asked. A failure is logged."""
        self._note_write()
        self._thread.shutdown()
        if self._failure is not None and not isinstance(self._failure, RunDirectoryError):  # that has been said
            kind, message = self._describe(self._failure)
            log.error("%s", message, exc_info=self._failure if kind == "defect" else None)

    def _commit(self, state: dict[str, Any], is_best: bool) -> Path:
        """What the thread does. Old checkpoints, also the one that was resumed from, stay until this one is whole."""
        seal(state)
        folder = self._directory.save(state, is_best)
        self._directory.prune(self._config.keep_last)
        return folder

    def _act_on_failure(self, prefix: str, goes_on: bool) -> None:
        error, self._failure = self._failure, None
        kind, message = self._context.broadcast_object(self._describe(error))
        if kind == "defect" and self._context.is_main:
            raise RuntimeError(message) from error  # with the traceback of the thread
        if kind == "disk" and goes_on:
            if self._context.is_main:
                log.error("%s; training goes on (checkpoint.on_error=continue)", message)
            return
        kind_of_refusal = RanksDisagree if kind == "defect" else RunDirectoryError
        refusal = kind_of_refusal(prefix + message if kind == "disk" else message)
        refusal.shared = True
        raise refusal from error

    def _note_write(self) -> None:
        """Wait for the write in flight, if there is one, and note how it ended."""
        if self._write is None:
            return
        write, self._write = self._write, None
        error = write.exception()
        if error is not None:
            self._note_failure(error)
            return
        if isinstance(self._failure, OSError | DataError):
            log.error("%s; a later one is", self._describe(self._failure)[1])
            self._failure = None
        self._on_commit(self._step, write.result())

    def _note_failure(self, error: BaseException) -> None:
        self._step = None
        if self._failure is None or isinstance(self._failure, OSError | DataError):
            self._failure = error

    def _describe(self, error: BaseException | None) -> tuple[str, str]:
        """What kind of failure it is, and what to say about it."""
        if isinstance(error, RunDirectoryError):
            return "the run is not ours", str(error)
        if isinstance(error, OSError | DataError):
            reason = getattr(error, "strerror", None) or error
            return "disk", f"checkpoint in {self._directory.path}: not written: {reason}; older ones are as they were"
        return "defect", f"rank 0: a checkpoint was not written: {error!r}"
