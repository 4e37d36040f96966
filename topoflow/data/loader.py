"""The loader of batches."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from topoflow.data.batch import Batch, BatchSource, allocate_batch, make_batch


class BatchLoader:
    """Iterates over given batches in order, and loads the next ones in threads meanwhile.

    Each batch has memory of its own and stays valid as long as it is held; it is page-locked if the process uses a GPU.
    An exception in a thread is raised where its batch would have been returned. Ending an iteration early drops the
    batches that no thread has begun, and does not wait for the others.

    Args:
        batches: indices of the samples of each batch; asked for in the calling thread, as far as batches are loaded.
        threads: 0 loads each batch in the calling thread when it is requested.
        ahead: batches that are loaded or ready while one is in use; by default one more than there are threads.
    """

    def __init__(
        self, samples: BatchSource, batches: Iterable[Sequence[int]], threads: int = 0, ahead: int | None = None
    ):
        self._samples, self._batches, self._threads = samples, batches, threads
        self._ahead = threads + 1 if ahead is None else ahead

    def __iter__(self) -> Iterator[Batch]:
        if self._threads:
            return self._load_ahead()
        return (make_batch(self._samples, indices, _is_for_gpu()) for indices in self._batches)

    def _load_ahead(self) -> Iterator[Batch]:
        batches, loading = iter(self._batches), deque[Future[Batch]]()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="loader")
        try:
            while True:
                # one more than `ahead`: the first of them is returned now
                for indices in itertools.islice(batches, self._ahead + 1 - len(loading)):
                    # memory comes from this thread, whose current device is the run's
                    batch = allocate_batch(self._samples.layout, len(indices), _is_for_gpu())
                    loading.append(pool.submit(self._fill, indices, batch))
                if not loading:
                    return
                yield loading.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self, indices: Sequence[int], batch: Batch) -> Batch:
        self._samples.fill(indices, batch)
        return batch


def _is_for_gpu() -> bool:
    """Return whether the run uses a GPU: it does so before it loads its first batch."""
    return torch.cuda.is_initialized()
