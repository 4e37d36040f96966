"""The loader of batches, and its worker processes."""

import functools
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.data import DataLoader

from topoflow.data.fields import FieldSource
from topoflow.errors import Refusal

_ALIGNMENT = 64
"""Bytes: tensors in a parcel begin where those that torch allocates do."""


class MakesBatches(Protocol):
    """A data set that makes whole batches of samples: {name: [B, ...]}. source: what it reads, closed before a fork."""

    source: FieldSource

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The samples `indices`, stacked along a new first dimension."""


@dataclass(frozen=True)
class _Batches(torch.utils.data.Dataset):
    """What torch's loader indexes, by the samples of a batch."""

    samples: MakesBatches

    def __getitem__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return self.samples.batch(indices)


class BatchLoader(DataLoader):
    """A DataLoader over given batches whose workers leave signals, handles and the random state alone.

    A refusal raised in a worker arrives as itself, one line.
    """

    def __init__(self, dataset: MakesBatches, batches: Iterable[list[int]], workers: int):
        super().__init__(
            _Batches(dataset),
            sampler=batches,
            batch_size=None,  # the data set makes whole batches
            num_workers=workers,
            collate_fn=_Parcel.of if workers > 0 else _as_it_is,
            # the fields in memory are shared with the workers, copy-on-write
            multiprocessing_context="fork" if workers > 0 else None,
            worker_init_fn=functools.partial(_start_worker, os.getpid()),
            pin_memory=torch.cuda.is_available(),
            # seeds of workers are drawn from here, not from the global stream; nothing in a sample is random
            generator=torch.Generator().manual_seed(0),
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if self.num_workers > 0:
            self.dataset.samples.source.close()  # each worker opens its own handles
        with _deferred_sigterm():  # which would end a worker that has not come to _start_worker yet
            batches = super().__iter__()
        return _surface_refusals(_fetch_ahead(batches) if self.num_workers > 0 else batches)


@dataclass(frozen=True)
class _Parcel:
    """A batch on its way from a worker: its tensors as one, since each takes a file descriptor and half a millisecond.

    data: uint8 [n]. layout: name, type, shape and first byte of each tensor.
    """

    data: torch.Tensor
    layout: tuple[tuple[str, torch.dtype, torch.Size, int], ...]

    @classmethod
    def of(cls, batch: dict[str, torch.Tensor]) -> "_Parcel":
        """What a data set made."""
        layout, end = [], 0
        for name, tensor in batch.items():
            layout.append((name, tensor.dtype, tensor.shape, end))
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        data = torch.empty(end, dtype=torch.uint8)
        for (_, _, _, begin), tensor in zip(layout, batch.values(), strict=True):
            data[begin : begin + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
        return cls(data, tuple(layout))

    def pin_memory(self) -> "_Parcel":
        """What torch calls to ready it for a GPU."""
        return _Parcel(self.data.pin_memory(), self.layout)

    def opened(self) -> dict[str, torch.Tensor]:
        """The batch; its tensors are parts of the parcel."""
        sizes = [dtype.itemsize * shape.numel() for _, dtype, shape, _ in self.layout]
        return {
            name: self.data[begin : begin + size].view(dtype).view(shape)
            for (name, dtype, shape, begin), size in zip(self.layout, sizes, strict=True)
        }


def _as_it_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch


def _fetch_ahead(batches: Iterator[_Parcel]) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of workers; while one is used, a thread takes the next one from them.

    That takes some milliseconds, most of them for the file descriptor of its shared memory, and the loop would wait.
    """
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        try:
            while (parcel := coming.result()) is not None:
                coming = pool.submit(next, batches, None)
                yield parcel.opened()
        finally:
            del coming  # an exception that it holds holds this frame, and with it the workers


def _surface_refusals(batches: Iterator[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    try:
        yield from batches
    except Refusal as refusal:
        # torch re-raises a worker's exception with its traceback as the message; the last line is "type: message"
        lines = str(refusal).rstrip().splitlines()
        if len(lines) == 1:
            raise
        refusal.__traceback__ = None  # its frames hold it, and the workers, until the collector comes by
        raise type(refusal)(lines[-1].partition(": ")[2]) from None


@contextmanager
def _deferred_sigterm() -> Iterator[None]:
    """A SIGTERM that comes while the block runs arrives after it; a process forked inside never gets one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(parent: int, _: int) -> None:
    """Leave signals to the parent: a stop asked of the whole job must not end the workers before its last step."""
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """Obey SIGTERM from the parent process alone, as torch's own handler does, and end when the parent is gone.

    torch looks for that too, but a worker whose parent was killed while it started would wait for work for ever.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
