"""The order of samples, how steps and ranks share them, and which loaders fetch them."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from topoflow.data.batch import BatchSource
from topoflow.data.dataset import ForecastDataset
from topoflow.data.loader import BatchLoader
from topoflow.errors import ConfigError, ResumeRefused

_ORDER = 1
"""Purpose of the draw in the seed sequence."""


@dataclass(frozen=True)
class BatchPlan:
    """Which samples every rank takes at every optimizer step.

    Position p of the epoch's order belongs to step p // global_batch_size, the same for any number of ranks and loader
    threads. Within the global batch rank r takes the contiguous micro-batches [r * accumulation, (r+1) * accumulation).
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

    def require_position(self, samples: int, what: str) -> None:
        """Check that a position in an epoch is between two steps: other data or batch sizes can put it inside one.

        Args: samples, of the epoch, that are done; what, the same in words.

        Raises:
            ResumeRefused: it is inside a batch, or past the epoch.
        """
        if samples % self.global_batch_size or samples >= self.steps_per_epoch * self.global_batch_size:
            raise ResumeRefused(
                f"position: {what} are done, which is not between two steps of an epoch of {self.steps_per_epoch} "
                f"batches of train.global_batch_size = {self.global_batch_size}: expected sizes that fit, or a "
                "checkpoint from the end of an epoch"
            )

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
    dataset: ForecastDataset, plan: BatchPlan, epoch: int, first_step: int = 0, threads: int = 0
) -> BatchLoader:
    """Micro-batches of `plan` from `first_step` of `epoch` on: samples stacked along a new first dimension.

    The epochs follow each other without end, so that no epoch waits for its first batches: each gives
    plan.steps_per_epoch times plan.accumulation micro-batches. Those of a whole step are loaded in advance.
    """
    assert plan.num_samples == len(dataset)
    ahead = max(threads + 1, plan.accumulation)
    return BatchLoader(dataset, TrainBatches(plan, epoch, first_step), threads, ahead)


def build_eval_loader(
    dataset: BatchSource, batch_size: int, rank: int = 0, world_size: int = 1, threads: int = 0
) -> EvaluationLoader:
    """(batch_index, batch) pairs that cover the data set once over all ranks.

    Batch j holds samples [j * batch_size, (j+1) * batch_size), the last one what is left, and belongs to rank
    j % world_size. Its contents do not depend on the world size.
    """
    indices = range(rank, math.ceil(len(dataset) / batch_size), world_size)
    batches = EvaluationBatches(len(dataset), batch_size, indices)
    return EvaluationLoader(BatchLoader(dataset, batches, threads), indices)
