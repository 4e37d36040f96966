"""The loader of batches."""

import functools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from topoflow.data.batch_memory import Batch, BatchMemory, BatchSource, SharedSlots, make_batch
from topoflow.data.worker_process import WorkerContext, deferred_sigterm, start_worker
from topoflow.errors import Refusal

_PREFETCHED = 2
"""Batches that torch's loader requests from each worker in advance."""


class _Batches(torch.utils.data.Dataset):
    """What torch's loader indexes, by the samples of a batch: in a worker's process, or in this one.

    A worker returns (slot, number of samples), and is at most _PREFETCHED batches ahead of the one that was taken last:
    torch requests one more batch from a worker for each that it returns. So with one more slot than that, a batch that
    was taken stays valid until the next one is taken.
    """

    def __init__(self, samples: BatchSource):
        self.samples = samples
        self.slots: SharedSlots | None = None
        self._filled = 0

    def __getitem__(self, indices: list[int]) -> Batch | tuple[int, int]:
        worker = get_worker_info()
        if worker is None:
            return make_batch(self.samples, indices, pinned=_is_for_gpu())
        assert self.slots is not None, "the loader makes them before it forks a worker"
        slot = self.slots.number(worker.id, self._filled)
        self._filled += 1
        self.samples.fill(indices, self.slots.open(slot, len(indices)))
        return slot, len(indices)


class BatchLoader(DataLoader):
    """A DataLoader over given batches whose workers do not touch signals, handles or the random state.

    A refusal raised in a worker is raised again here as the same one-line error. batch_size: samples in the largest
    batch.
    """

    def __init__(self, samples: BatchSource, batches: Iterable[list[int]], batch_size: int, workers: int):
        source = _Batches(samples)
        super().__init__(
            source,
            sampler=batches,
            batch_size=None,  # the data set makes whole batches
            num_workers=workers,
            prefetch_factor=_PREFETCHED if workers > 0 else None,
            collate_fn=_as_it_is,
            multiprocessing_context=WorkerContext() if workers > 0 else None,
            worker_init_fn=functools.partial(start_worker, os.getpid()),
            # seeds of workers are drawn from here, not from the global stream; nothing in a sample is random
            generator=torch.Generator().manual_seed(0),
        )
        self._source = source
        self._memory = BatchMemory(samples.layout, batch_size)

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]  (torch names a private class)
        if self.num_workers == 0:
            return _surface_refusals(super().__iter__())
        self._source.samples.source.close()  # each worker opens its own handles
        slots = self._source.slots = SharedSlots(self._memory, self.num_workers, _PREFETCHED + 1)
        with deferred_sigterm():  # it would end a worker that has not reached start_worker yet
            filled = super().__iter__()
        pinned = _is_for_gpu()
        batches = (slots.copy(slot, count, pinned) for slot, count in filled)
        # on CPU all cores are computing: a thread that fetches batches would only slow them down
        return _surface_refusals(_fetch_ahead(batches) if pinned else batches)


def _as_it_is(batch: Any) -> Any:
    return batch


def _is_for_gpu() -> bool:
    """Return whether the run uses a GPU: it does so before it loads its first batch."""
    return torch.cuda.is_initialized()


def _fetch_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the same batches, each copied by a thread while the previous one is used: copying takes milliseconds."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        try:
            while (batch := coming.result()) is not None:
                coming = pool.submit(next, batches, None)
                yield batch
        finally:
            del coming  # its exception would keep this frame alive, and with it the workers


def _surface_refusals(batches: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except Refusal as refusal:
        # torch re-raises a worker's exception with its traceback as the message; the last line is "type: message"
        lines = str(refusal).rstrip().splitlines()
        if len(lines) == 1:
            raise
        refusal.__traceback__ = None  # its frames would keep the workers alive until a garbage collection
        raise type(refusal)(lines[-1].partition(": ")[2]) from None
