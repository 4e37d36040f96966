"""Saving during a run: rank 0 copies the state and writes it in the background, all ranks learn whether it worked."""

import logging
import mmap
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.checkpoint.fingerprint import seal
from topoflow.config import CheckpointConfig
from topoflow.errors import DataError, RanksDisagree, RunDirectoryError
from topoflow.ranks import Context

_ALIGNMENT = 64
_MADV_WIPEONFORK = 18
"""<linux/mman.h>, since Linux 4.14; not in Python's mmap."""


class HostBuffer:
    """Host memory that every copy uses again: the tensors of one copy are gone when the next is taken.

    Args:
        pinned: page-locked, which lets a GPU copy on its own.
    """

    def __init__(self, pinned: bool):
        self._pinned, self._memory = pinned, memoryview(b"")

    def reserve(self, nbytes: int) -> None:
        """Have this much memory at hand, every page of it touched: the first copy is then as fast as later ones.

        Raises:
            OSError: there is not so much.
        """
        if len(self._memory) < nbytes:
            self._memory = memoryview(b"")  # before the larger one is taken
            self._memory = _allocate_pinned(nbytes) if self._pinned else _allocate_pageable(nbytes)

    def copy(self, tree: Any) -> Any:
        """The tree (nested dicts and lists of tensors and plain values) with each tensor copied to the host.

        Each has a storage of its own, so that torch.save writes no more than it.

        Raises:
            OSError: there is not enough memory.
        """
        self.reserve(sum(_room(tensor) for tensor in _tensors(tree)))
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
            copied = _map_tensors(tree, take)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return copied


def _allocate_pageable(nbytes: int) -> memoryview:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        # A loader worker that is forked would share these pages, and the next copy would first duplicate each of them.
        # It gets empty ones. With MADV_DONTFORK it would get none, and what it then maps to that place would be gone
        # when this object is freed there.
        for advice in (_MADV_WIPEONFORK, mmap.MADV_HUGEPAGE):
            with suppress(OSError):  # a kernel without it
                memory.madvise(advice)
    np.frombuffer(memory, np.uint8)[:] = 0  # not by torch, see `topoflow.checkpoint.fingerprint`
    return memoryview(memory)


def _allocate_pinned(nbytes: int) -> memoryview:
    return memoryview(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy())


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(item)


def _map_tensors(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The tree with `function` of each tensor, in containers of its own."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map_tensors(item, function) for item in tree)
    return tree


log = logging.getLogger(__name__)


class CheckpointSaver:
    """Writes checkpoints of one run into its directory, and deletes those that need not stay.

    The loop waits for a copy of the state to host memory only. One write is in flight at a time, in a thread of rank 0.
    What goes wrong there waits for `handle_failed_save`, in which all ranks act on it together.

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

    def is_due(self, step: int, is_best: bool) -> bool:
        """Return whether the state after `step` steps is to be saved: by checkpoint.every_steps, or as a new best."""
        every = self._config.every_steps
        return bool(every and step % every == 0) or (is_best and self._config.keep_best)

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
            self._write = self._thread.submit(self._commit, state, step == self._best_step and self._config.keep_best)

    def poll(self) -> bool:
        """Note a write that has ended; return whether one failed. All ranks must then call `handle_failed_save`."""
        if self._write is not None and self._write.done():
            self._note_write()
        return self._failure is not None

    def handle_failed_save(self) -> None:
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
