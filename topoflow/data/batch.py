"""Batches of samples, and what makes them."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

Batch = dict[str, torch.Tensor]
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Names of a sample's tensors, and type and shape of each."""


class BatchSource(Protocol):
    """A data set that writes whole batches of samples. Several threads call `fill` at a time."""

    layout: Layout

    def __len__(self) -> int: ...

    def fill(self, indices: Sequence[int], batch: Batch) -> None:
        """Write the samples `indices` into `batch` {name: [B, ...]}, every element of it."""
        ...


def allocate_batch(layout: Layout, count: int, pinned: bool = False) -> Batch:
    """Return uninitialized memory for `count` samples: {name: [count, ...]}.

    pinned: page-locked, for asynchronous copies to a GPU. torch reuses such memory once it is released and the copies
    from it have ended.
    """
    return {name: torch.empty(count, *shape, dtype=dtype, pin_memory=pinned) for name, (dtype, shape) in layout.items()}


def make_batch(samples: BatchSource, indices: Sequence[int], pinned: bool = False) -> Batch:
    """The samples `indices`, stacked along a new first dimension, in memory of their own."""
    batch = allocate_batch(samples.layout, len(indices), pinned)
    samples.fill(indices, batch)
    return batch
