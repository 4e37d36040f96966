"""Batches in one piece of memory each, and the memory in which they come from a loader's workers."""

import math
import mmap
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from topoflow.data.fields import FieldSource

Batch = dict[str, torch.Tensor]
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Names of a sample's tensors, and type and shape of each."""

_ALIGNMENT = 64
"""Bytes: tensors begin where those that torch allocates do."""


class BatchSource(Protocol):
    """A data set that writes whole batches of samples. source: what it reads, closed before a fork."""

    source: FieldSource
    layout: Layout

    def __len__(self) -> int: ...

    def fill(self, indices: Sequence[int], batch: Batch) -> None:
        """Write the samples `indices` into `batch` {name: [B, ...]}, every element of it."""
        ...


class BatchMemory:
    """Pieces of memory for batches of at most `batch_size` samples of a layout."""

    def __init__(self, layout: Layout, batch_size: int):
        self._places, end = [], 0
        for name, (dtype, shape) in layout.items():
            size = batch_size * math.prod(shape) * dtype.itemsize
            self._places.append((name, dtype, (batch_size, *shape), slice(end, end + size)))
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = end

    def allocate(self, pinned: bool = False) -> torch.Tensor:
        """Allocate memory for one batch, uint8 [nbytes]. pinned: page-locked, for asynchronous copies to a GPU."""
        return torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=pinned)

    def open(self, piece: torch.Tensor, count: int) -> Batch:
        """A batch of `count` samples that lies in `piece`: {name: [count, ...]}."""
        return {name: piece[place].view(dtype).view(shape)[:count] for name, dtype, shape, place in self._places}


def make_batch(samples: BatchSource, indices: Sequence[int], pinned: bool = False) -> Batch:
    """The samples `indices`, stacked along a new first dimension, in memory of their own."""
    memory = BatchMemory(samples.layout, len(indices))
    batch = memory.open(memory.allocate(pinned), len(indices))
    samples.fill(indices, batch)
    return batch


class SharedSlots:
    """Pieces of memory that this process shares with the workers it forks from now on, some for each worker.

    A worker fills its slots in turn. torch's own way, a file in shared memory for each batch whose descriptor is
    handed over, costs each side two milliseconds, more than making the batch; and a container may limit such files.
    """

    def __init__(self, memory: BatchMemory, workers: int, per_worker: int):
        self._memory, self._per_worker = memory, per_worker
        count = workers * per_worker
        # a page of its own for each: they are written by different processes
        stride = -(-memory.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        shared = np.frombuffer(mmap.mmap(-1, count * stride), np.uint8)
        self._pieces = [shared[slot * stride : slot * stride + memory.nbytes] for slot in range(count)]

    def number(self, worker: int, nth: int) -> int:
        """Which slot a worker's nth batch goes into."""
        return worker * self._per_worker + nth % self._per_worker

    def open(self, slot: int, count: int) -> Batch:
        """The batch of `count` samples in a slot."""
        return self._memory.open(torch.from_numpy(self._pieces[slot]), count)

    def copy(self, slot: int, count: int, pinned: bool) -> Batch:
        """Likewise, in memory of its own: the slot may then be filled anew."""
        piece = self._memory.allocate(pinned)
        # not by torch: its threads for this thread would slow down those of the loop, as in checkpoint.fingerprint
        np.copyto(piece.numpy(), self._pieces[slot])
        return self._memory.open(piece, count)
