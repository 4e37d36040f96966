"""Content hashes of tensors and of the file that holds them: each byte once, in threads beside its write or read."""

import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
import torch

_BLOCK_BYTES = 2**20
_WORTH_A_PIECE = 2**16

Piece = tuple[int, str]
"""So many bytes of a file, and their SHA-256."""


class HashedFile:
    """A file that is being written, and the SHA-256 of each piece of it: a piece is one large write, or all small ones
    between two large ones. A thread of `pool` hashes the bytes while the operating system takes them.

    torch.save writes each storage at once, straight from its memory, so the hash of a piece is that of a tensor too.
    """

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor, on_progress: Callable[[], None]):
        self._file, self._pool, self._on_progress = file, pool, on_progress
        self._pieces: list[Piece] = []
        self._by_address: dict[int, Piece] = {}
        self._small, self._small_size = hashlib.sha256(), 0
        self.error: OSError | None = None
        """What the operating system said; torch's writer hides it behind an error of its own."""

    def write(self, data: bytes | memoryview) -> int:
        """Write and hash `data`."""
        view = memoryview(data).cast("B")
        is_small = len(view) < _WORTH_A_PIECE
        hashing = None if is_small else self._pool.submit(_digest, view)
        try:
            self._file.write(view)
        except OSError as error:
            self.error = error
            raise
        finally:
            # before we return: then the memory is the caller's again
            digest = None if is_small else hashing.result()
        if is_small:
            self._small.update(view)
            self._small_size += len(view)
        else:
            self._end_small()
            self._pieces.append((len(view), digest))
            self._by_address[np.frombuffer(view, np.uint8).ctypes.data] = self._pieces[-1]
            self._on_progress()
        return len(view)

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        self._file.flush()

    def pieces(self) -> list[Piece]:
        """What was written, piece by piece."""
        self._end_small()
        return self._pieces

    def tensor_digest(self, tensor: torch.Tensor) -> str:
        """SHA-256 of a tensor's bytes, taken from what was written where that is the tensor's own memory."""
        size, digest = self._by_address.get(tensor.data_ptr(), (-1, ""))
        if size == tensor.nbytes and tensor.is_contiguous():
            return digest
        return _digest(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    def _end_small(self) -> None:
        if self._small_size:
            self._pieces.append((self._small_size, self._small.hexdigest()))
        self._small, self._small_size = hashlib.sha256(), 0


def file_digests(file: BinaryIO, sizes: Sequence[int]) -> list[str]:
    """SHA-256 of the pieces of a file that have these sizes, read and hashed by several threads."""
    descriptor = file.fileno()

    def digest(start: int, size: int) -> str:
        piece, block = hashlib.sha256(), memoryview(bytearray(min(size, _BLOCK_BYTES)))
        position, end = start, start + size
        while position < end:
            count = os.preadv(descriptor, [block[: end - position]], position)
            if count == 0:
                break  # shorter than it should be: the hash will tell
            piece.update(block[:count])
            position += count
        return piece.hexdigest()

    starts = itertools.accumulate(sizes, initial=0)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest, starts, sizes))


def _digest(data: memoryview | np.ndarray) -> str:
    return hashlib.sha256(data).hexdigest()
