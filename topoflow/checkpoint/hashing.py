"""Content hashes: of a tensor, and of a file in pieces, so that several threads can verify it at once."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import torch

PIECE_BYTES = 8 * 2**20
_BLOCK_BYTES = 2**20
_WORTH_A_THREAD = 2**16


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, with its dtype and shape."""
    host = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{host.dtype}{tuple(host.shape)}".encode())
    digest.update(host.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class HashedFile:
    """A file that is being written, and the SHA-256 of each PIECE_BYTES of what went into it.

    A thread of `pool` hashes the bytes while the operating system takes them.
    """

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor):
        self._file, self._pool = file, pool
        self._digests: list[str] = []
        self._piece, self._room = hashlib.sha256(), PIECE_BYTES
        self.size = 0
        self.error: OSError | None = None
        """What the operating system said; torch's writer hides it behind an error of its own."""

    def write(self, data: bytes | memoryview) -> int:
        """Write and hash `data`."""
        view = memoryview(data).cast("B")
        hashing = self._pool.submit(self._hash, view) if len(view) >= _WORTH_A_THREAD else None
        try:
            written = self._file.write(view)
        except OSError as error:
            self.error = error
            raise
        finally:
            # before we return: then the memory is the caller's again
            hashing.result() if hashing is not None else self._hash(view)
        self.size += len(view)
        return written

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        self._file.flush()

    def digests(self) -> list[str]:
        """The hash of each piece; the last may be shorter."""
        return self._digests + ([self._piece.hexdigest()] if self._room < PIECE_BYTES else [])

    def _hash(self, view: memoryview) -> None:
        while len(view):
            taken = view[: self._room]
            self._piece.update(taken)
            self._room -= len(taken)
            if self._room == 0:
                self._digests.append(self._piece.hexdigest())
                self._piece, self._room = hashlib.sha256(), PIECE_BYTES
            view = view[len(taken) :]


def file_digests(file: BinaryIO, size: int, piece_bytes: int) -> list[str]:
    """SHA-256 of each piece of the first `size` bytes of a file, read and hashed by several threads."""
    descriptor = file.fileno()

    def digest(start: int) -> str:
        piece, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
        position, end = start, min(start + piece_bytes, size)
        while position < end:
            count = os.preadv(descriptor, [block[: end - position]], position)
            if count == 0:
                break  # shorter than `size`: the hash will tell
            piece.update(block[:count])
            position += count
        return piece.hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest, range(0, size, piece_bytes)))
