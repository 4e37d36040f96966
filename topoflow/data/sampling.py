"""The order of samples, how steps and ranks share them, and the loaders that fetch them."""

import functools
import itertools
import math
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from topoflow.data.dataset import ForecastDataset
from topoflow.data.fields import FieldSource
from topoflow.errors import ConfigError, Refusal

_ORDER = 1
"""Purpose of the draw in the seed sequence."""

_ALIGNMENT = 64
"""Bytes: tensors in a parcel begin where those that torch allocates do."""


@dataclass(frozen=True)
class BatchPlan:
    """Which samples every rank takes at every optimizer step.

    Position p of the epoch's order belongs to step p // global_batch_size, the same for any number of ranks and
    workers. Within the global batch rank r takes the contiguous micro-batches [r * accumulation, (r+1) * accumulation).
    Raises ConfigError for a world size that does not divide the global batch and for fewer samples than one batch.
    """

    num_samples: int
    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __post_init__(self):
        assert 0 <= self.rank < self.world_size
        if self.global_batch_size % (self.micro_batch_size * self.world_size):
            batches, rest = divmod(self.global_batch_size, self.micro_batch_size)
            if rest:
                raise ConfigError(
                    f"train.global_batch_size: {self.global_batch_size} is not usable: "
                    f"expected a multiple of train.micro_batch_size = {self.micro_batch_size}"
                )
            usable = [str(size) for size in range(1, batches + 1) if batches % size == 0]
            raise ConfigError(
                f"world size {self.world_size} does not divide train.global_batch_size = {self.global_batch_size} in "
                f"micro-batches of train.micro_batch_size = {self.micro_batch_size}: "
                f"expected a world size of {', '.join(usable)}"
            )
        if self.num_samples < self.global_batch_size:
            raise ConfigError(
                f"data.train: {self.num_samples} samples are fewer than train.global_batch_size = "
                f"{self.global_batch_size}: expected at least one global batch"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return self.num_samples // self.global_batch_size

    @property
    def dropped(self) -> int:
        """Samples at the end of each epoch's order that do not fill a global batch; others in each epoch."""
        return self.num_samples % self.global_batch_size

    @property
    def fingerprint(self) -> str:
        """What the order of samples and their share by steps depend on: the same on all ranks."""
        return f"seed {self.seed}, {self.num_samples} samples, {self.global_batch_size} x {self.micro_batch_size}"

    def order(self, epoch: int) -> np.ndarray:
        """int64 [num_samples], a permutation: a pure function of num_samples, seed and epoch.

        Sorts raw Philox numbers: NumPy keeps the streams of seed sequences and bit generators for good (NEP 19), the
        algorithm of Generator.permutation not.
        """
        stream = np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(_ORDER, epoch)))
        return np.argsort(stream.random_raw(self.num_samples), kind="stable").astype(np.int64)

    def micro_batches(self, epoch: int, first_step: int = 0) -> Iterator[list[int]]:
        """This rank's micro-batches of the epoch from step `first_step` on: lists of sample indices.

        Each step gives `accumulation` of them, in the order of the global batch.
        """
        order = self.order(epoch)
        share = self.accumulation * self.micro_batch_size
        for step in range(first_step, self.steps_per_epoch):
            begin = step * self.global_batch_size + self.rank * share
            for first in range(begin, begin + share, self.micro_batch_size):
                yield order[first : first + self.micro_batch_size].tolist()


@dataclass(frozen=True)
class TrainBatches:
    """This rank's micro-batches of `plan` from a step of an epoch on, epoch after epoch, without end.

    Each is made when it is asked for: what is held is the order of one epoch.
    """

    plan: BatchPlan
    epoch: int
    first_step: int

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.plan.micro_batches(self.epoch, self.first_step)
        for epoch in itertools.count(self.epoch + 1):
            yield from self.plan.micro_batches(epoch)


@dataclass(frozen=True)
class EvaluationBatches:
    """The batches `numbers` of `num_samples` samples in order, batch_size at a time, the last one what is left."""

    num_samples: int
    batch_size: int
    numbers: range

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            first = number * self.batch_size
            yield list(range(first, min(first + self.batch_size, self.num_samples)))


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


class EvaluationLoader:
    """Yields (batch_index, batch) of this rank; see `build_eval_loader`."""

    def __init__(self, loader: BatchLoader, batch_indices: range):
        self._loader = loader
        self._batch_indices = batch_indices

    def __len__(self) -> int:
        return len(self._batch_indices)

    def __iter__(self) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        return zip(self._batch_indices, self._loader, strict=True)


def build_train_loader(
    dataset: ForecastDataset, plan: BatchPlan, epoch: int, first_step: int = 0, workers: int = 0
) -> BatchLoader:
    """Micro-batches of `plan` from `first_step` of `epoch` on: samples stacked along a new first dimension.

    The epochs follow each other without end, so that workers are started once: each gives plan.steps_per_epoch times
    plan.accumulation micro-batches.
    """
    assert plan.num_samples == len(dataset)
    return BatchLoader(dataset, TrainBatches(plan, epoch, first_step), workers)


def build_eval_loader(
    dataset: ForecastDataset, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 0
) -> EvaluationLoader:
    """(batch_index, batch) pairs that cover the data set once over all ranks.

    Batch j holds samples [j * batch_size, (j+1) * batch_size), the last one what is left, and belongs to rank
    j % world_size. Its contents do not depend on the world size.
    """
    indices = range(rank, math.ceil(len(dataset) / batch_size), world_size)
    batches = EvaluationBatches(len(dataset), batch_size, indices)
    return EvaluationLoader(BatchLoader(dataset, batches, workers), indices)


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
